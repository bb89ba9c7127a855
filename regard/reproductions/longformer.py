"""Longformer (Beltagy et al., arXiv 2004.05150) and BigBird (Zaheer et al., arXiv 2007.14062): windows and a few global
tokens are nearly as good as full attention on long inputs, in linear time.

The papers (abstracts): attention that scales linearly is a drop-in replacement for full attention and beats RoBERTa on
long documents; BigBird handles sequences 8 times longer on the same hardware. BigBird's table 1: windows alone and
random blocks alone fall short; windows with random blocks and global tokens do not.

Here: scikit-learn's digits as 64 pixel tokens, read off at the first token after 2 layers of width 64, 450 steps.
Windows of 8 pixels (a row) alone do not reach that token; one global token or one global block does. Expected are an
accuracy within 5 points of softmax, and at least 20 points less with windows alone. Forward time on one core, N = 4096,
windows of 256 and blocks of 64, and its growth from 1024 to 8192.
"""

from functools import partial
from typing import Any

import torch

from regard import get_mechanism
from regard.apply import apply
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import timed_ratio, timed_slopes
from regard.reproductions.framework.training import classifier, digit_pixels, trained_score

TRAINING = {"steps": 450, "batch_size": 32, "learning_rate": 3e-3, "items": 1000}
TIMED: dict[str, dict[str, Any]] = {"longformer": {"window": 256}, "bigbird": {}, "softmax": {}}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure the accuracy on digits from the first token; with ``lengths``, times of a forward call."""
    if "lengths" in setting:
        with torch.no_grad():
            return time_forward(setting)
    task = digit_pixels(setting["items"])
    plan = [(setting["mixer"], setting["options"])] * 2
    return {**trained_score(classifier(task, plan, dim=64, num_heads=4, pool="first"), task, setting, seed)}


def time_forward(setting: Setting) -> dict[str, Any]:
    """Measure how all times grow with the length, and both speedups over softmax at the second longest."""
    actions: dict[str, dict[float, Any]] = {name: {} for name in TIMED}
    for n in setting["lengths"]:
        inputs = dict(zip("qkv", torch.randn(3, 1, 4, n, 64), strict=True))
        for name, options in TIMED.items():
            card = get_mechanism(name)
            config = card.options(**options)
            actions[name][n] = partial(apply, card, inputs, pattern="noncausal-self", config=config)
    found: dict[str, Any] = {**timed_slopes(actions, seconds=setting["seconds"])}
    at = setting["lengths"][-2]
    for name in ("longformer", "bigbird"):
        ratio = timed_ratio(actions["softmax"][at], actions[name][at], seconds=setting["seconds"])
        found[f"{name}_speedup"] = ratio
    return found


WINDOW = {"window": 8, "global_tokens": 0}
BLOCKS = {"block": 4, "random_blocks": 1}

REPRODUCTION = Reproduction(
    name="longformer",
    mechanisms=("longformer", "bigbird"),
    claim=(
        "Windows with a few global tokens (and random blocks) match full attention on long inputs in linear time; windows "
        "alone do not (abstracts; BigBird, table 1)."
    ),
    instead=(
        "Digits as 64 pixel tokens, read off at the first token after 2 layers of width 64: accuracy within 5 points of "
        "softmax, windows alone 20 below. Forward time on one core, and p of time ~ length^p."
    ),
    settings={
        "softmax": TRAINING | {"mixer": "softmax", "options": {}},
        "longformer": TRAINING | {"mixer": "longformer", "options": {"window": 8}},
        "bigbird": TRAINING | {"mixer": "bigbird", "options": BLOCKS},
        "window": TRAINING | {"mixer": "longformer", "options": WINDOW},
        "time": {"lengths": [1024, 2048, 4096, 8192], "seconds": 8.0},
    },
    run_cell=run_cell,
    checks=(
        Check("Longformer within 5 points of softmax", minus("longformer", "softmax"), above=-0.05),
        Check("BigBird within 5 points of softmax", minus("bigbird", "softmax"), above=-0.05),
        Check("windows alone 20 points below", minus("window", "softmax"), below=-0.2),
        Check(
            "softmax takes over twice as long as Longformer at 4096", measured("time", "longformer_speedup"), above=2.0
        ),
        Check("softmax takes over twice as long as BigBird at 4096", measured("time", "bigbird_speedup"), above=2.0),
        Check("time of Longformer grows with p < 1.3", measured("time", "longformer"), below=1.3),
        Check("time of BigBird grows with p < 1.3", measured("time", "bigbird"), below=1.3),
    ),
    needs=(Check("softmax classifies digits (above 0.8)", measured("softmax", "score"), above=0.8),),
    left_out=(
        "better than RoBERTa on long documents, text8 and enwik8: pretrained or much larger models",
        "sequences 8 times longer on the same hardware: a GPU's memory",
        "random blocks alone fall short: without global blocks the first token's reach is luck here",
        "universal approximation and Turing completeness: theorems, not measurements",
    ),
    timings=frozenset({"time"}),
    more_seeds={"longformer": 6, "softmax": 6},
    smoke={"steps": 2, "batch_size": 2, "items": 8, "lengths": [32, 64, 128], "seconds": 0.01},
    seconds=40,
)
