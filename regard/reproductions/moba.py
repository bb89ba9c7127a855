"""Mixture of block attention (Lu et al., arXiv 2502.13189): a few blocks of keys, chosen by their means, are enough.

The paper (section 3.1, figure 3): language models of 568M to 2.1B parameters with blocks of 512 and k = 3, which hide 81 % of
8K tokens, have validation losses within 1e-3 of full attention's. Figure 2: 6.5 times as fast at a million tokens.

Here: bytes of Python's standard library in windows of 512, 2 layers of width 64, 300 steps at a rate of 3e-3: softmax, blocks
of 32 with k = 3, a window of 96, as many tokens as three blocks have. Recall from the first 16 of 128 tokens (the task of
`local`), blocks of 8 with k = 3 against a window of 24. Forward time on one core with blocks of 64 and k = 3 against
softmax's kernel, and its growth from 1024 to 8192.
"""

from functools import partial
from typing import Any

import torch

from regard import get_mechanism
from regard.apply import apply
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import growth_and_speedup
from regard.reproductions.framework.training import cached_task, language_model, trained_score
from regard.reproductions.local import DistantRecall

TEXT = {"steps": 300, "batch_size": 8, "learning_rate": 3e-3, "items": 32, "length": 512}
RECALL = {"steps": 1000, "batch_size": 16, "learning_rate": 3e-3, "items": 512}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    if "lengths" in setting:
        with torch.no_grad():
            return time_forward(setting)
    items = setting["items"]
    task = cached_task("text", length=setting["length"], evaluation_items=items) if "length" in setting else None
    task = DistantRecall(items) if task is None else task
    model = language_model(task, [(setting["mixer"], setting["options"])] * 2, dim=64, num_heads=4)
    return trained_score(model, task, setting, seed)


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
        "Loss in nats on code bytes, windows of 512, 2 layers of width 64, 300 steps: within 0.02 of softmax and below a window "
        "of as many tokens. Recall over 80 tokens above a window's by 30 points. Forward time on one core, and p of time ~ "
        "length^p."
    ),
    settings={
        "softmax": TEXT | {"mixer": "softmax", "options": {}},
        "moba": TEXT | {"mixer": "moba", "options": {"block_size": 32, "top": 3}},
        "window": TEXT | {"mixer": "local", "options": {"window": 96}},
        "recall moba": RECALL | {"mixer": "moba", "options": {"block_size": 8, "top": 3, "short_convolution": 4}},
        "recall window": RECALL | {"mixer": "local", "options": {"window": 24, "short_convolution": 4}},
        "time": {"lengths": [1024, 2048, 4096, 8192], "seconds": 8.0},
    },
    run_cell=run_cell,
    checks=(
        Check("within 0.02 nats of softmax", minus("moba", "softmax", "loss"), below=0.02),
        Check("better than a window of as many tokens", minus("moba", "window", "loss"), below=0.0),
        Check("recall above a window's by 0.3", minus("recall moba", "recall window"), above=0.3),
        Check("softmax takes longer at 8192 tokens", measured("time", "speedup"), above=1.0),
        Check("time grows with p < 1.7", measured("time", "moba"), below=1.7),
    ),
    timings=frozenset({"time"}),
    smoke={"steps": 2, "batch_size": 2, "items": 4, "length": 96, "lengths": [32, 64, 128], "seconds": 0.01},
    seconds=80,
)
