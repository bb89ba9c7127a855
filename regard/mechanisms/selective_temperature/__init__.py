r"""Selective temperature: softmax attention in which each token sharpens its own query and scales its value up or down.

When to pick it: an addition of about two numbers per feature to any softmax attention: queries that are sharp where one
token matters and broad elsewhere, less flattening in long contexts, noisy values scaled down. Any softmax kernel runs
it.
When not: a plain baseline (`softmax`); weights that should be exactly zero (`clipped_softmax`).

Definition (Selective Self-Attention, Zhang et al., arXiv 2411.12892), for each head:

    tau(x, n) = 1 + tanh(f(x)) + s log n
    q'_i = tau_q(x_i, n_i) q_i,   v'_j = tau_v(x_j, n_j) v_j,   o_i = sum_j softmax_j(c q'_i . k_j + bias_ij) v'_j

| paper | here |
|---|---|
| tanh(f(x)), the token's term, in (-1, 1) | `q_token`, `k_token`, `v_token`: 0 when not given |
| s, so that 1 + s log n is the position's term | `q_slope`, `k_slope`, `v_slope` >= 0, one number per head; 0 when not given |
| s = sigmoid(alpha) | `position_form="sigmoid"`; exp(-exp(alpha)) and alpha, both in the authors' code: `double_exp`, `linear` |
| f(x) = u . gelu(W x) with the head's own W (weight sharing) | `token_features="heads"`: u . gelu(q), u . gelu(v) |
| a separate f | `token_features="tokens"`: two layers on x |
| which of q, k, v have which term | `q_temperature`, `k_temperature`, `v_temperature` |
| sqrt(1 / d) | `scale`, c |

The temperature of a query multiplies its scores (an inverse temperature), before biases. n is the number of visible
keys: in causal-self a token's position, counted from 1 and, in decoding, from the start of the sequence; in the other
patterns the number of all valid keys, for queries, keys and values alike. Keys hidden by a bias or a block mask are
included. With bounded scores the largest weight over n keys stays away from 1 / n only if tau grows with log n. tau > 0
if the terms are in the ranges above. The features of f are those of the projected heads before rotation and before any
temperature. With rotary positions the order of rotation and temperature does not matter. A norm of queries
(`query_key_norm`) is applied before.

State: keys and values, in causal-self with their temperatures applied; memory stores its tokens' terms next to them
(one number per key), since n is only known once the whole memory is there. Requested weights are the softmax's, to be
applied to v'.

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). A query that sees no key gives 0.
A layer shares alpha between q, k and v, as re-implementations do (a group of heads uses the mean over its query heads),
so it adds 2 H d + H parameters. To start close to a trained model use `position_start=-7`; u always starts at 0. For
trained models the authors' code trains alpha at a rate of 0.01, a thousand times that of other weights, and so does a
retrofit; alpha has no weight decay here.
Deviations: the authors publish the position term for queries only; the rest follows the paper. Noncausal and cross
patterns are not in the paper. Of the paper's baselines, a constant temperature (also YaRN's) is the function's `scale`;
a temperature by token frequency needs counts of ids, which no layer sees, but functions accept it as `q_token`; keeping
only the largest scores of a row is an analysis of trained models in the authors' code, not the method, and needs whole
rows of scores, which softmax kernels do not store.
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
    found["q"] /= 4  # temperatures reach about 4: keeps scores as close as in other mechanisms
    for name, terms in config.terms.items():
        if terms in ("token", "both"):
            found[f"{name}_token"] = normal(*shapes[name][:3]).tanh()
        if terms in ("position", "both"):
            found[f"{name}_slope"] = normal(shapes[name][1]).sigmoid()
    return {name: x.to(dtype) for name, x in found.items()}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of softmax attention, and of one product per number of the queries and values."""
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
    summary="Softmax in which each token sets how sharp its query is and how strong its value, by content and position.",
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
    in_trained_models=lambda model: {"position_start": -7.0},  # a slope of 0.0009; the authors use 0.0006
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
