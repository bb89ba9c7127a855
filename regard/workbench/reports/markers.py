"""Colours, shapes and markers of mechanisms."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from markupsafe import Markup

from regard.workbench.reports.labels import Point

COLOURS = 8


def _polygon(corners: int, turn: float, *, inner: float | None = None, grow: float = 1.0) -> list[Point]:
    steps = corners if inner is None else 2 * corners
    radii = [grow if inner is None or i % 2 == 0 else grow * inner for i in range(steps)]
    return [
        (r * math.sin(turn + 2 * math.pi * i / steps), -r * math.cos(turn + 2 * math.pi * i / steps))
        for i, r in enumerate(radii)
    ]


_QUARTER = ((-1, -3), (1, -3), (1, -1))
_PLUS = [
    (0.38 * x, 0.38 * y)
    for quarter in (
        _QUARTER,
        [(-b, a) for a, b in _QUARTER],
        [(-a, -b) for a, b in _QUARTER],
        [(b, -a) for a, b in _QUARTER],
    )
    for x, y in quarter
]

SHAPES: tuple[Sequence[Point] | None, ...] = (
    None,  # a circle
    _polygon(4, math.pi / 4, grow=1.25),
    _polygon(3, 0, grow=1.35),
    _polygon(4, 0, grow=1.3),
    _polygon(3, math.pi, grow=1.35),
    _PLUS,
    _polygon(5, 0, inner=0.45, grow=1.45),
    _polygon(6, 0, grow=1.15),
    _polygon(4, math.pi / 4, inner=0.4, grow=1.5),
)
"""Outlines of the markers, in units of the radius. Pairs of the nine shapes and eight colours repeat after 72."""


def marker(number: int, x: float, y: float, radius: float, name: str = "marker") -> Markup:
    """The marker of mechanism `number`."""
    outline = SHAPES[number % len(SHAPES)]
    if outline is None:
        shape = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:.2f}"'
        return Markup('<circle class="{} k{}" {}/>').format(name, number % COLOURS, Markup(shape))
    corners = " ".join(f"{x + radius * a:.1f},{y + radius * b:.1f}" for a, b in outline)
    return Markup('<polygon class="{} k{}" points="{}"/>').format(name, number % COLOURS, Markup(corners))


FIRST = ("softmax", "gated_linear", "delta_rule", "local", "linear", "mamba2", "mamba", "sigmoid")
"""The most common mechanisms: each gets a colour of its own."""


def numbers(names: Sequence[str], catalogue: Sequence[str]) -> dict[str, int]:
    """Numbers that determine the colour and shape of each mechanism: the same in every report, unless two would be
    equal.

    Args:
        names: names in a report. One that begins with a mechanism's name (``local:window=32``) gets its number, if it
            is free.
        catalogue: all mechanisms, sorted.
    """
    order = [*FIRST, *(name for name in catalogue if name not in FIRST)]
    own = {name: number for number, name in enumerate(order)}
    found = {name: own[name] for name in names if name in own}
    for name in names:
        if name not in found:
            number = own.get(re.split(r"[:*+]", name)[0], 0)
            while number in found.values():
                number += 1
            found[name] = number
    return found


def glyph(number: int) -> Markup:
    """The marker of mechanism `number` by itself, for use within a line of text."""
    return Markup('<svg class="glyph" viewBox="-7 -7 14 14" aria-hidden="true">{}</svg>').format(
        marker(number, 0, 0, 5)
    )
