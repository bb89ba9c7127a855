"""Sections of a report as HTML: tables, and pictures as SVG."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from regard.catalogue import list_mechanisms
from regard.measurement import units
from regard.workbench.reports import charts
from regard.workbench.reports.charts import Figure, ScatterPoint, Series
from regard.workbench.reports.labels import CHARACTER, shortened
from regard.workbench.reports.markers import numbers
from regard.workbench.reports.scales import Axis, is_number
from regard.workbench.reports.sections import Curves, Heat, Picture, Section

MOST_MARKED = 24
"""Most points on a curve for which they are marked individually."""


def parts_of_page(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Data for ``sections.html.j2``: the text, pictures and rows of each section."""
    names = _names([picture for part in sections for picture in part.pictures])
    return [
        {
            "title": part.title,
            "says": part.says,
            "identity": _identity(part.title),
            "figures": [
                Figure(picture.caption, draw(picture, f"{_identity(part.title)}-{at}", names), picture.note)
                for at, picture in enumerate(part.pictures)
            ],
            "headings": list(part.rows[0]) if part.rows else [],
            "words": {name for row in part.rows for name, value in row.items() if isinstance(value, str)},
            "rows": [[cell(row[name]) if name in row else "" for name in part.rows[0]] for row in part.rows],
        }
        for part in sections
    ]


def cell(value: Any) -> str:
    """Format a table value as text."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def draw(picture: Picture, identity: str, names: Mapping[str, int] | None = None) -> Markup | None:
    """Draw a picture as SVG; None if there is nothing to draw.

    Args:
        identity: prefix of its element ids, different for each picture on a page.
        names: number of each name that it draws, which determines colour and shape.
    """
    own = _names([picture]) if names is None else names
    if isinstance(picture, Heat):
        return _heat(picture, identity)
    x = Axis(picture.x, units.tick, log=picture.log_x)
    upwards = picture.y if picture.rising else f"{picture.y} (less is up)"
    y = Axis(upwards, units.tick, log=picture.log_y, rising=picture.rising)
    if isinstance(picture, Curves):
        series = [Series(own[name], name, points) for name, points in picture.curves.items()]
        marked = all(len(one.points) <= MOST_MARKED for one in series)
        return charts.lines(identity, picture.caption, picture.note or picture.caption, series, x, y, markers=marked)
    points = [
        ScatterPoint(own[name], name, *at, detail=f"{name}: {units.number(at[0])}, {units.number(at[1])}")
        for name, at in picture.points.items()
        if x.usable(at[0]) and y.usable(at[1])
    ]
    return charts.scatter(identity, picture.caption, picture.note or picture.caption, points, x, y) if points else None


def _names(pictures: Sequence[Picture]) -> dict[str, int]:
    drawn = [
        name
        for one in pictures
        if not isinstance(one, Heat)
        for name in (one.curves if isinstance(one, Curves) else one.points)
    ]
    return numbers(list(dict.fromkeys(drawn)), list_mechanisms())


def _identity(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _heat(picture: Heat, identity: str) -> Markup | None:
    """A grid in shades of one colour, with each field's value as a tooltip."""
    known = [v for row in picture.values for v in row if is_number(v)]
    if not known:
        return None
    low, high = min(known), max(known)
    rows, columns = shortened(picture.rows), shortened(picture.columns)
    left = 8 + CHARACTER * max(map(len, rows))
    width = (charts.WIDTH - left - 4) / len(picture.columns)
    height = min(18.0, 240.0 / len(picture.rows))
    body = []
    for i, row in enumerate(picture.values):
        top = 12 + i * height
        if height >= 9 or i % 4 == 0:
            body.append(
                Markup('<text class="tick end" x="{:.1f}" y="{:.1f}">{}</text>').format(
                    left - 6, top + height / 2 + 4, rows[i]
                )
            )
        for j, value in enumerate(row):
            if not is_number(value):
                continue
            share = (value - low) / (high - low) if high > low else 1.0
            said = f"{picture.rows[i]}, {picture.columns[j]}: {units.number(value)}"
            body.append(
                Markup(
                    '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="currentColor" '
                    'fill-opacity="{:.3f}"><title>{}</title></rect>'
                ).format(left + j * width, top, max(width - 0.6, 0.4), max(height - 0.6, 0.4), 0.04 + 0.9 * share, said)
            )
    bottom = 12 + len(picture.rows) * height
    every = max(1, round(len(picture.columns) * CHARACTER * 5 / (charts.WIDTH - left)))
    for j in range(0, len(picture.columns), every):
        body.append(
            Markup('<text class="tick middle" x="{:.1f}" y="{:.1f}">{}</text>').format(
                left + (j + 0.5) * width, bottom + 14, columns[j]
            )
        )
    return Markup(
        '<svg class="chart" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-labelledby="{i}-t">'
        '<title id="{i}-t">{}</title>{}</svg>'
    ).format(charts.WIDTH, bottom + 22, picture.caption, Markup("").join(body), i=identity)
