"""`regard study`: ask one question of many mechanisms at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from regard.cli.console import console, emit
from regard.cli.options import ADDRESS, ENGINE, JSON, PLUGINS, SHARD, TIMINGS
from regard.cli.reproduce import cells_in, refuse_beside, run_cells, tell_judged
from regard.cli.sweeps import sweep_of
from regard.contract import Unsupported
from regard.measurement import units
from regard.workbench.plugins import enter_plugins


def study(
    name: Annotated[str | None, typer.Argument(help="A study; all are listed when none is named.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Argument(help="Your files, or names, if the study takes any: `regard study` lists which do."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Size, by a name that `regard study` lists; the smallest when not given.")
    ] = None,
    mechanisms: Annotated[
        str | None,
        typer.Option(
            help="Mechanisms, written as for `regard compare`, or all, for every one that can take part; the study's own and your plugins' when "
            "not given."
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of each setting; the study's own when not given.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="A time (20m, 2h): cells that would not finish within it are left for the next call."),
    ] = None,
    only: SHARD = None,
    timings: TIMINGS = None,
    engine: ENGINE = "local",
    address: ADDRESS = None,
    plugin: PLUGINS = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results; the same command resumes from it. When not given, runs/studies, or runs/reproduce "
            "for a study that shares its cells with regard reproduce."
        ),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Show the finished runs; run nothing.")] = False,
    as_json: JSON = False,
) -> None:
    """Ask one question of many mechanisms at once, and write a report with tables, pictures and a verdict.

    Every run is stored as soon as it ends, so the command can be stopped and repeated; processes with different shards
    can share a folder. A plugin is a file with a MECHANISM, or file.py:Class for any torch module, which enters with
    the patterns that it is found to have (see regard detect-patterns).

    Examples:

    \b
        regard study
        regard study wide-attention --preset small --no-timings --shard 1/2
        regard study wide-attention --preset small --no-timings --engine ray --address 192.168.0.10:6379
        regard study token-reduction --budget 30m
        regard study wide-attention --preset small --table --json
        regard study attention-passes my_cascade.txt my_machine.yaml
        regard study attention-passes my_cascade.txt edge this-processor
        regard study training-dynamics my_corpus.txt
        regard study training-dynamics my_corpus.txt --mechanisms sigmoid,local:window=8
        regard study cab --plugin my_module.py:MyAttention
        regard study cab LM=my_novel.txt MLM=my_novel.txt --mechanisms softmax,gated_linear
        regard study cab --preset small LSTF=my_load.csv,target=load SR=my_photos/
        regard study in-context-functions --plugin my_mechanism.py --mechanisms softmax,my_mechanism --json
    """
    from regard.measurement.sharding import shard
    from regard.reproductions import plan
    from regard.studies import get_study, list_studies, opened

    entered = enter_plugins(plugin)
    if len(entered.mechanisms) < len(entered.files):
        raise Unsupported(
            "a plugin without a mechanism in regard study", supported="a file with a MECHANISM, or file.py:Class"
        )
    sweeps = sweep_of(engine, address, plugin)
    if name is None:
        found = [get_study(one) for one in list_studies()]
        told = [
            {
                "name": one.name,
                "question": one.question,
                "presets": one.presets,
                "seconds": {preset: one.seconds(preset) for preset in one.presets},
                "mechanisms": one.mechanisms,
                "files": one.takes_data,
            }
            for one in found
        ]
        emit({"studies": told}) if as_json else _tell_list(told)
        return
    asked = get_study(name)
    chosen = asked.choose(preset, mechanisms, data or (), entered.mechanisms)
    seconds = _seconds(budget)
    folder = Path(asked.folder) if output is None else output
    if table:
        refuse_beside("--table", shard=only, timings=timings, budget=budget)
    else:
        cells = shard(plan([asked.make(chosen)], seeds, timings=timings), only)
        with sweeps as sweep:
            run_cells(cells, folder, quiet=as_json, within=seconds, sweep=sweep)
    with cells_in(folder) as store:
        record = opened(asked, chosen, store, seeds)
    report = None if table else _write(record, folder / f"{asked.name}.html")
    if as_json:
        emit({**record, "report": None if report is None else str(report)})
        return
    tell_judged([record])
    for part in record["sections"]:
        if part["rows"]:
            console.print(Text(part["title"], style="bold"))
            console.print(_rows(part["rows"]))
    if report is not None:
        console.print(Text(f"report: {report}"))


def _write(record: dict[str, Any], path: Path) -> Path:
    from regard.studies.framework.report import write_study_report

    return write_study_report(record, path)


def _seconds(budget: str | None) -> float | None:
    from regard.measurement.budget import Budget

    if budget is None:
        return None
    parsed = Budget.parse(budget)
    if parsed.unit != "seconds":
        raise Unsupported(f"budget {budget!r} of a study", supported="a time: 90s, 20m, 2h", nearest="20m")
    return parsed.amount


def _tell_list(found: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("study", "presets, on one core", "mechanisms", "question, and what it takes of yours"):
        table.add_column(heading, no_wrap=not heading.startswith("question"))
    for one in found:
        entered = str(len(one["mechanisms"])) if one["mechanisms"] else "its own"
        presets = "\n".join(f"{name}: {units.duration(one['seconds'][name])}" for name in one["presets"])
        files = f" Takes {one['files']}." if one["files"] else ""
        table.add_row(one["name"], presets, entered, Text.assemble(one["question"], (files, "dim")))
    console.print(table)


def _rows(rows: list[dict[str, Any]]) -> Table:
    from regard.workbench.reports.section_pages import cell

    shown = Table(box=None, pad_edge=False, header_style="dim")
    for heading in rows[0]:
        words = any(isinstance(row[heading], str) for row in rows)
        shown.add_column(
            heading, justify="left" if words else "right", overflow="fold"
        )  # figures keep all their digits
    for row in rows:
        shown.add_row(*map(cell, row.values()))
    return shown
