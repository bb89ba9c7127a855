r"""Selective temperature: softmax attention in which each token sharpens its own query, and turns its value up or down.

When to pick it: an addition of about two numbers a feature to any softmax attention: queries that are sharp where one token
matters and broad elsewhere, less flattening in long contexts, noisy values turned down. Any softmax kernel runs it.
When not: a plain yardstick (`softmax`); weights that should be exactly zero (`clipped_softmax`).

Definition (Selective Self-Attention, Zhang et al., arXiv 2411.12892), for each head:

    tau(x, n) = 1 + tanh(f(x)) + s log n
    q'_i = tau_q(x_i, n_i) q_i,   v'_j = tau_v(x_j, n_j) v_j,   o_i = sum_j softmax_j(c q'_i . k_j + bias_ij) v'_j

| paper | here |
|---|---|
| tanh(f(x)), the token's term, in (-1, 1) | `q_token`, `k_token`, `v_token`: 0 where they are not given |
| s, so that 1 + s log n is the position's term | `q_slope`, `k_slope`, `v_slope` >= 0, one number a head: 0 where not given |
| s = sigmoid(alpha) | `position_form="sigmoid"`; exp(-exp(alpha)) and alpha, both in the authors' code: `double_exp`, `linear` |
| f(x) = u . gelu(W x) with the head's own W (weight sharing) | `token_features="heads"`: u . gelu(q), u . gelu(v) |
| f of its own | `token_features="tokens"`: two layers on x |
| which of q, k, v have which term | `q_temperature`, `k_temperature`, `v_temperature` |
| sqrt(1 / d) | `scale`, c |

The temperature of a query multiplies its scores (an inverse temperature), before biases. n is the number of keys in sight: in
causal-self a token's place, counted from 1 and from the start of the sequence when it is decoded; in the other patterns all
valid keys, for queries, keys and values alike. Keys that a bias or a block mask hides count. With bounded scores the largest
weight of n keys stays apart from 1 / n only if tau grows with log n. tau > 0 as long as terms are as declared.
The features of f are those of the projected heads before rotation and before any temperature. With rotary positions the order
of rotation and temperature does not matter. A norm of queries (`query_key_norm`) comes before.

State: keys and values, in causal-self with their temperatures; memory keeps the terms of its tokens beside them (one number a
key), since n is known only once all of it is there. Wanted weights are the softmax's, to be read with v'.

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). A query that sees no key gives 0.
A layer shares alpha between q, k and v, as its re-implementations do (a group of heads: the mean of theirs), so that it has
2 H d + H parameters more. To begin near a trained model use `position_start=-7`; u begins at 0 always. There the authors' code
trains alpha at a rate of 0.01, a thousand times that of other weights, and so does a retrofit; it has no weight decay here.
Deviations: the authors publish the position's term for queries only; the rest follows the paper. What noncausal and cross
patterns do is ours. Of what the paper compares with, a constant temperature (YaRN's too) is the function's `scale`; one by
the frequency of a token needs counts of ids, which no layer sees, and functions take it as `q_token`; keeping the largest
scores of a row is an analysis of trained models in the authors' code, not the method, and needs whole rows of scores,
which softmax kernels do not keep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.contract import (
    ALL_PATTERNS,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Shape,
    Tensors,
    Waiver,
)
from regard.core.sampling import attention_shapes
from regard.mechanisms.selective_temperature.definition import POSITION_FORMS, TERMS, Config, reference
from regard.mechanisms.selective_temperature.forms import SelectiveState, absorb, chunked, parallel, read
from regard.mechanisms.selective_temperature.layer import Temperatures


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    config: Config,
    sizes: dict[str, int],
    **_: Any,
) -> Tensors:
    """Inputs for tests and timings, with the terms that a layer with these options would have."""
    size = {"h": 2, "g": 2, "d": 8, "v": 6} | sizes

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = attention_shapes(batch, n, m, size)
    found = {name: normal(*shape) for name, shape in shapes.items()}
    found["q"] /= 4  # temperatures reach about 4: scores are then no further apart than other mechanisms'
    for name, terms in config.terms.items():
        if terms in ("token", "both"):
            found[f"{name}_token"] = normal(*shapes[name][:3]).tanh()
        if terms in ("position", "both"):
            found[f"{name}_slope"] = normal(shapes[name][1]).sigmoid()
    return {name: x.to(dtype) for name, x in found.items()}


def cost(shape: Shape, config: Config) -> Cost:
    """Softmax attention's, and a product for each number of the queries and values."""
    width = shape.dim_key + shape.dim_value
    heads = shape.batch * shape.heads
    scaling = shape.n * shape.dim_key + shape.m * shape.dim_value
    return Cost(
        flops=heads * (2.0 * shape.n * shape.m * width + scaling),
        memory=heads * (shape.n + float(scaling)),
        state=float(shape.heads * shape.m * width),
        step_flops=heads * (2.0 * shape.m * width + width),
    )


MECHANISM = Mechanism(
    name="selective_temperature",
    aliases=("ssa_temp", "selective_self_attention"),
    kind=Kind.ATTENTION,
    summary="Softmax in which each token sets how sharp its query is and how loud its value, by content and position.",
    paper=Paper(
        "Selective Attention: Enhancing Transformer through Principled Context Control", "2411.12892", 2024, 31
    ),
    inputs={
        "q": "bhnd",
        "k": "bgmd",
        "v": "bgmv",
        "q_token?": "bhn",
        "k_token?": "bgm",
        "v_token?": "bgm",
        "q_slope?": "h",
        "k_slope?": "g",
        "v_slope?": "g",
    },
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
    waivers=(
        Waiver(
            "gradient",
            "in float32 the terms that reach the weights of a temperature cancel (up to 4e-6 off, by torch too)",
            variants=("from the layer's input",),
            dtypes=(torch.float32,),
        ),
    ),
    variants={
        "positions alone": {
            "q_temperature": "position",
            "v_temperature": "position",
            "k_temperature": "position",
            "position_form": "linear",
            "position_start": 0.5,
        },
        "tokens alone": {
            "q_temperature": "token",
            "v_temperature": "token",
            "k_temperature": "token",
            "share_heads": True,
        },
        "from the layer's input": {
            "token_features": "tokens",
            "hidden": 5,
            "k_temperature": "both",
            "position_granularity": "layer",
        },
        "keys alone": {
            "q_temperature": "none",
            "v_temperature": "none",
            "k_temperature": "both",
            "position_form": "double_exp",
            "round_scaled": True,
        },
    },
    engine="attention",
    state=SelectiveState,
    cost=cost,
    honours=frozenset({"bias", "blocks", "dropout", "weights", "lse"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative"),
    domains={"q_token": "tanh", "k_token": "tanh", "v_token": "tanh"},
    sample_inputs=sample_inputs,
    in_trained_models=lambda length, heads: {"position_start": -7.0},  # a slope of 0.0009; the authors have 0.0006
    projection=Temperatures,
)


__all__ = [
    "MECHANISM",
    "POSITION_FORMS",
    "TERMS",
    "Config",
    "SelectiveState",
    "Temperatures",
    "absorb",
    "chunked",
    "cost",
    "parallel",
    "read",
    "reference",
    "sample_inputs",
]
