"""`regard detect-patterns`: which of the four attention patterns a module has."""

from __future__ import annotations

import ast
import dataclasses
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from regard.cli.console import console, emit
from regard.cli.options import JSON, LARGEST_SEED, PLUGINS
from regard.contract import Unsupported
from regard.workbench.plugins import enter_plugins


def detect_patterns(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help="file.py:Class (or a function that makes a module, or a module), or mechanisms, written as for `regard compare`; "
            "the whole catalogue when none is named."
        ),
    ] = None,
    dim: Annotated[int, typer.Option(min=1, help="Width of the tokens.")] = 32,
    heads: Annotated[int, typer.Option(min=1, help="Heads, for a module that has them.")] = 4,
    length: Annotated[
        int,
        typer.Option(
            min=4,
            help="Tokens in the sequence; a length above the module's window or chunk shows more, and one that needs whole "
            "blocks takes only multiples of them.",
        ),
    ] = 24,
    memory_length: Annotated[int, typer.Option(min=4, help="Tokens in the memory.")] = 20,
    option: Annotated[
        list[str] | None, typer.Option(help="An argument of your class's constructor, such as window=32. Repeatable.")
    ] = None,
    seeded: Annotated[
        bool, typer.Option("--seeded", help="Seed torch before each call of your module, if it draws random numbers.")
    ] = False,
    expect: Annotated[
        list[str] | None,
        typer.Option(help="A pattern that the module must have; otherwise the exit code is 1. Repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the random inputs.")] = 0,
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Find which of noncausal-self, causal-self, noncausal-cross and causal-cross a module has, and where it leaks.

    The probe changes later tokens, later queries, memory and padding: no output that must not see them may change. It
    also runs prefixes alone, which must give the same outputs as within the whole sequence, and changes other rows of a
    batch, which no output may see. A class is constructed with its width and heads under their usual names and, if its
    constructor takes causal, cross or pattern, once for each pattern. Its forward gets key_padding_mask and
    query_padding_mask, True at padding, if it names them. If it names state or incremental_state, or if the class has
    step(x_t, state), tokens one by one must give the outputs of the whole causal call. A mechanism of the catalogue is
    checked against its card. Ends with exit code 1 if a module does not match its card or --expect, mixes the rows of a
    batch, or does not do what its masks and state are for, and 2 if it cannot be probed.

    Examples:

    \b
        regard detect-patterns my_module.py:MyAttention
        regard detect-patterns my_module.py:MyAttention --dim 64 --option window=16 --expect causal-self
        regard detect-patterns performer local:window=8
        regard detect-patterns --plugin my_mechanism.py my_mechanism --json
        regard detect-patterns
    """
    from regard.catalogue import get_mechanism, list_mechanisms
    from regard.contract import Pattern
    from regard.workbench.advice.layer_work import MIXING
    from regard.workbench.detection.patterns import detect
    from regard.workbench.detection.suspects import suspect

    enter_plugins(plugin)
    expected = [Pattern.parse(name) for name in expect or ()]
    given = dict(_option(text) for text in option or ())
    names = targets or [name for name in list_mechanisms() if get_mechanism(name).kind in MIXING]
    rows: list[dict[str, Any]] = []
    for target in names:
        probed = suspect(target, given, dim=dim, heads=heads, seeded=seeded)
        for finding in detect(probed, length=length, memory_length=memory_length, seed=seed):
            missed = finding.pattern in expected and not finding.has
            told = dataclasses.asdict(finding) | {"pattern": finding.pattern.value}
            rows.append({"module": probed.name, **told, "agrees": finding.agrees and not missed})
    wrong = sum(not row["agrees"] for row in rows)
    if as_json:
        emit({"findings": rows, "disagreements": wrong})
    elif targets:
        console.print(_details(rows))
    else:
        console.print(_summary(rows))
    if wrong and not as_json:
        for row in rows:
            if not row["agrees"]:
                console.print(Text(f"- {row['module']} in {row['pattern']}: {_disagreement(row)}"))
    if wrong:
        raise typer.Exit(1)


def _option(text: str) -> tuple[str, Any]:
    name, mark, value = text.partition("=")
    if not mark or not name:
        raise Unsupported(f"--option {text}", supported="NAME=VALUE", nearest="--option window=16")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, {"true": True, "false": False}.get(value.lower(), value)


BROKEN = {
    "padding": "what padding holds changes other outputs",
    "query_padding": "what padded queries hold changes other outputs",
    "steps": "token by token, with a state, it does not give the outputs of the whole call",
}


def _disagreement(row: dict[str, Any]) -> str:
    if not row["has"]:
        return row["why"]
    broken = [row["raised"].get(name, said) for name, said in BROKEN.items() if row[name] is False]
    return ", and ".join(broken) or "it has the pattern, and says that it has not"


def _has(row: dict[str, Any]) -> str:
    if not row["has"]:
        return "no"
    return "at one length" if row["prefixes"] == 0 else "yes"


def _padding(row: dict[str, Any]) -> str:
    if row["raised"].keys() & {"padding", "query_padding"}:
        return "raises"
    keys, queries = row["padding"], row["query_padding"]
    if queries is False:
        return "leaks" if keys is False else "queries leak"
    if keys is False:
        return "keys leak" if queries else "leaks"
    return "kept out" if keys else ""


def _steps(row: dict[str, Any]) -> str:
    return "raises" if "steps" in row["raised"] else {None: "", True: "equal", False: "not equal"}[row["steps"]]


def _details(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("module", "pattern", "has it", "padding", "steps", "found"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row["module"], row["pattern"], _has(row), _padding(row), _steps(row), Text(row["why"]))
    return table


def _summary(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    for heading in ("mechanism", *patterns):
        table.add_column(heading)
    for name in dict.fromkeys(row["module"] for row in rows):
        own = {row["pattern"]: row["has"] for row in rows if row["module"] == name}
        table.add_row(name, *("yes" if own[pattern] else "-" for pattern in patterns))
    return table
