"""`regard reproduce`: test the claims of papers at a small size."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from regard.cli.console import console, emit
from regard.cli.options import ADDRESS, ENGINE, JSON, SHARD, TIMINGS
from regard.cli.progress import progress
from regard.cli.sweeps import sweep_of
from regard.contract import Unsupported
from regard.measurement import units

if TYPE_CHECKING:
    from regard.measurement.store import Store
    from regard.measurement.sweeps import Sweep


def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Reproductions, or mechanisms that they cover, or all, which takes days; listed when none is named."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Runs of each setting; each reproduction's own when not given.")
    ] = None,
    only: SHARD = None,
    timings: TIMINGS = None,
    engine: ENGINE = "local",
    address: ADDRESS = None,
    output: Annotated[Path, typer.Option(help="Folder of the results; the same command resumes from it.")] = Path(
        "runs/reproduce"
    ),
    pilot: Annotated[
        int | None,
        typer.Option(
            help="Run this many other seeds, which are never judged, and report whether the experiment can decide, how "
            "much its numbers vary, and how many seeds would suffice."
        ),
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="List the reproductions and their finished runs; run nothing.")
    ] = False,
    table: Annotated[bool, typer.Option("--table", help="Judge the finished runs; run nothing.")] = False,
    as_json: JSON = False,
) -> None:
    """Test the claims of papers at a small size, and say for each whether it held.

    Every run is stored as soon as it ends, so the command can be stopped and repeated; processes with different shards
    can share an output folder. A claim that does not hold is a result, not an error.

    Examples:

    \b
        regard reproduce --list
        regard reproduce delta_rule
        regard reproduce all --no-timings --shard 1/2
        regard reproduce all --no-timings --engine ray --address auto
        regard reproduce all --table --json
        regard reproduce delta_rule --pilot 3
    """
    from regard.measurement.sharding import shard
    from regard.reproductions import collect, get_reproduction, list_reproductions, plan
    from regard.reproductions import pilot as piloted

    sweeps = sweep_of(engine, address)
    wanted = list_reproductions() if not names or "all" in names else [get_reproduction(n).name for n in names]
    if not (names or listing or table):
        _check_listing(seeds=seeds, shard=only, timings=timings, pilot=pilot, address=address)
        listing = True
    elif table:
        refuse_beside("--table", shard=only, timings=timings, pilot=pilot)
    elif pilot is not None:
        refuse_beside("--pilot", seeds=seeds, timings=timings)
    if not (listing or table):
        cells = plan(wanted, pilot=pilot) if pilot is not None else plan(wanted, seeds, timings=timings)
        with sweeps as sweep:
            run_cells(shard(cells, only), output, quiet=as_json, sweep=sweep)
    with cells_in(output) as store:
        if pilot is not None:
            shown = [piloted(name, store) for name in wanted]
            emit({"pilots": shown}) if as_json else _pilots_told(shown)
            return
        found = collect(wanted, store, seeds)
    if as_json:
        emit({"reproductions": found})
    elif listing:
        tell_listed(found)
    else:
        tell_judged(found)


def _check_listing(**given: Any) -> None:
    """Raise Unsupported for options of runs when no reproduction is named, so that nothing is run."""
    asked = [name for name, value in given.items() if value is not None]
    if asked:
        raise Unsupported(
            f"--{asked[0]} without names", supported="reproductions, mechanisms, or all", nearest="regard reproduce all"
        )


def refuse_beside(option: str, **given: Any) -> None:
    """Raise Unsupported for options that mean nothing beside another, so that they are not ignored without a word."""
    for name, value in given.items():
        if value is not None:
            raise Unsupported(
                f"--{name} beside {option}", supported=f"--{name} in a command that runs cells", nearest=f"no --{name}"
            )


def cells_in(output: Path) -> AbstractContextManager[Store | None]:
    """The results in a folder, opened for reading; None if nothing has been run."""
    from regard.measurement.store import Store

    file = output / "results.db"
    return Store(file, read_only=True) if file.is_file() else nullcontext()


def run_cells(
    cells: Sequence[Any], output: Path, *, quiet: bool, within: float | None = None, sweep: Sweep | None = None
) -> None:
    """Run the cells that are missing in a folder, showing progress; see :func:`regard.reproductions.run`."""
    from regard.measurement.store import Store
    from regard.reproductions import run

    with Store(output / "results.db") as store, progress(quiet=quiet) as (bar, line):
        shown = bar.add_task("starting", total=None)

        def on_cell(cell: Any, left: int, seconds: float) -> None:
            remaining = f"{units.counted(left, 'cell')}, about {units.clock(seconds)} left"
            said = f"{cell.reproduction.name}: {cell.setting}, seed {cell.seed}; {remaining}"
            bar.update(shown, description=said, completed=len(cells) - left, total=len(cells))
            line(said)

        run(cells, store, on_cell=on_cell, within=within, sweep=sweep)


def tell_listed(found: list[dict[str, Any]]) -> None:
    """Print reproductions with their papers, their planned and finished cells, and their claims."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("reproduction", "paper", "cells", "done", "claim"):
        table.add_column(heading, no_wrap=heading != "claim")
    for one in found:
        arxiv = f"arXiv {one['paper']['arxiv']}"
        table.add_row(one["name"], arxiv, str(one["planned"]), str(one["done"]), Text(one["claim"]))
    console.print(table)


def tell_judged(found: list[dict[str, Any]]) -> None:
    """Print the outcome of each reproduction and the evidence for it."""
    from regard.reproductions.framework.telling import remarks

    for one in found:
        missing = f"  ({one['done']} of {one['planned']} cells)" if one["missing"] else ""
        console.print(Text.assemble((f"{one['name']}: {one['outcome']}", "bold"), (missing, "dim")))
        console.print(Text(one["claim"]))
        for finding in one["findings"]:
            console.print(Text(f"- {_judged(finding)}"))
        for finding in one["needs"]:
            console.print(Text(f"- it can tell only if {_judged(finding)}"))
        for remark in remarks(one):
            console.print(Text(f"- {remark}", style="dim"))
        console.print()


def _judged(finding: dict[str, Any]) -> str:
    from regard.reproductions.framework.telling import measured_words

    return f"{finding['says']}: {measured_words(finding)}: {finding['outcome']}"


def _pilots_told(found: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("expectation", "mean", "spread", "seeds", "within, with 10 seeds", "seeds to decide"):
        table.add_column(heading, justify="left" if heading == "expectation" else "right")
    for one in found:
        table.add_row(Text(one["name"], style="bold"))
        for row in (row for row in one["findings"] if row["seeds"]):
            numbers = [row[name] for name in ("mean", "spread", "seeds", "half_width", "seeds_to_decide")]
            table.add_row(Text(row["says"]), *("-" if n is None else f"{n:.3g}" for n in numbers))
    console.print(table)
