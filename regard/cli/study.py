"""`regard study`: a question to many mechanisms at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from regard.cli.console import console, emit
from regard.cli.options import JSON, SHARD, TIMINGS
from regard.cli.reproduce import reproduced, tell_judged, tell_listed
from regard.contract import Unsupported, closest


def study(
    name: Annotated[str | None, typer.Argument(help="A study; all are listed when none is named.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of each setting; the study's own when not given.")] = None,
    only: SHARD = None,
    timings: TIMINGS = None,
    output: Annotated[Path, typer.Option(help="Folder of the results; the same command goes on from it.")] = Path(
        "runs/reproduce"
    ),
    table: Annotated[bool, typer.Option("--table", help="Show what is done; run nothing.")] = False,
    as_json: JSON = False,
) -> None:
    """Put a question to many mechanisms at once: a reproduction with a table of its own.

    Runs, stores and goes on as `regard reproduce` does, in the same folder.

    Examples:

    \b
        regard study
        regard study wide-attention --no-timings --shard 1/2
        regard study wide-attention --table --json
    """
    from regard.reproductions import get_reproduction, list_reproductions

    studies = [n for n in list_reproductions() if get_reproduction(n).table is not None]
    if name is None:
        found = reproduced(studies, seeds, timings, only, output, quiet=as_json, run=False)
        emit({"studies": found}) if as_json else tell_listed(found)
        return
    module = name.replace("-", "_")
    if module not in studies:
        names = [n.replace("_", "-") for n in studies]
        raise Unsupported(f"study {name!r}", supported=", ".join(names), nearest=closest(name, names))
    found = reproduced([module], seeds, timings, only, output, quiet=as_json, run=not table)
    if as_json:
        emit(found[0])
        return
    tell_judged(found)
    console.print(_rows(found[0]["table"]))


def _rows(rows: list[dict[str, Any]]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for heading in rows[0]:
        shown.add_column(heading, justify="left" if isinstance(rows[0][heading], str) else "right")
    for row in rows:
        shown.add_row(*(v if isinstance(v, str) else "—" if v is None else f"{v:.3g}" for v in row.values()))
    return shown
