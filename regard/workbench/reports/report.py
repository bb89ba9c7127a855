"""The report of a comparison: one HTML file that needs nothing else, drawn from rows of the store.

Means, standard errors and the Pareto front come in ready made; :mod:`regard.workbench.reports.view` has what the template
says of them, :mod:`regard.workbench.reports.drawings` its charts.
"""

from __future__ import annotations

from pathlib import Path

from regard.core.files import write_text_atomically
from regard.workbench.reports.drawings import Drawings
from regard.workbench.reports.markers import glyph
from regard.workbench.reports.pages import pages
from regard.workbench.reports.view import REFERENCE, Measured, View


def write_report(path: str | Path, measured: Measured) -> Path:
    """Write the report of one run, replacing the file in one step.

    Args:
        path: the HTML file. Its folder is created when missing.

    Returns:
        The path.

    Raises:
        Unsupported: the file cannot be written.
    """
    path = Path(path)
    page = render(measured)
    write_text_atomically(path, page)
    return path


def render(measured: Measured) -> str:
    """The page as text."""
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
