"""`regard advise`: which mechanism to use, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from regard.cli.arguments import read_lengths, read_names
from regard.cli.console import console, emit
from regard.cli.options import DEVICE, JSON, PLUGINS
from regard.cli.progress import progress
from regard.contract import Pattern
from regard.workbench.plugins import enter_plugins


def advise_command(
    lengths: Annotated[str, typer.Option(help="Length, or comma-separated lengths: 512,8k (k is 1024).")] = "1024",
    use: Annotated[str, typer.Option(help="train, infer or serve (token after token, from a state).")] = "infer",
    needs: Annotated[
        str,
        typer.Option(
            help="Comma-separated list of exact, recall, keep-all, order, any-length, constant-state, weights, bias; "
            "--show-needs explains them."
        ),
    ] = "",
    memory: Annotated[
        str | None, typer.Option(help="Memory limit of one layer, not counting weights and input: 512MiB, 2GB.")
    ] = None,
    pattern: Annotated[str, typer.Option(help="Pattern of the layer.")] = Pattern.CAUSAL_SELF.value,
    dim: Annotated[int, typer.Option(help="Width of the layer.")] = 512,
    heads: Annotated[int, typer.Option(help="Heads.")] = 8,
    head_dim: Annotated[int | None, typer.Option(help="Width of a head; dim / heads by default.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences in a batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float64.")] = "float32",
    device: DEVICE = "cpu",
    short_convolution: Annotated[
        int | None,
        typer.Option(help="Width of the short convolutions in every layer that has them; each layer's own by default."),
    ] = None,
    mechanisms: Annotated[str, typer.Option(help="Candidates: comma-separated names, or all.")] = "all",
    exclude: Annotated[str, typer.Option(help="Comma-separated names to exclude.")] = "",
    results: Annotated[
        Path | None, typer.Option(help="Output folder of regard compare, whose results are used to judge quality.")
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            help="Time for measuring, once per machine and size. The deciding figures are always measured at 32 and 64 tokens; "
            "starting and building the layers are not counted."
        ),
    ] = 120.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again instead of using stored measurements.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Measure the error of the predictions at five other lengths.")
    ] = False,
    show_needs: Annotated[bool, typer.Option("--show-needs", help="Explain each need and exit.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Show all mechanisms, reasons, changes and notes, and all lines to paste.")
    ] = False,
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Say which mechanism is fastest and smallest for a length, a use and your needs, before anything is trained.

    Examples:

    \b
        regard advise --lengths 4096 --use train
        regard advise --lengths 512,8192 --use serve --needs recall --memory 64MiB
        regard advise --lengths 2048 --results runs/compare --json
        regard advise --check
    """
    from regard.measurement.units import parse_size
    from regard.workbench.advice.advise import advise
    from regard.workbench.advice.check import check as run_check
    from regard.workbench.advice.needs import NEEDS, parse_needs
    from regard.workbench.advice.settings import AdviseSettings
    from regard.workbench.advice.text import advice_text, errors_table, short_text

    enter_plugins(plugin)
    if show_needs:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, meaning in NEEDS.items():
            table.add_row(name, Text(meaning))
        emit(NEEDS) if as_json else console.print(table)
        return
    settings = AdviseSettings(
        lengths=read_lengths(lengths),
        use=use,
        needs=parse_needs(needs),
        memory=None if memory is None else parse_size(memory),
        pattern=Pattern.parse(pattern),
        dim=dim,
        heads=heads,
        head_dim=head_dim,
        batch=batch,
        dtype=dtype,
        device=device,
        mechanisms=None if mechanisms.strip() == "all" else read_names(mechanisms),
        exclude=read_names(exclude),
        seconds=seconds,
        short_convolution=short_convolution,
    )
    with progress(quiet=as_json) as (bar, line):
        shown = bar.add_task("advise", total=None)

        def say(text: str) -> None:
            if not as_json:
                bar.console.print(Text(text, style="dim"))

        def on_sample(what: str, length: int, done: int, total: int) -> None:
            bar.update(shown, description=f"{what} at {length}", completed=done, total=total)
            line(f"{what} at {length}: {done} of {total}")

        def on_step(doing: str, done: int, total: int) -> None:
            bar.update(shown, description=doing, completed=done, total=total)
            line(f"{doing}: {done} of {total}")

        if check:
            errors_found = run_check(settings, fresh=fresh, say=say, on_step=on_step)
        else:
            advice = advise(settings, results=results, fresh=fresh, say=say, on_sample=on_sample)
    if check:
        emit([e.as_dict() for e in errors_found]) if as_json else console.print(errors_table(errors_found))
    elif as_json:
        emit(advice.as_dict())
    else:
        for part in advice_text(advice) if everything else short_text(advice):
            console.print(part)
