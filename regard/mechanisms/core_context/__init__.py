r"""Core context aware attention: the last tokens are read exactly, each group of earlier ones through one core.

When to pick it: long contexts in a pretrained decoder, whose cache and attention should shrink by the group size
without new parameters, after a short fine-tuning.
When not: exact recall of far tokens (a group has one key, weighted by its last token's query before any later query is
known).

Definition (Chen et al., arXiv 2412.12465, and the authors' code), ranks from 1, g = `group`, s = `window`, tau the scale:

    I_r   = { (r - 1) g + 1, ..., r g }
    w_r   = softmax over j in I_r of (tau q_rg . k_j)          the query is that of the group's last token
    k^G_r = sum_{j in I_r} w_rj k_j,     v^G_r = sum_{j in I_r} w_rj v_j
    j(i)  = max(0, floor((i - s) / g))
    o_i   = softmax over { k^G_1, ..., k^G_{j(i)} } and { k_t, j(i) g < t <= i } of tau q_i . k,  with v^G and v

Cores and tokens partition the past exactly: s + ((i - s) mod g) tokens are read individually once i > s.

| paper | here |
|---|---|
| g, group size | `group` |
| s, local window | `window` |
| globality-aware pooling | `pool="cca"`; `mean` and `max` are its ablations |
| core token c_r W^K | pooled keys: the same by linearity, before rotation (`pool_keys="pre_rope"`) |

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries), in which case each query head has its own
cores unless `share_gqa`. N = M in causal-self, since groups have queries.
State: the last max(s, 1) + g - 2 keys and values, and the cores of all complete groups.
Rotary positions: `post_rope` pools rotated keys, as the authors' code does; `pre_rope` pools unrotated keys, weighted
by unrotated queries, and rotates the core to the position of its group's last token; the last g - 1 unrotated keys are
then in the state as well.
Deviations: cores are computed when their group is complete, not when it leaves the window, so no query needs to be
kept. The defaults of the code are groups of 16 and a window of 1024. `fusion="gated"`, two softmaxes with a learned
gate, interprets a sentence of the paper's first version. Not in the paper: noncausal-self, where groups within s tokens
(rounded up to whole groups) are read token by token and all others, including the unfinished one, through cores; and
cross patterns, which read only cores of the memory, weighted by the mean of the group's keys in place of a query.
"""

from __future__ import annotations

from typing import Any

import torch

from regard.contract import (
    ALL_PATTERNS,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Shape,
    Tensors,
    TrainedModel,
    Waiver,
)
from regard.core.sampling import attention_shapes, normals
from regard.mechanisms.core_context.definition import Config, check, check_pattern, read, reference
from regard.mechanisms.core_context.forms import CoreState, absorb, chunked, parallel
from regard.mechanisms.core_context.layer import Gate


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
    """Normal inputs for tests, with a `gate` for the heads if the fusion is gated."""
    widths = {"h": 2, "g": 2, "d": 8, "v": 6, **(sizes or {})}
    shapes = attention_shapes(batch, n, m, widths)
    if config.fusion == "gated":
        shapes["gate"] = (widths["h"],)
    return normals(generator, shapes, dtype)


def cost(shape: Shape, config: Any) -> Cost:
    """Cost of the causal pattern with N = M and as many key heads as query heads."""
    width, heads, m = shape.dim_key + shape.dim_value, shape.batch * shape.heads, shape.m
    near = min((m + 1) / 2, config.window + (config.group - 1) / 2)
    cores = max(0, m - config.window) / config.group
    return Cost(
        flops=2.0 * heads * width * (shape.n * (near + cores / 2) + m),
        memory=float(heads * (shape.n + m / config.group * width)),
        state=float(shape.heads * width * (config.cached + m // config.group)),
        step_flops=2.0 * heads * width * (min(m + 1, config.window + (config.group - 1) / 2) + cores + 1),
    )


def in_trained_models(model: TrainedModel) -> dict[str, Any]:
    """The paper's groups of 16 and window of 1024, or half of a training text if that is less, so that cores are read."""
    window = min(1024, model.length // (2 if model.pattern.causal else 4))
    return {"group": min(16, max(1, model.length // 8)), "window": window}


MECHANISM = Mechanism(
    name="core_context",
    aliases=("cca", "cca_attention", "core_context_aware"),
    kind=Kind.ATTENTION,
    summary="The last tokens are read exactly, and each group of earlier ones through a single core token.",
    paper=Paper("Core Context Aware Attention for Long Context Language Modeling", "2412.12465", 2024, 47),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv", "gate?": "h"},
    patterns=ALL_PATTERNS,
    forms={
        "reference": reference,
        "parallel": parallel,
        "chunked": chunked,
        "step": chunked,
        "absorb": absorb,
        "read": read,
    },
    config=Config,
    variants={
        "mean query": {"group": 4, "window": 2, "pool_query": "mean", "share_gqa": True},
        "means": {"group": 3, "window": 4, "pool": "mean"},
        "maxima": {"group": 4, "window": 8, "pool": "max"},
        "gated": {"group": 5, "window": 1, "fusion": "gated"},
        "gated, no window": {"group": 3, "window": 0, "fusion": "gated"},
        "no window": {"group": 4, "window": 0},
        "groups of one": {"group": 1, "window": 1},
        "cores before rotation": {"group": 3, "window": 5, "pool_keys": "pre_rope"},
    },
    variant_patterns={
        "cores before rotation": (Pattern.CAUSAL_SELF,),
        "gated": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
        "gated, no window": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    },
    engine="attention",
    state=CoreState,
    cost=cost,
    uneven=False,
    honours=frozenset({"dropout", "rotate"}),
    weights="implicit",
    sample_inputs=sample_inputs,
    in_trained_models=in_trained_models,
    projection=Gate,
    waivers=(
        Waiver(
            "layer_lengths",
            "its number of groups is fixed when the program is compiled",
            patterns=(Pattern.CAUSAL_SELF,),
        ),
        Waiver(
            "grouped_heads", "heads of a group share cores, those of repeated keys do not", variants=("mean query",)
        ),
    ),
)


__all__ = [
    "MECHANISM",
    "Config",
    "CoreState",
    "Gate",
    "absorb",
    "check",
    "check_pattern",
    "chunked",
    "cost",
    "parallel",
    "read",
    "reference",
    "sample_inputs",
]
