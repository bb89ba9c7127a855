"""Sparse Sinkhorn attention (Tay et al., arXiv 2002.11296): a block besides one's own, found by sorting, beats local attention.

The paper (abstract): with sparse memory of O(b^2 + N_B^2) it outperforms the efficient models of its day (Sparse Transformer)
and is near the full one. Table 1, on sorting sequences: exact match far above local attention of the same block size. Table 2, on
LM1B: 43 to 41 perplexity against 47 of local attention and 42 of the Transformer.

Here: scikit-learn's digits as 64 pixel tokens, read off at the first token after 2 layers of width 64, 450 steps; blocks of 8
pixels, a row. Blocks alone never leave their row; a mixed block does. Accuracy 20 points above blocks alone, and within 10 points
of softmax. Forward time on one core, blocks of 64, and its growth from 1024 to 8192.
"""

from functools import partial
from typing import Any

import torch

from regard import get_mechanism
from regard.apply import apply
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import timed_ratio, timed_slopes
from regard.reproductions.framework.training import cached_task, classifier, trained_score

TRAINING = {"steps": 450, "batch_size": 32, "learning_rate": 3e-3, "items": 1000}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    if "lengths" in setting:
        with torch.no_grad():
            return time_forward(setting)
    task = cached_task("images", data="digits", patch=1, held_out=0.5, evaluation_items=setting["items"])
    plan = [(setting["mixer"], setting["options"])] * 2
    return trained_score(classifier(task, plan, dim=64, num_heads=4, pool="first"), task, setting, seed)


def time_forward(setting: Setting) -> dict[str, Any]:
    actions: dict[str, dict[float, Any]] = {"sinkhorn": {}, "softmax": {}}
    for n in setting["lengths"]:
        inputs = dict(zip("qkv", torch.randn(3, 1, 4, n, 64), strict=True))
        for name, timed in actions.items():
            timed[n] = partial(apply, get_mechanism(name), inputs, pattern="noncausal-self")
    found: dict[str, Any] = {**timed_slopes(actions, seconds=setting["seconds"])}
    longest = setting["lengths"][-1]
    found["speedup"] = timed_ratio(
        actions["softmax"][longest], actions["sinkhorn"][longest], seconds=setting["seconds"]
    )
    return found


REPRODUCTION = Reproduction(
    name="sinkhorn",
    mechanisms=("sinkhorn",),
    claim=(
        "A learned sorting of blocks beats local attention of the same blocks and comes near full attention, at a fraction of its "
        "cost (abstract, tables 1 and 2)."
    ),
    instead=(
        "Digits as 64 pixel tokens, read off at the first token after 2 layers of width 64, blocks of 8: 20 points above blocks "
        "alone, within 10 points of softmax. Forward time on one core, and p of time ~ length^p."
    ),
    settings={
        "softmax": TRAINING | {"mixer": "softmax", "options": {}},
        "sinkhorn": TRAINING | {"mixer": "sinkhorn", "options": {"block": 8}},
        "blocks": TRAINING | {"mixer": "local", "options": {"form": "block", "block": 8, "lookback": 0}},
        "time": {"lengths": [1024, 2048, 4096, 8192], "seconds": 8.0},
    },
    run_cell=run_cell,
    checks=(
        Check("20 points above blocks alone", minus("sinkhorn", "blocks"), above=0.2),
        Check("within 10 points of softmax", minus("sinkhorn", "softmax"), above=-0.1),
        Check("softmax takes over twice as long at the greatest length", measured("time", "speedup"), above=2.0),
        Check("time grows with p < 1.3", measured("time", "sinkhorn"), below=1.3),
    ),
    timings=frozenset({"time"}),
    smoke={"steps": 2, "batch_size": 2, "items": 8, "lengths": [32, 64, 128], "seconds": 0.01},
    seconds=40,
)
