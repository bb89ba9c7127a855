"""`regard verify`: test the matrix of properties that every mechanism must have."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from regard.catalogue import list_mechanisms
from regard.cli.arguments import given_options, spelled_option
from regard.cli.console import console, emit
from regard.cli.options import JSON, LARGEST_SEED, PLUGINS
from regard.cli.progress import progress
from regard.workbench.plugins import enter_plugins, plugin_words


def verify(
    context: typer.Context,
    mechanisms: Annotated[
        list[str] | None,
        typer.Argument(help="Mechanisms, with options as in local:window=4; all of them when none is named."),
    ] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="Only these patterns.")] = None,
    prop: Annotated[list[str] | None, typer.Option("--property", help="Only these properties.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Variants of the card, or all: test with their options instead of the default ones."),
    ] = None,
    random: Annotated[
        int,
        typer.Option(
            min=0,
            help="Try this many random cases of each mechanism instead: options, sizes, padding, splits; no --property.",
        ),
    ] = 0,
    case: Annotated[
        str | None, typer.Option(help="Try one case instead, written as --random prints failing cases.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the random cases.")] = 0,
    full: Annotated[
        bool,
        typer.Option("--full/--quick", help="Compile with Inductor, and try more seeds; an interrupted run resumes."),
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder of the store that --full resumes from.")] = Path("runs/verify"),
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Test the equality matrix: definition = fast forms = steps, padding, packing, causality, gradients and more.

    Ends with exit code 0 when every cell holds, and 1 when one fails.

    Examples:

    \b
        regard verify softmax gated_linear
        regard verify --plugin my_mechanism.py my_mechanism
        regard verify local:form=block,block=4
        regard verify landmark --variant all
        regard verify landmark --random 200
        regard verify --full --output runs/verify
        regard verify --json > matrix.json
    """
    from regard.contract import Unsupported
    from regard.measurement.store import Store
    from regard.models.variants import known_name
    from regard.workbench.verification.failures import grouped, kind
    from regard.workbench.verification.verify import KEY, Cell, Place, plan, unmeasured
    from regard.workbench.verification.verify import verify as run

    entered = enter_plugins(plugin)
    if case is not None:
        others = [name for name in given_options(context) if name not in ("case", "plugin", "as_json")]
        if others:
            spelled = {"mechanisms": "mechanisms", "prop": "--property"}
            raise Unsupported(
                f"{', '.join(spelled.get(name, spelled_option(name)) for name in others)} with --case, which describes the whole case",
                supported="--plugin and --json with it",
                nearest="regard verify --case CASE",
            )
        _one_case(case, as_json)
        return
    mechanisms = mechanisms or entered.mechanisms
    names = [known_name(n) for n in mechanisms] if mechanisms else list_mechanisms()
    if random:
        if prop or full:
            raise Unsupported(
                f"{'--property' if prop else '--full'} with --random, which tries rows, pieces and gradients of each case",
                supported="--pattern and --variant with it",
                nearest=f"regard verify --property {prop[0]}" if prop else "regard verify --full",
            )
        _random_cases(names, random, pattern, variant or (), seed, entered.files, as_json)
        return
    total = sum(1 for _ in plan(names, patterns=pattern, properties=prop, variants=variant or ()))
    store = Store(output / "results.db") if full else None
    cells: list[Cell] = []
    told: set[Any] = set()
    with progress(quiet=as_json) as (bar, line):
        task = bar.add_task("verify", total=total)
        before = itertools.count()

        def on_place(place: Place) -> None:
            about, places = _about(place.key), next(before)
            bar.update(task, completed=places, description=about)
            line(f"{places} of {total}, {about}")

        def on_cell(cell: Cell) -> None:
            cells.append(cell)
            key = {name: getattr(cell, name) for name in KEY}
            if store is not None:
                store.put("verify", {**key, "full": True}, dataclasses.asdict(cell))
            if cell.status == "fail" and not as_json and kind(cell) not in told:
                told.add(kind(cell))
                bar.console.print(f"[red]fail[/red] {_about(key)} {cell.dtype}: {escape(cell.detail)}")

        def done(key: dict[str, str]) -> bool:
            row = None if store is None else store.get("verify", {**key, "full": True})
            if row is not None:
                cells.append(Cell(**row.payload))
            return row is not None

        run(
            names,
            patterns=pattern,
            properties=prop,
            variants=variant or (),
            full=full,
            on_cell=on_cell,
            on_place=on_place,
            done=done,
        )
        bar.update(task, completed=total)
    failures = [c for c in cells if c.status == "fail"]
    missing = unmeasured(names, cells, patterns=pattern) if mechanisms else []
    if as_json:
        emit({"cells": [dataclasses.asdict(c) for c in cells], "failures": len(failures), "unmeasured": missing})
    else:
        console.print(_matrix(cells))
        waived = sum(c.status == "waived" for c in cells)
        console.print(
            f"{len(cells)} cells: {len(cells) - len(failures) - waived} hold, {waived} waived with a reason, {len(failures)} fail"
        )
        for group in grouped(cells):
            console.print(Text(f"- {group}"))
        for sentence in missing:
            console.print(Text(f"- {sentence}"))
    if failures:
        raise typer.Exit(1)


def _about(key: dict[str, str]) -> str:
    """Describe where a cell is in the matrix."""
    return " ".join(filter(None, [key[name] for name in ("mechanism", "variant", "pattern", "property")]))


def _one_case(text: str, as_json: bool) -> None:
    from regard.workbench.verification.properties import Broken
    from regard.workbench.verification.random_cases import Case, run_case

    case = Case.read(text)
    detail, error = "", None
    try:
        error = run_case(case)
    except Broken as broken:
        detail = str(broken)
    if as_json:
        emit({"case": dataclasses.asdict(case), "error": error, "detail": detail})
    else:
        console.print(Text(f"fails: {detail}" if detail else f"holds: error {error:.0e}"))
    if detail:
        raise typer.Exit(1)


def _random_cases(
    names: list[str],
    count: int,
    patterns: list[str] | None,
    variants: Sequence[str],
    seed: int,
    plugins: Sequence[str],
    as_json: bool,
) -> None:
    from regard.catalogue import get_mechanism
    from regard.contract import Pattern
    from regard.workbench.verification.random_cases import drawn_from, search, unreached_options
    from regard.workbench.verification.verify import plan, verified_backends

    next(plan(names, patterns=patterns, variants=variants), None)  # refuses names that do not exist
    chosen = None if patterns is None else [Pattern.parse(p) for p in patterns]
    if len(names) > 1:  # as in the matrix, mechanisms that lack what was asked for are left out
        names = [name for name in names if drawn_from(get_mechanism(name), chosen, variants)] or names
    rows = []
    with progress(quiet=as_json) as (bar, line):
        task = bar.add_task("verify", total=len(names) * count * len(verified_backends()))
        for name in names:
            card = get_mechanism(name)
            for backend in verified_backends():
                bar.update(task, description=f"{name} {backend}")
                found = search(
                    card,
                    count,
                    patterns=chosen,
                    variants=variants,
                    backend=backend,
                    seed=seed,
                    on_case=lambda _: bar.advance(task),
                )
                rows.append((name, backend, found, unreached_options(card)))
            line(f"{name}: {sum(r[2].ran for r in rows if r[0] == name)} cases")
    failures = [(name, found.case, found.detail) for name, _, found, _ in rows if found.case is not None]
    if as_json:
        cells = [
            {"mechanism": name, "backend": backend, "ran": found.ran, "refused": found.refused}
            | {"case": None if found.case is None else str(found.case), "detail": found.detail, "unreached": missing}
            for name, backend, found, missing in rows
        ]
        emit({"searches": cells, "failures": len(failures)})
    else:
        ran, refused = (sum(getattr(found, of) for _, _, found, _ in rows) for of in ("ran", "refused"))
        console.print(
            f"{ran} cases of {len(names)} mechanisms: {len(failures)} searches fail, {refused} cases were refused"
        )
        for name, smallest, detail in failures:
            console.print(Text(f"- {name}: {detail}"))
            console.print(Text(f"  {smallest.command}{plugin_words(plugins)}"), soft_wrap=True)  # to be copied
        for name, missing in {row[0]: row[3] for row in rows}.items():
            if missing:
                console.print(Text(f"- {name}: no variant of the card has {', '.join(missing)}"))
    if failures:
        raise typer.Exit(1)


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
