"""Measurements of cascades, of designs, and of this processor."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from regard import functional
from regard.contract import Pattern
from regard.measurement.speeds import measured_speeds
from regard.measurement.timing import rounds
from regard.reproductions.framework.judging import Measurements, spread
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

SHIPPED = ("three_pass", "two_pass_deferred", "two_pass", "one_pass", "naive")
KERNELS = ("softmax", "sigmoid", "linear")
HEADS, DIM = 8, 64
"""Heads, and features of each, of the native kernels' calls."""

WORKLOAD = WORKLOADS["BERT"]
TOKENS = 4096
"""Number of queries and of keys for which cascades are costed on machines, with the heads and sequences of WORKLOAD."""

ELSE = {"c": 16, "a": 16, "s": 16, "b": 1}
"""Sizes of small ranks (slots, agents, states) there; all other ranks have 64."""

THIS_PROCESSOR = "this-processor"
"""The machine whose speeds its cell measures."""

SWEPT = 2**18
"""Number of tokens for the comparison of array sizes."""

TILE = 16
TILES = (1, 2, 4, 8, 16, 32, 64)


def run_cell(setting: Setting, seed: int) -> Measurements:
    """The measurements of a setting, by its part."""
    return _PARTS[setting["part"]](setting, seed)


def _class(setting: Setting, seed: int) -> Measurements:
    found = cascade_of(setting["mechanism"])
    assert found.cascade is not None
    return {**described(found.cascade, seed), "difference": difference(found, seed=seed)}


def _cascade(setting: Setting, seed: int) -> Measurements:
    return described(parse(setting["text"], setting["name"]), seed)


def described(cascade: Cascade, seed: int = 0) -> dict[str, Any]:
    """A cascade's class: the traversals that it needs and that a run took, and the growth of its buffer when its keys
    double."""
    runs = []
    for keys in (8 * TILE, 16 * TILE):
        inside = {name: min(size, 4) for name, size in _small_ranks(cascade).items()} | {"p": 4}
        runs.append(_run(cascade, {**inside, cascade.fiber.rank: keys}, seed))
    return {
        "passes": passes(cascade).count,
        "traversals": runs[0].traversals,
        "growth": runs[1].high_water / runs[0].high_water,
    }


def costed(cascade: Cascade, machine: Machine) -> dict[str, float]:
    """A cascade's cost on a machine, in the sizes that all cascades and machines are compared in."""
    small = _small_ranks(cascade)
    sizes = {**small, cascade.fiber.rank: TOKENS, **({"p": TOKENS} if "p" in small else {})}
    found = cost(cascade, machine, complete_sizes(cascade, sizes), WORKLOAD.batch * WORKLOAD.heads)
    return {"seconds": found.seconds, "bytes": found.bytes, "cycles": sum(found.cycles.values())}


def _small_ranks(cascade: Cascade) -> dict[str, int]:
    """Sizes of the ranks that are neither keys nor sized by the cascade."""
    known = cascade.fiber.parts + tuple(cascade.sizes)
    return {rank: ELSE.get(rank, 64) for rank in cascade.ranks if rank not in known}


def _run(cascade: Cascade, sizes: Mapping[str, int], seed: int, keep: bool = True) -> Run:
    """Run a cascade on random inputs."""
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
    given = setting["machine"]
    machine = this_processor(measured_speeds(setting["seconds"])) if given == THIS_PROCESSOR else machine_of(given)
    return {name: costed(parse(text, name), machine) for name, text in setting["cascades"].items()}


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
    """Median seconds of a call on one thread."""
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
    "class": _class, "cascade": _cascade, "designs": _designs, "buffer": _buffer, "schedule": _schedule, "machine": _machine,
    "processor": _processor,
}  # fmt: skip
