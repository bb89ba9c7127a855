"""Measure how much of the held-out text occurs word for word in the training text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from regard.tasks.sampling import spread

if TYPE_CHECKING:
    from jaxtyping import Int, UInt8, UInt64

SHINGLE = 50
"""Length in bytes of the strings looked up: about eight words of English, which two authors seldom share by chance."""
LOOKED_UP = 1 << 16
"""Largest number of strings looked up, evenly spread: the standard error of a share of 5 % is then below 0.1 %."""
MUCH = 0.05
"""Share above which the score no longer measures performance on new text."""

_WORD = 8
_STARTS = np.array([*range(0, SHINGLE - _WORD, _WORD), SHINGLE - _WORD])
_FACTORS = np.random.default_rng(0).integers(1 << 63, size=len(_STARTS), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_BITS = 22
_BLOCK = 1 << 15


@dataclass(frozen=True)
class Overlap:
    """The share of strings of `SHINGLE` bytes in the held-out texts that also occur in the training text.

    Attributes:
        share: share of the strings looked up; nan when no held-out text is long enough.
        looked_up: number of strings looked up, evenly spread over `count`.
        count: number of all such strings.
    """

    share: float
    looked_up: int
    count: int

    @property
    def much(self) -> bool:
        """Whether the share is above `MUCH`; False when it is unknown."""
        return self.share > MUCH

    def __str__(self) -> str:
        if not self.count:
            return f"overlap: not known, since no held-out text has {SHINGLE} bytes"
        which = "all" if self.looked_up == self.count else f"{self.looked_up:,} looked up"
        told = (
            f"{self.share:.1%} of the held-out text stands word for word in the training text "
            f"(strings of {SHINGLE} bytes, {which} of {self.count:,})"
        )
        return f"warning: {told}: the score is not that of new text" if self.much else f"overlap: {told}"


def overlap(training: Sequence[bytes], held_out: Sequence[bytes]) -> Overlap:
    """The share of strings in the held-out texts that also occur in the concatenated training texts.

    Each training string is hashed in part and, where that matches a string looked up, in full: about 5 ns per byte.
    """
    lengths = np.array([len(text) for text in held_out], dtype=np.int64)
    each = np.maximum(lengths - SHINGLE + 1, 0)
    count = int(each.sum())
    chosen = spread(count, LOOKED_UP)
    if not count:
        return Overlap(float("nan"), 0, 0)
    ends = each.cumsum()
    document = np.searchsorted(ends, chosen, side="right")
    places = (lengths.cumsum() - lengths)[document] + chosen - (ends - each)[document]
    text = np.frombuffer(b"".join(held_out), dtype=np.uint8)
    hashes = _hashes(text, places)
    wanted = np.unique(hashes)
    listed = np.zeros(1 << _BITS, dtype=bool)
    listed[_parts(text)[places]] = True

    found = np.zeros(len(wanted), dtype=bool)
    text = np.frombuffer(b"".join(training), dtype=np.uint8)
    for start in range(0, len(text) - SHINGLE + 1, _BLOCK):
        block = text[start : start + _BLOCK + SHINGLE - 1]
        known = _hashes(block, np.flatnonzero(listed[_parts(block)]))
        at = np.searchsorted(wanted, known).clip(max=len(wanted) - 1)
        found[at[wanted[at] == known]] = True
    return Overlap(float(found[np.searchsorted(wanted, hashes)].mean()), len(chosen), count)


def _words(text: UInt8[np.ndarray, " n"]) -> UInt64[np.ndarray, " m"]:
    """The eight bytes starting at each position, as a number; a view."""
    return np.ndarray((len(text) - _WORD + 1,), np.uint64, buffer=text, strides=(1,))


def _parts(text: UInt8[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """A short hash of the first and last eight bytes of the string at each position."""
    words = _words(text)
    mixed = words[: len(text) - SHINGLE + 1] * _FACTORS[0]
    mixed += words[SHINGLE - _WORD :] * _FACTORS[1]
    return (mixed >> np.uint64(64 - _BITS)).view(np.int64)


def _hashes(text: UInt8[np.ndarray, " n"], places: Int[np.ndarray, " k"]) -> UInt64[np.ndarray, " k"]:
    """A hash of all bytes of the strings at these positions."""
    return _words(text)[places[:, None] + _STARTS] @ _FACTORS
