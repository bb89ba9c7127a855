"""TransNormer (Qin et al., arXiv 2210.10340): linear attention with a norm and local first layers models language better.

The paper (abstract): a linear model whose attention is normalised instead of divided, and local in its first layers, beats
the Transformer and other linear models at text classification, language modelling and Long-Range Arena, in less time and
memory. Its causes: unbounded gradients under the denominator, and attention that is spread over the whole sequence.

Here: bytes of Python's standard library in windows of 256, 4 layers of width 64, 400 steps: linear attention with its
denominator, NormAttention in all layers, the variants T1 and T2 (2 layers of blocks of 32, then 2 of NormAttention), and
softmax. The paper's comparison is with a loss; a tie with softmax means within 0.02 nats. Forward time of whole models
on one core at N = 4096. Gradients are not judged: spikes do not show at this size, and both the denominator and the norm
divide by what vanishes when all scores of a query do (`tests/mechanisms/test_norm_linear.py` measures it).
"""

from functools import partial
from typing import Any

import torch

from regard.models import transnormer_plan
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import timed_ratio
from regard.reproductions.framework.training import cached_task, language_model, trained_score

TRAINING = {"steps": 400, "batch_size": 16, "learning_rate": 3e-3, "items": 64}
PLANS: dict[str, list[Any]] = {
    "linear": ["linear"] * 4,
    "norm": [("norm_linear", {"positions": "lrpe"})] * 4,
    "T1": transnormer_plan(4, "T1", block=32),
    "T2": transnormer_plan(4, "T2", block=32),
    "softmax": ["softmax"] * 4,
}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    task = cached_task("text", length=256, evaluation_items=setting.get("items", 8))
    if "seconds" in setting:
        ids = torch.randint(task.vocab_size or 1, (1, setting["length"]))
        slow, fast = (language_model(task, PLANS[plan], dim=64, num_heads=4) for plan in ("softmax", "T2"))
        with torch.no_grad():
            return {"speedup": timed_ratio(partial(slow, ids), partial(fast, ids), seconds=setting["seconds"])}
    model = language_model(task, PLANS[setting["plan"]], dim=64, num_heads=4)
    return {**trained_score(model, task, setting, seed)}


REPRODUCTION = Reproduction(
    name="norm_linear",
    mechanisms=("norm_linear", "diagonal"),
    claim=(
        "Linear attention with a norm in place of the denominator, below it local attention, models language better than "
        "linear attention and than the Transformer, in less time (abstract; no figure)."
    ),
    instead=(
        "Loss in nats on code bytes, windows of 256, 4 layers of width 64, 400 steps: all layers linear, all normalised, "
        "half of them local, all softmax. Forward time at N = 4096 on one core. Gradients are not judged."
    ),
    settings={plan: TRAINING | {"plan": plan} for plan in PLANS} | {"time": {"length": 4096, "seconds": 10.0}},
    run_cell=run_cell,
    checks=(
        Check("NormAttention below linear attention", minus("norm", "linear", "loss"), below=0.0),
        Check("T2 below NormAttention alone", minus("T2", "norm", "loss"), below=0.0),
        Check("T1 below NormAttention alone", minus("T1", "norm", "loss"), below=0.0),
        Check("T2 at most 0.02 nats above softmax", minus("T2", "softmax", "loss"), below=0.02),
        Check("softmax takes longer than T2, forward", measured("time", "speedup"), above=1.0),
    ),
    timings=frozenset({"time"}),
    smoke={"steps": 2, "batch_size": 2, "items": 4, "length": 64, "seconds": 0.01},
    seconds=80,
)
