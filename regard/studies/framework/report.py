"""The report page of a study: one self-contained HTML file."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regard.core.files import write_text_atomically
from regard.reproductions.framework.judging import Outcome
from regard.reproductions.framework.telling import measured_words, remarks
from regard.workbench.reports.pages import pages
from regard.workbench.reports.section_pages import parts_of_page
from regard.workbench.reports.sections import section


def write_study_report(record: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the report of a record from :func:`opened`, replacing the file atomically.

    Raises:
        Unsupported: if the file cannot be written.
    """
    place = Path(path)
    page = render_study(record)
    write_text_atomically(place, page)
    return place


def render_study(record: Mapping[str, Any]) -> str:
    """The report page of a record as HTML text."""
    environment = pages(Path(__file__).parent / "templates")
    judged = [(one["says"], measured_words(one), one["outcome"]) for one in [*record["needs"], *record["findings"]]]
    return environment.get_template("study.html.j2").render(
        record=record,
        sections=parts_of_page([section(one) for one in record["sections"]]),
        judged=judged,
        open=[one for one in judged if one[2] in (Outcome.DID_NOT_HOLD, Outcome.UNDECIDED)],
        remarks=remarks(record),
        machines=sorted({one["machine"] for one in record["cells"] if one.get("machine")}) or [platform.machine()],
    )
