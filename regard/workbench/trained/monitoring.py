"""What the monitors of a training run share: when they look, the records that a resumed run continues, and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from regard.core.files import write_text_atomically
from regard.workbench.reports.pages import pages
from regard.workbench.reports.section_pages import parts_of_page
from regard.workbench.reports.sections import Section

LOOKS = 20
"""Looks that are spread evenly over a run; as many again are concentrated at its beginning."""


class RunMonitor:
    """Base of the monitors.

    Args:
        path: file for the records; None to write none.

    Attributes:
        name: as `regard train --monitor` takes it.
        lede: the first line of its page.
        looks: what was seen, by step.
    """

    name: ClassVar[str]
    lede: ClassVar[str]

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.looks: dict[int, dict[str, Any]] = {}

    def due(self, steps: int) -> frozenset[int]:
        """The steps after which to look, including 0."""
        even = (round(steps * (i + 1) / LOOKS) for i in range(LOOKS))
        early = (round(steps ** (i / LOOKS)) for i in range(LOOKS))
        return frozenset([0, *even, *early])

    def keep(self, step: int, seen: dict[str, Any]) -> None:
        """Add a look, in place of those of this step and later ones, and write the records."""
        earlier = [other for other in self.looks if other < step]
        self.looks = {other: self.looks[other] for other in earlier} | {
            step: {"step": step, "since": max(earlier, default=0), **seen}
        }
        if self.path is not None:
            write_text_atomically(self.path, json.dumps(self.as_record()) + "\n")

    def restore(self, **same: Any) -> None:
        """Take up the looks in the file, if there is one and its record has these values."""
        if self.path is None or not self.path.is_file():
            return
        told = json.loads(self.path.read_text(encoding="utf-8"))
        if all(told[key] == value for key, value in same.items()):
            self.looks = {look["step"]: look for look in told["looks"]}

    def as_record(self) -> dict[str, Any]:
        """All records, for JSON."""
        return {"looks": [self.looks[step] for step in sorted(self.looks)]}

    def summary(self) -> dict[str, Any]:
        """The rows of the tables, for JSON."""
        raise NotImplementedError

    def says(self) -> str:
        """What was seen, in a sentence; "" if nothing was."""
        raise NotImplementedError

    def sections(self) -> list[Section]:
        """The report sections: pictures and tables."""
        raise NotImplementedError

    def write_page(self, path: Path, title: str) -> Path:
        """Write the sections as one HTML file."""
        page = pages().get_template("monitor.html.j2")
        text = page.render(title=title, kind=self.name, lede=self.lede, sections=parts_of_page(self.sections()))
        write_text_atomically(path, text)
        return path
