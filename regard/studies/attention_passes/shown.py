"""Report sections of the study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from regard.reproductions.framework.judging import Measurements
from regard.studies.attention_passes.accelerator import (
    DESIGNS,
    LENGTHS,
    SIDES,
    WORKLOADS,
)
from regard.studies.attention_passes.cells import (
    DIM,
    HEADS,
    KERNELS,
    SHIPPED,
    SWEPT,
    THIS_PROCESSOR,
    TILE,
    TOKENS,
    WORKLOAD,
)
from regard.studies.attention_passes.mechanisms import cascade_of
from regard.studies.framework.protocol import Cells, Chosen
from regard.workbench.reports.sections import Curves, Section


def sections(chosen: Chosen, cells: Cells) -> Sequence[Section]:
    """The report's sections."""
    known: dict[str, Measurements] = {}
    for (setting, _), measured in sorted(cells.items(), key=lambda cell: -cell[0][1]):
        known[setting] = measured  # seeds descend, so the first one stays
    parts = [
        _of_classes(known), _of_costs(known), *_of_mechanisms(chosen, known), _of_designs(known), _of_buffers(known),
        _of_tiles(known), _of_processor(known),
    ]  # fmt: skip
    return [part for part in parts if part is not None and (part.rows or part.pictures)]


def _of_classes(known: Mapping[str, Measurements]) -> Section:
    rows = [
        {
            "cascade": name,
            "passes": told["passes"],
            "in a run": told["traversals"],
            "buffer grows": told["growth"] > 1.2,
            "off by": told.get("difference"),
        }
        for setting, told in known.items()
        if (name := _cascade_name(setting)) is not None
    ]
    rows.sort(key=lambda row: (row["passes"], row["cascade"]))
    says = (
        "How often each mechanism, each form of softmax and each of your files passes over its keys. The cascade of a mechanism that "
        "equals its definition differs from it by rounding alone."
    )
    return Section("Classes", says, (), rows)


def _cascade_name(setting: str) -> str | None:
    """The name of a cascade in the tables; None for other settings."""
    kind, _, name = setting.partition(" ")
    return {"class": name, "file": name, "cascade": f"softmax as {name}"}.get(kind)


def _of_costs(known: Mapping[str, Measurements]) -> Section:
    """One row for each cascade, with its cost on every machine."""
    machines = {name.partition(" ")[2]: told for name, told in known.items() if name.startswith("machine ")}
    shown = {"ms": ("seconds", 1e-3), "GB": ("bytes", 1e9), "Mcycles": ("cycles", 1e6)}
    rows = [
        {"cascade": name}
        | {
            f"{unit} on {machine}": costs[setting][what] / size
            for unit, (what, size) in shown.items()
            for machine, costs in machines.items()
        }
        for setting in next(iter(machines.values()), {})
        if (name := _cascade_name(setting)) is not None
    ]
    rows.sort(key=lambda row: list(row.values())[1])  # the time on the first machine
    says = (
        f"Time, bytes moved and cycles of every cascade on every machine, for {TOKENS} queries (rank p) and keys of the "
        f"{WORKLOAD.batch} sequences and {WORKLOAD.heads} heads of BERT's workload; the ranks c, a and s have 16, all others 64. "
        "Cycles are of both arrays together, and of full arrays: the steps of a recurrence, which wait for each other, are counted "
        f"side by side. Those of {THIS_PROCESSOR} are nanoseconds of one core."
    )
    return Section("Costs", says, (), rows)


def _of_mechanisms(chosen: Chosen, known: Mapping[str, Measurements]) -> list[Section]:
    remarks, without = [], []
    for name in chosen.mechanisms:
        found = cascade_of(name)
        if found.written is None:
            without.append({"mechanism": name, "why": found.reason})
        elif f"class {name}" in known and found.written.remark:
            remarks.append({"cascade": name, "remark": found.written.remark})
    return [
        Section("Remarks", "What the tables do not say.", (), remarks),
        Section(
            "Without a cascade",
            "Mechanisms that the language cannot express, or whose cascade is not written.",
            (),
            without,
        ),
    ]


def _of_designs(known: Mapping[str, Measurements]) -> Section | None:
    models = [model for model in WORKLOADS if f"designs {model}" in known]
    if not models:
        return None
    told = known[f"designs {models[0]}"]
    words = {
        "unfused": "unfused",
        "flat": "FLAT",
        "cascade": "+Cascade",
        "architecture": "+Architecture",
        "binding": "+Binding",
    }

    def curves(what: str) -> dict[str, list[tuple[float, float | None]]]:
        return {
            words[design]: list(zip(map(float, LENGTHS), told[f"{design} {what}"], strict=True)) for design in DESIGNS
        }

    rows = []
    for model in models:
        cell = known[f"designs {model}"]
        for at, length in enumerate(LENGTHS):
            row: dict[str, Any] = {"model": model, "tokens": length}
            row |= {f"{words[design]} (s)": cell[f"{design} seconds"][at] for design in DESIGNS}
            row["FLAT / +Binding"] = cell["flat seconds"][at] / cell["binding seconds"][at]
            row["energy / FLAT"] = cell["binding energy"][at] / cell["flat energy"][at]
            rows.append(row)
    pairs = WORKLOADS[models[0]].batch * WORKLOADS[models[0]].heads
    a_pair = {
        name: [(n, None if t is None else 1e12 * t / pairs / n**2) for n, t in points]
        for name, points in curves("seconds").items()
    }
    pictures = [
        Curves(
            f"Time of attention per pair of query and key, {models[0]}",
            "tokens",
            "picoseconds",
            a_pair,
            log_x=True,
            log_y=True,
            rising=False,
        ),
        Curves(
            f"Share of the time in which cells are busy, {models[0]}", "tokens", "share", curves("util_2d"), log_x=True
        ),
        Curves(
            f"Share of the time in which lanes are busy, {models[0]}", "tokens", "share", curves("util_1d"), log_x=True
        ),
    ]
    sides = {
        model: list(zip(map(float, SIDES), known[f"designs {model}"]["sides seconds"], strict=True)) for model in models
    }
    pictures.append(
        Curves(
            f"Time of +Binding by the side of the 2D array, {SWEPT:,} tokens",
            "cells of a side",
            "seconds",
            sides,
            log_x=True,
            log_y=True,
            rising=False,
        )
    )
    says = (
        "Five designs of equal area, each adding one idea. One pass alone gains nothing on a machine whose cells cannot "
        "exponentiate. What the first two move, and energies, are recorded numbers of the authors."
    )
    return Section("Designs", says, pictures, rows)


def _of_buffers(known: Mapping[str, Measurements]) -> Section | None:
    found = {name: known[f"buffer {name}"] for name in SHIPPED if f"buffer {name}" in known}

    def curves(what: str) -> dict[str, list[tuple[float, float | None]]]:
        return {name: list(zip(map(float, told["keys"]), told[what], strict=True)) for name, told in found.items()}

    if not found:
        return None
    pictures = [
        Curves("Numbers held at once", "keys", "numbers", curves("high_water"), log_x=True, log_y=True, rising=False),
        Curves(
            "Numbers moved with a buffer of a tile",
            "keys",
            "numbers",
            curves("traffic"),
            log_x=True,
            log_y=True,
            rising=False,
        ),
    ]
    return Section(
        "Buffers", f"Counted in runs with 4 queries of 8 features and tiles of {TILE} keys, fibers kept (left) or written and read.",
        pictures,
    )  # fmt: skip


def _of_tiles(known: Mapping[str, Measurements]) -> Section | None:
    if "schedule" not in known:
        return None
    told = known["schedule"]
    names = {"interleaved": "interleaved", "in turn": "tile after tile", "formula": "formula of +Binding"}
    curves = {shown: list(zip(map(float, told["tiles"]), told[name], strict=True)) for name, shown in names.items()}
    return Section(
        "Interleaving",
        "Cycles per tile of the one-pass cascade, scheduled on both arrays.",
        [Curves("Cycles a tile", "tiles", "cycles", curves, log_x=True, rising=False)],
    )


def _of_processor(known: Mapping[str, Measurements]) -> Section | None:
    if "this processor" not in known:
        return None
    told = known["this processor"]
    lengths = told["tokens"]
    rows = [
        {
            "kernel": kernel,
            "tokens": length,
            "predicted (ms)": 1e3 * predicted,
            "measured (ms)": 1e3 * measured,
            "predicted / measured": predicted / measured,
        }
        for kernel in KERNELS
        for length, predicted, measured in zip(
            lengths, told[f"{kernel} predicted"], told[f"{kernel} measured"], strict=True
        )
    ]
    times = {
        what: list(zip(map(float, lengths), told[f"softmax {what}"], strict=True)) for what in ("predicted", "measured")
    }
    ratios = {
        kernel: [(float(row["tokens"]), row["predicted / measured"]) for row in rows if row["kernel"] == kernel]
        for kernel in KERNELS
    }
    apart = {
        kernel: max((ratio for _, ratio in line), key=lambda ratio: abs(math.log(ratio)))
        for kernel, line in ratios.items()
    }
    says = (
        f"Each cascade's operations at the speeds that regard doctor --speeds measures, on one thread with {HEADS} heads of "
        f"{DIM}, beside the kernels. Farthest off are "
        + ", ".join(f"{ratio:.2f} of the measured time ({kernel})" for kernel, ratio in apart.items())
        + "."
    )
    pictures = [
        Curves("Softmax", "tokens", "seconds", times, log_x=True, log_y=True, rising=False),
        Curves("Predicted over measured time", "tokens", "ratio", ratios, log_x=True),
    ]
    return Section("This processor", says, pictures, rows)
