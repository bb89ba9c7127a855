"""Large kernel attention (Guo et al., arXiv 2202.09741): a product gate from a large neighbourhood, at linear cost.

The paper: VAN-B0 has 75.4 % on ImageNet-1K, and 74.6 % when the gate is added instead of multiplied (table 3, quoted in the
authors' issue 32); VAN-B2 beats Swin-T by 4 points of mIoU on ADE20K (abstract).

Here: scikit-learn's digits as 64 pixels on an 8 x 8 grid, half of the images held out, 4 blocks of width 48 with K = 10 and
d = 2 (a field of 11), 450 steps. The gate multiplied, added, and without a gate (the plain depthwise convolutions); softmax
at the same width. The host's feed-forward has no convolution of its own. Growth of forward time with pixels on one core.
"""

import math
from functools import partial
from typing import Any

import torch

from regard import Context, create_layer
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import timed_slopes
from regard.reproductions.framework.training import classifier, digit_pixels, trained_score

TRAINING = {"steps": 450, "batch_size": 32, "learning_rate": 3e-3, "items": 1000}
FIELD = {"kernel": 10, "dilation": 2}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    if "pixels" in setting:
        with torch.no_grad():
            return {**time_forward(setting)}
    task = digit_pixels(setting["items"])
    model = classifier(task, [(setting["mixer"], setting["options"])] * 4, dim=48, num_heads=4)
    return {**trained_score(model, task, setting, seed)}


def time_forward(setting: Setting) -> dict[str, Any]:
    layers = {
        "large_kernel": create_layer("large_kernel", 64, pattern="noncausal-self"),
        "softmax": create_layer("softmax", 64, 4, pattern="noncausal-self"),
    }
    inputs = {n: (torch.randn(1, n, 64), Context(grid=(math.isqrt(n), math.isqrt(n)))) for n in setting["pixels"]}
    actions = {
        name: {n: partial(layer, x, context=context) for n, (x, context) in inputs.items()}
        for name, layer in layers.items()
    }
    return timed_slopes(actions, seconds=setting["seconds"])


REPRODUCTION = Reproduction(
    name="large_kernel",
    mechanisms=("large_kernel",),
    claim=(
        "Multiplying by the large-kernel gate is better than adding it (75.4 against 74.6 % on ImageNet-1K), and than "
        "self-attention, at a cost linear in the pixels."
    ),
    instead=(
        "Accuracy on digits, 4 blocks of width 48 with a field of 11: product, sum, plain depthwise convolutions, softmax; "
        "growth of forward time on one core, as p of time ~ pixels^p."
    ),
    settings={
        "product": TRAINING | {"mixer": "large_kernel", "options": FIELD},
        "sum": TRAINING | {"mixer": "large_kernel", "options": FIELD | {"gating": "add"}},
        "no gate": TRAINING | {"mixer": "large_kernel", "options": FIELD | {"gating": "none"}},
        "softmax": TRAINING | {"mixer": "softmax", "options": {}},
        "time": {"pixels": [1024, 2304, 4096, 9216], "seconds": 15.0},
    },
    run_cell=run_cell,
    checks=(
        Check("product above sum", minus("product", "sum"), above=0.0),
        Check("product above plain convolutions", minus("product", "no gate"), above=0.0),
        Check("product within 1 point of softmax or better", minus("product", "softmax"), above=-0.01),
        Check("time of large kernels grows with p < 1.3", measured("time", "large_kernel"), below=1.3),
        Check("time of softmax grows with p > 1.5", measured("time", "softmax"), above=1.5),
    ),
    timings=frozenset({"time"}),
    smoke={"steps": 2, "batch_size": 2, "items": 8, "pixels": [64, 256], "seconds": 0.01},
    seconds=45,
)
