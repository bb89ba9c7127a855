"""`regard offload`: does attention on other devices pay off, by a table of devices or by measuring on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from regard.cli.arguments import read_lengths
from regard.cli.console import console, emit, errors
from regard.cli.options import JSON, PLUGINS
from regard.contract import Unsupported
from regard.workbench.plugins import enter_plugins

if TYPE_CHECKING:
    from regard.models import LanguageModel
    from regard.serving.offload.costs import Plan

SHOWN = 5


def offload(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Folder of regard train; a random model of 4 layers and 256 features when not given."),
    ] = None,
    devices: Annotated[
        Path | None,
        typer.Option(
            help="Plan instead of measuring, from this table (YAML, TOML or JSON) of devices that you can rent."
        ),
    ] = None,
    context: Annotated[
        str, typer.Option(help="Lengths of the sequences in tokens, tried one after the other.")
    ] = "1024,4096",
    batch: Annotated[int, typer.Option(help="Sequences at a time, when measuring.")] = 8,
    workers: Annotated[int, typer.Option(help="Attention workers, when measuring.")] = 1,
    split: Annotated[
        str, typer.Option(help="What is split among the workers: auto, head, request or sequence.")
    ] = "auto",
    backend: Annotated[str, typer.Option(help="Where workers run: process, tcp or local.")] = "process",
    threads: Annotated[int, typer.Option(help="Threads of the model, and of each worker.")] = 1,
    cores: Annotated[
        str | None,
        typer.Option(help="Processor cores: first the model's, then those of the workers; any when not given."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of measurement at each length.")] = 10.0,
    plugins: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Attention offloading: the model on one device, keys, values and attention on others (regard serve --offload).

    With --devices, say which devices give the most tokens for the money, with everything on one kind or with attention
    on another, from counted operations and bytes. Prices and figures are yours, each with its source. Without
    --devices, measure the time of a step on this machine, with processes as workers: one batch at a time against two
    alternating micro-batches.

    Examples:

    \b
        regard offload --devices table.yaml --context 1024,8192,65536
        regard offload my_model --devices table.yaml --json
        regard offload my_model --workers 1 --batch 16 --context 4096 --cores 0,1
    """
    enter_plugins(plugins)
    contexts = read_lengths(context, "--context")
    if devices is not None:
        _plan(devices, folder, contexts, as_json)
        return
    import torch

    from regard.serving.offload.backends import create_backend
    from regard.serving.offload.measure import Load, measure

    loads = [Load(batch, tokens, seconds) for tokens in contexts]
    chosen = None if cores is None else [int(core) for core in _cores(cores)]
    started = create_backend(backend, threads, None if chosen is None else chosen[1:])
    model = _model(folder)
    torch.set_num_threads(threads)
    if chosen is not None:
        os.sched_setaffinity(0, chosen[:1])
    rows = []
    for load in loads:
        rows.append(measure(model, workers, started, load, split=split))
        if not as_json:
            errors.print(f"context {load.context}: gain {rows[-1]['gain']:.2f}", soft_wrap=True)
    if as_json:
        emit({"backend": backend, "threads": threads, "rows": rows})
        return
    console.print(measured_table(rows))


def _cores(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) < 2 or not all(part.isdecimal() for part in parts):
        raise Unsupported(f"--cores {text!r}", supported="the model's core, then one for each worker", nearest="0,1")
    return parts


def _model(folder: Path | None) -> LanguageModel:
    import torch

    from regard.models import LanguageModel, LanguageModelConfig
    from regard.serving.language import LanguageReader
    from regard.serving.opened import open_model

    if folder is None:
        torch.manual_seed(0)
        return LanguageModel(LanguageModelConfig(256, dim=256, num_layers=4, num_heads=8, num_kv_heads=4)).eval()
    reader = open_model(folder, rows=1, cache_tokens=32).reader
    if not isinstance(reader, LanguageReader):
        raise Unsupported(f"offloaded attention of the model in {folder}", supported="language models of regard")
    return reader.model


def _plan(path: Path, folder: Path | None, contexts: tuple[int, ...], as_json: bool) -> None:
    from regard.serving.offload.costs import Sizes, crossing, plans, read_table, required_bandwidth

    table = read_table(path)
    sizes = table.model if folder is None else Sizes.of(_model(folder))
    if sizes is None:
        raise Unsupported("a plan without a model", supported="a folder, or model: in the table of devices")
    found = {context: plans(table.devices, table.network, sizes, context) for context in contexts}
    gains = {
        context: pairs[0].tokens_per_unit / alone[0].tokens_per_unit if alone and pairs else None
        for context, (alone, pairs) in found.items()
    }
    if as_json:
        rows = [
            {
                "context": context,
                "one_kind": [plan.as_record() for plan in alone[:SHOWN]],
                "offloaded": [plan.as_record() for plan in pairs[:SHOWN]],
                "gain": gains[context],
                "required_bandwidth": required_bandwidth(sizes, pairs[0].batch, pairs[0].seconds) if pairs else None,
            }
            for context, (alone, pairs) in found.items()
        ]
        emit({"rows": rows, "crossing": crossing(gains), "attention_intensity": sizes.attention_intensity})
        return
    for context, (alone, pairs) in found.items():
        console.print(plans_table(context, alone[:SHOWN], pairs[:SHOWN]))
    for context, gain in gains.items():
        said = "does not fit both ways" if gain is None else f"{gain:.2f} times the tokens for the money"
        console.print(Text(f"context {context}: offloaded attention {said}"))
    at = crossing(gains)
    console.print(Text("It pays at none of these." if at is None else f"It pays from a context of {at} on."))
    console.print(Text("for one: tokens for one unit of the price's currency. Counted from the table, not measured."))


def plans_table(context: int, alone: list[Plan], pairs: list[Plan]) -> Table:
    """Plans for one context length, devices alone and in pairs; prices per hour, and tokens per unit of money ("for
    one")."""
    table = Table(box=None, pad_edge=False, header_style="dim", title=f"context {context}", title_justify="left")
    for heading in ("model", "attention"):
        table.add_column(heading, no_wrap=True)
    for heading in ("batch", "step", "tokens/s", "price/h", "for one", "bound by"):
        table.add_column(heading, justify="right", no_wrap=True)
    for plan in (*alone, *pairs):
        table.add_row(
            plan.model,
            plan.attention or "same",
            f"{plan.batch} in 2" if plan.micro_batches == 2 else str(plan.batch),
            f"{1e3 * plan.seconds:.1f} ms",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.price_per_hour:.2f}",
            f"{plan.tokens_per_unit:,.0f}",
            plan.busiest,
        )
    return table


def measured_table(rows: list[dict[str, Any]]) -> Table:
    """Measured seconds per step, next to the simulated ones."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("context", "serial", "early", "pipelined", "both", "gain", "simulated", "error"):
        table.add_column(heading, justify="right")
    for row in rows:
        taken = [row["seconds_of"][name]["median"] for name in ("serial", "early", "pipelined", "pipelined_early")]
        table.add_row(
            str(row["context"]),
            *(f"{1e3 * seconds:.2f} ms" for seconds in taken),
            f"{row['gain']:.2f}",
            f"{1e3 * row['simulated_seconds']:.2f} ms",
            f"{100 * row['simulation_error']:+.0f} %",
        )
    return table
