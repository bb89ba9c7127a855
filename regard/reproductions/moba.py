"""Mixture of block attention (Lu et al., arXiv 2502.13189): a few blocks of keys, chosen by their means, are enough.

The paper (section 3.1, figure 3): language models of 568M to 2.1B parameters with blocks of 512 and k = 3, which hide 81 % of
8K tokens, have validation losses within 1e-3 of full attention's. Figure 2: 6.5 times as fast at a million tokens.

Here: scikit-learn's digits as text of 64 pixels, each predicted from those before it, 2 layers of width 64, 600 steps: softmax,
blocks of 4 with k = 3, which hide 81 % of the image too, and the own block alone. Looking up facts in 64 tokens (the task of `landmark`, and its layers), 1,100 steps: softmax, blocks of 4 with
k = 3, and a window of 12. Forward time on one core with blocks of 64 and k = 3 against softmax's kernel, and its growth from 1024
to 8192. As good means within 0.05 nats, a fifth of what
reading beyond the own block is worth.

In the pilot (two seeds) softmax had 1.37 and 1.42 nats, blocks 1.41 and 1.44, the own block 1.67 on both, and a window of as many
tokens, which sees the rows above, 1.43 on both; the lookup was solved by softmax (1.00) and by blocks (0.93 and 0.98), with a
window 0.29 and 0.28. Six seeds tell the losses apart.
"""

from functools import partial
from typing import Any

import torch

from regard import get_mechanism
from regard.apply import apply
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import growth_and_speedup
from regard.reproductions.framework.training import digit_levels, language_model, trained_score
from regard.reproductions.landmark import WINDOW, Lookup, lookup_model

PIXELS = {"task": "pixels", "steps": 600, "batch_size": 32, "learning_rate": 3e-3, "items": 512}
RECALL = {"task": "lookup", "steps": 1100, "batch_size": 16, "learning_rate": 3e-3, "items": 256}
BLOCKS = {"block_size": 4, "top": 3}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    if "lengths" in setting:
        with torch.no_grad():
            return time_forward(setting)
    layer = (setting["mixer"], setting["options"])
    if setting["task"] == "lookup":
        lookup = Lookup(WINDOW, setting["items"])
        return {**trained_score(lookup_model(lookup, layer), lookup, setting, seed)}
    levels = digit_levels(setting["items"])
    return {**trained_score(language_model(levels, [layer] * 2, dim=64, num_heads=4), levels, setting, seed)}


def time_forward(setting: Setting) -> dict[str, Any]:
    actions: dict[str, dict[float, Any]] = {"moba": {}, "softmax": {}}
    for n in setting["lengths"]:
        inputs = dict(zip("qkv", torch.randn(3, 1, 4, n, 64), strict=True))
        for name, by_length in actions.items():
            by_length[n] = partial(apply, get_mechanism(name), inputs, pattern="causal-self")
    return growth_and_speedup(actions, seconds=setting["seconds"])


REPRODUCTION = Reproduction(
    name="moba",
    mechanisms=("moba",),
    claim=(
        "Reading three blocks of keys that are chosen by their means gives the loss of full attention within 1e-3 (figure 3, "
        "8K tokens), and is several times as fast on long inputs."
    ),
    instead=(
        "Loss in nats a pixel of digits, 64 pixels read one by one, 2 layers of width 64, 600 steps: within 0.05 of softmax. "
        "Looking up facts in 64 tokens, 30 points above a window. Forward time on one "
        "core, and p of time ~ length^p."
    ),
    settings={
        "softmax": PIXELS | {"mixer": "softmax", "options": {}},
        "moba": PIXELS | {"mixer": "moba", "options": BLOCKS},
        "block": PIXELS | {"mixer": "moba", "options": BLOCKS | {"top": 1}},
        "recall softmax": RECALL | {"mixer": "softmax", "options": {}},
        "recall moba": RECALL | {"mixer": "moba", "options": BLOCKS},
        "recall window": RECALL | {"mixer": "local", "options": {"window": 12}},
        "time": {"lengths": [1024, 2048, 4096, 8192], "seconds": 8.0},
    },
    run_cell=run_cell,
    checks=(
        Check("within 0.05 nats of softmax", minus("moba", "softmax", "loss"), below=0.05),
        Check("recall above a window's by 0.3", minus("recall moba", "recall window"), above=0.3),
        Check("softmax takes longer at 8192 tokens", measured("time", "speedup"), above=1.0),
        Check("time grows with p < 1.7", measured("time", "moba"), below=1.7),
    ),
    needs=(
        Check("what is far helps: softmax 0.1 nats below the own block", minus("softmax", "block", "loss"), below=-0.1),
        Check("softmax learns the lookup (above 0.9)", measured("recall softmax", "score"), above=0.9),
        Check("a window does not (below 0.6)", measured("recall window", "score"), below=0.6),
    ),
    left_out=(
        "within 1e-3 of full attention, over sizes and at the end of contexts of 32K (figures 3 and 4): less than runs of this size "
        "differ by chance",
        "full attention in the last layers or in a part of the training (figure 5): a schedule for long training",
        "needles found in a million tokens (figure 7): a large model",
    ),
    timings=frozenset({"time"}),
    smoke={"steps": 2, "batch_size": 2, "items": 4, "lengths": [32, 64, 128], "seconds": 0.01},
    more_seeds=dict.fromkeys(("softmax", "moba", "block"), 6),
    seconds=30,
)
