"""`regard doctor`: what this machine has and what is missing."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from regard.backends import NATIVE, engine_names, which_backend
from regard.backends.native import library
from regard.cli.console import console, emit
from regard.cli.options import JSON


def doctor(
    speeds: Annotated[
        bool,
        typer.Option(
            "--speeds", help="Measure how much one core computes and moves per second, which takes some seconds."
        ),
    ] = False,
    as_json: JSON = False,
) -> None:
    """Report what this machine has, which backends run, and what is missing.

    Examples:

    \b
        regard doctor
        regard doctor --speeds
        regard doctor --json
    """
    from regard.measurement import units
    from regard.measurement.provenance import fingerprint
    from regard.measurement.speeds import caches, measured_speeds
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
    measured = dataclasses.asdict(measured_speeds()) if speeds else None
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
        emit(
            {
                "machine": facts,
                "caches": caches(),
                "speeds": measured,
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
    table.add_row(
        "caches", Text(", ".join(f"{name} {units.size(size)}" for name, size in caches().items()) or "unknown")
    )
    for name, value in (measured or {}).items():
        if name != "caches":
            table.add_row(f"{name} a second", units.number(value))
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
