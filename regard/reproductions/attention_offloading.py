"""Attention offloading (Chen et al., arXiv 2405.01814): keys, values and attention on cheaper devices than the model.

The paper (abstract, first version): 1.48 to 12.1 times the estimated throughput per dollar of homogeneous devices, with
a bandwidth that common networks provide.

Here: the estimate, from the counted operations and bytes of :mod:`regard.serving.offload.costs`, for up to eight H100
with the model and up to 32 RTX 3090 with the attention (data sheets; 200 Gb/s and 20 microseconds between them), models
of 13 and 70 billion parameters of two bytes, and contexts of 1k to 64k. Prices are assumptions: the small device costs
a fourth, an eighth or a sixteenth of the large one. The comparison is with H100 alone, and with the better of the two
kinds alone, whose devices share all work at no cost in this count, which favours many small ones. And a measurement,
with a model of 4 layers of width 256 on one core and its keys and values on another: two alternating micro-batches
against one batch, where attention takes much less time than the model, about as much, and much more.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from regard.contract import Paper
from regard.models import LanguageModel, LanguageModelConfig
from regard.reproductions.framework.judging import Check, Measurements, Seed, measured
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.serving.offload.backends import create_backend
from regard.serving.offload.costs import Device, Network, Sizes, plans, required_bandwidth
from regard.serving.offload.measure import Load, measure

CONTEXTS = (1024, 4096, 16_384, 65_536)
DATA_SHEET = "data sheet of the maker: dense operations of two-byte numbers"
LARGE = Device("H100 SXM", 989e12, 3.35e12, 80e9, 16.0, DATA_SHEET)
NETWORK = Network(2.5e10, 2e-5)
FAST_NETWORK = 5e10
"""Bytes per second of a 400 Gb/s network."""
MODELS = {"13b": Sizes(40, 40, 40, 128, 13e9), "70b": Sizes(80, 64, 8, 128, 70e9)}
SHORT, EVEN, LONG = "short", "even", "long"
TIMES = {SHORT: 128, EVEN: 2048, LONG: 16_384}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Return the planned economics of a published model, or the measured gain of two micro-batches with a worker on its
    own core, with the stage times and the error of the simulation."""
    if "share" in setting:
        return economics(MODELS[setting["model"]], setting["share"], CONTEXTS[: setting["contexts"]])
    torch.manual_seed(seed)
    config = LanguageModelConfig(256, dim=setting["dim"], num_layers=4, num_heads=8, num_kv_heads=4)
    model = LanguageModel(config).eval()
    load = Load(setting["batch"], setting["context"], setting["seconds"])
    cores = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else []
    apart = len(cores) == 2
    backend = create_backend("process", 1, cores[1:] if apart else None)
    with on_core(cores[0]) if apart else nullcontext():
        found = measure(model, 1, backend, load)
    serial, pipelined = found["seconds_of"]["serial"], found["seconds_of"]["pipelined"]
    ends = {"low": serial["low"] / pipelined["high"], "high": serial["high"] / pipelined["low"]}
    stages = found["stages"]
    return {
        "gain": {"median": found["gain"], **ends},
        "attention over model": stages["attention"] / stages["model"],
        "simulation error": abs(found["simulation_error"]),
    }


def economics(sizes: Sizes, share: float, contexts: tuple[int, ...]) -> dict[str, float]:
    """Return tokens per price with the model on large and attention on small devices, over large devices alone and over
    the best single kind; and the bytes per second between them."""
    small = Device("RTX 3090", 71e12, 9.36e11, 24e9, LARGE.price_per_hour * share, DATA_SHEET, available=32)
    gains, best, needed = {}, [], []
    for context in contexts:
        alone, pairs = plans((LARGE, small), NETWORK, sizes, context)
        large = next(plan for plan in alone if LARGE.name in plan.model)
        mixed = next(plan for plan in pairs if LARGE.name in plan.model and small.name in str(plan.attention))
        gains[context] = mixed.tokens_per_unit / large.tokens_per_unit
        best.append(mixed.tokens_per_unit / alone[0].tokens_per_unit)
        needed.append(required_bandwidth(sizes, mixed.batch, mixed.seconds))
    shortest, longest = min(gains), max(gains)
    return {
        **{f"gain at {context // 1024}k": gain for context, gain in gains.items()},
        "most": max(gains.values()),
        "longest over shortest": gains[longest] / gains[shortest],
        "most, over the best kind": max(best),
        "bandwidth": max(needed),
    }


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Pin this process to one core inside the ``with`` block."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def best_gain(seed: Seed) -> Measurements:
    """Return the largest gain over the three contexts."""
    found: list[Measurements] = [seed[name]["gain"] for name in TIMES]
    return max(found, key=lambda gain: gain["median"])


REPRODUCTION = Reproduction(
    name="attention_offloading",
    mechanisms=("softmax",),
    source=Paper(
        "Efficient and Economic Large Language Model Inference with Attention Offloading", "2405.01814", 2024, 43
    ),
    claim=(
        "Attention on cheaper devices gives 1.48 to 12.1 times the estimated throughput for the money of homogeneous devices, "
        "over networks that are common (abstract, first version)."
    ),
    instead=(
        "Counted operations and bytes of H100 with RTX 3090 at assumed price ratios, for models of 13 and 70 billion "
        "parameters; and two processes with a core each, two micro-batches in turn against one batch."
    ),
    settings={
        f"{model}, 1/{round(1 / share)}": {"model": model, "share": share, "contexts": len(CONTEXTS)}
        for model in MODELS
        for share in (1 / 4, 1 / 8, 1 / 16)
    }
    | {name: {"context": context, "batch": 16, "dim": 256, "seconds": 15.0} for name, context in TIMES.items()},
    run_cell=run_cell,
    checks=(
        *(
            check
            for model in MODELS
            for check in (
                Check(
                    f"{model} at an eighth of the price: 1.48 times the large device alone, somewhere",
                    measured(f"{model}, 1/8", "most"),
                    above=1.48,
                ),
                Check(
                    f"{model}: more than the best single kind, somewhere",
                    measured(f"{model}, 1/8", "most, over the best kind"),
                    above=1.0,
                ),
                Check(
                    f"{model}: more at 64k than at 1k", measured(f"{model}, 1/8", "longest over shortest"), above=1.0
                ),
                Check(f"{model}: 400 Gb/s are enough", measured(f"{model}, 1/8", "bandwidth"), below=FAST_NETWORK),
            )
        ),
        Check("two micro-batches are 1.3 times as fast somewhere", best_gain, above=1.3),
        Check("the simulator is within 15 % there", measured(EVEN, "simulation error"), below=0.15),
    ),
    left_out=(
        "16 to 90 % more throughput of a deployed system at similar cost (second version): there are no such devices here",
        "prices: the abstracts name none, so that ratios are assumed and told",
    ),
    timings=frozenset(TIMES),
    smoke={"contexts": 1, "context": 8, "batch": 2, "dim": 32, "seconds": 0.0},
    seconds=40,
)
