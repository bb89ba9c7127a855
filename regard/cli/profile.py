"""`regard profile`: time and memory against length."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.table import Table

from regard.cli.arguments import read_lengths
from regard.cli.console import console, emit
from regard.cli.options import DEVICE, JSON, PLUGINS
from regard.cli.progress import progress
from regard.contract import Pattern
from regard.measurement import units
from regard.workbench.plugins import enter_plugins


def profile_command(
    mechanisms: Annotated[list[str], typer.Argument(help="Mechanisms; softmax is always measured too.")],
    pattern: Annotated[str, typer.Option(help="A pattern that all of them support.")] = Pattern.CAUSAL_SELF.value,
    lengths: Annotated[
        str, typer.Option(help="Comma-separated lengths: 512,8k (k is 1024).")
    ] = "256,512,1024,2048,4096",
    what: Annotated[
        str, typer.Option(help="What to time, comma-separated: forward, training, decode.")
    ] = "forward,training,decode",
    batch: Annotated[int, typer.Option(help="Sequences in a batch.")] = 1,
    heads: Annotated[int, typer.Option(help="Heads.")] = 8,
    head_dim: Annotated[int | None, typer.Option(help="Width of a head; 64, or dim / heads with --dim.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float64.")] = "float32",
    seconds: Annotated[float, typer.Option(help="Seconds of timing at each length.")] = 1.0,
    layer: Annotated[bool, typer.Option("--layer", help="Measure layers with projections, not functions.")] = False,
    dim: Annotated[int | None, typer.Option(help="Width of the layers; heads times head-dim by default.")] = None,
    device: DEVICE = "cpu",
    growing: Annotated[
        bool,
        typer.Option("--growth", help="Also fit how time and memory grow with the length, next to the card's cost."),
    ] = False,
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Measure time and memory against length, interleaved with softmax; with medians, spread and efficiency lengths.

    Examples:

    \b
        regard profile gated_linear delta_rule
        regard profile linear --pattern noncausal-self --lengths 1024,4096,16384 --what forward
        regard profile linear delta_rule --growth --lengths 1024,2048,4096,8192,16384
        regard profile mamba2 large_kernel --layer --dim 512
        regard profile local --json
    """
    from regard.workbench.profile import ProfileSettings, growth, profile

    enter_plugins(plugin)
    settings = ProfileSettings(
        tuple(mechanisms),
        Pattern.parse(pattern),
        read_lengths(lengths),
        tuple(part.strip() for part in what.split(",")),
        batch,
        heads,
        head_dim,
        dtype,
        seconds,
        layer,
        dim,
        device,
    )
    with progress(quiet=as_json) as (bar, line):
        task = bar.add_task("profile", total=len(settings.lengths) * len(settings.what))

        def on_length(kind: str, length: int) -> None:
            bar.update(task, advance=1, description=f"{kind} at {length}")
            line(f"{kind} at {length}")

        grown = {}
        if growing:
            line("growth")
            grown = growth(settings)
        found = profile(settings, on_length=on_length)
    if as_json:
        emit({**found.as_dict(), "growth": {name: dataclasses.asdict(exponents) for name, exponents in grown.items()}})
        return
    for kind in settings.what:
        rows = [m for m in found.measurements if m.what == kind]
        table = Table(
            box=None,
            pad_edge=False,
            header_style="dim",
            title=f"{kind}: milliseconds (middle half) and memory",
            title_justify="left",
        )
        names = list(dict.fromkeys(m.mechanism for m in rows))
        for heading in ("length", *names):
            table.add_column(heading, justify="right")
        for length in settings.lengths:
            at = {m.mechanism: m for m in rows if m.length == length}
            table.add_row(str(length), *(_measurement(at[n]) if n in at else "" for n in names))
        console.print(table)
        console.print()
    for line_ in _speeds(found):
        console.print(line_)
    for name, crossing in found.efficiency.items():
        farthest = max((m.length for m in found.measurements if m.mechanism == name), default=0)
        said = ", ".join(f"{k} from {v}" if v else f"{k} not by {farthest}" for k, v in crossing.items())
        console.print(f"{name} beats softmax: {said}")
    for name, p in grown.items():
        console.print(
            f"{name} grows: time ~ length^{p.time:.2f} ({p.low:.2f} to {p.high:.2f}; by its card {p.time_by_cost:.2f}), "
            f"memory ~ length^{p.memory:.2f} (by its card {p.memory_by_cost:.2f})"
        )
    for reason in found.skipped.values():
        console.print(f"[dim]{reason}[/dim]")


def _speeds(found: Any) -> list[str]:
    """The backend of each mechanism, and its fraction of the machine's peak at the longest length."""
    peak = "" if found.peak_gflops is None else f"; the machine's multiply-adds peak at {found.peak_gflops:.0f} GFLOP/s"
    lines = []
    for name in dict.fromkeys(m.mechanism for m in found.measurements):
        own = [m for m in found.measurements if m.mechanism == name]
        rated = max((m for m in own if m.gflops is not None), key=lambda m: m.length, default=None)
        line = f"{name}: backend {', '.join(dict.fromkeys(m.backend for m in own))}"
        if rated is not None:
            line += f"; forward at {rated.length}: {rated.gflops:.0f} GFLOP/s"
            line += "" if rated.peak_share is None else f", {rated.peak_share:.0%} of the peak"
        lines.append(line)
    rated_any = any(m.gflops is not None for m in found.measurements)
    told = f"(operations as the cards count them: all pairs, also those that causal kernels leave out{peak})"
    return [*lines, told] if rated_any else lines


def _measurement(m: Any) -> str:
    memory = f"  {units.size(m.memory_bytes)}" if m.memory_bytes is not None else ""
    return f"{m.milliseconds:.3g} ({m.low:.3g}-{m.high:.3g}){memory}"
