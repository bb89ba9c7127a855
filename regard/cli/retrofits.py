"""`regard compare --from`: compare retrofits of one pretrained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.text import Text

from regard.cli.arguments import given_options, read_lengths, spelled_option
from regard.cli.console import console, emit, plain
from regard.cli.retrofit import showing
from regard.contract import Unsupported
from regard.workbench.plugins import enter_plugins

OF_RETROFITS = (
    "keep_layers",
    "batch_size",
    "train",
    "distil",
    "transfer_rate",
    "rate",
    "evaluation_blocks",
    "positions",
    "shared_heads",
)
"""Options of `regard compare` that apply to retrofits alone."""
OF_BOTH = ("precision",)
"""Options of `regard compare` that mean the same for retrofits."""
TAKEN = (
    *("data", "source", "mechanisms", "budget", "output", "validation", "length", "lengths", "seed_offset", "plugin"),
    *OF_RETROFITS,
    *OF_BOTH,
)
"""Options of `regard compare` that apply to a model that is already trained."""


def compare_from(context: typer.Context, source: Path) -> None:
    """Retrofit a model with each of the mechanisms given to `regard compare`.

    Raises:
        Unsupported: for options that apply only to models trained from scratch, and where mechanisms are missing.
    """
    from regard.measurement.budget import Budget
    from regard.models.variants import read_variants
    from regard.retrofit.inserting import read_mechanism
    from regard.workbench.retrofits import compare_retrofits, rows

    asked = context.params
    given = set(given_options(context))
    foreign = given - {*TAKEN, "as_json"}
    if foreign:
        others = ", ".join(spelled_option(name) for name in TAKEN if name not in ("data", "source", "plugin"))
        raise Unsupported(
            f"{spelled_option(min(foreign))} together with --from",
            supported=f"text, {others}; the model cannot be changed otherwise",
        )
    if asked["mechanisms"] is None:
        raise Unsupported(
            "--from without --mechanisms", supported="mechanisms to retrofit", nearest="--mechanisms lolcats,local"
        )
    enter_plugins(asked["plugin"])
    more: dict[str, Any] = {"length": asked["length"]} if asked["length"] is not None else {}
    more |= {name: asked[name] for name in (*OF_RETROFITS, *OF_BOTH) if name in given}
    if "lengths" in given:
        more["lengths"] = read_lengths(asked["lengths"])
    output, quiet = asked["output"], asked["as_json"]
    with showing(quiet) as (watch, say):
        told = compare_retrofits(
            str(source),
            read_variants(asked["mechanisms"], read_mechanism),
            data=asked["data"] or None,
            output=output,
            budget=Budget.parse(asked["budget"]),
            validation=asked["validation"] or None,
            seed=asked["seed_offset"],
            watch=watch,
            say=say,
            **more,
        )
    if quiet:
        emit({**told, "folder": str(output), "report": str(output / "report.html")})
        return
    for row in rows(told["retrofits"]):
        console.print(Text(str(row.pop("attention")), style="bold"))
        console.print(plain("  " + ", ".join(f"{name} {value}" for name, value in row.items() if value is not None)))
    console.print()
    console.print(Text(told["recommendation"], style="bold"))
    console.print(Text(f"Report: {output / 'report.html'}"))
