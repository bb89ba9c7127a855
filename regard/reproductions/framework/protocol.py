"""How a reproduction is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from regard.catalogue import get_mechanism
from regard.contract import Paper
from regard.reproductions.framework.judging import Check, Measurements, Verdict, judge

Setting = Mapping[str, Any]
"""Everything that a cell depends on beside its seed, as JSON could say it."""


@dataclass(frozen=True)
class Cell:
    """One run: a setting of a reproduction with a seed."""

    reproduction: str
    setting: str
    seed: int


@dataclass(frozen=True)
class Reproduction:
    """A claim of a paper, and the small experiment that tries it.

    Attributes:
        name: that of its module.
        mechanisms: those of the catalogue that it is about.
        source: the paper; that of the first mechanism's card when None.
        claim: what the paper claims, in our own words, with its figure where there is one.
        instead: what is done here instead, and what differs.
        settings: by name, everything that is run.
        run_cell: measurements of a setting with a seed: a pure function of both, except that timings are timings.
        checks: what would count as held. They are fixed before anything is run.
        timings: names of the settings whose measurements are times.
        smoke: options that shrink every setting to seconds, for tests.
        seeds: how many by default.
        seconds: roughly what a cell takes on one core, until some have been run.
        protocol: raised when `run_cell` changes what it does, so that older rows no longer count.
    """

    name: str
    mechanisms: tuple[str, ...]
    claim: str
    instead: str
    settings: Mapping[str, Setting]
    run_cell: Callable[[Setting, int], Measurements]
    checks: tuple[Check, ...]
    timings: frozenset[str] = field(default_factory=frozenset)
    smoke: Setting = field(default_factory=dict)
    seeds: int = 3
    seconds: float = 30.0
    protocol: int = 1
    source: Paper | None = None

    @property
    def paper(self) -> Paper:
        return get_mechanism(self.mechanisms[0]).paper if self.source is None else self.source

    def cells(self, seeds: int | None = None, *, timings: bool | None = None) -> list[Cell]:
        """All cells, seed by seed, so that an interrupted run leaves whole seeds behind.

        Args:
            seeds: how many; the reproduction's own number when None.
            timings: only the settings that are times (True) or only the others (False); all when None.
        """
        names = [name for name in self.settings if timings is None or (name in self.timings) == timings]
        return [Cell(self.name, name, seed) for seed in range(self.seeds if seeds is None else seeds) for name in names]

    def smoke_settings(self) -> dict[str, Setting]:
        """The settings, shrunk."""
        return {
            name: {option: self.smoke.get(option, value) for option, value in setting.items()}
            for name, setting in self.settings.items()
        }

    def judge(self, cells: Mapping[tuple[str, int], Measurements]) -> Verdict:
        """The verdict on cells, given by (setting, seed)."""
        return judge(self.checks, cells)
