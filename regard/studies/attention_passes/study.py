"""The study: what is measured of cascades, designs and this processor, and how it is shown."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from regard import functional
from regard.catalogue import list_mechanisms
from regard.contract import Paper, Pattern, Unsupported
from regard.measurement.speeds import measured_speeds
from regard.measurement.timing import rounds
from regard.reproductions import Reproduction
from regard.reproductions.framework.judging import Check, Measurements, Seed, spread
from regard.reproductions.framework.protocol import Setting
from regard.studies.attention_passes.accelerator import (
    DESIGNS,
    LENGTHS,
    SIDES,
    WORKLOADS,
    estimate,
    interleaved_cycles,
    recorded,
    shipped,
)
from regard.studies.attention_passes.analysis import passes
from regard.studies.attention_passes.executor import Run, complete_sizes, run_cascade
from regard.studies.attention_passes.language import Cascade, parse
from regard.studies.attention_passes.machine import Machine, cost, machine_of, read_machine, this_processor
from regard.studies.attention_passes.mechanisms import cascade_of, difference
from regard.studies.attention_passes.scheduling import schedule
from regard.studies.framework.protocol import Cells, Chosen, Study
from regard.workbench.sections import Curves, Section

PAPER = Paper(
    "FuseMax: Leveraging Extended Einsums to Optimize Attention Accelerator Design", "2406.10491", 2024, number=30
)
SHIPPED = ("three_pass", "two_pass_deferred", "two_pass", "one_pass", "naive")
KERNELS = ("softmax", "sigmoid", "linear")
HEADS, DIM = 8, 64
TOKENS = 4096
"""Queries and keys at which the table tells bytes and times, with the heads and sequences of BERT's workload."""

ELSE = {"c": 16, "a": 16, "s": 16, "b": 1}
"""Sizes of ranks with few coordinates (slots, agents, states) in the table; all others have 64."""

LENGTHS_BY_PRESET = {"tiny": (64, 128, 256, 512, 1024), "small": (256, 512, 1024, 2048, 4096)}
SWEPT = 2**18
"""Tokens at which arrays of different sizes are compared."""

TILE = 16
TILES = (1, 2, 4, 8, 16, 32, 64)


def make(chosen: Chosen) -> Reproduction:
    """The cells of what was chosen."""
    lengths = list(LENGTHS_BY_PRESET[chosen.preset])
    settings: dict[str, Setting] = {}
    for given in chosen.data:
        name, setting = _given(Path(given))
        if name in settings:
            raise Unsupported(f"two files called {Path(given).name!r}", supported="files of different names")
        settings[name] = setting
    for name in chosen.mechanisms:
        found = cascade_of(name)
        if found.cascade is not None:
            settings[f"class {name}"] = {"part": "class", "mechanism": name, "text": found.cascade.text}
    for name in WORKLOADS:
        settings[f"designs {name}"] = {"part": "designs", "model": name}
    for name in SHIPPED:
        settings[f"buffer {name}"] = {"part": "buffer", "text": shipped(name).text, "lengths": lengths}
    settings["schedule"] = {"part": "schedule", "tiles": list(TILES)}
    settings["this processor"] = {"part": "processor", "kernels": list(KERNELS), "lengths": lengths, "seconds": 1.0}
    return Reproduction(
        name="attention-passes",
        mechanisms=("softmax",),
        source=PAPER,
        claim=(
            "FlashAttention's form of softmax walks over its keys once, with a buffer that does not grow; interleaved on cells "
            "that also add, compare and exponentiate it is 6.7 times as fast as the fused three passes of FLAT."
        ),
        instead=(
            "The paper's machines as closed forms, in closed-form agreement with the authors' tables for four models at six "
            "lengths; the bytes that the unfused and FLAT mappings move, and all energies, are the authors' recorded numbers. "
            "Traversals and buffers are counted in a run of each cascade."
        ),
        settings=settings,
        run_cell=_run_cell,
        checks=_checks(lengths),
        needs=_needs(lengths),
        left_out=(
            "area, and energies of machines other than the recorded ones: they come from component tables, not from cycles",
            "the search for the unfused and FLAT mappings: what they move is loaded",
        ),
        timings=frozenset({"this processor"}),
        smoke={"lengths": [16, 32, 48, 64, 96], "tiles": [1, 2, 3], "seconds": 0.01},
        seeds=2,
        seconds=1.0,
    )


def _given(path: Path) -> tuple[str, Setting]:
    """The cell of a user's file: a cascade, or a machine."""
    if path.suffix in (".yaml", ".yml"):
        return f"machine {path.name}", {"part": "machine", "machine": dataclasses.asdict(read_machine(path))}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise Unsupported(
            f"file {path.name!r}, which cannot be read as text", supported="a cascade (.txt) or a machine (.yaml)"
        ) from None
    parse(text, path.stem)
    return f"file {path.name}", {"part": "file", "text": text, "name": path.stem}


def _run_cell(setting: Setting, seed: int) -> Measurements:
    return _PARTS[setting["part"]](setting, seed)


def _class(setting: Setting, seed: int) -> Measurements:
    found = cascade_of(setting["mechanism"])
    assert found.cascade is not None
    return {**described(found.cascade, seed), "difference": difference(found, seed=seed)}


def _file(setting: Setting, seed: int) -> Measurements:
    return described(parse(setting["text"], setting["name"]), seed)


def described(cascade: Cascade, seed: int = 0) -> dict[str, Any]:
    """What the table tells of a cascade: the traversals that it needs and that a run took, how its buffer grows when its keys
    double, and bytes and seconds on both machines."""
    sizes = {
        rank: ELSE.get(rank, 64) for rank in cascade.ranks if rank not in cascade.fiber.parts + tuple(cascade.sizes)
    }
    large = complete_sizes(cascade, {**sizes, cascade.fiber.rank: TOKENS, **({"p": TOKENS} if "p" in sizes else {})})
    workload = WORKLOADS["BERT"]
    told: dict[str, Any] = {"passes": passes(cascade).count}
    for name in ("fusemax", "flat"):
        found = cost(cascade, read_machine(name), large, workload.batch * workload.heads)
        told |= {f"{name}_seconds": found.seconds, f"{name}_bytes": found.bytes, f"{name}_kept": int(found.kept)}
    told["fusemax_cycles"] = sum(found.cycles.values())
    runs = []
    for keys in (8 * TILE, 16 * TILE):
        inside = {name: min(size, 4) for name, size in sizes.items()} | {"p": 4}
        runs.append(_run(cascade, {**inside, cascade.fiber.rank: keys}, seed))
    told["traversals"] = runs[0].traversals
    told["growth"] = runs[1].high_water / runs[0].high_water
    return told


def _run(cascade: Cascade, sizes: Mapping[str, int], seed: int, keep: bool = True) -> Run:
    """A run on random inputs."""
    generator = torch.Generator().manual_seed(seed)
    known = complete_sizes(cascade, {**sizes, **{r: n for r, n in cascade.sizes.items() if isinstance(n, int)}})
    inputs = {
        name: torch.rand([known[rank] for rank in ranks], generator=generator, dtype=torch.float64)
        for name, ranks in cascade.inputs.items()
    }
    return run_cascade(
        cascade, inputs, tile=TILE, keep=keep, sizes={r: n for r, n in known.items() if r in cascade.ranks}
    )


def _designs(setting: Setting, _: int) -> Measurements:
    workload = WORKLOADS[setting["model"]]
    told: dict[str, Any] = {}
    for design in DESIGNS:
        found = [estimate(design, workload, length) for length in LENGTHS]
        for name in ("seconds", "bytes", "util_2d", "util_1d"):
            told[f"{design} {name}"] = [getattr(one, name) for one in found]
        tables = [recorded()[design, workload.name, length] for length in LENGTHS]
        told[f"{design} energy"] = [one.energy * 1e-12 for one in tables]
        told[f"{design} off"] = max(
            abs(getattr(one, name) / getattr(table, name) - 1)
            for one, table in zip(found, tables, strict=True)
            for name in ("seconds", "bytes", "util_2d", "util_1d")
        )
    told["sides seconds"] = [estimate("binding", workload, SWEPT, side).seconds for side in SIDES]
    for name in ("flat", "fusemax"):
        tables = [recorded()[f"projections {name}", workload.name, length] for length in LENGTHS]
        told[f"projections {name} seconds"] = [one.seconds for one in tables]
        told[f"projections {name} energy"] = [one.energy * 1e-12 for one in tables]
    return told


def _buffer(setting: Setting, seed: int) -> Measurements:
    cascade = parse(setting["text"])
    runs = [_run(cascade, {"e": 8, "f": 8, "p": 4, "m": keys}, seed) for keys in setting["lengths"]]
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, 7, n, generator=generator, dtype=torch.float64) for n in (5, 37, 37))
    expected = torch.nn.functional.scaled_dot_product_attention(q.mT, k.mT, v.mT, scale=1.0).mT
    found = run_cascade(cascade, {"Q": q, "K": k, "V": v}, tile=8)
    return {
        "keys": list(setting["lengths"]),
        "high_water": [run.high_water for run in runs],
        "traffic": [
            _run(cascade, {"e": 8, "f": 8, "p": 4, "m": n}, seed, keep=False).traffic for n in setting["lengths"]
        ],
        "off": float((found.output - expected).abs().max()),
    }


def _schedule(setting: Setting, _: int) -> Measurements:
    machine = read_machine("fusemax")
    told: dict[str, Any] = {"tiles": list(setting["tiles"]), "interleaved": [], "in turn": [], "formula": []}
    for count in setting["tiles"]:
        sizes = {"m": count * machine.tile, "p": machine.tile, "e": DIM, "f": DIM}
        told["interleaved"].append(schedule(shipped("one_pass"), machine, sizes).cycles / count)
        told["in turn"].append(schedule(shipped("one_pass"), machine, sizes, ahead=0).cycles / count)
        told["formula"].append(interleaved_cycles(cost(shipped("one_pass"), machine, sizes)) / count)
    return told


def _machine(setting: Setting, _: int) -> Measurements:
    sizes = {"m": TOKENS, "p": TOKENS, "e": DIM, "f": DIM}
    found = {name: cost(shipped(name), machine_of(setting["machine"]), sizes, HEADS) for name in SHIPPED}
    return {f"{name} {what}": getattr(one, what) for name, one in found.items() for what in ("seconds", "bytes")}


def _processor(setting: Setting, seed: int) -> Measurements:
    speeds = measured_speeds(setting["seconds"])
    machine = this_processor(speeds)
    told: dict[str, Any] = {"tokens": list(setting["lengths"]), "products": speeds.products, "bytes": speeds.bytes}
    for kernel in setting["kernels"]:
        told[f"{kernel} predicted"] = [_predicted(kernel, machine, length) for length in setting["lengths"]]
        told[f"{kernel} measured"] = [
            _measured(kernel, length, seed, setting["seconds"]) for length in setting["lengths"]
        ]
    return told


def _predicted(kernel: str, machine: Machine, length: int) -> float:
    found = cascade_of(kernel)
    assert found.cascade is not None
    sizes = {"m": length, "p": length, "e": DIM, "f": DIM}
    return cost(found.cascade, machine, sizes, HEADS).seconds


def _measured(kernel: str, length: int, seed: int, seconds: float) -> float:
    """Seconds of a call on one thread, the median of its repeats."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, HEADS, length, DIM, generator=generator) for _ in range(3))
    call = getattr(functional, f"{kernel}_attention")
    with torch.no_grad():
        times = rounds(
            {"call": lambda: call(q, k, v, pattern=Pattern.NONCAUSAL_SELF)},
            seconds=seconds / 3,
            least=3,
            clock=time.thread_time,
        )
    return spread(times["call"])["median"]


_PARTS = {
    "class": _class, "file": _file, "designs": _designs, "buffer": _buffer, "schedule": _schedule, "machine": _machine,
    "processor": _processor,
}  # fmt: skip


def _ratio(over: str, under: str, what: str = "seconds", whole: bool = False) -> Any:
    """The mean, over models and lengths, of one design's number by another's; of a whole layer with its projections."""

    def value(seed: Seed) -> float:
        ratios = []
        for model in WORKLOADS:
            cells = seed[f"designs {model}"]
            top, bottom = cells[f"{over} {what}"], cells[f"{under} {what}"]
            if whole:
                top = _sum(top, cells[f"projections {_machine_name(over)} {what}"])
                bottom = _sum(bottom, cells[f"projections {_machine_name(under)} {what}"])
            ratios += [a / b for a, b in zip(top, bottom, strict=True)]
        return statistics.mean(ratios)

    return value


def _machine_name(design: str) -> str:
    return "flat" if design == "flat" else "fusemax"


def _sum(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(first, second, strict=True)]


def _all_designs(what: str, design: str) -> Any:
    return lambda seed: min(value for model in WORKLOADS for value in seed[f"designs {model}"][f"{design} {what}"])


def _checks(lengths: Sequence[int]) -> tuple[Check, ...]:
    keys = lengths[-1] / lengths[0]

    def grows(name: str) -> Any:
        return lambda seed: seed[f"buffer {name}"]["high_water"][-1] / seed[f"buffer {name}"]["high_water"][0]

    return (
        Check("attention with interleaved tiles is at least 6.7 times as fast as FLAT (mean)", _ratio("flat", "binding"), above=6.7),
        Check("... a whole layer at least 5.3 times", _ratio("flat", "binding", whole=True), above=5.3),
        Check("... with at most 79 % of the energy for attention", _ratio("binding", "flat", "energy"), below=0.79),
        Check("... and 83.5 % for a whole layer", _ratio("binding", "flat", "energy", True), below=0.835),
        Check("the one-pass cascade alone, on FLAT's machine, is no faster", _ratio("flat", "cascade"), below=1.0),
        Check("the lanes are busy more than 99 % of the time", _all_designs("util_1d", "binding"), above=0.99),
        Check("the cells are busy more than 85 % of the time", _all_designs("util_2d", "binding"), above=0.85),
        Check("the buffer of one pass does not grow with the keys", grows("one_pass"), below=1.001),
        Check("the buffer of three passes grows by half of what they do or more", grows("three_pass"), above=keys / 2),
        Check(
            "interleaving ends within a tile of the formula",
            lambda seed: (seed["schedule"]["interleaved"][-1] - seed["schedule"]["formula"][-1])
            * seed["schedule"]["tiles"][-1]
            / seed["schedule"]["in turn"][0],
            below=1.0,
        ),
    )  # fmt: skip


def _needs(lengths: Sequence[int]) -> tuple[Check, ...]:
    return (
        Check(
            "all cascades of softmax are scaled dot-product attention in float64",
            lambda seed: max(seed[f"buffer {name}"]["off"] for name in SHIPPED),
            below=1e-12,
        ),
        Check(
            "times, bytes and utilisation are those of the authors' tables",
            lambda seed: max(seed[f"designs {model}"][f"{design} off"] for model in WORKLOADS for design in DESIGNS),
            below=1e-12,
        ),
    )


def sections(chosen: Chosen, cells: Cells) -> Sequence[Section]:
    """What the cells show."""
    known: dict[str, Measurements] = {}
    for (setting, _), measured in sorted(cells.items(), key=lambda cell: -cell[0][1]):
        known[setting] = measured  # the first seed of each
    parts = [
        _of_files(known), *_of_classes(chosen, known), _of_designs(known), _of_buffers(known), _of_tiles(known),
        _of_processor(known),
    ]  # fmt: skip
    return [part for part in parts if part is not None and (part.rows or part.pictures)]


def _row(name: str, told: Measurements) -> dict[str, Any]:
    return {
        "cascade": name,
        "passes": told["passes"],
        "in a run": told["traversals"],
        "buffer grows": told["growth"] > 1.2,
        "off by": told.get("difference"),
        "Mcycles": told["fusemax_cycles"] / 1e6,
        "GB": told["fusemax_bytes"] / 1e9,
        "FuseMax ms": 1e3 * told["fusemax_seconds"],
        "FLAT ms": 1e3 * told["flat_seconds"],
    }


def _of_files(known: Mapping[str, Measurements]) -> Section | None:
    rows = [_row(name.split(" ", 1)[1], told) for name, told in known.items() if name.startswith("file ")]
    for name, told in known.items():
        if name.startswith("machine "):
            rows += [
                {
                    "cascade": one,
                    "machine": name.split(" ", 1)[1],
                    "ms": 1e3 * told[f"{one} seconds"],
                    "GB moved": told[f"{one} bytes"] / 1e9,
                }
                for one in SHIPPED
            ]
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    rows = [{heading: row.get(heading) for heading in headings} for row in rows]
    return Section("Your files", f"At {TOKENS} queries and keys.", (), rows)


def _of_classes(chosen: Chosen, known: Mapping[str, Measurements]) -> list[Section]:
    rows, remarks, without = [], [], []
    for name in chosen.mechanisms:
        found = cascade_of(name)
        if found.written is None:
            without.append({"mechanism": name, "why": found.reason})
        elif f"class {name}" in known:
            rows.append(_row(name, known[f"class {name}"]))
            remarks += [{"cascade": name, "remark": found.written.remark}] if found.written.remark else []
    rows.sort(key=lambda row: (row["passes"], row["cascade"]))
    says = (
        f"Walks over the keys that each mechanism needs, and what it costs at {TOKENS} queries and keys with the 64 sequences "
        "and 12 heads of BERT's workload. A cascade that equals its mechanism's definition is off by rounding alone. "
        "Mcycles are of both arrays together, and of full arrays: the steps of a recurrence, which wait for each other, are counted side by side."
    )
    return [
        Section("Classes", says, (), rows),
        Section("Remarks", "What the table does not say.", (), remarks),
        Section("Without a cascade", "Mechanisms that the language cannot say, or that nobody wrote.", (), without),
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
            f"Time of attention a pair of query and key, {models[0]}",
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
        "Five designs on equal area, each with one idea more. One pass alone gains nothing on a machine whose cells cannot "
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
        "Cycles a tile of the one-pass cascade, scheduled on both arrays.",
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
    errors = [abs(row["predicted / measured"] - 1) for row in rows if row["kernel"] == "softmax"]
    says = (
        f"Each cascade's operations at the speeds that regard doctor --speeds measures, on one thread with {HEADS} heads of "
        f"{DIM}, beside the kernels. Softmax is off by {100 * max(errors):.0f} % at most."
    )
    pictures = [
        Curves("Softmax", "tokens", "seconds", times, log_x=True, log_y=True, rising=False),
        Curves("Predicted over measured time", "tokens", "ratio", ratios, log_x=True),
    ]
    return Section("This processor", says, pictures, rows)


def _refuses(name: str) -> str | None:
    return "a cascade is written for one set of options: give the name alone" if ":" in name else None


STUDY = Study(
    name="attention-passes",
    question="How many times does an attention algorithm have to walk over its keys, and what does that cost on a machine?",
    make=make,
    sections=sections,
    presets=("tiny", "small"),
    mechanisms=tuple(list_mechanisms()),
    refuses=_refuses,
    takes_data="cascades (.txt), and machines (.yaml)",
)
