"""LeanAttention (Sanovar et al., arXiv 2405.10480): decoding with work cut into equal spans is never slower.

The paper (abstract): 2.6 times as fast as FlashAttention-2 on average in decoding, up to 8.33 times at 512k tokens; in
the second version of the paper 1.73 times as fast as FlashDecoding, up to 2.18 times at 256k.

Here: the paper's cost model (tiles of the busiest of 108 processors of an A100, with time proportional to tiles) over
contexts of 1k to 512k, 1 to 8 requests and 12 to 56 heads; and the times of two workers, each a thread with the native
kernel for decoding (or PyTorch where there is none), which all schemes share. (a) 3 heads on 2 workers: 4/3 by the
model. (b) 8 requests of one head, the last of them 16 times as long: 38/23 by the model. (c) Even work, where nothing
can be gained.
"""

import time
from functools import partial
from itertools import product
from typing import Any

import torch

from regard.backends.native import library
from regard.contract import Paper
from regard.engines.lean_attention import lean_attention, makespans
from regard.measurement.timing import rounds
from regard.reproductions.framework.judging import Check, measured, spread
from regard.reproductions.framework.protocol import Reproduction, Setting

PROCESSORS = 108
CONTEXTS = tuple(2**power for power in range(10, 20))


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure how many times as much work or time other schemes need: by the model over contexts, or on workers."""
    if "lengths" not in setting:
        return model(setting["contexts"])
    torch.manual_seed(seed)
    lengths = [length // setting["shrink"] for length in setting["lengths"]]
    return times(lengths, setting["kv_heads"], setting["seconds"])


def model(contexts: int) -> dict[str, float]:
    """Return how many times as many tiles the busiest processor has with the other schemes: mean and maximum."""
    found = [
        makespans([n] * batch, kv_heads=heads, workers=PROCESSORS)
        for n, batch, heads in product(CONTEXTS[:contexts], (1, 2, 4, 8), (12, 32, 56))
    ]
    ratios = {scheme: [tiles[scheme] / tiles["lean"] for tiles in found] for scheme in ("per_head", "fixed_split")}
    means = {f"{scheme} mean": sum(values) / len(values) for scheme, values in ratios.items()}
    return means | {f"{scheme} most": max(values) for scheme, values in ratios.items()}


@torch.no_grad()
def times(lengths: list[int], kv_heads: int, seconds: float) -> dict[str, Any]:
    """Measure how many times as long the other schemes take on two workers, measured and by the model."""
    tile, longest = 256, -(-max(lengths) // 256) * 256
    q = torch.randn(len(lengths), kv_heads, 1, 64)
    k, v = torch.randn(2, len(lengths), kv_heads, longest, 64)
    backend = "threads" if library.why_missing() is not None else "native"

    def attend(scheme: str) -> object:
        return lean_attention(q, k, v, lengths, scheme=scheme, workers=2, tile=tile, backend=backend)

    found = rounds(
        {scheme: partial(attend, scheme) for scheme in ("lean", "per_head", "fixed_split")},
        seconds=seconds,
        least=5,
        most=200,
        clock=time.perf_counter,
    )
    tiles = makespans(lengths, kv_heads=kv_heads, workers=2, tile=tile)
    told: dict[str, Any] = {}
    for scheme in ("per_head", "fixed_split"):
        told[scheme] = spread([a / b for a, b in zip(found[scheme], found["lean"], strict=True)])
        told[f"{scheme}, tiles"] = tiles[scheme] / tiles["lean"]
    return told


REPRODUCTION = Reproduction(
    name="lean_attention",
    mechanisms=("softmax",),
    source=Paper(
        "Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of Transformers",
        "2405.10480",
        2024,
        2,
    ),
    claim=(
        "In decoding, equal spans of all tiles are 2.6 times as fast as a worker for each head on average, up to 8.33 times at "
        "512k tokens, and never slower (abstract; on A100s)."
    ),
    instead=(
        "Tiles of the busiest of 108 processors for contexts of 1k to 512k; times of two threads on a CPU, which all schemes "
        "share, for 3 heads, for a ragged batch of 8 with one request 16 times as long, and for even work."
    ),
    settings={
        "model": {"contexts": len(CONTEXTS)},
        "3 heads": {"lengths": [65536], "kv_heads": 3, "shrink": 1, "seconds": 10.0},
        "ragged": {"lengths": [4096] * 7 + [65536], "kv_heads": 1, "shrink": 1, "seconds": 10.0},
        "even": {"lengths": [16384] * 4, "kv_heads": 2, "shrink": 1, "seconds": 10.0},
    },
    run_cell=run_cell,
    checks=(
        Check(
            "model: twice as fast as a worker for each head on average", measured("model", "per_head mean"), above=2.0
        ),
        Check("model: 8 times as fast somewhere", measured("model", "per_head most"), above=8.0),
        Check("model: faster than fixed splits on average", measured("model", "fixed_split mean"), above=1.1),
        Check("3 heads on 2 workers: 1.2 times as fast (4/3 by the model)", measured("3 heads", "per_head"), above=1.2),
        Check("ragged: 1.5 times as fast (1.65 by the model)", measured("ragged", "per_head"), above=1.5),
        Check("even work: not slower than 0.97", measured("even", "per_head"), above=0.97),
    ),
    left_out=(
        "times on GPUs: two threads of a CPU are timed, and 108 processors are counted",
        "end-to-end inference of whole models: one attention call is timed",
        "several GPUs: tensor parallelism divides heads before this schedule divides tiles",
    ),
    timings=frozenset({"3 heads", "ragged", "even"}),
    smoke={"contexts": 2, "shrink": 64, "seconds": 0.01},
    seconds=15,
)
