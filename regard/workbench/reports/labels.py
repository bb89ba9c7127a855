"""Positions of the labels in a chart: next to what they name, fully visible, and without overlaps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

CHARACTER = 7.0
"""Mean width of a character in a label."""
LINE = 14.0
"""Height of a line in a label."""
LONGEST_LABEL = 24

Point = tuple[float, float]
Box = tuple[float, float, float, float]


def short(name: str, longest: int = LONGEST_LABEL) -> str:
    """Shorten a name so that it fits next to a mark."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def shortened(names: Sequence[str]) -> list[str]:
    """:func:`short` for names in one chart; of those that would look the same, the end is shown too."""
    alike = Counter(map(short, set(names)))
    half = (LONGEST_LABEL - 1) // 2
    return [
        short(name) if alike[short(name)] == 1 else f"{name[:half]}…{name[half + 1 - LONGEST_LABEL :]}"
        for name in names
    ]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart inside [low, high], as close to the wanted ones as possible (least squares).

    Labels in a column keep the order of what they name. If they do not all fit, they are spaced evenly.
    """
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Without the gaps this is isotonic regression: pool neighbours that are out of order.
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([wanted[index] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (mean, count), (next_mean, next_count) = pools[-2:]
            pools[-2:] = [[(mean * count + next_mean * next_count) / (count + next_count), count + next_count]]
    level = [mean for mean, count in pools for _ in range(int(count))]
    top = high - (len(wanted) - 1) * gap
    placed = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        placed[index] = min(max(level[rank], low), top) + rank * gap
    return placed


def place_labels(
    points: Sequence[Point], radii: Sequence[float], widths: Sequence[float], taken: Sequence[Box], frame: Box
) -> list[Box]:
    """A box next to each point, chosen greedily, most crowded point first, to overlap as little as possible.

    Args:
        points: points to label.
        radii: radii of the points' marks.
        widths: widths of the labels.
        taken: boxes that labels should not cover, such as marks and error bars.
        frame: box that labels must stay inside.

    Returns:
        The box (x0, y0, x1, y1) of each label, in the order of `points`.
    """

    def crowd(i: int) -> float:
        return sum(1 / (1 + math.dist(points[i], other)) for other in points)

    boxes: dict[int, Box] = {}
    for i in sorted(range(len(points)), key=crowd, reverse=True):
        candidates = _boxes_around(points[i], radii[i], widths[i])
        obstacles = [*taken, *boxes.values()]
        boxes[i] = min(
            candidates,
            key=lambda c: 200 * _outside(c[1], frame) + sum(collision(c[1], other) for other in obstacles) + c[0],
        )[1]
    return [boxes[i] for i in range(len(points))]


def _boxes_around(point: Point, radius: float, width: float) -> Iterable[tuple[float, Box]]:
    """Candidate boxes, each with its own cost: close is cheap, and right is cheaper than left."""
    x, y = point
    for away in (4.0, 12.0, 22.0, 36.0, 52.0):
        distance = radius + away
        for turn in range(16):
            angle = 2 * math.pi * turn / 16
            dx, dy = math.cos(angle), math.sin(angle)
            centre_x = x + dx * distance + (width / 2) * max(-1.0, min(1.0, 1.6 * dx))
            centre_y = y + dy * distance + (LINE / 2 - 2) * dy
            cost = 4 * away + 6 * (1 - dx) + (4 if turn % 4 else 0)
            yield cost, (centre_x - width / 2, centre_y - LINE / 2, centre_x + width / 2, centre_y + LINE / 2)


def collision(a: Box, b: Box) -> float:
    """The penalty for two overlapping boxes: more than for any place without overlap, and growing with the overlap."""
    if a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]:  # nearly all pairs
        return 0.0
    area = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return 300 + 3 * area if area else 0.0


def _outside(box: Box, frame: Box) -> float:
    return (
        max(0.0, frame[0] - box[0])
        + max(0.0, frame[1] - box[1])
        + max(0.0, box[2] - frame[2])
        + max(0.0, box[3] - frame[3])
    )
