"""How a reproduction is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from regard.catalogue import get_mechanism
from regard.contract import Paper
from regard.reproductions.framework.judging import Check, Measurements, Verdict, judge

Setting = Mapping[str, Any]
"""Everything that a cell depends on beside its seed, as JSON could say it."""

PILOT = 1000
"""The first seed of a pilot."""


@dataclass(frozen=True, eq=False)
class Reproduction:
    """A claim of a paper, and the small experiment that tries it.

    Attributes:
        name: that of its module.
        mechanisms: those of the catalogue that it is about; the first one's card names the paper, unless `source` does.
        claim: what the paper claims, in our own words, with its figure where there is one.
        instead: what is done here instead, and what differs.
        settings: by name, everything that is run.
        run_cell: measurements of a setting with a seed: a pure function of both, except that timings are timings.
        checks: what would count as held. They are fixed before anything is judged.
        needs: what shows that the experiment can tell at all: the control learns, the upper end solves the task, the
            cells are not all alike. The claim is undecided where one of them does not hold.
        left_out: claims of the paper that are not tried here, each with the reason.
        timings: names of the settings whose measurements are times.
        smoke: options that shrink every setting to seconds, for tests.
        seeds: how many by default. A pilot says how many are enough (:meth:`pilot`).
        more_seeds: the settings that get another number of seeds, since what they are compared in varies more.
        seconds: roughly what a cell takes on one core, until some have been run.
        more_seconds: the settings that take another time.
        source: the paper, where it is none of a mechanism.
        table: rows of what the cells measured, given by (setting, seed), for a claim that is about many mechanisms at once:
            ``regard study`` shows it.
        picture: columns of the table that the pages draw: names, across and up; more is better in both.
        protocol: raised when `run_cell` changes what it does, so that older rows no longer count.
    """

    name: str
    mechanisms: tuple[str, ...]
    claim: str
    instead: str
    settings: Mapping[str, Setting]
    run_cell: Callable[[Setting, int], Measurements]
    checks: tuple[Check, ...]
    needs: tuple[Check, ...] = ()
    left_out: tuple[str, ...] = ()
    timings: frozenset[str] = field(default_factory=frozenset)
    smoke: Setting = field(default_factory=dict)
    seeds: int = 3
    more_seeds: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 30.0
    more_seconds: Mapping[str, float] = field(default_factory=dict)
    source: Paper | None = None
    table: Callable[[Mapping[tuple[str, int], Measurements]], list[dict[str, Any]]] | None = None
    picture: tuple[str, str, str] | None = None
    protocol: int = 1

    @property
    def paper(self) -> Paper:
        """The paper that the claim is of."""
        return get_mechanism(self.mechanisms[0]).paper if self.source is None else self.source

    def cells(self, seeds: int | None = None, *, timings: bool | None = None) -> list[Cell]:
        """All cells, seed by seed, so that an interrupted run leaves whole seeds behind.

        Args:
            seeds: how many; the reproduction's own number when None.
            timings: only the settings that are times (True) or only the others (False); all when None.
        """
        wanted = {
            name: self.more_seeds.get(name, self.seeds) if seeds is None else seeds
            for name in self.settings
            if timings is None or (name in self.timings) == timings
        }
        return [
            Cell(self, name, seed)
            for seed in range(max(wanted.values(), default=0))
            for name, count in wanted.items()
            if seed < count
        ]

    def pilot(self, seeds: int) -> list[Cell]:
        """Cells that are run before the number of seeds is fixed, and are never judged."""
        return [dataclasses.replace(cell, seed=PILOT + cell.seed) for cell in self.cells(seeds, timings=False)]

    def smoke_settings(self) -> dict[str, Setting]:
        """The settings, shrunk."""
        return {
            name: {option: self.smoke.get(option, value) for option, value in setting.items()}
            for name, setting in self.settings.items()
        }

    def judge(self, cells: Mapping[tuple[str, int], Measurements]) -> Verdict:
        """The verdict on cells, given by (setting, seed)."""
        return judge(self.checks, cells, self.needs)


@dataclass(frozen=True)
class Cell:
    """One run: a setting of a reproduction with a seed."""

    reproduction: Reproduction
    setting: str
    seed: int

    @property
    def seconds(self) -> float:
        """Roughly what it takes on one core."""
        return self.reproduction.more_seconds.get(self.setting, self.reproduction.seconds)

    @property
    def timed(self) -> bool:
        """Whether its measurements are times."""
        return self.setting in self.reproduction.timings
