"""Reformer (Kitaev et al., arXiv 2001.04451): attention within hash buckets is as good as full attention.

The paper (abstract): performance on par with Transformers in O(L log L) instead of O(L^2). Section 5: sharing queries
and keys costs nothing, eight hashing rounds match full attention on text and images, and a model evaluated with fewer
rounds than in training is less accurate (table 2, on duplicating sequences).

Here: scikit-learn's digits as 64 pixel tokens, classified from their mean after 2 layers of width 64, 450 steps; 4
rounds of 16 buckets in chunks of 8, so that a query sees a quarter of the tokens in each round. Expected are an
accuracy within 5 points of softmax, and a lower one when evaluated with one round instead of four. Forward time on one
core at N = 8192, one round, chunks of 64 in 256 buckets, and its growth from 1024 with N / 32 buckets.
"""

from functools import partial
from typing import Any

import torch

from regard import get_mechanism
from regard.apply import apply
from regard.mechanisms.reformer import Rotations
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import growth_and_speedup
from regard.reproductions.framework.training import classifier, digit_pixels, fit, score

TRAINING = {"steps": 450, "batch_size": 32, "learning_rate": 3e-3, "items": 1000}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure accuracy on digits, and its drop with one hashing round; with ``lengths``, times of a forward call."""
    if "lengths" in setting:
        with torch.no_grad():
            return time_forward(setting)
    task = digit_pixels(setting["items"])
    model = classifier(task, [(setting["mixer"], setting["options"])] * 2, dim=64, num_heads=4)
    if not fit(model, task, setting, seed):
        return {"score": float("nan"), "fewer": float("nan")}
    trained = score(model, task)["score"]
    for module in model.modules():
        if isinstance(module, Rotations):
            module.rotations = module.rotations[:, :1]
    return {"score": trained, "fewer": trained - score(model, task)["score"]}


def time_forward(setting: Setting) -> dict[str, Any]:
    """Measure how both times grow with the length, and the speedup at the longest."""
    actions: dict[str, dict[float, Any]] = {"reformer": {}, "softmax": {}}
    for n in setting["lengths"]:
        q, k, v = torch.randn(3, 1, 4, n, 64)
        rotations = torch.randn(4, 1, 64, max(1, n // 64))
        hashed = {"q": q, "v": v, "rotations": rotations}
        actions["reformer"][n] = partial(apply, get_mechanism("reformer"), hashed, pattern="noncausal-self")
        actions["softmax"][n] = partial(
            apply, get_mechanism("softmax"), {"q": q, "k": k, "v": v}, pattern="noncausal-self"
        )
    return growth_and_speedup(actions, seconds=setting["seconds"])


REPRODUCTION = Reproduction(
    name="reformer",
    mechanisms=("reformer",),
    claim=(
        "Attention in buckets of random hashes, queries and keys shared, is on par with full attention at a cost of N log N; "
        "fewer rounds at evaluation than in training cost accuracy (abstract, section 5)."
    ),
    instead=(
        "Digits as 64 pixel tokens, 2 layers of width 64: accuracy with 4 rounds in chunks of 8 within 5 points of softmax, and "
        "lower when evaluated with one round. Forward time of one round on one core, and p of time ~ length^p."
    ),
    settings={
        "softmax": TRAINING | {"mixer": "softmax", "options": {}},
        "reformer": TRAINING | {"mixer": "reformer", "options": {"chunk": 8, "rounds": 4, "buckets": 16}},
        "time": {"lengths": [1024, 2048, 4096, 8192], "seconds": 8.0},
    },
    run_cell=run_cell,
    checks=(
        Check("within 5 points of softmax", minus("reformer", "softmax"), above=-0.05),
        Check("one round instead of four costs accuracy", measured("reformer", "fewer"), above=0.0),
        Check("softmax takes over twice as long at the greatest length", measured("time", "speedup"), above=2.0),
        Check("time grows with p < 1.3", measured("time", "reformer"), below=1.3),
    ),
    needs=(Check("softmax classifies digits (above 0.8)", measured("softmax", "score"), above=0.8),),
    left_out=(
        "queries and keys shared at no loss: what is compared shares them, and softmax does not",
        "eight rounds match full attention: four of 16 buckets are tried on 64 tokens",
        "reversible layers and memory: `regard profile` measures memory, and reversible stacks are another mechanism",
        "enwik8 and ImageNet-64: out of reach",
    ),
    timings=frozenset({"time"}),
    smoke={"steps": 2, "batch_size": 2, "items": 8, "lengths": [32, 64, 128], "seconds": 0.01},
    seconds=50,
)
