"""How a study is written: a reproduction for the requested mechanisms and size, and the report's sections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regard.catalogue import list_mechanisms
from regard.contract import Mechanism, Pattern, Unsupported, closest
from regard.measurement.store import Store
from regard.models.variants import known_name, read_variants
from regard.reproductions import Reproduction, collect
from regard.reproductions.framework.judging import Measurements
from regard.workbench.reports.sections import Section

Cells = Mapping[tuple[str, int], Measurements]
"""Measurements by (setting, seed)."""


@dataclass(frozen=True)
class Chosen:
    """What the user asked of a study.

    Attributes:
        preset: a name of :attr:`Study.presets`.
        mechanisms: names, with options if any (``local:window=32``); empty where a study takes none.
        data: the user's files; empty where none were given.
    """

    preset: str
    mechanisms: tuple[str, ...] = ()
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A question put to many mechanisms at once.

    Attributes:
        name: as `regard study` takes it, with hyphens.
        question: what the study answers, as one sentence with a question mark.
        make: builds the cells and the checks that judge them. The reproduction has the study's name. A cell's setting
            holds everything the cell depends on, so that results of one preset never count for another.
        sections: builds the report's sections from the cells, the most interesting first; cells may be missing.
        presets: sizes, the smallest first; the smallest ends within minutes.
        mechanisms: the default mechanisms; empty where the study takes none.
        refuses: returns why a mechanism cannot enter, in words that follow "since" ("it inserts tokens"), or None where
            it can.
        takes_data: what the user's files may be; "" where the study takes none.
        folder: default folder of the results.
    """

    name: str
    question: str
    make: Callable[[Chosen], Reproduction]
    sections: Callable[[Chosen, Cells], Sequence[Section]]
    presets: tuple[str, ...] = ("tiny", "small")
    mechanisms: tuple[str, ...] = ()
    refuses: Callable[[str], str | None] = field(default=lambda _: None)
    takes_data: str = ""
    folder: str = "runs/studies"

    def choose(
        self,
        preset: str | None = None,
        mechanisms: str | None = None,
        data: Sequence[str] = (),
        entered: Sequence[str] = (),
    ) -> Chosen:
        """Check the user's choices.

        Args:
            preset: the first one when None.
            mechanisms: as `regard compare` takes them, or ``all``; the study's defaults and `entered` when None.
            data: the user's files.
            entered: names of the user's own mechanisms.

        Raises:
            Unsupported: for an unknown preset or mechanism, a mechanism that cannot enter, and files or mechanisms
                given to a study that takes none.
        """
        wanted = self.presets[0] if preset is None else preset
        if wanted not in self.presets:
            raise Unsupported(
                f"preset {wanted!r} of {self.name}",
                supported=", ".join(self.presets),
                nearest=closest(wanted, self.presets),
            )
        if data and not self.takes_data:
            raise Unsupported(f"files for {self.name}", supported="no files: it makes its own data")
        if not self.mechanisms and (mechanisms is not None or entered):
            given = "--mechanisms" if mechanisms is not None else entered[0]
            raise Unsupported(f"{given} in {self.name}", supported="no mechanisms: it is not about them")
        if mechanisms == "all":
            names = [name for name in list_mechanisms() if self.refuses(name) is None]
            return Chosen(wanted, tuple(names), tuple(data))
        own = self.mechanisms if mechanisms is None else ()
        names = list(entered) if mechanisms is None else [known_name(one.name) for one in read_variants(mechanisms)]
        for name in names:
            reason = self.refuses(name)
            if reason is not None:
                raise Unsupported(
                    f"{name} in {self.name}, since {reason}", supported="the mechanisms that --mechanisms all enters"
                )
        return Chosen(wanted, tuple(dict.fromkeys((*own, *names))), tuple(data))

    def seconds(self, preset: str) -> float:
        """Rough duration of a preset on one core, with the study's default mechanisms."""
        return sum(cell.seconds for cell in self.make(self.choose(preset)).cells())


def lacks(card: Mechanism, pattern: Pattern) -> str | None:
    """Why a mechanism cannot enter a study that needs a pattern, or None where it has the pattern."""
    if pattern in card.patterns:
        return None
    reason = card.refused.get(pattern, "")
    return f"it lacks the pattern {pattern.value}" + (f" ({reason})" if reason else "")


def refused(error: Unsupported) -> str:
    """Why a mechanism cannot enter that raised an error when the study tried it."""
    return f"{error.asked} is refused" + (f" ({error.supported})" if error.supported else "")


def opened(study: Study, chosen: Chosen, store: Store | None, seeds: int | None = None) -> dict[str, Any]:
    """The stored results of a study as a JSON-compatible record: its reproduction's record, and `study`, `question`,
    `preset`, `sections`, `entered` and `data`."""
    (record,) = collect([study.make(chosen)], store, seeds)
    cells = {
        (cell["setting"], cell["seed"]): {
            name: value for name, value in cell.items() if name not in ("setting", "seed")
        }
        for cell in record["cells"]
    }
    shown = [one.plain() for one in study.sections(chosen, cells)]
    told = {"study": study.name, "question": study.question, "preset": chosen.preset, "sections": shown}
    return {**record, **told, "entered": list(chosen.mechanisms), "data": list(chosen.data)}


def of_record(record: Mapping[str, Any], study: Study) -> Reproduction:
    """The study's reproduction from which :func:`opened` made a record."""
    return study.make(Chosen(record["preset"], tuple(record["entered"]), tuple(record["data"])))
