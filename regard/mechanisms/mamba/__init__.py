r"""Mamba: a selective state space (S6), a diagonal recurrence per channel whose step, B and C depend on the token.

When to pick it: long sequences with constant memory per decoded token, in a self-contained block with few parameters;
signals and features whose channels need different rates of forgetting.
When not: exact recall of many single tokens (see `delta_rule`, or interleave a few layers of `softmax`); when training
speed matters most, use `mamba2`: one decay per head makes its recurrence a matrix product, and its state is larger.

Definition (Gu & Dao, arXiv 2312.00752, equation 2 and algorithm 2; survey arXiv 2408.01129). For channel e and state k

    h_t[e,k] = exp(dt_t[e] A[e,k]) h_{t-1}[e,k] + dt_t[e] x_t[e] B_t[k],     y_t[e] = sum_k h_t[e,k] C_t[k] + D[e] x_t[e]

with A < 0 and dt >= 0: an exact discretisation of A and an Euler step for B. Written as attention, with one matrix per
channel,

    y_t[e] = sum_{s<=t} (sum_k C_t[k] exp(A[e,k] (dt_{s+1} + ... + dt_t)[e]) B_s[k]) dt_s[e] x_s[e] + D[e] x_t[e]

The block around it:

    [x, z] = W_in u,   x = silu(conv(x)),   [delta, B, C] = W_x x,   dt = softplus(W_dt delta + dt_bias),   A = -exp(A_log)
    out = W_out (y * silu(z))

| paper | here |
|---|---|
| x, Delta, A | `x` (B, M, E), `dt` (B, M, E), `a` (E, K) |
| B, C | `b` (B, M, G, K), `c` (B, N, G, K) |
| D, z | `skip` (E,), `z` (B, N, E) |
| bias of Delta's projection | `dt_bias` (E,): when given, steps are softplus(dt + dt_bias) |
| h | `SelectiveState.memory` (B, E, K) |
| N (or n), E, R, w | `d_state`, expand * dim, `dt_rank`, `conv_width` |

Layout: (B, N, E), channels last, in functions too. b and c carry G groups, each shared by E / G consecutive channels.
The gate silu(z) is applied after D x is added. The scale is 1.
Patterns: noncausal-self is a forward pass that reads after writing plus a backward pass that reads before writing, so
that a token counts itself once; the block's convolution is then centred, with one more tap before the token than after
it when `conv_width` is even. In cross patterns the memory is absorbed in order and the queries read the final state:
there is no D (a query is not a token of the memory), z and C come from the queries, x, B and dt from the memory, and
only the memory is convolved, so queries stay independent of each other.
Deviations: padding is gathered away, so padded tokens leave the state unchanged; ports that zero the input still decay
by softplus(dt_bias) and write the convolution's bias. `groups`, `dt_limit`, `norm` and `scalar_a` come from Mamba-2,
and `constant` (S4D-real, for controls without selection) from S4D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from regard.contract import (
    ALL_PATTERNS,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Shape,
    Tensors,
)
from regard.engines.selective_scan import SelectiveState
from regard.mechanisms.mamba.definition import Config, reference
from regard.mechanisms.mamba.forms import absorb, chunked, parallel, read, step
from regard.mechanisms.mamba.layer import MambaLayer


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """Axis sizes: channels, groups of B and C, and states per channel."""
    return {"e": shape.heads * shape.dim_value, "g": config.groups, "k": config.d_state}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost with H heads of dim_value features as channels and the config's states per channel. Without a kernel, add
    three numbers per state and token of a chunk to the memory."""
    channels = shape.heads * shape.dim_value
    state, tokens = channels * config.d_state, shape.batch * shape.m
    return Cost(
        flops=7.0 * tokens * state,
        memory=float(shape.batch * shape.m * channels),
        state=float(state),
        step_flops=7.0 * shape.batch * state,
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
) -> Tensors:
    """Random inputs for tests: steps as in trained layers, and no skip in cross patterns."""
    widths = {"e": 8, "g": 2, "k": 4, **(sizes or {}), "b": batch, "n": n, "m": m}
    widths["e"] = max(widths["e"], 2 * widths["g"])  # still divisible if the groups are doubled
    found = {}
    for name, axes in MECHANISM.inputs.items():
        shape = [widths[axis] for axis in axes]
        found[name.rstrip("?")] = torch.randn(shape, generator=generator, dtype=torch.float64)
    found["dt_bias"] -= 1
    found["a"] = -F.softplus(2 * found["a"])
    if pattern.cross:
        del found["skip"]
    return {name: tensor.to(dtype) for name, tensor in found.items()}


MECHANISM = Mechanism(
    name="mamba",
    aliases=("mamba1", "mamba_1", "s6", "selective_ssm"),
    kind=Kind.MIXER,
    summary="A selective state space (S6), a diagonal recurrence for each channel whose step, B and C depend on the token.",
    paper=Paper("Mamba: Linear-Time Sequence Modeling with Selective State Spaces", "2312.00752", 2023, 51),
    inputs={
        "x": "bme",
        "dt": "bme",
        "a": "ek",
        "b": "bmgk",
        "c": "bngk",
        "skip?": "e",
        "dt_bias?": "e",
        "z?": "bne",
    },
    output="bne",
    patterns=ALL_PATTERNS,
    forms={
        "reference": reference,
        "parallel": parallel,
        "chunked": chunked,
        "step": step,
        "absorb": absorb,
        "read": read,
    },
    config=Config,
    variants={
        "no convolution": {"conv_width": 0, "gate": False, "skip": False},
        "grouped": {"groups": 2, "dt_rank": 5, "d_state": 3, "chunk_size": 3},
        "scalar": {"scalar_a": True, "conv_width": 1, "dt_limit": (0.05, 0.1)},
        "normed": {"norm": True, "norm_eps": 1e-3, "expand": 1.0},
        "normed before the gate": {"norm": True, "norm_before_gate": True, "dt_init": (0.01, 0.02)},
        "constant steps": {"constant": ("dt",)},
        "constant": {"constant": ("dt", "B", "C")},
    },
    engine="selective_scan",
    state=SelectiveState,
    combines="diagonal",
    cost=cost,
    axis_sizes=axis_sizes,
    default_scale=1.0,
    weights="implicit",
    accepts_positions=("none", "sinusoidal", "learned"),
    domains={"a": "negative"},
    sample_inputs=sample_inputs,
    module=MambaLayer,
)


__all__ = [
    "MECHANISM",
    "Config",
    "MambaLayer",
    "absorb",
    "axis_sizes",
    "chunked",
    "cost",
    "parallel",
    "read",
    "reference",
    "sample_inputs",
    "step",
]
