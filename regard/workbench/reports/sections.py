"""Sections of a study's result: tables and pictures as plain data, for reports, documentation pages and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

Row = Mapping[str, Any]
"""Values by heading: strings, numbers, or None for what was not measured."""


@dataclass(frozen=True)
class Curves:
    """Lines over a shared x axis.

    Attributes:
        caption: text above the picture.
        x, y: axis labels, including units.
        curves: points by name; y is None if it was not measured.
        note: text below the picture.
        log_x, log_y: whether the axes are logarithmic.
        rising: False if smaller is better; smaller values are then drawn higher.
    """

    kind: ClassVar[str] = "curves"

    caption: str
    x: str
    y: str
    curves: Mapping[str, Sequence[tuple[float, float | None]]]
    note: str = ""
    log_x: bool = False
    log_y: bool = False
    rising: bool = True


@dataclass(frozen=True)
class Points:
    """One point per name.

    Attributes:
        caption, x, y, note, log_x, log_y, rising: as in :class:`Curves`.
        points: (x, y) by name.
    """

    kind: ClassVar[str] = "points"

    caption: str
    x: str
    y: str
    points: Mapping[str, tuple[float, float]]
    note: str = ""
    log_x: bool = False
    log_y: bool = False
    rising: bool = True


@dataclass(frozen=True)
class Heat:
    """A grid of shades, from the smallest value to the largest.

    Attributes:
        caption, note: texts above and below the picture.
        rows, columns: their names.
        values: for each row, one value per column; None for what was not measured.
    """

    kind: ClassVar[str] = "heat"

    caption: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    note: str = ""


Picture = Curves | Points | Heat
_KINDS: dict[str, type[Any]] = {one.kind: one for one in (Curves, Points, Heat)}


@dataclass(frozen=True)
class Section:
    """A section of a report.

    Attributes:
        title: its heading.
        says: what it shows and what follows from it, in a sentence or two.
        pictures: its pictures; at most three are placed side by side.
        rows: rows of its table, all with the same headings.
    """

    title: str
    says: str = ""
    pictures: Sequence[Picture] = field(default_factory=tuple)
    rows: Sequence[Row] = field(default_factory=tuple)

    def plain(self) -> dict[str, Any]:
        """The section as JSON data; :func:`section` restores it."""
        pictures = [{"kind": one.kind, **dataclasses.asdict(one)} for one in self.pictures]
        return {"title": self.title, "says": self.says, "pictures": pictures, "rows": [dict(row) for row in self.rows]}


def section(plain: Mapping[str, Any]) -> Section:
    """Restore a section from the result of :meth:`Section.plain`."""
    pictures = [
        _KINDS[one["kind"]](**{name: value for name, value in one.items() if name != "kind"})
        for one in plain["pictures"]
    ]
    return Section(plain["title"], plain["says"], pictures, plain["rows"])
