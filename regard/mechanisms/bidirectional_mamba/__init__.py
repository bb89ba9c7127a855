r"""Bidirectional Mamba: the selective scan along several paths through a sequence or a grid, then combined.

When to pick it: encoders of long sequences, high-resolution images and volumes, at a cost linear in the number of
tokens.
When not: generation (`mamba`, the forward path alone, decodes with a state); short inputs, where softmax attention
costs no more and retrieves single tokens exactly.

Definition (survey arXiv 2406.03430; Vim, arXiv 2401.09417, algorithm 1; VMamba, arXiv 2401.10166, section 4). A path p
visits the tokens in the order pi_p. With S6 the selective scan of `mamba`, including its skip D,

    y_p[pi_p(t)] = S6(x_p[pi_p(1 ... t)]; dt_p, A_p, B_p, C_p, D_p),     y = combine(y_1, ..., y_P)

Every path includes the token itself, so two paths count it twice (`mean` halves the sum); `mamba` in noncausal-self
counts it once.

| `scan` | paths | from |
|---|---|---|
| ``forward`` | row by row | Mamba |
| ``reverse`` | row by row, from the last token; alternates with ``forward`` layers, in pairs | Vim |
| ``bidirectional`` | row by row, and its reverse | Vim |
| ``columns``, ``columns_reverse`` | column by column, and its reverse; in alternating layers; two axes | Mamba-ND |
| ``cross`` | one path with each axis as the fastest (rows; columns), and their reverses: 2 per axis of the grid | VMamba |
| ``snake`` | as ``cross``, with every second line reversed, so that each token follows a neighbour; two axes | PlainMamba |
| ``slices`` | row by row, its reverse, and across the slices of the first axis | SegMamba |
| ``strided`` | four interleaved grids, two by rows and two by columns, each token on one; two axes | EfficientVMamba |
| ``windows`` | window by window, row by row in each, and its reverse; two axes | LocalMamba |
| ``cascade`` | every row in both directions, then every column of the result; two axes; the layer only | VMamba |

The surrounding block (Vim version 2, the default; version 1 is `convolution="once", combine="sum", shared=("conv",
"x_proj", "dt", "D")`; VMamba's SS2D is `scan="cross", combine="sum", convolution="grid", conv_width=3, norm="layer"`,
in its current form also `gate=False, d_state=1, conv_bias=False`):

    [x, z] = W_in u,   x_p = silu(conv_p(x)),   [delta, B, C]_p = W_p x_p,   dt_p = softplus(W_{dt,p} delta_p + bias_p)
    out = W_out (norm(y) * silu(z))

| paper | here |
|---|---|
| x, Delta, B, C of a path | `x` (B, U, N, E), `dt` (B, W, N, E), `b`, `c` (B, Q, N, G, K): tokens in their original order |
| A, D, bias of Delta | `a` (S, E, K), `skip` (T, E), `dt_bias` (R, E) |
| z | `z` (B, N, E) |
| weights of paths | `mix` (B, P, N): y = sum_p softmax_p(mix) y_p, with `combine="gate"` |

U, W, Q, S, T and R are each the number of paths P, or 1 if the paths share the tensor.
Layout: tokens (B, N, E), channels last, row by row on the `grid` of the call. Without a grid the tokens are a sequence.
Padding is skipped, on a grid too: every path goes from valid token to valid token, and its convolution sees only those.
So the reversed path starts at the last valid token, and a grid with masked rows or columns at its border equals the
smaller grid.
Patterns: noncausal-self. Deviations: the originals take no masks. In VMamba's code the outputs of a cascade's reversed
scans are added in reversed order; here they are turned back first. The bias of dt is drawn in the same way for all
paths, unless `symmetric_dt_init=False` (Vim's code leaves it 0 for all but the first). PlainMamba's direction vectors
and Mamba-2 in place of S6 are left out, and a class token is left to the model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from regard.contract import (
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Shape,
    Tensors,
)
from regard.mechanisms.bidirectional_mamba.definition import (
    ANY_AXES,
    COMBINATIONS,
    CONVOLUTIONS,
    SCANS,
    SETS,
    TWO_AXES,
    Config,
    reference,
    scan_orders,
)
from regard.mechanisms.bidirectional_mamba.forms import ROWS_FIRST, Path, find_paths, parallel
from regard.mechanisms.bidirectional_mamba.layer import (
    GRID_CONVOLUTIONS,
    BidirectionalMambaLayer,
    GridConvolution,
    count_paths,
)


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """Number of channels, of groups of B and C (one), and of states per channel."""
    return {"e": shape.heads * shape.dim_value, "g": 1, "k": config.d_state}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost with H heads of dim_value features as channels, on grids of two axes. Without a kernel, three numbers for
    each state and token of a chunk add to the memory."""
    channels, paths = shape.heads * shape.dim_value, count_paths(config, 2)
    visits = shape.batch * shape.n * (1 if config.scan == "strided" else paths)
    state = channels * config.d_state
    return Cost(
        flops=7.0 * visits * state,
        memory=2.0 * visits * channels,
        state=0.0,
        step_flops=0.0,
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
    grid: tuple[int, ...] = (0,),
) -> Tensors:
    """Random inputs for tests, with separate weights for each path and steps like those of trained layers."""
    widths = {"e": 8, "g": 2, "k": 4, **(sizes or {}), "b": batch, "n": n}
    widths["e"] = max(widths["e"], 2 * widths["g"])  # groups may be doubled and still divide the channels
    paths = count_paths(config, len(grid))
    of_tokens = 1 if config.scan == "strided" else paths
    widths |= {"u": of_tokens, "w": of_tokens, "q": of_tokens, "p": paths, "s": paths, "t": paths, "r": paths}
    found = {}
    for name, letters in MECHANISM.inputs.items():
        if name == "mix?" and config.combine != "gate":
            continue
        shape = [widths[letter] for letter in letters]
        found[name.rstrip("?")] = torch.randn(shape, generator=generator, dtype=torch.float64)
    found["dt_bias"] -= 1
    found["a"] = -F.softplus(2 * found["a"])
    return {name: tensor.to(dtype) for name, tensor in found.items()}


SELF_ONLY = "a path reads the tokens it writes; no paper defines one for another sequence's queries (use `mamba`)"


SS2D = {"scan": "cross", "combine": "sum", "convolution": "grid", "conv_width": 3, "norm": "layer"}
"""Options of VMamba's block."""


MECHANISM = Mechanism(
    name="bidirectional_mamba",
    aliases=("vim", "vision_mamba", "vmamba", "ss2d", "bimamba"),
    alias_options={"vmamba": SS2D, "ss2d": SS2D},
    kind=Kind.MIXER,
    summary="The selective scan along several paths through a sequence or a grid, forward and reversed, combined.",
    paper=Paper(
        "Computation-Efficient Era: A Comprehensive Survey of State Space Models in Medical Image Analysis",
        "2406.03430",
        2024,
        52,
    ),
    inputs={
        "x": "bune",
        "dt": "bwne",
        "a": "sek",
        "b": "bqngk",
        "c": "bqngk",
        "skip?": "te",
        "dt_bias?": "re",
        "z?": "bne",
        "mix?": "bpn",
    },
    output="bnf",
    patterns=(Pattern.NONCAUSAL_SELF,),
    refused={
        Pattern.CAUSAL_SELF: "the reversed paths see the tokens that follow; the forward path alone is `mamba`",
        Pattern.NONCAUSAL_CROSS: SELF_ONLY,
        Pattern.CAUSAL_CROSS: SELF_ONLY,
    },
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    variants={
        "forward": {"scan": "forward", "d_state": 1, "dt_rank": 5, "chunk_size": 8},
        "backward": {"scan": "reverse", "conv_width": 0, "expand": 1.0},
        "two copies, concatenated": {"copies": 2, "combine": "concat", "norm": "rms"},
        "gated sum": {"combine": "gate", "gate": False, "skip": False},
        "shared": {"shared": ("conv", "x_proj", "dt", "A", "D"), "combine": "sum"},
        "one convolution": {"convolution": "once", "shared": ("x_proj", "A"), "dt_init": (0.01, 0.02)},
        "on a grid": {"convolution": "grid", "conv_width": 3},
        "cross": {"scan": "cross", "norm": "layer"},
        "slices": {"scan": "slices", "symmetric_dt_init": False},
        "columns": {"scan": "columns", "convolution": "grid", "conv_width": 3, "conv_bias": False},
        "columns, backward": {"scan": "columns_reverse"},
        "snake": {"scan": "snake"},
        "strided": {"scan": "strided", "combine": "sum", "shared": ("conv", "x_proj")},
        "windows": {"scan": "windows", "window": (2, 3)},
        "cascade": {"scan": "cascade", "convolution": "once", "combine": "sum"},
    },
    layer_variants=frozenset({"cascade"}),
    grid_variants=frozenset(
        {"on a grid", "cross", "slices", "columns", "columns, backward", "snake", "strided", "windows", "cascade"}
    ),
    engine="selective_scan",
    cost=cost,
    axis_sizes=axis_sizes,
    default_scale=1.0,
    honours=frozenset({"grid"}),
    weights="implicit",
    accepts_positions=("none", "sinusoidal", "learned"),
    domains={"a": "negative"},
    sample_inputs=sample_inputs,
    module=BidirectionalMambaLayer,
)


__all__ = [
    "ANY_AXES",
    "COMBINATIONS",
    "CONVOLUTIONS",
    "GRID_CONVOLUTIONS",
    "MECHANISM",
    "ROWS_FIRST",
    "SCANS",
    "SELF_ONLY",
    "SETS",
    "SS2D",
    "TWO_AXES",
    "BidirectionalMambaLayer",
    "Config",
    "GridConvolution",
    "Path",
    "axis_sizes",
    "cost",
    "count_paths",
    "find_paths",
    "parallel",
    "reference",
    "sample_inputs",
    "scan_orders",
]
