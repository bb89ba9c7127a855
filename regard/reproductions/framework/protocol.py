"""The definition of a reproduction, and its cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from regard.catalogue import get_mechanism
from regard.contract import Paper
from regard.reproductions.framework.judging import Check, Measurements, Verdict, judge

Setting = Mapping[str, Any]
"""All options of a cell apart from its seed, as JSON values."""

PILOT = 1000
"""The first seed of a pilot."""


@dataclass(frozen=True, eq=False)
class Reproduction:
    """A claim of a paper, and the small experiment that tests it.

    Attributes:
        name: name of its module.
        mechanisms: the mechanisms that the claim is about; the first one's card names the paper, unless `source` does.
        claim: the paper's claim in our own words, with its number if it has one.
        instead: the experiment here, and how it differs from the paper's.
        settings: all settings that are run, by name.
        run_cell: function from a setting and a seed to measurements; deterministic except for timings.
        checks: the conditions under which the claim holds. They are fixed before any result is judged.
        needs: conditions under which the experiment can decide at all: the control learns, the upper end solves the
            task, the cells are not all alike. If one of them does not hold, the claim is undecided.
        left_out: claims of the paper that are not tested here, each with the reason.
        timings: names of the settings whose measurements are times.
        smoke: options that shrink every setting to seconds, for tests.
        seeds: default number of seeds. A pilot shows how many are enough (:meth:`pilot`).
        more_seeds: number of seeds for settings that need another number, since their measurements vary more.
        seconds: rough seconds of a cell on one core, an estimate for cells that have not been run.
        more_seconds: seconds for settings that take another time.
        source: the paper, if it is not the paper of a mechanism.
        table: function from measurements by (setting, seed) to the rows of a table, for a claim about many mechanisms
            at once; ``regard study`` shows it.
        question: what the table answers, as one sentence with a question mark.
        picture: columns of the table that the pages plot: names, x and y; more is better in both.
        protocol: version number, raised when `run_cell` changes its behaviour, so that older rows no longer count.
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
    question: str = ""
    picture: tuple[str, str, str] | None = None
    protocol: int = 1

    @property
    def paper(self) -> Paper:
        """The paper that makes the claim."""
        return get_mechanism(self.mechanisms[0]).paper if self.source is None else self.source

    def cells(self, seeds: int | None = None, *, timings: bool | None = None) -> list[Cell]:
        """Return all cells, seed by seed, so that an interrupted run leaves complete seeds behind.

        Args:
            seeds: number of seeds; the reproduction's own number when None.
            timings: True for only the timing settings, False for only the others; all when None.
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
        """Return cells that are run before the number of seeds is fixed, and never judged."""
        return [dataclasses.replace(cell, seed=PILOT + cell.seed) for cell in self.cells(seeds, timings=False)]

    def smoke_settings(self) -> dict[str, Setting]:
        """Return the settings, shrunk for tests."""
        return {
            name: {option: self.smoke.get(option, value) for option, value in setting.items()}
            for name, setting in self.settings.items()
        }

    def judge(self, cells: Mapping[tuple[str, int], Measurements]) -> Verdict:
        """Return the verdict on measurements by (setting, seed)."""
        return judge(self.checks, cells, self.needs)


@dataclass(frozen=True)
class Cell:
    """One run: a setting of a reproduction with a seed."""

    reproduction: Reproduction
    setting: str
    seed: int

    @property
    def seconds(self) -> float:
        """Rough seconds of the cell on one core."""
        return self.reproduction.more_seconds.get(self.setting, self.reproduction.seconds)

    @property
    def timed(self) -> bool:
        """True if the cell's measurements are times."""
        return self.setting in self.reproduction.timings
