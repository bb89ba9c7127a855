"""Retrieval by a hand-constructed layer, at several widths and compression ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from regard.compression.sparse.constructed import cost, retrieval
from regard.workbench.sparse.analysis import Point

WIDTHS = (16, 32, 64, 128)
RATIOS = (1, 4, 8, 16)


def isoflops(
    lengths: Sequence[int],
    trials: int,
    *,
    widths: Sequence[int] = WIDTHS,
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
    topics: bool = True,
    on_point: Callable[[int, int, float], None] = lambda length, width, ratio: None,
) -> dict[int, list[Point]]:
    """Costs and scores for all widths and all compression ratios, by length."""
    found: dict[int, list[Point]] = {}
    for n in lengths:
        found[n] = []
        for width in widths:
            for ratio in ratios:
                on_point(n, width, ratio)
                scores = retrieval(n, width, ratio, trials, seed, topics=topics)
                found[n].append(Point(width, float(ratio), cost(n, width, ratio), scores))
    return found
