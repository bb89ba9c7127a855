"""Informer's ProbSparse attention (Zhou et al., arXiv 2012.07436): only a few queries attend, at a small loss.

The paper (abstract): attention in O(L log L), with performance comparable to that of full attention on long sequence
forecasting. The Comprehensive Attention Benchmark (arXiv 2210.07661, leaderboard, noncausal self): index -0.66, second
to last, against -0.02 for softmax.

Here: scikit-learn's digits as 64 pixel tokens, 2 layers of width 64, 600 steps: softmax, ProbSparse with the paper's
factor 5 (25 keys sampled and 25 of 64 queries chosen) and with factor 1 (5 of 64). "Comparable" means within 5 points.
Growth of forward time on one core. Forecasting is not tested.
"""

from typing import Any

from regard.functional import probsparse_attention, softmax_attention
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import forward_growth
from regard.reproductions.framework.training import digits_score

TRAINING = {"steps": 600, "batch_size": 32, "learning_rate": 3e-3, "items": 1000}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure the accuracy on digits; with ``lengths``, the growth of a forward call."""
    if "lengths" in setting:
        return forward_growth(setting, {"probsparse": probsparse_attention, "softmax": softmax_attention})
    return digits_score(setting, seed)


REPRODUCTION = Reproduction(
    name="probsparse",
    mechanisms=("probsparse",),
    claim=(
        "Comparable to attention of all queries at L log L (abstract); in the benchmark's noncausal tasks below softmax (index "
        "-0.66 against -0.02)."
    ),
    instead=(
        "Accuracy on digits as 64 pixel tokens, 2 layers of width 64, 25 of 64 queries chosen; comparable meaning within 5 "
        "points; growth of forward time on one core. No forecasting."
    ),
    settings={
        "probsparse": TRAINING | {"mixer": "probsparse", "options": {}},
        "factor 1": TRAINING | {"mixer": "probsparse", "options": {"factor": 1}},
        "softmax": TRAINING | {"mixer": "softmax", "options": {}},
        "time": {"lengths": [1024, 2048, 4096, 8192], "seconds": 8.0},
    },
    run_cell=run_cell,
    checks=(
        Check("accuracy within 5 points of softmax", minus("probsparse", "softmax"), above=-0.05),
        Check("softmax is better", minus("softmax", "probsparse"), above=0.0),
        Check("25 queries are better than 5", minus("probsparse", "factor 1"), above=0.0),
        Check("forward time grows with p < 1.3", measured("time", "probsparse"), below=1.3),
        Check("softmax takes longer at 8192 tokens", measured("time", "speedup"), above=1.0),
    ),
    needs=(Check("softmax classifies digits (above 0.8)", measured("softmax", "score"), above=0.8),),
    left_out=(
        "forecasting: the paper's task, with a decoder that gives all steps at once; digits stand for it",
        "distilling between layers: a part of the paper's encoder, not of its attention",
        "memory in L log L: `regard profile` measures it",
    ),
    timings=frozenset({"time"}),
    more_seeds={"probsparse": 6, "softmax": 6},
    smoke={"steps": 2, "batch_size": 2, "items": 8, "lengths": [64, 128], "seconds": 0.01},
    seconds=30,
)
