"""What a study shows: tables and pictures as plain data, so that a report, a page of the documentation and JSON hold the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

Row = Mapping[str, Any]
"""Values by heading: words, numbers, and None for what was not measured."""


@dataclass(frozen=True)
class Curves:
    """Lines over a common axis.

    Attributes:
        caption: above the picture.
        x, y: what the axes show, units included.
        curves: points by name; None for a value that was not measured.
        note: below the picture.
        log_x, log_y: logarithmic axes.
        rising: False where smaller is better, which is drawn higher.
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
    """A point for each name.

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
    """A grid of shades from the smallest value to the largest.

    Attributes:
        caption, note: above and below the picture.
        rows, columns: names.
        values: of each row, one a column; None for what was not measured.
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
    """A part of a report.

    Attributes:
        title: of the part.
        says: what it shows and what follows, in a sentence or two.
        pictures: at most three stand beside each other.
        rows: of its table; all have the same headings.
    """

    title: str
    says: str = ""
    pictures: Sequence[Picture] = field(default_factory=tuple)
    rows: Sequence[Row] = field(default_factory=tuple)

    def plain(self) -> dict[str, Any]:
        """The section as JSON could hold it; :func:`section` reads it back."""
        pictures = [{"kind": one.kind, **dataclasses.asdict(one)} for one in self.pictures]
        return {"title": self.title, "says": self.says, "pictures": pictures, "rows": [dict(row) for row in self.rows]}


def section(plain: Mapping[str, Any]) -> Section:
    """A section from what :meth:`Section.plain` made."""
    pictures = [
        _KINDS[one["kind"]](**{name: value for name, value in one.items() if name != "kind"})
        for one in plain["pictures"]
    ]
    return Section(plain["title"], plain["says"], pictures, plain["rows"])
