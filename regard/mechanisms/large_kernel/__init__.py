r"""Large kernel attention: a gate from a large neighbourhood, by two small depthwise convolutions and a pointwise one.

When to pick it: images and other grids at high resolution, where the cost must stay linear in the number of pixels and
the neighbourhood matters; the gate differs by position and by channel.
When not: dependencies beyond its receptive field (23 x 23 by default), or sequences that attend to another sequence.

Definition (Guo et al., Visual Attention Network, arXiv 2202.09741, equations 1-2), for X (B, C, H, W):

    A = PW(DWD(DW(X))),   LKA(X) = A * X
    Attn(X) = X + W_2 LKA(gelu(W_1 X))       (the layer; the gate multiplies the input of LKA)

Without softmax or sigmoid, A is unbounded and signed. DW is depthwise with side k1 = 2d - 1, DWD depthwise with side k2
= ceil(K / d) and dilation d, PW mixes channels. They are composed, not summed, each with a bias and zero padding around
its own input. The receptive field of A has side k1 + d (k2 - 1).

| paper | here |
|---|---|
| K, d | `kernel`, `dilation`: (7, 2), (14, 3), (21, 3) and (28, 4) have receptive fields of 9, 17, 23 and 31 |
| DW, DWD | `depthwise` (C, k1^axes), `dilated` (C, k2^axes): taps in row-major order, like tokens |
| PW | `pointwise` (C, C): output channel first |

Layout: tokens (B, N, C), in row-major order on the `grid` of the call, which may have one, two or three axes. Without a
grid the tokens are a sequence, as with a grid of one axis, except that padding is then gathered away.
On a grid, invalid places keep their positions and are zeroed before each convolution, so masked rows at the border act
like a smaller grid; the original has no masks.
Deviations: the causal 1-D form is not in the paper: both convolutions look back only, by k1 - 1 and d (k2 - 1), and the
state is the last k1 - 1 inputs of DW and the last d (k2 - 1) outputs of DW, 22 C numbers by default. `gating`,
`sigmoid` and omitting a convolution are the paper's ablations and similar ones. The layer keeps the original's inner
residual (`residual=True`), so in a block with its own residual the normed input is added once more; set it to False to
keep only the block's residual. Channels are not split into heads: `num_heads` has no effect on the layer. LSKA, another
paper, uses filters that are outer products of a row and a column: functions accept them as `depthwise` and `dilated`,
but without LSKA's lower cost.
"""

from __future__ import annotations

import torch

from regard.contract import (
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Shape,
    Tensors,
)
from regard.mechanisms.large_kernel.definition import CONVOLUTIONS, GATINGS, NAMES, Config, reference
from regard.mechanisms.large_kernel.forms import ConvolutionState, chunked, parallel, step
from regard.mechanisms.large_kernel.layer import LargeKernelLayer


def cost(shape: Shape, config: Config) -> Cost:
    """Cost on a grid of two axes; a step is a step of a sequence."""
    channels = shape.heads * shape.dim_value
    spatial = {
        "depthwise": (config.depthwise_side, config.depthwise_side - 1),
        "dilated": (config.dilated_side, config.dilated_span - 1),
    }
    spatial = {name: both for name, both in spatial.items() if name not in config.without}
    mixed = 0 if "pointwise" in config.without else channels
    tokens = shape.batch * shape.n * channels
    return Cost(
        flops=2.0 * tokens * (sum(side**2 for side, _ in spatial.values()) + mixed),
        memory=2.0 * tokens,
        state=float(channels * sum(kept for _, kept in spatial.values())),
        step_flops=2.0 * shape.batch * channels * (sum(side for side, _ in spatial.values()) + mixed),
    )


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    pattern: Pattern,
    config: Config,
    sizes: dict[str, int] | None = None,
    axes: int | None = None,
) -> Tensors:
    """Random inputs for tests, with filters for two axes in noncausal-self unless `axes` is given."""
    axes = (1 if pattern.causal else 2) if axes is None else axes
    channels = (sizes or {}).get("c", 4)
    taps = (config.depthwise_side**axes, config.dilated_side**axes)
    shapes = {
        "x": (batch, n, channels),
        "depthwise": (channels, taps[0]),
        "depthwise_bias": (channels,),
        "dilated": (channels, taps[1]),
        "dilated_bias": (channels,),
        "pointwise": (channels, channels),
        "pointwise_bias": (channels,),
    }
    found = {}
    for name, shape in shapes.items():
        scale = shape[1] ** -0.5 if name in ("depthwise", "dilated", "pointwise") else 1.0
        found[name] = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    return found


MECHANISM = Mechanism(
    name="large_kernel",
    aliases=("lka", "van", "large_kernel_attention", "visual_attention_network"),
    kind=Kind.MIXER,
    summary="A gate from a large neighbourhood, built from two small depthwise convolutions and a pointwise one.",
    paper=Paper("Visual Attention Network", "2202.09741", 2022, 13),
    inputs={
        "x": "bnc",
        "depthwise?": "cj",
        "depthwise_bias?": "c",
        "dilated?": "ci",
        "dilated_bias?": "c",
        "pointwise?": "oc",
        "pointwise_bias?": "o",
    },
    output="bnc",
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    refused={
        Pattern.NONCAUSAL_CROSS: "the gate of a position comes from its neighbourhood on the same grid",
        Pattern.CAUSAL_CROSS: "the gate of a token comes from its neighbourhood in the same sequence",
    },
    forms={"reference": reference, "parallel": parallel, "chunked": chunked, "step": step},
    config=Config,
    variants={
        "small": {"kernel": 7, "dilation": 2},
        "plain": {"kernel": 3, "dilation": 1, "sigmoid": True, "without": ("pointwise",)},
        "added": {"gating": "add", "without": ("depthwise",)},
        "ungated": {"gating": "none", "without": ("dilated",), "residual": False},
    },
    state=ConvolutionState,
    cost=cost,
    default_scale=1.0,
    accepts_positions=("none", "sinusoidal", "learned"),
    length="grid",
    sample_inputs=sample_inputs,
    module=LargeKernelLayer,
)


__all__ = [
    "CONVOLUTIONS",
    "GATINGS",
    "MECHANISM",
    "NAMES",
    "Config",
    "ConvolutionState",
    "LargeKernelLayer",
    "chunked",
    "cost",
    "parallel",
    "reference",
    "sample_inputs",
    "step",
]
