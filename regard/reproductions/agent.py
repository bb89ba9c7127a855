"""Agent attention (Han et al., arXiv 2312.08874): the quality of softmax at a linear cost.

The paper (table in the authors' repository, ImageNet-1K top-1): DeiT-T 72.2 to 74.9 %, PVT-T 75.1 to 78.4 %, Swin-T 81.2 to
82.6 % when softmax is replaced by agents with their bias and convolution.

Here: scikit-learn's digits as 64 pixel tokens on an 8 x 8 grid, half of the images held out, a 4-layer encoder of width 64
with 4 heads, 16 agents, 500 steps. Softmax, linear attention (elu + 1), agents with the depthwise convolution and without.
This project's agents have no agent bias. Growth of forward time over grids of 1024 to 4096 tokens on one core.
"""

import math
from functools import partial
from typing import Any

import torch

from regard.functional import agent_attention, softmax_attention
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import timed_ratio, timed_slopes
from regard.reproductions.framework.training import classifier, digit_pixels, trained_score

TRAINING = {"steps": 500, "batch_size": 32, "learning_rate": 3e-3, "items": 1000}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    if "lengths" in setting:
        with torch.no_grad():
            return time_forward(setting)
    task = digit_pixels(setting["items"])
    model = classifier(task, [(setting["mixer"], setting["options"])] * 4, dim=64, num_heads=4)
    return {**trained_score(model, task, setting, seed)}


def time_forward(setting: Setting) -> dict[str, Any]:
    inputs = {n: torch.randn(3, 1, 4, n, 64) for n in setting["lengths"]}
    agents = {
        n: partial(agent_attention, *x, pattern="noncausal-self", num_agents=16, grid=(math.isqrt(n), math.isqrt(n)))
        for n, x in inputs.items()
    }
    softmax = {n: partial(softmax_attention, *x, pattern="noncausal-self") for n, x in inputs.items()}
    longest = max(inputs)
    found = timed_slopes({"agent": agents, "softmax": softmax}, seconds=setting["seconds"])
    ratio = timed_ratio(softmax[longest], agents[longest], seconds=setting["seconds"])
    return {**found, "speedup": ratio}


REPRODUCTION = Reproduction(
    name="agent",
    mechanisms=("agent",),
    claim=(
        "Agents with their convolution are better than softmax (DeiT-T 72.2 to 74.9 % on ImageNet-1K, the authors' table) at "
        "a cost linear in the tokens."
    ),
    instead=(
        "Accuracy on digits as 64 tokens, a 4-layer encoder of width 64, 16 agents, no agent bias; growth of forward time on "
        "one core, as p of time ~ tokens^p."
    ),
    settings={
        "agent": TRAINING | {"mixer": "agent", "options": {"num_agents": 16}},
        "agent, no convolution": TRAINING | {"mixer": "agent", "options": {"num_agents": 16, "dwc": "none"}},
        "linear": TRAINING | {"mixer": "linear", "options": {}},
        "softmax": TRAINING | {"mixer": "softmax", "options": {}},
        "time": {"lengths": [1024, 2304, 4096], "seconds": 10.0},
    },
    run_cell=run_cell,
    checks=(
        Check("agents within 1 point of softmax or better", minus("agent", "softmax"), above=-0.01),
        Check("agents above linear attention", minus("agent", "linear"), above=0.0),
        Check("the convolution helps", minus("agent", "agent, no convolution"), above=0.0),
        Check("time of agents grows with p < 1.3", measured("time", "agent"), below=1.3),
        Check("softmax takes longer at 4096 tokens", measured("time", "speedup"), above=1.0),
    ),
    timings=frozenset({"time"}),
    smoke={"steps": 2, "batch_size": 2, "items": 8, "lengths": [64, 256], "seconds": 0.01},
    seconds=45,
)
