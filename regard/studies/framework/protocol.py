"""How a study is written: a reproduction made for the mechanisms and the size that somebody asks for, and what it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regard.catalogue import list_mechanisms
from regard.contract import Unsupported, closest
from regard.measurement.store import Store
from regard.models.variants import known_name, read_variants
from regard.reproductions import Reproduction, collect
from regard.reproductions.framework.judging import Measurements
from regard.workbench.reports.sections import Section

Cells = Mapping[tuple[str, int], Measurements]
"""Measurements by (setting, seed)."""


@dataclass(frozen=True)
class Chosen:
    """What somebody asked a study for.

    Attributes:
        preset: a name of :attr:`Study.presets`.
        mechanisms: by name, with options where they have some (``local:window=32``); empty where a study takes none.
        data: the user's files; empty where none were given.
    """

    preset: str
    mechanisms: tuple[str, ...] = ()
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A question to many mechanisms at once.

    Attributes:
        name: as `regard study` takes it, with hyphens.
        question: what it answers, in a sentence with a question mark.
        make: the cells and the rules of their verdict, for what was chosen. Its reproduction is named like the study;
            everything that a cell depends on is in its setting, so that rows of one preset do not count for another.
        sections: what the cells show, in the order of a reader's interest; cells may be missing.
        presets: sizes, the smallest first: that one ends within minutes.
        mechanisms: those that enter when none are named; empty where the study takes none.
        refuses: why a mechanism cannot enter, or None where it can.
        takes_data: what the user's files may be; "" where the study takes none.
        instead: a command that a mechanism may be given to, where the study takes none; "" where there is no such command.
        folder: of the results, when no other is named.
    """

    name: str
    question: str
    make: Callable[[Chosen], Reproduction]
    sections: Callable[[Chosen, Cells], Sequence[Section]]
    presets: tuple[str, ...] = ("tiny", "small")
    mechanisms: tuple[str, ...] = ()
    refuses: Callable[[str], str | None] = field(default=lambda _: None)
    takes_data: str = ""
    instead: str = ""
    folder: str = "runs/studies"

    def choose(
        self,
        preset: str | None = None,
        mechanisms: str | None = None,
        data: Sequence[str] = (),
        entered: Sequence[str] = (),
    ) -> Chosen:
        """What is asked for, checked.

        Args:
            preset: the first one when None.
            mechanisms: as `regard compare` takes them, or ``all``; the study's own and those of `entered` when None.
            data: the user's files.
            entered: names of the user's own mechanisms.

        Raises:
            Unsupported: for an unknown preset or mechanism, a mechanism that cannot enter, and what the study does not take.
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
            raise Unsupported(
                f"{given} in {self.name}", supported="no mechanisms: it is not about them", nearest=self.instead
            )
        if mechanisms == "all":
            names = [name for name in list_mechanisms() if self.refuses(name) is None]
            return Chosen(wanted, tuple(names), tuple(data))
        own = self.mechanisms if mechanisms is None else ()
        names = list(entered) if mechanisms is None else [known_name(one.name) for one in read_variants(mechanisms)]
        for name in names:
            reason = self.refuses(name)
            if reason is not None:
                raise Unsupported(f"{name} in {self.name}", supported=f"mechanisms that can enter: {reason}")
        return Chosen(wanted, tuple(dict.fromkeys((*own, *names))), tuple(data))

    def seconds(self, preset: str) -> float:
        """Roughly what a preset takes on one core, with the study's own mechanisms."""
        return sum(cell.seconds for cell in self.make(self.choose(preset)).cells())


def opened(study: Study, chosen: Chosen, store: Store | None, seeds: int | None = None) -> dict[str, Any]:
    """What a store holds of a study, as JSON could hold it: the record of its reproduction, and of the study itself its
    `study`, `question`, `preset` and `sections`."""
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
    """The reproduction of a study that a record of :func:`opened` is of."""
    return study.make(Chosen(record["preset"], tuple(record["entered"]), tuple(record["data"])))
