"""`regard report`: write the report of a comparison again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from regard.cli.console import console
from regard.contract import Unsupported


def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of regard compare or regard retrofit.")] = Path(
        "runs/compare"
    ),
    output: Annotated[
        Path | None, typer.Option(help="Where to write; report.html in the folder when not given.")
    ] = None,
) -> None:
    """Write the HTML report of a finished comparison or retrofit again.

    Examples:

    \b
        regard report
        regard report runs/recall --output recall.html
        regard report hybrid/
    """
    from regard.measurement.store import Store
    from regard.retrofit.folder import RECORD
    from regard.workbench.comparison.compare import render_report
    from regard.workbench.reports.retrofit_report import write_retrofit_report
    from regard.workbench.retrofits import RECORD as RETROFITS
    from regard.workbench.retrofits import write_report

    file = folder / "results.db"
    if not file.is_file() and (folder / RECORD).is_file():
        console.print(Text(f"Report: {write_retrofit_report(folder, output)}"))
        return
    if not file.is_file() and (folder / RETROFITS).is_file():
        console.print(Text(f"Report: {write_report(folder, output)}"))
        return
    if not file.is_file():
        raise Unsupported(
            f"a report from {folder}: no results.db there",
            supported="the output folder of regard compare or regard retrofit",
        )
    with Store(file, read_only=True) as store:
        console.print(Text(f"Report: {render_report(store, output or folder / 'report.html')}"))
