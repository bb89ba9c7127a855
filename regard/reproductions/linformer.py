"""Linformer (Wang et al., arXiv 2006.04768): a few mixtures of keys are enough, and sharing their matrices is free.

The paper (abstract, section 5): on par with the standard Transformer in pretraining and after fine-tuning, at linear
time and memory; perplexity hardly depends on which matrices are shared; with a fixed projected dimension it stays the
same as inputs grow.

Here: scikit-learn's digits as 64 pixel tokens, 2 layers of width 64, 600 steps: softmax, Linformer with 16 mixtures of
64 keys, with one matrix for keys and values, and with a matrix for each head. "On par" means within 5 points, "hardly"
within 3 points. Growth of forward time on one core with 256 mixtures, over lengths from 1024 to 8192. No pretraining.
"""

from functools import partial
from typing import Any

import torch

from regard.functional import linformer_attention, softmax_attention
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import growth_and_speedup
from regard.reproductions.framework.training import digits_score

TRAINING = {"steps": 600, "batch_size": 32, "learning_rate": 3e-3, "items": 1000}
FEW = {"length": 64, "projected": 16}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure the accuracy on digits; with ``lengths``, times of a forward call."""
    if "lengths" in setting:
        with torch.no_grad():
            return time_forward(setting)
    return digits_score(setting, seed)


def time_forward(setting: Setting) -> dict[str, Any]:
    """Measure how both times grow with the length, and the speedup at the longest."""
    lengths = setting["lengths"]
    inputs = {n: torch.randn(3, 1, 4, n, 64) for n in lengths}
    mixing = {n: torch.rand(2, 1, n, 256) / 8 - 1 / 16 for n in lengths}
    softmax = {n: partial(softmax_attention, *inputs[n], pattern="noncausal-self") for n in lengths}
    linformer = {n: partial(linformer_attention, *inputs[n], *mixing[n], pattern="noncausal-self") for n in lengths}
    return growth_and_speedup({"linformer": linformer, "softmax": softmax}, seconds=setting["seconds"])


REPRODUCTION = Reproduction(
    name="linformer",
    mechanisms=("linformer",),
    claim=(
        "On par with the standard Transformer at linear time and memory (abstract); what is shared between the matrices "
        "hardly matters (section 5)."
    ),
    instead=(
        "Accuracy on digits as 64 pixel tokens, 2 layers of width 64, 16 mixtures; on par meaning within 5 points, hardly "
        "within 3; growth of forward time on one core with 256 mixtures. No pretraining."
    ),
    settings={
        "linformer": TRAINING | {"mixer": "linformer", "options": FEW},
        "one matrix": TRAINING | {"mixer": "linformer", "options": FEW | {"sharing": "key-value"}},
        "a matrix a head": TRAINING | {"mixer": "linformer", "options": FEW | {"sharing": "none"}},
        "softmax": TRAINING | {"mixer": "softmax", "options": {}},
        "time": {"lengths": [1024, 2048, 4096, 8192], "seconds": 8.0},
    },
    run_cell=run_cell,
    checks=(
        Check("accuracy within 5 points of softmax", minus("linformer", "softmax"), above=-0.05),
        Check("one matrix for keys and values within 3 points", minus("one matrix", "linformer"), above=-0.03),
        Check(
            "one matrix for all heads within 3 points of one a head", minus("linformer", "a matrix a head"), above=-0.03
        ),
        Check("forward time grows with p < 1.3", measured("time", "linformer"), below=1.3),
        Check("softmax takes longer at 8192 tokens", measured("time", "speedup"), above=1.0),
    ),
    needs=(Check("softmax classifies digits (above 0.8)", measured("softmax", "score"), above=0.8),),
    left_out=(
        "perplexity in pretraining and GLUE afterwards: the pretraining is out of reach",
        "the same perplexity on longer inputs at as many mixtures: one length is trained",
        "linear memory: `regard profile` measures it",
    ),
    timings=frozenset({"time"}),
    more_seeds={"linformer": 8, "one matrix": 8},
    smoke={"steps": 2, "batch_size": 2, "items": 8, "lengths": [64, 128], "seconds": 0.01},
    seconds=30,
)
