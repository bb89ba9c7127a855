"""LARA (Zheng et al., arXiv 2204.04667): proposals near the tokens beat random features from one distribution.

The paper (abstract): randomized attention with several proposals significantly improves on earlier linear attention, at
linear cost. The Comprehensive Attention Benchmark (arXiv 2210.07661, leaderboard, noncausal self): index -0.03, level
with softmax (-0.02), against -0.29 of Performer, both with 16 landmarks or features.

Here: scikit-learn's digits as 64 pixel tokens, 2 layers of width 64, 600 steps: softmax, LARA with 16 landmarks, with
and without its noise in training, and a Performer as in its own paper, with fixed orthogonal features, as many as LARA
has proposals. Also run, but in no check: the Performer of the benchmark, with 16 features redrawn at each training step
and fixed in evaluation, which hardly learns this task. "Level" means within 5 points. Growth of forward time on one
core.

The first protocol compared with the benchmark's Performer alone, which had 0.25 to 0.31 with three seeds; in a pilot
with one seed, the Performer with fixed features had 0.94.
"""

from typing import Any

from regard.functional import lara_attention, softmax_attention
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import forward_growth
from regard.reproductions.framework.training import digits_score

TRAINING = {"steps": 600, "batch_size": 32, "learning_rate": 3e-3, "items": 1000}
BENCHMARK = {"num_features": 16, "fresh": True, "least_denominator": 0.1}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure the accuracy on digits; with ``lengths``, the growth of a forward call."""
    if "lengths" in setting:
        return forward_growth(setting, {"lara": lara_attention, "softmax": softmax_attention})
    return digits_score(setting, seed)


REPRODUCTION = Reproduction(
    name="lara",
    mechanisms=("lara", "performer"),
    claim=(
        "Better than earlier linear attention at a linear cost (abstract); level with softmax and above Performer in the "
        "benchmark's noncausal tasks (index -0.03, -0.02 and -0.29)."
    ),
    instead=(
        "Accuracy on digits as 64 pixel tokens, 2 layers of width 64, 16 landmarks against 16 features; level meaning within 5 "
        "points of softmax; growth of forward time on one core."
    ),
    settings={
        "lara": TRAINING | {"mixer": "lara", "options": {}},
        "lara, no noise": TRAINING | {"mixer": "lara", "options": {"noise": 0.0}},
        "performer, fixed features": TRAINING | {"mixer": "performer", "options": {"num_features": 16}},
        "performer": TRAINING | {"mixer": "performer", "options": BENCHMARK},
        "softmax": TRAINING | {"mixer": "softmax", "options": {}},
        "time": {"lengths": [1024, 2048, 4096, 8192], "seconds": 8.0},
    },
    run_cell=run_cell,
    more_seeds={"lara": 9, "performer, fixed features": 9},
    needs=(
        Check("softmax gets above 0.85", measured("softmax", "score"), above=0.85),
        Check("Performer gets above 0.7", measured("performer, fixed features", "score"), above=0.7),
        Check("LARA stays below 0.98", measured("lara", "score"), below=0.98),
    ),
    checks=(
        Check("accuracy within 5 points of softmax", minus("lara", "softmax"), above=-0.05),
        Check("accuracy above Performer with fixed features", minus("lara", "performer, fixed features"), above=0.0),
        Check("forward time grows with p < 1.3", measured("time", "lara"), below=1.3),
        Check("softmax takes longer at 8192 tokens", measured("time", "speedup"), above=1.0),
    ),
    timings=frozenset({"time"}),
    left_out=("images and video of the paper, and the benchmark's other tasks: no such hosts at this size",),
    smoke={"steps": 2, "batch_size": 2, "items": 8, "lengths": [64, 128], "seconds": 0.01},
    seconds=40,
)
