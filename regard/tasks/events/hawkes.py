"""Hawkes processes: each event makes further events more likely for a while; exact sampling and exact densities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ANY_MARK = 0.2
"""Share of an event's offspring with a random mark; the rest have the next mark."""


@dataclass(frozen=True)
class Hawkes:
    """A marked point process with exponential kernels that share one decay rate (Hawkes, Biometrika 58, 1971).

    The intensity of mark c at time t is base[c] + sum_j offspring[c, mark_j] decay exp(-decay (t - t_j)), summed over
    the events j before t. The process starts at time 0 without a past.

    Attributes:
        base: (C,) rate of each mark without excitation, positive.
        offspring: (C, C) mean number of events of mark c that an event of mark m triggers directly; spectral radius
            below 1.
        decay: rate at which excitation fades, positive.
    """

    base: Float[np.ndarray, " c"]
    offspring: Float[np.ndarray, "c c"]
    decay: float

    @classmethod
    def cyclic(cls, marks: int, excitation: float, decay: float) -> Hawkes:
        """A process with one event per unit of time in the long run; events of mark m mostly trigger mark m + 1.

        Args:
            excitation: mean number of events that an event triggers directly, at least 0 and below 1.
        """
        following = np.roll(np.eye(marks), 1, axis=0)  # [m + 1, m]
        offspring = excitation * ((1 - ANY_MARK) * following + ANY_MARK / marks)
        return cls(np.full(marks, (1 - excitation) / marks), offspring, decay)

    def draw(
        self, rng: np.random.Generator, count: int, events: int
    ) -> tuple[Float[np.ndarray, "b n"], Int[np.ndarray, "b n"]]:
        """Draw the first `events` events of `count` runs: the time since the previous event (or since 0), and the mark.

        There is no rejection: the time to the next event is the smaller of two times, for the base and for the
        excitation (which may trigger none), whose distributions can be inverted (Dassios & Zhao, Electron. Commun.
        Probab. 18, 2013).
        """
        gaps, marks = np.empty((count, events)), np.empty((count, events), dtype=np.int64)
        excited = np.zeros((count, len(self.base)))
        for i in range(events):
            waits, places = rng.exponential(size=(2, count)), rng.random((count, 1))
            total = excited.sum(1)
            left = 1 - self.decay * waits[1] / np.where(total > 0, total, 1)
            comes = (total > 0) & (left > 0)
            by_excitation = np.where(comes, -np.log(np.where(comes, left, 1)) / self.decay, np.inf)
            gaps[:, i] = np.minimum(waits[0] / self.base.sum(), by_excitation)
            excited *= np.exp(-self.decay * gaps[:, i : i + 1])
            reached = (self.base + excited).cumsum(1)
            marks[:, i] = (reached[:, :-1] <= places * reached[:, -1:]).sum(1)
            excited += self.decay * self.offspring.T[marks[:, i]]
        return gaps, marks

    def log_density(self, gaps: Float[np.ndarray, "b n"], marks: Int[np.ndarray, "b n"]) -> Float[np.ndarray, "b n"]:
        """Joint log density of the time and mark of each event, given all events before it."""
        found = np.empty(gaps.shape)
        excited, rows = np.zeros((len(gaps), len(self.base))), np.arange(len(gaps))
        for i in range(gaps.shape[1]):
            gap = gaps[:, i : i + 1]
            expected = self.base * gap - excited * np.expm1(-self.decay * gap) / self.decay
            excited = excited * np.exp(-self.decay * gap)
            found[:, i] = np.log((self.base + excited)[rows, marks[:, i]]) - expected.sum(1)
            excited = excited + self.decay * self.offspring.T[marks[:, i]]
        return found
