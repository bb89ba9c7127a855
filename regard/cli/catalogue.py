"""`regard list` and `regard show`: the mechanisms there are, and how each is defined."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from regard.catalogue import get_mechanism, get_module, list_mechanisms
from regard.cli.console import console, emit
from regard.cli.options import JSON, PLUGINS
from regard.contract import Mechanism, Pattern, Unsupported, spelled
from regard.functional import function_name
from regard.tasks import TASKS
from regard.tasks.described import described
from regard.workbench.plugins import enter_plugins


def list_command(
    pattern: Annotated[str | None, typer.Option(help="Only mechanisms that support this pattern.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="Only this kind: attention, mixer, pooling, projection, wrapper.")
    ] = None,
    recurrent: Annotated[
        bool | None,
        typer.Option(
            "--recurrent/--not-recurrent",
            help="Only mechanisms whose decoding state has a constant size, or only the others.",
        ),
    ] = None,
    backbones: Annotated[
        bool, typer.Option("--backbones", help="List the image backbones (for --model and --models) instead.")
    ] = False,
    tasks: Annotated[bool, typer.Option("--tasks", help="List the tasks (for --task) instead.")] = False,
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """List the mechanisms in the catalogue, or the image backbones, or the tasks.

    Examples:

    \b
        regard list
        regard list --pattern causal-self --recurrent
        regard list --kind mixer --json
        regard list --backbones
        regard list --tasks
    """
    if backbones:
        _list_backbones(as_json)
        return
    if tasks:
        _list_tasks(as_json)
        return
    enter_plugins(plugin)
    cards = [get_mechanism(n) for n in list_mechanisms(pattern=pattern, kind=kind, recurrent=recurrent)]
    if as_json:
        emit([_card(card.name) for card in cards])
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    headings = ["mechanism", "patterns", "what it does"]
    if console.width >= WIDE:
        headings[1:1] = ["kind", "paper"]
    for heading in headings:
        table.add_column(heading, no_wrap=heading != "what it does")
    for card in cards:
        marks = " ".join(_SHORT[p] if p in card.patterns else "--" for p in Pattern)
        cells = {"mechanism": card.name, "kind": card.kind.value, "paper": _paper(card)}
        cells |= {"patterns": marks, "what it does": card.summary}
        table.add_row(*(Text(cells[heading]) for heading in headings))
    console.print(table)
    console.print("[dim]patterns: NS noncausal-self, CS causal-self, NC noncausal-cross, CC causal-cross[/dim]")


def _list_backbones(as_json: bool) -> None:
    import torch

    from regard.models.parameters import count_parameters
    from regard.models.vision import list_backbones, read_backbone
    from regard.models.vision.segmentation import Segmenter, list_segmenters, read_segmenter

    rows: list[dict[str, Any]] = []
    for serves, names, read in (
        ("images", list_backbones(), read_backbone),
        ("segmentation", list_segmenters(), read_segmenter),
    ):
        for name in names:
            network, config = read(name)
            with torch.device("meta"):
                parameters = count_parameters(network(config))
            summary = (inspect.getdoc(sys.modules[network.__module__]) or "").partition("\n")[0]
            side = getattr(config, "image_size", None)
            side = [side, side] if isinstance(side, int) else None if side is None else list(side)
            of_volumes = issubclass(network, Segmenter) and len(network.multiples(config)) == 3
            task = serves + "_3d" * of_volumes
            rows.append(
                {"name": name, "serves": task, "parameters": parameters, "image_size": side, "summary": summary}
            )
    if as_json:
        emit(rows)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("backbone", "serves", "parameters", "pixels", "what it is"):
        table.add_column(heading, justify="right" if heading in ("parameters", "pixels") else "left")
    for row, before in zip(rows, [None, *(row["summary"] for row in rows)], strict=False):
        side = "any" if row["image_size"] is None else "x".join(map(str, row["image_size"]))
        said = "" if row["summary"] == before else row["summary"]
        table.add_row(row["name"], row["serves"], f"{row['parameters'] / 1e6:.1f} M", side, said)
    console.print(table)


def _list_tasks(as_json: bool) -> None:
    rows = [_task(name) for name in TASKS]
    if as_json:
        emit(rows)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("task", "pattern", "what it is"):
        table.add_column(heading, no_wrap=heading != "what it is")
    for row in rows:
        table.add_row(row["name"], row["pattern"], Text(row["summary"].partition("\n")[0]))
    console.print(table)


def _task(name: str) -> dict[str, Any]:
    summary, options = described(TASKS[name])
    return {
        "name": name,
        "pattern": str(TASKS[name].pattern),
        "summary": summary,
        "options": {option.name: {"default": option.default, "meaning": option.meaning} for option in options},
    }


def _show_task(name: str, as_json: bool) -> None:
    row = _task(name)
    if as_json:
        emit(row)
        return
    console.print(f"[bold]{name}[/bold]  task, {row['pattern']}")
    console.print()
    console.print(Text(row["summary"]))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("option", "default", "meaning"):
        table.add_column(heading, no_wrap=heading == "option")
    for option, told in row["options"].items():
        table.add_row(option, Text(str(told["default"])), Text(told["meaning"]))
    console.print()
    console.print(table)
    console.print()
    option, told = next((o, t) for o, t in row["options"].items() if t["default"] is not None)
    console.print(Text(f"for example: regard compare --task {name}:{option}={told['default']}"))


WIDE = 110
"""Terminal width from which a mechanism's kind and paper are shown too."""

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
        "alias_options": {alias: dict(options) for alias, options in card.alias_options.items()},
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


def show(
    name: Annotated[str, typer.Argument(help="Mechanism, with or without options, such as local:window=4; or a task.")],
    matrix: Annotated[
        bool,
        typer.Option("--matrix", help="Show its mixing matrix on an example instead, and measurements of that matrix."),
    ] = False,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Pattern of the matrix: causal-self or noncausal-self; when not given, the first that the mechanism supports."
        ),
    ] = None,
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Show a mechanism: its equations, symbols, options, patterns and how to call it, or how it mixes tokens; or a task.

    Examples:

    \b
        regard show gated_linear
        regard show gla --json
        regard show local:window=32
        regard show local --matrix --pattern noncausal-self
        regard show recall
    """
    enter_plugins(plugin)
    if name in TASKS and name not in list_mechanisms():
        if matrix or pattern is not None:
            raise Unsupported(f"a matrix of the task {name}", supported=f"regard show {name}, or a mechanism")
        _show_task(name, as_json)
        return
    if matrix:
        _show_matrix(name, pattern, as_json)
        return
    if pattern is not None:
        raise Unsupported(f"--pattern {pattern} without --matrix", supported="--matrix --pattern", nearest="--matrix")
    from regard.models.variants import read_variant

    variant = read_variant(name)
    card, meant = variant.card, variant.options
    if as_json:
        emit(
            _card(card.name) | {"given": meant, "documentation": inspect.cleandoc(get_module(card.name).__doc__ or "")}
        )
        return
    if meant:
        console.print(Text(f"{name} is {card.name} with {spelled(meant)}:"))
    year = f" ({card.paper.year})" if card.paper.year else ""
    console.print(f"[bold]{card.name}[/bold]  {card.kind.value}, {escape(_paper(card))}{year}")
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
        table.add_row("refused", Text(f"other positions: {card.refused_positions}"))
    table.add_row("engine", card.engine or "none: torch operators")
    if card.forms:
        table.add_row("function", Text(f"regard.functional.{function_name(card)}"))
    table.add_row("layer", Text(f'regard.create_layer("{card.name}", dim, num_heads)'))
    console.print()
    console.print(table)


def _paper(card: Mechanism) -> str:
    """The paper's place; its title, or the file of a user's module, if it is not on arXiv."""
    return f"arXiv {card.paper.arxiv}" if card.paper.arxiv else card.paper.title


def _show_matrix(name: str, pattern: str | None, as_json: bool) -> None:
    from regard.workbench.mixing import STRUCTURES, as_text, mixing_of

    found = mixing_of(name, pattern)
    if as_json:
        told = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        emit({**told, "weights": found.weights.tolist()})
        return
    console.print(f"[bold]{found.mechanism}[/bold]  {found.pattern.value}: {found.structure}")
    console.print(Text(STRUCTURES[found.structure], style="dim"))
    console.print()
    for line in as_text(found.weights):
        console.print(Text(line), no_wrap=True, overflow="crop")
    console.print()
    console.print(
        Text(f"{', '.join(found.facts())}. A row is an output, a column a token; shades are of the row's largest.")
    )
