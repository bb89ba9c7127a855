r"""Hard attention: softmax of which each query keeps only its k largest weights.

When to pick it: in some layers of a model that was trained with softmax and fine-tuned on little data, where many keys
with small weights are noise; :mod:`regard.compression.pruning.axformer` finds the layers.
When not: for speed. All scores are computed, and selecting the largest takes longer than the products that it saves.

Definition (AxFormer, Nagarajan et al., arXiv 2010.03688, selective hard attention):

    P = softmax(tau Q K^T + bias),   C_ij = P_ij where it is one of the k largest of row i, 0 elsewhere,   O = C V

The kept weights are not normalised again: those of a row sum to at most 1. With k = 1 a query gives P_max v_argmax, not
v_argmax; with k >= M this is softmax.

| paper | here |
|---|---|
| k, 30 in the authors' code | `keys` |
| 1 / sqrt(d) | `scale` |

Dropout comes before the selection, as in the authors' code: a dropped weight makes room for another.

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). A query that sees no key gives 0; one that sees
fewer than k reads them all. The softmax is in at least float32. Which of equal weights are kept is not specified.
Deviations: the authors' code raises an error where there are fewer than k keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract import ALL_PATTERNS, Call, Cost, Kind, Mechanism, Paper, Result, Shape, at_least
from regard.core.sampling import attention_shapes, normals
from regard.engines import attention_forms
from regard.engines.attention import attention_cost, attention_reference, masked_scores_bias, ranks
from regard.engines.attention_forms import by_pattern
from regard.engines.cache import KeyValueState, absorb

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        keys: k, how many keys a query reads, >= 1.
    """

    keys: int = 30

    def __post_init__(self) -> None:
        at_least("keys", self.keys, 1)


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    visible, bias = masked_scores_bias(where, by_pattern(call), call.bias, call.position_bias, call.blocks, q.dtype)

    def weights(scores: Tensor) -> Tensor:
        soft = scores.softmax(-1)
        order = soft.argsort(-1, descending=True)
        return torch.where(order.argsort(-1) < call.config.keys, soft, 0)

    return attention_reference(q, k, v, visible, weights, call.scale, bias)


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Result:
    """Softmax over all keys, a block of queries at a time, keeping the k largest weights of each row."""
    return attention_forms.parallel(call, q, k, v, largest=call.config.keys)


def chunked(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Result:
    """Continue a cached sequence by any number of tokens; also the step."""
    return attention_forms.chunked(call, q, k, v, largest=call.config.keys)


def read(call: Call, q: Float[Tensor, "b h n d"]) -> Result:
    """Attend to absorbed memory."""
    return attention_forms.read(call, q, largest=call.config.keys)


def sample_inputs(
    generator: torch.Generator, *, batch: int, n: int, m: int, dtype: torch.dtype, sizes: dict[str, int], **_: Any
) -> dict[str, Tensor]:
    """Inputs for tests and timings."""
    size = {"h": 2, "g": 2, "d": 8, "v": 6} | sizes
    return normals(generator, attention_shapes(batch, n, m, size), dtype)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of two products for each pair of query and key: all weights are computed before some are chosen."""
    return attention_cost(shape)


MECHANISM = Mechanism(
    name="hard_softmax",
    aliases=("hard_attention", "axformer"),
    kind=Kind.ATTENTION,
    summary="Softmax of which each query keeps only its k largest weights, without renormalising them.",
    paper=Paper(
        "AxFormer: Accuracy-driven Approximation of Transformers for Faster, Smaller and more Accurate NLP Models",
        "2010.03688",
        2020,
        17,
    ),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv"},
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
    variants={"few": {"keys": 3}, "one": {"keys": 1}},
    engine="attention",
    state=KeyValueState,
    cost=cost,
    honours=frozenset({"bias", "blocks", "dropout", "weights"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative", "toeplitz"),
    sample_inputs=sample_inputs,
)
