"""The page of a study: one HTML file that needs nothing else."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

import regard
from regard.catalogue import list_mechanisms
from regard.measurement import units
from regard.models.weights import write_atomically
from regard.reproductions.framework.telling import measured_words, remarks
from regard.studies.framework.sections import Curves, Heat, Picture, Section, section
from regard.workbench import charts
from regard.workbench.charts import Axis, ScatterPoint, Series
from regard.workbench.report import pages

MOST_MARKED = 24
"""Points of a curve beyond which they are not marked one by one."""


def write_study_report(record: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the report of what :func:`opened` told, replacing the file in one step.

    Raises:
        Unsupported: where it cannot be written.
    """
    place = Path(path)
    page = render_study(record)
    write_atomically(place, lambda file: file.write_text(page, encoding="utf-8"))
    return place


def render_study(record: Mapping[str, Any]) -> str:
    """The page of a record as text."""
    judged = [(one, measured_words(one)) for one in [*record["needs"], *record["findings"]]]
    return _page(
        "study.html.j2",
        [section(one) for one in record["sections"]],
        record=record,
        judged=judged,
        remarks=remarks(record),
        machines=sorted({one["machine"] for one in record["cells"] if one.get("machine")}) or [platform.machine()],
    )


def render_sections(title: str, parts: Sequence[Section], *, kind: str, says: str) -> str:
    """A page of sections that are no study's: `kind` says what it is, `says` what it shows."""
    return _page("page.html.j2", parts, title=title, kind=kind, says=says)


def _page(template: str, parts: Sequence[Section], **more: Any) -> str:
    names = _names([picture for part in parts for picture in part.pictures])
    shown = [
        {
            "title": part.title,
            "says": part.says,
            "identity": _identity(part.title),
            "figures": [
                (picture, draw(picture, f"{_identity(part.title)}-{at}", names))
                for at, picture in enumerate(part.pictures)
            ],
            "headings": list(part.rows[0]) if part.rows else [],
            "rows": part.rows,
        }
        for part in parts
    ]
    environment = pages(Path(__file__).parent / "templates")
    return environment.get_template(template).render(sections=shown, cell=cell, version=regard.__version__, **more)


def cell(value: Any) -> str:
    """A value of a table as text."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def draw(picture: Picture, identity: str, names: Mapping[str, int] | None = None) -> Markup | None:
    """A picture as SVG; None where there is nothing to draw.

    Args:
        identity: of its title, different for each picture of a page.
        names: numbers of what it draws, which decide colours and shapes.
    """
    numbers = _names([picture]) if names is None else names
    if isinstance(picture, Heat):
        return _heat(picture, identity)
    x = Axis(picture.x, units.tick, log=picture.log_x)
    y = Axis(picture.y, units.tick, log=picture.log_y, rising=picture.rising)
    if isinstance(picture, Curves):
        series = [Series(numbers[name], name, points) for name, points in picture.curves.items()]
        marked = all(len(one.points) <= MOST_MARKED for one in series)
        return charts.lines(identity, picture.caption, picture.note or picture.caption, series, x, y, markers=marked)
    points = [
        ScatterPoint(numbers[name], name, *at, detail=f"{name}: {units.number(at[0])}, {units.number(at[1])}")
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
    return charts.numbers(list(dict.fromkeys(drawn)), list_mechanisms())


def _identity(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _heat(picture: Heat, identity: str) -> Markup | None:
    """Shades of one colour, with the value of each field when the pointer rests on it."""
    known = [v for row in picture.values for v in row if charts.is_number(v)]
    if not known:
        return None
    low, high = min(known), max(known)
    left = 8 + charts.CHARACTER * max(len(charts.short(name)) for name in picture.rows)
    width = (charts.WIDTH - left - 4) / len(picture.columns)
    height = min(18.0, 240.0 / len(picture.rows))
    body = []
    for i, row in enumerate(picture.values):
        top = 12 + i * height
        if height >= 9 or i % 4 == 0:
            text = charts.short(picture.rows[i])
            body.append(
                Markup('<text class="tick end" x="{:.1f}" y="{:.1f}">{}</text>').format(
                    left - 6, top + height / 2 + 4, text
                )
            )
        for j, value in enumerate(row):
            if not charts.is_number(value):
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
    every = max(1, round(len(picture.columns) * charts.CHARACTER * 5 / (charts.WIDTH - left)))
    for j in range(0, len(picture.columns), every):
        body.append(
            Markup('<text class="tick middle" x="{:.1f}" y="{:.1f}">{}</text>').format(
                left + (j + 0.5) * width, bottom + 14, charts.short(picture.columns[j])
            )
        )
    return Markup(
        '<svg class="chart" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-labelledby="{i}-t">'
        '<title id="{i}-t">{}</title>{}</svg>'
    ).format(charts.WIDTH, bottom + 22, picture.caption, Markup("").join(body), i=identity)
