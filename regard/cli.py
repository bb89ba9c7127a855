"""The command line. Every command has ``--help`` with examples; commands that a program may read have ``--json``."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from regard.backends import NATIVE, engine_names, which_backend
from regard.backends.native import library
from regard.catalogue import get_mechanism, get_module, list_mechanisms, load_plugin
from regard.contract import Kind, Pattern, Unsupported, closest
from regard.functional import function_name
from regard.measurement import provenance
from regard.training.memory import keep_freed_memory

if TYPE_CHECKING:
    from regard.measurement.store import Store

app = typer.Typer(
    name="regard",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)

JSON = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")]
PLUGINS = Annotated[
    list[Path] | None, typer.Option("--plugin", help="Python file that defines a MECHANISM or a TASK. Repeatable.")
]


def _load(plugins: list[Path] | None) -> list[Any]:
    return [load_plugin(path) for path in plugins or ()]


def _plain(text: str) -> Text:
    """Text of a user's files, whose control characters are not the terminal's to obey."""
    from regard.tasks.documents import printable

    return Text("\n".join(printable(line) for line in text.split("\n")))


def _emit(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _version(asked: bool) -> None:
    if asked:
        print(f"regard {provenance.regard_version()}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """The attention workbench: list, verify, profile, advise on and compare attention mechanisms on your data and machine."""


@app.command("list")
def list_command(
    pattern: Annotated[str | None, typer.Option(help="Only mechanisms that have this pattern.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="Only this kind: attention, mixer, pooling, projection, wrapper.")
    ] = None,
    recurrent: Annotated[
        bool | None, typer.Option("--recurrent/--not-recurrent", help="Whether the decoding state stays the same size.")
    ] = None,
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """List the mechanisms in the catalogue.

    Examples:

    \b
        regard list
        regard list --pattern causal-self --recurrent
        regard list --kind mixer --json
    """
    _load(plugin)
    cards = [get_mechanism(n) for n in list_mechanisms(pattern=pattern, kind=kind, recurrent=recurrent)]
    if as_json:
        _emit([_card(card.name) for card in cards])
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    headings = ["mechanism", "patterns", "what it does"]
    if console.width >= WIDE:
        headings[1:1] = ["kind", "paper"]
    for heading in headings:
        table.add_column(heading, no_wrap=heading != "what it does")
    for card in cards:
        marks = " ".join(_SHORT[p] if p in card.patterns else "--" for p in Pattern)
        cells = {"mechanism": card.name, "kind": card.kind.value, "paper": f"arXiv {card.paper.arxiv}"}
        cells |= {"patterns": marks, "what it does": card.summary}
        table.add_row(*(Text(cells[heading]) for heading in headings))
    console.print(table)
    console.print("[dim]patterns: NS noncausal-self, CS causal-self, NC noncausal-cross, CC causal-cross[/dim]")


WIDE = 110
"""Columns of a terminal that has room for a mechanism's kind and paper too."""

_SHORT = {
    Pattern.NONCAUSAL_SELF: "NS",
    Pattern.CAUSAL_SELF: "CS",
    Pattern.NONCAUSAL_CROSS: "NC",
    Pattern.CAUSAL_CROSS: "CC",
}


def _card(name: str) -> dict[str, Any]:
    card = get_mechanism(name)
    return {
        "name": card.name,
        "aliases": list(card.aliases),
        "kind": card.kind.value,
        "summary": card.summary,
        "paper": dataclasses.asdict(card.paper),
        "inputs": dict(card.inputs),
        "patterns": [p.value for p in card.patterns],
        "refused": {p.value: reason for p, reason in card.refused.items()},
        "forms": list(card.forms),
        "recurrent": card.recurrent,
        "options": {f.name: _default(f) for f in dataclasses.fields(card.config)},
        "honours": sorted(card.honours),
        "weights": card.weights,
        "positions": list(card.accepts_positions),
        "refused_positions": card.refused_positions,
        "waivers": [
            {"property": w.property, "reason": w.reason, "holds_with": w.holds_with and dict(w.holds_with)}
            for w in card.waivers
        ],
    }


def _default(field: Any) -> Any:
    return field.default if field.default is not dataclasses.MISSING else None


@app.command()
def show(name: str, plugin: PLUGINS = None, as_json: JSON = False) -> None:
    """Show a mechanism: equations, symbols, options, patterns and how to call it.

    Examples:

    \b
        regard show gated_linear
        regard show gla --json
    """
    _load(plugin)
    card = get_mechanism(name)
    if as_json:
        _emit(_card(name) | {"documentation": inspect.cleandoc(get_module(card.name).__doc__ or "")})
        return
    console.print(f"[bold]{card.name}[/bold]  {card.kind.value}, arXiv {card.paper.arxiv} ({card.paper.year})")
    if card.aliases:
        console.print(f"[dim]also called {', '.join(card.spelled_aliases())}[/dim]")
    console.print()
    console.print(Text(inspect.cleandoc(get_module(card.name).__doc__ or "")))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("inputs", Text(", ".join(f"{n} ({', '.join(a)})" for n, a in card.inputs.items())))
    table.add_row("patterns", ", ".join(card.patterns))
    for pattern, reason in card.refused.items():
        table.add_row("refused", Text(f"{pattern.value}: {reason}"))
    table.add_row(
        "options", Text(", ".join(f"{f.name}={_default(f)!r}" for f in dataclasses.fields(card.config)) or "none")
    )
    table.add_row("positions", ", ".join(card.accepts_positions))
    if card.refused_positions:
        table.add_row("no others", card.refused_positions)
    table.add_row("engine", card.engine or "none: torch operators")
    table.add_row("function", Text(f"regard.functional.{function_name(card)}"))
    table.add_row("layer", Text(f'regard.create_layer("{card.name}", dim, num_heads)'))
    console.print()
    console.print(table)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Of the mechanism: lower case letters, digits and underscores.")],
    output: Annotated[Path, typer.Option(help="Folder of the file.")] = Path(),
) -> None:
    """Begin a mechanism: a file with its card, and a definition that fails until you write it.

    Examples:

    \b
        regard new my_mechanism
        regard verify --plugin my_mechanism.py my_mechanism
    """
    from regard.workbench.scaffold import new_mechanism

    path = new_mechanism(name, output)
    console.print(Text(f"{path} is written. Next:"))
    console.print(Text("- write `reference`, the definition, and the lines of the docstring"))
    console.print(Text(f"- regard verify --plugin {path} {name}"))
    console.print(Text(f"- regard compare --plugin {path} --mechanisms softmax,{name}"))


@app.command()
def verify(
    mechanisms: Annotated[list[str] | None, typer.Argument(help="Mechanisms; all when none is named.")] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="Only these patterns.")] = None,
    prop: Annotated[list[str] | None, typer.Option("--property", help="Only these properties.")] = None,
    full: Annotated[bool, typer.Option("--full/--quick", help="Inductor and more seeds; resumable.")] = False,
    output: Annotated[Path, typer.Option(help="Folder of the store that --full resumes from.")] = Path("runs/verify"),
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Measure the equality matrix: definition = fast forms = steps, padding, packing, causality, gradients and more.

    Ends with exit code 0 when every cell holds, 1 when one fails.

    Examples:

    \b
        regard verify softmax gated_linear
        regard verify --plugin my_mechanism.py my_mechanism
        regard verify local:form=block,block=4
        regard verify --full --output runs/verify
        regard verify --json > matrix.json
    """
    from regard.measurement.store import Store
    from regard.models.variants import known_name
    from regard.workbench.failures import grouped, kind
    from regard.workbench.verify import PROPERTIES, Cell, plan
    from regard.workbench.verify import verify as run

    modules = _load(plugin)
    if not mechanisms and modules:
        mechanisms = [m.MECHANISM.name for m in modules if hasattr(m, "MECHANISM")]
    names = [known_name(n) for n in mechanisms] if mechanisms else list_mechanisms()
    known = [p.name for p in PROPERTIES]
    for name in prop or ():
        if name not in known:
            raise Unsupported(f"property {name!r}", supported=", ".join(known))
    total = sum(1 for _ in plan(names, patterns=pattern, properties=prop))
    store = Store(output / "results.db") if full else None
    cells: list[Cell] = []
    told: set[Any] = set()
    with _progress(quiet=as_json) as (bar, line):
        task = bar.add_task("verify", total=total)

        def on_cell(cell: Cell) -> None:
            cells.append(cell)
            if store is not None:
                store.put("verify", _verify_key(cell), dataclasses.asdict(cell))
            bar.update(task, advance=1, description=f"{cell.mechanism} {cell.pattern} {cell.property}")
            line(f"{len(cells)} cells, {cell.mechanism} {cell.pattern}")
            if cell.status == "fail" and not as_json and kind(cell) not in told:
                told.add(kind(cell))
                bar.console.print(
                    f"[red]fail[/red] {cell.mechanism} {cell.pattern} {cell.property} {cell.dtype}: {escape(cell.detail)}"
                )

        def done(key: dict[str, str]) -> bool:
            row = None if store is None else store.get("verify", {**key, "full": True})
            if row is not None:
                cells.append(Cell(**row.payload))
            return row is not None

        run(names, patterns=pattern, properties=prop, full=full, on_cell=on_cell, done=done)
    failures = [c for c in cells if c.status == "fail"]
    if as_json:
        _emit({"cells": [dataclasses.asdict(c) for c in cells], "failures": len(failures)})
    else:
        console.print(_matrix(cells))
        waived = sum(c.status == "waived" for c in cells)
        console.print(
            f"{len(cells)} cells: {len(cells) - len(failures) - waived} hold, {waived} waived with a reason, {len(failures)} fail"
        )
        for group in grouped(cells):
            console.print(Text(f"- {group}"))
    if failures:
        raise typer.Exit(1)


def _verify_key(cell: Any) -> dict[str, Any]:
    names = ("mechanism", "pattern", "property", "dtype", "backend")
    return {name: getattr(cell, name) for name in names} | {"full": True}


def _matrix(cells: list[Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    short = {"f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}
    columns = {name: (dtype, "torch") for name, dtype in short.items()}
    columns |= {f"native\n{name}": (short[name], "native") for name in ("f32", "bf16")}
    headings = ["mechanism", "cells", "waived", "failed", *columns]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "mechanism" else "right")
    for name in dict.fromkeys(c.mechanism for c in cells):
        own = [c for c in cells if c.mechanism == name]
        worst = {
            column: [c.error for c in own if (c.dtype, c.backend) == kind and c.error is not None]
            for column, kind in columns.items()
        }
        counts = [len(own), sum(c.status == "waived" for c in own), sum(c.status == "fail" for c in own)]
        table.add_row(name, *map(str, counts), *(f"{max(e):.0e}" if e else "" for e in worst.values()))
    return table


@app.command("profile")
def profile_command(
    mechanisms: Annotated[list[str], typer.Argument(help="Mechanisms; softmax is always measured beside them.")],
    pattern: Annotated[str, typer.Option(help="One pattern that all of them have.")] = Pattern.CAUSAL_SELF.value,
    lengths: Annotated[str, typer.Option(help="Comma-separated lengths.")] = "256,512,1024,2048,4096",
    what: Annotated[str, typer.Option(help="Of forward, training, decode.")] = "forward,training,decode",
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    heads: Annotated[int, typer.Option(help="Heads.")] = 8,
    head_dim: Annotated[int | None, typer.Option(help="Width of a head; 64, or dim / heads with --dim.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float64.")] = "float32",
    seconds: Annotated[float, typer.Option(help="Timing for each length.")] = 1.0,
    layer: Annotated[bool, typer.Option("--layer", help="Measure layers with projections, not functions.")] = False,
    dim: Annotated[int | None, typer.Option(help="Width of the layers; heads times head-dim by default.")] = None,
    device: Annotated[str, typer.Option(help="A device of torch.")] = "cpu",
    growing: Annotated[
        bool,
        typer.Option("--growth", help="Also fit how time and memory grow with the length, beside the card's cost."),
    ] = False,
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Time and memory against length, interleaved with softmax; medians, spread and efficiency lengths.

    Examples:

    \b
        regard profile gated_linear delta_rule
        regard profile linear --pattern noncausal-self --lengths 1024,4096,16384 --what forward
        regard profile linear delta_rule --growth --lengths 1024,2048,4096,8192,16384
        regard profile mamba2 large_kernel --layer --dim 512
        regard profile local --json
    """
    from regard.workbench.profile import ProfileSettings, growth, profile

    _load(plugin)
    settings = ProfileSettings(
        tuple(mechanisms),
        Pattern.parse(pattern),
        _integers("lengths", lengths),
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
    with _progress(quiet=as_json) as (bar, line):
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
        _emit({**found.as_dict(), "growth": {name: dataclasses.asdict(exponents) for name, exponents in grown.items()}})
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
            table.add_row(str(length), *(_measurement(at[n]) for n in names))
        console.print(table)
        console.print()
    for line_ in _speeds(found):
        console.print(line_)
    for name, crossing in found.efficiency.items():
        said = ", ".join(f"{k} from {v}" if v else f"{k} not by {max(settings.lengths)}" for k, v in crossing.items())
        console.print(f"{name} beats softmax: {said}")
    for name, p in grown.items():
        console.print(
            f"{name} grows: time ~ length^{p.time:.2f} ({p.low:.2f} to {p.high:.2f}; by its card {p.time_by_cost:.2f}), "
            f"memory ~ length^{p.memory:.2f} (by its card {p.memory_by_cost:.2f})"
        )
    for reason in found.skipped.values():
        console.print(f"[dim]{reason}[/dim]")


def _speeds(found: Any) -> list[str]:
    """What ran each mechanism, and at what share of the machine's peak at the longest length."""
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
    return [*lines, f"(operations as the cards count them{peak})"] if rated_any else lines


def _measurement(m: Any) -> str:
    memory = f"  {m.memory_bytes / 2**20:.1f} MiB" if m.memory_bytes is not None else ""
    return f"{m.milliseconds:.3g} ({m.low:.3g}-{m.high:.3g}){memory}"


@app.command("advise")
def advise_command(
    lengths: Annotated[str, typer.Option(help="Length, or comma-separated lengths.")] = "1024",
    use: Annotated[str, typer.Option(help="train, infer or serve (token after token, from a state).")] = "infer",
    needs: Annotated[
        str,
        typer.Option(
            help="Comma-separated, of exact, recall, keep-all, order, any-length, constant-state, weights, bias; "
            "--show-needs."
        ),
    ] = "",
    memory: Annotated[
        str | None, typer.Option(help="Most that one layer may hold beside weights and input: 512MiB, 2GB.")
    ] = None,
    pattern: Annotated[str, typer.Option(help="Pattern of the layer.")] = Pattern.CAUSAL_SELF.value,
    dim: Annotated[int, typer.Option(help="Width of the layer.")] = 512,
    heads: Annotated[int, typer.Option(help="Heads.")] = 8,
    head_dim: Annotated[int | None, typer.Option(help="Width of a head; dim / heads by default.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="A device of torch.")] = "cpu",
    short_convolution: Annotated[
        int | None,
        typer.Option(help="Width of short convolutions in every layer that takes them; each layer's own by default."),
    ] = None,
    mechanisms: Annotated[str, typer.Option(help="Candidates: comma-separated names, or all.")] = "all",
    exclude: Annotated[str, typer.Option(help="Comma-separated names that are no candidates.")] = "",
    results: Annotated[
        Path | None, typer.Option(help="Output folder of regard compare: what it measured informs quality.")
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            help="Time to measure, once for a machine and size. What decides is measured at 32 and 64 tokens in any case; "
            "starting and building the layers are not counted."
        ),
    ] = 120.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is known.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Measure how wrong the predictions are, at five other lengths.")
    ] = False,
    show_needs: Annotated[bool, typer.Option("--show-needs", help="Say what each need means, and end.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="All mechanisms, reasons, changes and notes, and all lines to paste.")
    ] = False,
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Say which mechanism is fastest and smallest for a length, a use and what is needed, before anything is trained.

    Examples:

    \b
        regard advise --lengths 4096 --use train
        regard advise --lengths 512,8192 --use serve --needs recall --memory 64MiB
        regard advise --lengths 2048 --results runs/compare --json
        regard advise --check
    """
    from regard.workbench.advise import AdviseSettings, advise, parse_memory
    from regard.workbench.advise_check import check as run_check
    from regard.workbench.advise_text import advice_text, errors_table, short_text
    from regard.workbench.needs import NEEDS, parse_needs

    _load(plugin)
    if show_needs:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, meaning in NEEDS.items():
            table.add_row(name, Text(meaning))
        _emit(NEEDS) if as_json else console.print(table)
        return
    settings = AdviseSettings(
        lengths=_integers("lengths", lengths),
        use=use,
        needs=parse_needs(needs),
        memory=None if memory is None else parse_memory(memory),
        pattern=Pattern.parse(pattern),
        dim=dim,
        heads=heads,
        head_dim=head_dim,
        batch=batch,
        dtype=dtype,
        device=device,
        mechanisms=None if mechanisms.strip() == "all" else _names(mechanisms),
        exclude=_names(exclude),
        seconds=seconds,
        short_convolution=short_convolution,
    )
    with _progress(quiet=as_json) as (bar, line):
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
        _emit([e.as_dict() for e in errors_found]) if as_json else console.print(errors_table(errors_found))
    elif as_json:
        _emit(advice.as_dict())
    else:
        for part in advice_text(advice) if everything else short_text(advice):
            console.print(part)


def _names(text: str) -> tuple[str, ...]:
    from regard.models.variants import read_variants

    return tuple(variant.name for variant in read_variants(text))


@app.command()
def compare(
    data: Annotated[
        list[str] | None, typer.Argument(help="Your files: text, a table or a folder, as the task reads.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Task, as name or name:option=value,option=value: text, recall, copying, listops, images, documents, "
            "matching, paraphrase, summarize, forecast. Repeatable. Default: text and recall; for your data text, or "
            "what the columns of a table or the files of a folder are for."
        ),
    ] = None,
    mechanisms: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: a name, NAME:option=value, a hybrid such as gated_linear*3+softmax, a .toml, .json or "
            ".yaml file; or all. Default: softmax,local,gated_linear,delta_rule; in cross patterns linear for local."
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Time of the whole (8m, 2h), or work of each run (2M tokens, 5e13 flops).")
    ] = "8m",
    seeds: Annotated[int, typer.Option(help="Runs of each mechanism; two or more to judge differences.")] = 2,
    seed_offset: Annotated[
        int, typer.Option(help="The lowest seed: another repeats the comparison by other draws.")
    ] = 0,
    frame: Annotated[
        str,
        typer.Option(
            help="What surrounds each mechanism in its layer: bare, convolution or own. Of several, all are compared in the "
            "first, and those that lead in the others too."
        ),
    ] = "convolution,bare",
    leaders: Annotated[int, typer.Option(help="How many that lead are compared in the other frames.")] = 2,
    output: Annotated[Path, typer.Option(help="Folder of the results; the same command goes on from it.")] = Path(
        "runs/compare"
    ),
    validation: Annotated[
        list[str] | None, typer.Option(help="Held-out data, in the same form; split off when not given.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of an item.")] = None,
    tokenizer: Annotated[
        str, typer.Option(help="Of tasks that read text: bytes, bpe:SIZE or a saved .json.")
    ] = "bytes",
    dim: Annotated[int, typer.Option(help="Width of the backbone.")] = 64,
    layers: Annotated[int, typer.Option(help="Layers of the backbone.")] = 2,
    heads: Annotated[int, typer.Option(help="Heads of a layer.")] = 2,
    rates: Annotated[
        str,
        typer.Option(
            help="Learning rates tried, each in a full run of the first seed; of several, more beyond while the best is at "
            "an end."
        ),
    ] = "0.001,0.003,0.01",
    lengths: Annotated[
        str, typer.Option(help="Lengths at which costs are measured, beside the tasks' own.")
    ] = "256,512,1024,2048,4096",
    at_length: Annotated[
        int | None, typer.Option(help="Length whose cost decides; each task's own when not given.")
    ] = None,
    prefer: Annotated[
        str,
        typer.Option(
            help="What decides at equal quality: inference, training, decode, inference-memory, training-memory or state."
        ),
    ] = "inference",
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the weights of the winner.")] = False,
    stack: Annotated[
        str,
        typer.Option(
            help="How the backbone's layers are stacked, as option=value,option=value: share, share_groups, reversible, "
            "checkpoint_layers, stochastic_depth, exits (as 1+2), exit_threshold, layer_scale, branch_norm."
        ),
    ] = "",
    precision: Annotated[
        str, typer.Option(help="Of training: float32, or mixed: bfloat16, or float16 with a scaled loss.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Where models are trained and measured: cpu, cuda.")] = "cpu",
    only: Annotated[
        str | None,
        typer.Option(
            "--shard",
            help="i/n: only the training runs of share i of n of the mechanisms, beside other processes with the same "
            "output folder; the same command without it then measures costs and writes the report.",
        ),
    ] = None,
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Train mechanisms on the same work, measure quality and cost on this machine, and say which to take.

    Examples:

    \b
        regard compare
        regard compare my_corpus.txt --budget 20m --seeds 3
        regard compare reviews.csv
        regard compare --task images photos/ --mechanisms softmax,agent,flow_attention
        regard compare --task forecast:target=load,covariates=holiday demand.csv --mechanisms softmax,linear
        regard compare --task recall:pairs=16 --mechanisms all --budget "2M tokens" --output runs/recall
        regard compare --mechanisms all --budget "2M tokens" --output runs/all --shard 1/2
        regard compare my_corpus.txt --mechanisms "softmax,local:window=32,gated_linear+softmax" --frame own
    """
    from regard.workbench.budget import Budget
    from regard.workbench.compare import compare as run
    from regard.workbench.compare import train_share
    from regard.workbench.report import SCHEMA
    from regard.workbench.settings import CompareSettings
    from regard.workbench.summary_table import terminal_table
    from regard.workbench.work import default_mechanisms, fitting

    def recognised(described: str) -> None:
        if not as_json:
            console.print(_plain(f"By its contents: --task {described}"))

    modules = _load(plugin)
    tasks = _tasks(task, data, validation, length, tokenizer, modules, recognised)
    settings = CompareSettings(
        default_mechanisms(*tasks) if mechanisms is None else tuple(_variants(mechanisms, tasks)),
        Budget.parse(budget),
        seeds=seeds,
        first_seed=seed_offset,
        frames=tuple(part.strip() for part in frame.split(",") if part.strip()),
        leaders=leaders,
        dim=dim,
        layers=layers,
        heads=heads,
        rates=_numbers("rates", rates),
        lengths=_integers("lengths", lengths),
        at_length=at_length,
        prefer=prefer,
        keep_models=keep_models,
        stack=_stack(stack),
        precision=precision,
        device=device,
    )
    left_out: dict[str, str] = {}
    if mechanisms is not None and mechanisms.strip() == "all":
        names, left_out = fitting(tasks, settings)
        settings = settings.only(names)
    if not as_json:
        for one in tasks:
            described = _plain(one.describe())
            described.highlight_regex(r"(?m)^warning: .*", "yellow")
            console.print(described)
            console.print()
        for name, reason in left_out.items():
            console.print(Text(f"Left out: {name} with {reason}", style="dim"))
    with _progress(quiet=as_json) as (bar, line):
        shown = bar.add_task("starting", total=None)

        def watch(progress: Any) -> None:
            loss = f"  loss {progress.loss:.3f}" if progress.loss == progress.loss else ""
            bar.update(shown, description=progress.doing + loss, completed=progress.done, total=progress.total or None)
            share = progress.done / progress.total if progress.total else 0.0
            left = f"  about {_clock(progress.remaining)} left" if progress.total else ""
            line(f"{share:4.0%}  {progress.doing}{loss}{left}")

        def say(sentence: str) -> None:
            if not as_json:
                bar.console.print(Text(sentence, style="dim"))

        if only is not None:
            trained = train_share(tasks, settings, output, only, watch=watch, say=say)
        else:
            outcome = run(tasks, settings, output, watch=watch, say=say)
    if only is not None:
        if as_json:
            _emit({"shard": only, "trained": trained, "store": str(output / "results.db")})
        else:
            console.print(Text(f"Trained here: {', '.join(trained) or 'nothing'}."))
            console.print(Text("When all shares are done, give the same command without --shard."))
        return
    if as_json:
        _emit(
            {
                "schema": SCHEMA,
                "tasks": {one.name: one.describe() for one in tasks},
                "summary": outcome.summary,
                "baselines": outcome.baselines,
                "beside": outcome.beside,
                "recommendation": outcome.recommendation.as_dict(),
                "left_out": left_out,
                "report": str(outcome.report),
                "store": str(outcome.store),
                "models": {k: str(v) for k, v in outcome.models.items()},
            }
        )
        return
    console.print()
    console.print(terminal_table(outcome.summary, outcome.baselines, width=console.width))
    console.print()
    console.print(Text("★ no other is better and faster; equal ranks: not told apart by this comparison", style="dim"))
    console.print()
    console.print(Text(outcome.recommendation.text, style="bold"))
    console.print(Text(outcome.recommendation.reason))
    for note in outcome.recommendation.notes:
        console.print(Text(f"- {note}", style="dim"))
    console.print()
    console.print(Text(f"Report: {outcome.report}"))


def _tasks(
    chosen: list[str] | None,
    data: list[str] | None,
    validation: list[str] | None,
    length: int | None,
    tokenizer: str,
    modules: list[Any],
    recognised: Callable[[str], None] = lambda described: None,
) -> list[Any]:
    """The tasks of a comparison: named ones, those of plugins, what the data are for, or the default.

    Args:
        recognised: called with the task that the data are for.
    """
    from regard.models.variants import read_options
    from regard.tasks import TASKS, check_task, create_task
    from regard.tasks.recognise import recognise

    own = [check_task(m.TASK() if isinstance(m.TASK, type) else m.TASK) for m in modules if hasattr(m, "TASK")]
    named: list[tuple[str, dict[str, Any]]] = []
    for described in chosen or ():
        name, _, rest = described.partition(":")
        named.append((name, read_options(rest, name)))
    if not chosen and not own:
        named = [recognise(data)] if data else [("text", {}), ("recall", {})]
        name, options = named[0]
        if data and named != [("text", {})]:
            recognised(name + ":" * bool(options) + ",".join(f"{option}={value}" for option, value in options.items()))
    names = [name for name, _ in named]
    tasks, reading = [], []
    for name, options in named:
        if name in TASKS:
            accepted = inspect.signature(TASKS[name]).parameters
            if "data" in accepted:
                reading.append(name)
                given = {"data": _one(data), "validation": _one(validation)}
                options |= {option: paths for option, paths in given.items() if paths}
            if "tokenizer" in accepted:
                options["tokenizer"] = tokenizer
        if length is not None:
            options["length"] = length
        tasks.append(create_task(name, **{k: v for k, v in options.items() if v is not None}))
    if (data or validation) and names and not reading:
        readers = [name for name, kind in TASKS.items() if "data" in inspect.signature(kind).parameters]
        raise Unsupported(
            f"data for {', '.join(names)}",
            supported="tasks that read data: " + ", ".join(readers),
            nearest="--task text",
        )
    return [*tasks, *own]


def _stack(text: str) -> Any:
    """The stack of a comparison's backbones; layers of exits are joined by a plus sign."""
    from regard.models import StackConfig
    from regard.models.variants import read_options

    options = read_options(text, "stack", before="")
    if "exits" in options:
        options["exits"] = _integers("exits", str(options["exits"]).replace("+", ","))
    return StackConfig.read(options)


def _one(paths: list[str] | None) -> str | list[str] | None:
    return paths[0] if paths and len(paths) == 1 else paths


def _variants(text: str, tasks: list[Any]) -> list[Any]:
    from regard.models.variants import read_variants

    if text.strip() == "all":
        patterns = {t.pattern for t in tasks}
        inserting = patterns == {Pattern.CAUSAL_SELF}  # only language models have room for inserted tokens
        return list_mechanisms(
            where=lambda c: (
                patterns <= set(c.patterns)
                and c.kind in (Kind.ATTENTION, Kind.MIXER, Kind.WRAPPER)
                and (inserting or c.prepare is None)
            )
        )
    return read_variants(text)


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        raise Unsupported(
            f"{name} {text!r}", supported="comma-separated whole numbers", nearest="256,1024,4096"
        ) from None


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(sorted({float(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        raise Unsupported(f"{name} {text!r}", supported="comma-separated numbers", nearest="0.003,0.01") from None


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of a comparison.")] = Path("runs/compare"),
    output: Annotated[
        Path | None, typer.Option(help="Where to write; report.html in the folder when not given.")
    ] = None,
) -> None:
    """Write the HTML report of a finished comparison again.

    Examples:

    \b
        regard report
        regard report runs/recall --output recall.html
    """
    from regard.measurement.store import Store
    from regard.workbench.compare import render_report

    file = folder / "results.db"
    if not file.is_file():
        raise Unsupported(
            f"a report from {folder}: no results.db there", supported="the output folder of regard compare"
        )
    with Store(file, read_only=True) as store:
        console.print(Text(f"Report: {render_report(store, output or folder / 'report.html')}"))


@app.command()
def reproduce(
    names: Annotated[
        list[str] | None, typer.Argument(help="Reproductions, or mechanisms they are about; all when none is named.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Runs of each setting; each reproduction's own when not given.")
    ] = None,
    only: Annotated[
        str | None, typer.Option("--shard", help="i/n: run share i of n of the cells, beside other processes.")
    ] = None,
    timings: Annotated[
        bool | None,
        typer.Option("--timings/--no-timings", help="Only what is timed (on an idle machine), or only the rest."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results; the same command goes on from it.")] = Path(
        "runs/reproduce"
    ),
    pilot: Annotated[
        int | None,
        typer.Option(
            help="Run so many other seeds, which are never judged, and say what they show: whether the experiment can "
            "tell, how much its numbers vary, and how many seeds would decide."
        ),
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Say what there is and what is done; run nothing.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Judge what is done; run nothing.")] = False,
    as_json: JSON = False,
) -> None:
    """Try the claims of papers at a small size, and say of each whether it held.

    Every run is stored the moment it ends, so the command may be stopped and given again; processes with different
    shards may share an output folder. A claim that does not hold is a result, not an error.

    Examples:

    \b
        regard reproduce --list
        regard reproduce delta_rule
        regard reproduce all --no-timings --shard 1/2
        regard reproduce all --table --json
        regard reproduce delta_rule --pilot 3
    """
    from regard.reproductions import get_reproduction, list_reproductions

    wanted = list_reproductions() if not names or "all" in names else [get_reproduction(n).name for n in names]
    if pilot is not None:
        shown = _piloted(wanted, pilot, only, output, quiet=as_json, run=not (listing or table))
        _emit({"pilots": shown}) if as_json else _pilots_told(shown)
        return
    found = _reproduced(wanted, seeds, timings, only, output, quiet=as_json, run=not (listing or table))
    if as_json:
        _emit({"reproductions": found})
    elif listing:
        _reproductions_listed(found)
    else:
        _reproductions_judged(found)


@app.command()
def study(
    name: Annotated[str | None, typer.Argument(help="A study; all are listed when none is named.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of each setting; the study's own when not given.")] = None,
    only: Annotated[
        str | None, typer.Option("--shard", help="i/n: run share i of n of the cells, beside other processes.")
    ] = None,
    timings: Annotated[
        bool | None,
        typer.Option("--timings/--no-timings", help="Only what is timed (on an idle machine), or only the rest."),
    ] = None,
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
        found = _reproduced(studies, seeds, timings, only, output, quiet=as_json, run=False)
        _emit({"studies": found}) if as_json else _reproductions_listed(found)
        return
    module = name.replace("-", "_")
    if module not in studies:
        names = [n.replace("_", "-") for n in studies]
        raise Unsupported(f"study {name!r}", supported=", ".join(names), nearest=closest(name, names))
    found = _reproduced([module], seeds, timings, only, output, quiet=as_json, run=not table)
    if as_json:
        _emit(found[0])
        return
    _reproductions_judged(found)
    console.print(_rows(found[0]["table"]))


def _rows(rows: list[dict[str, Any]]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for heading in rows[0]:
        shown.add_column(heading, justify="left" if isinstance(rows[0][heading], str) else "right")
    for row in rows:
        shown.add_row(*(v if isinstance(v, str) else "—" if v is None else f"{v:.3g}" for v in row.values()))
    return shown


def _reproduced(
    wanted: Sequence[str],
    seeds: int | None,
    timings: bool | None,
    only: str | None,
    output: Path,
    *,
    quiet: bool,
    run: bool,
) -> list[dict[str, Any]]:
    """What the folder holds of reproductions, once the cells that it lacks have been run if they are to be."""
    from regard.measurement.sharding import shard
    from regard.reproductions import collect, plan

    if run:
        _run_cells(shard(plan(wanted, seeds, timings=timings), only), output, quiet=quiet)
    with _cells_in(output) as store:
        return collect(wanted, store, seeds)


def _cells_in(output: Path) -> AbstractContextManager[Store | None]:
    """The folder's results, to read; None where nothing has been run."""
    from regard.measurement.store import Store

    file = output / "results.db"
    return Store(file, read_only=True) if file.is_file() else nullcontext()


def _run_cells(cells: Sequence[Any], output: Path, *, quiet: bool) -> None:
    from regard.measurement.store import Store
    from regard.reproductions import run

    with Store(output / "results.db") as store, _progress(quiet=quiet) as (bar, line):
        shown = bar.add_task("starting", total=None)

        def on_cell(cell: Any, left: int, seconds: float) -> None:
            said = f"{cell.reproduction}: {cell.setting}, seed {cell.seed}; {left} cells, about {_clock(seconds)} left"
            bar.update(shown, description=said, completed=len(cells) - left, total=len(cells))
            line(said)

        run(cells, store, on_cell=on_cell)


def _piloted(
    wanted: Sequence[str], seeds: int, only: str | None, output: Path, *, quiet: bool, run: bool
) -> list[dict[str, Any]]:
    """What the pilots of reproductions show, once the cells that the folder lacks have been run if they are to be."""
    from regard.measurement.sharding import shard
    from regard.reproductions import pilot, plan

    if run:
        _run_cells(shard(plan(wanted, pilot=seeds), only), output, quiet=quiet)
    with _cells_in(output) as store:
        return [pilot(name, store) for name in wanted]


def _reproductions_listed(found: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("reproduction", "paper", "cells", "done", "claim"):
        table.add_column(heading, no_wrap=heading != "claim")
    for one in found:
        arxiv = f"arXiv {one['paper']['arxiv']}"
        table.add_row(one["name"], arxiv, str(one["planned"]), str(one["done"]), Text(one["claim"]))
    console.print(table)


def _reproductions_judged(found: list[dict[str, Any]]) -> None:
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


@app.command()
def doctor(as_json: JSON = False) -> None:
    """Say what this machine has, which backends run, and what is missing.

    Examples:

    \b
        regard doctor
        regard doctor --json
    """
    from regard.measurement.provenance import fingerprint
    from regard.workbench.packages import OPTIONAL

    facts = fingerprint()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    engines = {d: {e: which_backend(e, device=d).name for e in engine_names()} for d in devices}
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    missing = library.why_missing()
    kernels: dict[str, Any] = {
        "missing": missing,
        "engines": sorted(NATIVE.engines),
        "instruction_sets": [] if missing else library.instruction_sets(),
        "instruction_set": None if missing else library.instruction_set(),
    }
    advice = []
    if missing:
        advice.append(
            f"native kernels are missing ({missing}). Everything works through torch, but on a CPU "
            f"{', '.join(kernels['engines'])} run several times slower, some tens of times on long inputs. "
            "With a C++ compiler (g++ or clang++): pip install --force-reinstall --no-deps regard, or install a wheel"
        )
    advice += [
        f"{package.name} is missing, needed for {package.needed_for} (pip install {package.install})"
        for package in OPTIONAL
        if not package.installed
    ]
    if compiler is None:
        advice.append("no C++ compiler: torch.compile with inductor, and so `verify --full`, needs one")
    if as_json:
        _emit(
            {
                "machine": facts,
                "backends": engines,
                "native_kernels": kernels,
                "packages": [dataclasses.asdict(p) | {"installed": p.installed} for p in OPTIONAL],
                "compiler": compiler,
                "advice": advice,
            }
        )
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), Text(str(value)))
    for device, chosen in engines.items():
        table.add_row(f"engines on {device}", Text(", ".join(f"{e}: {b}" for e, b in chosen.items())))
    sets = ", ".join(kernels["instruction_sets"])
    table.add_row(
        "native kernels", Text(f"missing: {missing}" if missing else f"{kernels['instruction_set']} (of {sets})")
    )
    table.add_row("C++ compiler", Text(compiler or "none"))
    console.print(table)
    console.print()
    optional = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("optional package", "there", "needed for", "pip install"):
        optional.add_column(heading)
    for package in OPTIONAL:
        there = "yes" if package.installed else "no"
        optional.add_row(package.name, there, Text(package.needed_for), Text(package.install))
    console.print(optional)
    console.print()
    for line in advice:
        console.print(Text(f"- {line}"))
    if not advice:
        console.print("Nothing is missing.")


class _Remaining(ProgressColumn):
    """Elapsed time, and the remaining time at the pace so far."""

    def render(self, task: Task) -> Text:
        elapsed = task.elapsed or 0.0
        if not task.total or task.completed <= 0:
            return Text(f"{elapsed:.0f}s", style="dim")
        left = elapsed * max(0.0, task.total - task.completed) / task.completed
        return Text(f"{_clock(elapsed)} elapsed, about {_clock(left)} left", style="dim")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


@contextmanager
def _progress(*, quiet: bool) -> Iterator[tuple[Progress, Callable[[str], None]]]:
    """A live bar on a terminal; elsewhere a line now and then."""
    started, last = time.monotonic(), [time.monotonic()]
    live = errors.is_terminal and not quiet

    def line(text: str) -> None:
        now = time.monotonic()
        if not live and not quiet and now - last[0] >= 15:
            last[0] = now
            print(f"[{_clock(now - started)}] {text}", file=sys.stderr, flush=True)

    columns = (BarColumn(bar_width=28), TextColumn("{task.description}", markup=False), _Remaining())
    with Progress(*columns, console=errors, disable=not live, transient=True) as bar:
        yield bar, line


def main() -> None:
    """Entry point: a request that cannot be honoured ends with exit code 2 and one clear line."""
    keep_freed_memory()
    try:
        app(standalone_mode=True)
    except Unsupported as error:
        errors.print(_plain(f"regard: {error}"), soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        errors.print("regard: interrupted; the same command goes on where it stopped")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
