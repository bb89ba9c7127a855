r"""Mamba-2: a gated recurrence with one learned decay and step per head and token, inside its own block.

When to pick it: long sequences with constant memory per decoded token; the strongest plain recurrent mixer for
language at equal size. Each head keeps a d_state x head_dim matrix, so a larger d_state remembers more.
When not: exact recall of many single tokens (see `delta_rule`, or interleave a few layers of `softmax`); a separate
decay for each key feature (see `gated_linear`).

Definition (Dao & Gu, arXiv 2405.21060, state-space duality; survey arXiv 2408.01129). For each head

    a_t = dt_t A,   S_t = exp(a_t) S_{t-1} + dt_t B_t x_t^T,   y_t = S_t^T C_t + D * x_t,      A < 0, dt_t >= 0

or, as masked linear attention, y = (L * C B^T)(dt x) with L_ij = exp(sum of a over (j, i]) for j <= i. Its block:

    [z, x, B, C, dt] = W_in u,   (x, B, C) = silu(conv(x, B, C)),   dt = clip(softplus(dt + dt_bias)),   A = -exp(A_log)
    out = W_out RMSNorm(y * silu(z)),      the norm over each group of d_ssm / groups features

| paper | here |
|---|---|
| C, B, X | `q` (B, G, N, K), `k` (B, G, M, K), `v` (B, H, M, V) |
| Delta, A, D | `dt` (B, H, M), `a` (H,), `skip` (H, V) |
| S (P x N, transposed) | `MatrixState.memory` (B, H, K, V) |
| N, P, E, G, H, w, Q | `d_state`, `head_dim`, expand * dim, `groups`, heads, `conv_width`, `chunk_size` |

Layout: (B, H, N, D). q and k carry G groups, each shared by H / G consecutive heads of v (the reverse of grouped
queries). The scale is 1. For one D per head, pass ``d[:, None].expand(H, V)``.
Patterns: noncausal-self is a forward pass that reads after writing plus a backward pass that reads before writing, so
that a token counts itself once; the block's convolution is then centred, with one more tap before the token than after
it when `conv_width` is even. In cross patterns the memory is absorbed in order and the queries read the final state:
there is no D (a query is not a token of the memory), z and C come from the queries, x, B and dt from the memory, and
only the memory is convolved, so queries stay independent of each other.
Deviations: the chunk defaults to 64 (256 in the paper), which changes only rounding. Padding is gathered away, so
padded tokens leave the state unchanged; ports that zero the input still decay by softplus(dt_bias) or write the
convolution's bias. `constant` (for controls without selection) is not in the paper.
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
from regard.engines.recurrent_forms import MatrixState
from regard.mechanisms.mamba2.definition import SKIP_KINDS, Config, reference
from regard.mechanisms.mamba2.forms import absorb, chunked, parallel, read, step
from regard.mechanisms.mamba2.layer import Mamba2Layer


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern in chunks of `chunk_size`; a token pairs with half a chunk on average."""
    matrix = shape.dim_key * shape.dim_value
    tokens = shape.batch * shape.heads * shape.m
    return Cost(
        flops=4.0 * tokens * (matrix + config.chunk_size / 2 * (shape.dim_key + shape.dim_value)),
        memory=float(tokens * (config.chunk_size + 2 * shape.dim_key + shape.dim_value)),
        state=float(shape.heads * matrix),
        step_flops=4.0 * shape.batch * shape.heads * matrix,
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
    widths = {"h": 4, "g": 2, "k": 8, "v": 6, **(sizes or {}), "b": batch, "n": n, "m": m}
    found = {}
    for name, axes in MECHANISM.inputs.items():
        shape = [widths[axis] for axis in axes]
        found[name.rstrip("?")] = torch.randn(shape, generator=generator, dtype=torch.float64)
    found["dt"] = F.softplus(found["dt"] - 1)
    found["a"] = -F.softplus(found["a"])
    if pattern.cross:
        del found["skip"]
    return {name: tensor.to(dtype) for name, tensor in found.items()}


MECHANISM = Mechanism(
    name="mamba2",
    aliases=("ssd", "mamba_2", "state_space_duality"),
    kind=Kind.MIXER,
    summary="A gated recurrence whose decay and step are one learned number per head and token, inside its own block.",
    paper=Paper(
        "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
        "2405.21060",
        2024,
        51,
    ),
    inputs={"q": "bgnk", "k": "bgmk", "v": "bhmv", "dt": "bhm", "a": "h", "skip?": "hv"},
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
        "no convolution": {"conv_width": 0, "gate": False, "skip_kind": "none", "d_state": 5},
        "a skip for each channel": {
            "skip_kind": "channel",
            "norm": False,
            "dt_limit": (0.05, 0.1),
            "a_init": (2.0, 4.0),
        },
        "normed before the gate": {"norm_before_gate": True, "norm_eps": 1e-3, "dt_init": (0.01, 0.02)},
        "grouped": {"groups": 2, "head_dim": 8, "chunk_size": 3, "expand": 1.0},
        "with a gated MLP": {"d_ssm": 16, "conv_width": 1},
        "initial states": {"initial_states": True},
        "constant": {"constant": ("dt", "B", "C")},
    },
    variant_patterns={
        "initial states": (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS),
    },
    engine="gated_recurrence",
    state=MatrixState,
    combines="diagonal",
    cost=cost,
    default_scale=1.0,
    weights="implicit",
    accepts_positions=("none", "sinusoidal", "learned"),
    domains={"dt": "positive", "a": "negative"},
    sample_inputs=sample_inputs,
    module=Mamba2Layer,
)


__all__ = [
    "MECHANISM",
    "SKIP_KINDS",
    "Config",
    "Mamba2Layer",
    "absorb",
    "chunked",
    "cost",
    "parallel",
    "read",
    "reference",
    "sample_inputs",
    "step",
]
