"""Mechanisms ranked by known and predicted times, for the question asked and for variations of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regard.measurement import units
from regard.workbench.advice.candidates import Findings, lack
from regard.workbench.advice.probe import LENGTHS
from regard.workbench.advice.quality import Quality
from regard.workbench.advice.samples import Probe
from regard.workbench.advice.settings import AdviseSettings
from regard.workbench.comparison.cost import REFERENCE

TIE = 1.05
"""Along the lengths, a winner is replaced only by a mechanism that is faster by more than this."""

STEPS_AN_OCTAVE = 4
"""Lengths per octave that are tried to find where another mechanism wins."""


@dataclass(frozen=True)
class Conditions:
    """What a mechanism must meet to qualify.

    Attributes:
        cap: most bytes that the deciding work may hold; None for no limit.
        needs: the needs of the question, or fewer.
        results: whether mechanisms that are behind others in stored results are excluded.
    """

    cap: int | None
    needs: tuple[str, ...]
    results: bool = True


class Ranking:
    """The mechanisms whose deciding time is known, and why others are excluded.

    Args:
        known: times and memory, measured and predicted.
        able: the mechanisms that can do each kind of work.
        rejected: why others are excluded.
        findings: for each mechanism that can do the deciding work, its findings by need.
    """

    def __init__(
        self,
        settings: AdviseSettings,
        known: Probe,
        able: Mapping[str, Sequence[str]],
        rejected: Mapping[str, str],
        quality: Quality,
        findings: Findings,
    ) -> None:
        self.settings, self.known, self.quality, self.findings = settings, known, quality, findings
        self.asked = Conditions(settings.memory, settings.needs)
        self.rejected = dict(rejected)
        self.names = []
        for name in dict.fromkeys(n for names in able.values() for n in names):
            if name not in able[settings.deciding]:
                self.rejected[name] = f"has no state that decodes in {settings.pattern.value}"
            elif known.curve(settings.deciding, name, "seconds") is None:
                missing = lack(findings[name], settings.needs)
                self.rejected[name] = missing or "not measured within the time; give more --seconds"
            else:
                self.names.append(name)

    def seconds(self, name: str, lengths: Sequence[int] | None = None) -> float:
        """Geometric mean of the deciding time over some lengths, those of the question by default."""
        return self.known.time(self.settings.deciding, name, lengths or self.settings.lengths)[0]

    def memory(self, name: str, lengths: Sequence[int] | None = None) -> float:
        """The most bytes that the deciding work holds."""
        return self.known.memory(self.settings.deciding, name, lengths or self.settings.lengths)

    def surely_faster(self, name: str, other: str, lengths: Sequence[int] | None = None) -> bool:
        """Whether `name` is faster than `other` beyond doubt: their intervals do not overlap."""
        lengths = lengths or self.settings.lengths
        (own, width), (rival, width_of_rival) = (
            self.known.time(self.settings.deciding, n, lengths) for n in (name, other)
        )
        return math.log(rival / own) > width + width_of_rival

    def obstacle(self, name: str, conditions: Conditions, lengths: Sequence[int] | None = None) -> str | None:
        """The reason why a mechanism does not qualify; None if it does."""
        if (missing := lack(self.findings[name], conditions.needs)) is not None:
            return missing
        if conditions.results and name in self.quality.behind:
            return self.quality.behind[name]
        if conditions.cap is not None and (held := self.memory(name, lengths)) > conditions.cap:
            return f"needs {units.size(held)} of memory, more than {units.size(conditions.cap)}"
        return None

    def ranked(self, conditions: Conditions, lengths: Sequence[int] | None = None) -> list[str]:
        """Mechanisms that qualify, best first: those with known results before the others, each group by time.

        If softmax is among those with known results, or no results are given, the first is the fastest mechanism that
        is surely faster than softmax, or softmax if none is.
        """
        chosen = [n for n in self.names if self.obstacle(n, conditions, lengths) is None]
        times = {n: self.seconds(n, lengths) for n in chosen}
        unknown = {n: bool(self.quality.said) and n not in self.quality.said for n in chosen}
        order = sorted(chosen, key=lambda n: (unknown[n], times[n]))
        if REFERENCE in order and not unknown[REFERENCE]:
            known = [n for n in order if n != REFERENCE and not unknown[n]]
            first = next((n for n in known if self.surely_faster(n, REFERENCE, lengths)), REFERENCE)
            order.remove(first)
            order.insert(0, first)
        return order

    @property
    def horizon(self) -> int:
        """The longest length at which winners are determined."""
        return max(LENGTHS[-1], 4 * self.settings.lengths[-1])

    def winners(self) -> list[tuple[str, int]]:
        """The winners along the lengths, each with the length up to which it wins, by predictions.

        Needs are judged at the longest length that was asked for. A winner stays until another is clearly faster.
        """
        octaves = math.log2(self.horizon / LENGTHS[0])
        found: list[tuple[str, int]] = []
        for i in range(math.ceil(octaves * STEPS_AN_OCTAVE) + 1):
            length = round(LENGTHS[0] * 2 ** (i / STEPS_AN_OCTAVE))
            order = self.ranked(self.asked, (length,))
            winner = next(iter(order), "none")
            if found:
                before = found[-1][0]
                if before in order and self.seconds(before, (length,)) <= TIE * self.seconds(winner, (length,)):
                    winner = before
                if before == winner:
                    found.pop()
            found.append((winner, length))
        return found
