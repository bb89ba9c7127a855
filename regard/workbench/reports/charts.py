"""Charts as inline SVG, without scripts, fonts or colours of their own.

Colours, line weights and the two themes are in the report's style sheet; a mark has the attribute ``data-m``, the
number of its mechanism, which determines its colour and shape throughout a report. Charts are about as wide as a
phone's screen, so their text stays readable there, and scale through ``viewBox``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from markupsafe import Markup

from regard.measurement import units
from regard.workbench.reports.labels import (
    CHARACTER,
    LINE,
    Box,
    Point,
    collision,
    place_labels,
    short,
    shortened,
    spread,
)
from regard.workbench.reports.markers import COLOURS, marker
from regard.workbench.reports.scales import Axis, Scale

WIDTH, HEIGHT = 380.0, 292.0
LEFT, TOP, BOTTOM = 54.0, 34.0, 42.0
LONGEST_RULE = 32


class Figure(NamedTuple):
    """A picture with caption and note; ``chart`` is None if there is nothing to draw."""

    caption: str
    chart: Markup | None
    note: str = ""


@dataclass(frozen=True)
class Series:
    """One line in a chart.

    Attributes:
        number: number of its mechanism, which determines colour and shape.
        name: name of its mechanism.
        points: (x, y); y is None if nothing could be measured, which breaks the line.
        ranges: (low, high) by x, drawn as whiskers.
        rings: x values of points to mark with a ring.
        crossing: x at which it crosses the reference, marked on the line and, if the line is labelled, on the axis.
        label: whether to write the name at its end; a mechanism with one line per seed is named once.
    """

    number: int
    name: str
    points: Sequence[tuple[float, float | None]]
    ranges: Mapping[float, tuple[float, float]] = field(default_factory=dict)
    rings: Sequence[float] = ()
    crossing: float | None = None
    label: bool = True


@dataclass(frozen=True)
class ScatterPoint:
    """One mechanism in a picture of quality against cost.

    Attributes:
        x, y: cost and mean quality.
        error: half the height of the error bar; None without one.
        seeds: quality of each seed.
        front: whether it is on the Pareto front.
        winner: whether it is the recommended mechanism.
        detail: tooltip text.
        label: whether to write its name next to it.
    """

    number: int
    name: str
    x: float
    y: float
    error: float | None = None
    seeds: Sequence[float] = ()
    front: bool = False
    winner: bool = False
    detail: str = ""
    label: bool = True


def _figure(identity: str, title: str, description: str, body: Iterable[Markup]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-labelledby="{i}-t {i}-d">'
        '<title id="{i}-t">{}</title><desc id="{i}-d">{}</desc>{}</svg>'
    ).format(WIDTH, HEIGHT, title, description, Markup("").join(body), i=identity)


def _axes(x: Scale, y: Scale, x_axis: Axis, y_axis: Axis, right: float) -> Iterable[Markup]:
    bottom = HEIGHT - BOTTOM
    for value in y.ticks:
        at = y(value)
        yield Markup('<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, right, at, at)
        yield _text(LEFT - 7, at + 4, y.label(value), "tick end")
    previous = -math.inf
    for value in sorted(x.ticks, key=x):
        at, text = x(value), x.label(value)
        yield Markup('<line class="notch" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
            at, at, bottom, bottom + 4
        )
        if at - previous > len(text) * CHARACTER + 6:
            yield _text(at, bottom + 17, text, "tick middle")
            previous = at
    yield Markup('<line class="axis" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
        LEFT, right, bottom, bottom
    )
    yield _text(2, 14, y_axis.label, "axis-title")
    yield _text(right, HEIGHT - 6, x_axis.label, "axis-title end")


def _text(x: float, y: float, text: str, name: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(name, x, y, text)


def scatter(
    identity: str,
    title: str,
    description: str,
    points: Sequence[ScatterPoint],
    x_axis: Axis,
    y_axis: Axis,
    *,
    rule: tuple[str, float] | None = None,
) -> Markup:
    """Quality against cost, with error bars, individual seeds, the Pareto front and labels next to the points.

    Args:
        rule: name and quality of something without a cost: drawn as a dashed line, or as a name at the edge if far off.
    """
    right, bottom = WIDTH - 14, HEIGHT - BOTTOM
    x = x_axis.scale([p.x for p in points], LEFT + 16, right - 16)
    heights = [h for p in points for h in (*p.seeds, p.y - (p.error or 0), p.y + (p.error or 0))]
    reach = max(heights) - min(heights)
    near = rule is not None and min(heights) - reach <= rule[1] <= max(heights) + reach
    y = y_axis.scale([*heights, rule[1]] if rule is not None and near else heights, bottom - 8, TOP + 4)
    body: list[Markup] = list(_axes(x, y, x_axis, y_axis, right))
    front = sorted((p for p in points if p.front), key=lambda p: p.x)
    if len(front) > 1:
        path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in front)
        body.append(Markup('<polyline class="front" points="{}"/>').format(Markup(path)))
    radii = [13.0 if p.winner else 8.0 for p in points]
    taken: list[Box] = [(x(p.x) - r, y(p.y) - r, x(p.x) + r, y(p.y) + r) for p, r in zip(points, radii, strict=True)]
    for p in points:
        if p.error:
            top, foot = sorted((y(p.y - p.error), y(p.y + p.error)))
            taken.append((x(p.x) - 2, top, x(p.x) + 2, foot))
    if rule is not None:
        parts, box = _rule(*rule, y, right, near, taken)
        body.extend(parts)
        taken.append(box)
    for a, b in itertools.pairwise(front):
        taken.extend(_along((x(a.x), y(a.y)), (x(b.x), y(b.y))))
    named = [i for i, p in enumerate(points) if p.label]
    centres = [(x(p.x), y(p.y)) for p in points]
    names = shortened([p.name for p in points])
    widths = [len(names[i]) * CHARACTER + 2 for i in named]
    frame = (LEFT, TOP - 12, WIDTH - 2, bottom - 2)
    placed = place_labels([centres[i] for i in named], [radii[i] for i in named], widths, taken, frame)
    boxes = dict(zip(named, placed, strict=True))
    for i, (p, radius, (at, height)) in enumerate(zip(points, radii, centres, strict=True)):
        parts = [Markup("<title>{}</title>").format(p.detail or p.name)]
        beside = boxes.get(i)
        if beside is not None:
            edge = (min(max(at, beside[0]), beside[2]), min(max(height, beside[1]), beside[3]))
            if math.dist(edge, (at, height)) > radius + 8:
                parts.append(_line("leader", at, height, *edge))
        parts += [_seed(p.number, at, y(seed)) for seed in p.seeds]
        if p.error:
            parts.append(_line(f"whisker k{p.number % COLOURS}", at, y(p.y - p.error), at, y(p.y + p.error)))
        if p.winner:
            parts.append(Markup('<circle class="halo" cx="{:.1f}" cy="{:.1f}" r="12"/>').format(at, height))
        parts.append(marker(p.number, at, height, 6 if p.front else 4.8, "point"))
        if beside is not None:
            # Anchored at the side facing the point, so that narrower letters stay next to it.
            side, anchor = min((abs(beside[0] - at), beside[0], ""), (abs(beside[2] - at), beside[2], " end"))[1:]
            if beside[0] < at < beside[2]:
                side, anchor = (beside[0] + beside[2]) / 2, " middle"
            style = "label" + anchor + (" winner" if p.winner else "")
            parts.append(_text(side, (beside[1] + beside[3]) / 2 + 4, names[i], style))
        body.append(_of_mechanism(p.number, parts))
    return _figure(identity, title, description, body)


def _rule(
    name: str, value: float, y: Scale, right: float, near: bool, taken: Sequence[Box]
) -> tuple[list[Markup], Box]:
    """A dashed line with its name at one end, or only the name and an arrow; and the box of the name."""
    at = y.inside(value)
    text = f"{short(name, LONGEST_RULE)} {units.number(value)}"
    if not near:
        text += " ↑" if at < (TOP + HEIGHT - BOTTOM) / 2 else " ↓"
    width = len(text) * CHARACTER
    boxes = [
        (left, foot - LINE + 3, left + width, foot + 3)
        for foot in (at - 5, at + LINE)
        for left in (LEFT + 4, right - width)
        if foot - LINE + 3 > TOP - LINE and foot + 3 < HEIGHT - BOTTOM
    ]
    box = min(boxes, key=lambda box: sum(collision(box, other) for other in taken))
    body = [_line("rule", LEFT, at, right, at)] if near else []
    # letters narrower than estimated stay at their end of the line
    left, end = (box[0], "") if box[0] == LEFT + 4 else (box[2], " end")
    return [*body, _text(left, box[3] - 3, text, "note" + end)], box


def _along(a: Point, b: Point) -> Iterable[Box]:
    """Small boxes along a line, so that labels avoid it."""
    steps = max(1, round(math.dist(a, b) / 8))
    for i in range(1, steps):
        cx, cy = a[0] + (b[0] - a[0]) * i / steps, a[1] + (b[1] - a[1]) * i / steps
        yield cx - 1.5, cy - 1.5, cx + 1.5, cy + 1.5


def _seed(number: int, x: float, y: float) -> Markup:
    return Markup('<circle class="seed k{}" cx="{:.1f}" cy="{:.1f}" r="1.9"/>').format(number % COLOURS, x, y)


def _line(name: str, x0: float, y0: float, x1: float, y1: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(name, x0, y0, x1, y1)


def _of_mechanism(number: int, parts: Iterable[Markup]) -> Markup:
    return Markup('<g data-m="{}">{}</g>').format(number, Markup("").join(parts))


def lines(
    identity: str,
    title: str,
    description: str,
    series: Sequence[Series],
    x_axis: Axis,
    y_axis: Axis,
    *,
    markers: bool = True,
    missing: str = "",
) -> Markup | None:
    """A line chart with names at the ends of the lines.

    Args:
        markers: whether to mark every point.
        missing: meaning of a point without a value; if given, such points are drawn as crosses along the bottom.

    Returns:
        The chart; None if there is nothing to draw.
    """
    kept = [(s, [(px, py) for px, py in s.points if x_axis.usable(px)]) for s in series]
    values = [py for _, points in kept for _, py in points if y_axis.usable(py)]
    lost = [px for _, points in kept for px, py in points if not y_axis.usable(py)] if missing else []
    if not values and not lost:
        return None
    names = dict(zip((s.name for s in series), shortened([s.name for s in series]), strict=True))
    room = max((len(names[s.name]) for s, points in kept if s.label and points), default=0) * CHARACTER + 24
    right, bottom = WIDTH - room, HEIGHT - BOTTOM
    x = x_axis.scale([px for _, points in kept for px, py in points if missing or y_axis.usable(py)], LEFT + 6, right)
    y = y_axis.scale(values or [1.0], bottom - (24 if lost else 6), TOP)
    body: list[Markup] = list(_axes(x, y, x_axis, y_axis, right))
    if lost:
        body.append(_text(LEFT + 2, bottom - 18, missing, "note"))
    body.extend(_crossings(series, x, bottom))
    ends: list[tuple[Series, Point]] = []
    for s, points in kept:
        drawn, end = _draw_series(s, points, x, y, x_axis, y_axis, markers, bottom - 8 if missing else None)
        body.append(_of_mechanism(s.number, drawn))
        if s.label and end is not None:
            ends.append((s, end))
    heights = spread([at for _, (_, at) in ends], LINE, TOP - 6, bottom - 2)
    for (s, (end_x, end_y)), height in zip(ends, heights, strict=True):
        parts = [_line(f"lead k{s.number % COLOURS}", end_x + 5, end_y, right + 14, height)]
        parts.append(_text(right + 17, height + 4, names[s.name], "label"))
        body.append(_of_mechanism(s.number, parts))
    return _figure(identity, title, description, body)


def _draw_series(
    series: Series,
    points: Sequence[tuple[float, float | None]],
    x: Scale,
    y: Scale,
    x_axis: Axis,
    y_axis: Axis,
    markers: bool,
    lost_at: float | None,
) -> tuple[list[Markup], Point | None]:
    """The marks of one series, and the pixel where it ends."""
    colour = f"k{series.number % COLOURS}"
    parts = [Markup("<title>{}</title>").format(series.name)]
    runs: list[list[Point]] = [[]]
    marks: list[Markup] = []
    end: Point | None = None
    for px, py in points:
        at = x(px)
        if not y_axis.usable(py):
            runs.append([])
            if lost_at is not None:
                marks.append(
                    Markup('<path class="cross {}" d="M{:.1f} {:.1f}l7 7m0 -7l-7 7"/>').format(
                        colour, at - 3.5, lost_at - 3.5
                    )
                )
                end = end or (at, lost_at)
            continue
        height = y.inside(py)
        runs[-1].append((at, height))
        end = (at, height)
        if px in series.ranges:
            low, high = series.ranges[px]
            if y_axis.usable(low) and y_axis.usable(high):
                marks.append(_line(f"whisker {colour}", at, y.inside(low), at, y.inside(high)))
        if markers:
            told = f"{series.name}: {y_axis.format(py)} at {x_axis.format(px)}"
            marks.append(
                Markup("<g><title>{}</title>{}</g>").format(told, marker(series.number, at, height, 3.6, "dot"))
            )
        if px in series.rings:
            marks.append(Markup('<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="8"/>').format(at, height))
    if series.crossing is not None and x.low <= series.crossing <= x.high:
        crossing = x(series.crossing)
        height_there = _height_at(crossing, runs)
        if height_there is not None:
            marks.append(Markup('<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="6"/>').format(crossing, height_there))
    for run in runs:
        if len(run) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in run)
            parts.append(Markup('<polyline class="line {}" points="{}"/>').format(colour, Markup(path)))
    return parts + marks, end


def _height_at(at: float, runs: Sequence[Sequence[Point]]) -> float | None:
    """The height of a drawn line at a horizontal pixel position."""
    for run in runs:
        for (x0, y0), (x1, y1) in itertools.pairwise(run):
            if x0 <= at <= x1:
                return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None


def _crossings(series: Sequence[Series], x: Scale, bottom: float) -> Iterable[Markup]:
    """A dashed line, and its length on the axis, wherever labelled lines cross the reference."""
    shown = sorted({s.crossing for s in series if s.label and s.crossing is not None and x.low <= s.crossing <= x.high})
    gap = max((len(units.tokens(c)) for c in shown), default=0) * CHARACTER + 4
    places = spread([x(c) for c in shown], gap, LEFT, x.end)
    for crossing, place in zip(shown, places, strict=True):
        yield _line("crossing", x(crossing), TOP, x(crossing), bottom)
        yield _text(place, TOP - 4, units.tokens(crossing), "crossing-label middle")
