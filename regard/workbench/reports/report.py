"""The report of a comparison: a self-contained HTML file, made from rows of the store.

Means, standard errors and the Pareto front are passed in; :mod:`regard.workbench.reports.view` prepares texts and
tables for the template, and :mod:`regard.workbench.reports.drawings` its charts.
"""

from __future__ import annotations

from pathlib import Path

from regard.core.files import write_text_atomically
from regard.workbench.reports.drawings import Drawings
from regard.workbench.reports.markers import glyph
from regard.workbench.reports.pages import pages
from regard.workbench.reports.view import REFERENCE, Measured, View


def write_report(path: str | Path, measured: Measured) -> Path:
    """Write the report of one run, replacing the file atomically.

    Args:
        path: path of the HTML file. Its folder is created if missing.

    Returns:
        The path of the file.

    Raises:
        Unsupported: if the file cannot be written.
    """
    path = Path(path)
    page = render(measured)
    write_text_atomically(path, page)
    return path


def render(measured: Measured) -> str:
    """The page as HTML text."""
    view, run = View(measured), measured.run
    return (
        pages()
        .get_template("report.html.j2")
        .render(
            view=view,
            drawings=Drawings(view),
            run=run,
            recommendation={"text": "", "reason": "", "winner": None, "notes": [], **(run.get("recommendation") or {})},
            quality=measured.quality,
            machine=measured.machine,
            revision=measured.revision,
            glyph=glyph,
            reference=REFERENCE,
        )
    )
