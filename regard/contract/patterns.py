"""Patterns, the ways in which attention is used, and the kinds of mechanism."""

from __future__ import annotations

import enum

from regard.contract.errors import Unsupported, closest


class Pattern(enum.StrEnum):
    """The four ways attention is used (Comprehensive Attention Benchmark, arXiv 2210.07661).

    In ``causal-cross`` output i may depend on queries <= i and on all of the memory; a streaming alignment of memory is
    a separate mask. In ``causal-self`` with more keys than queries (or fewer) positions align bottom-right.
    """

    NONCAUSAL_SELF = "noncausal-self"
    CAUSAL_SELF = "causal-self"
    NONCAUSAL_CROSS = "noncausal-cross"
    CAUSAL_CROSS = "causal-cross"

    causal: bool
    cross: bool

    def __init__(self, value: str) -> None:
        direction, _, memory = value.partition("-")
        self.causal, self.cross = direction == "causal", memory == "cross"

    @classmethod
    def parse(cls, value: str | Pattern) -> Pattern:
        """Parse a pattern's name; a pattern is returned as it is.

        Raises:
            Unsupported: for another name.
        """
        try:
            return cls(value)
        except ValueError:
            names = [p.value for p in cls]
            raise Unsupported(
                f"pattern {value!r}", supported=", ".join(names), nearest=closest(str(value), names)
            ) from None


ALL_PATTERNS = tuple(Pattern)


class Kind(enum.StrEnum):
    """Kinds of mechanism, by what they map."""

    ATTENTION = "attention"
    MIXER = "mixer"
    POOLING = "pooling"
    PROJECTION = "projection"
    WRAPPER = "wrapper"
