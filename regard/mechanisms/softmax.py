r"""Softmax attention: every query attends to every key; weights are positive and sum to one.

When to pick it: up to about a thousand tokens, when exact recall of any earlier token matters, or as the baseline.
When not: long sequences (time grows with N M) and streams (the state grows with every token).

Definition (Vaswani et al., arXiv 1706.03762; computed by blocks as in FlashAttention, arXiv 2205.14135):

    S = cap(tau Q K^T) + bias,   LSE_i = log sum_l exp(S_il) over visible keys l
    P_ij = exp(S_ij) / (exp(a) + exp(LSE_i)),   O = P V

with cap(s) = c tanh(s / c) if there is a softcap c, else s; the term exp(a) is present only with a sink a, one number
per head: with it the weights of a query sum to sigmoid(LSE_i - a) instead of 1, so that a head may attend to little.
In causal-self key j is visible to query i iff j <= i + M - N (bottom-right). A query that sees no key gives 0, and its
LSE is -inf.

| paper | here |
|---|---|
| Q, K, V | `q`, `k`, `v` |
| tau | `scale`, D^-0.5 by default |
| c, softcap of the scores | `softcap` |
| a, logit of an attention sink | `sink`; learned by a layer with `learn_sink` |
| (left, right) of a sliding window | `window` |
| queries computed in each head, with output 0 elsewhere (a mixture of heads) | `chosen`, boolean |
| block mask (block-sparse FlashAttention, section 3.3) | `mask.blocks`; patterns in `regard.engines.block_patterns` |
| LSE | `extras["lse"]` with `want={"lse"}`: (B, H, N), in at least float32, of the keys alone without the sink |

With LSE, outputs over separate parts of the keys merge: O = sum_p exp(LSE_p) O_p / sum_p exp(LSE_p) (without a sink).

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries).
Deviations: the paper applies the block mask only without causality; here both combine. The native kernel skips blocks
that the mask hides; torch computes and hides them, in the tiles of PyTorch's `scaled_dot_product_attention`, or in
blocks of queries for a softcap, LSE, weights, and dropout on a CPU or with a generator; memory stays linear in N.
Windows do not trim the cache of keys (`local` does). Second derivatives are not supported: the kernels refuse them.
Queries that are not `chosen` cost nothing if no bias, block mask, sink or dropout differs between heads and no
weights are requested; a compiled program computes and hides them.
For the traffic of tiles and stored scores between slow and fast memory see
:func:`regard.measurement.memory_traffic.io_count`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Cost,
    Kind,
    LayerCall,
    LayerSpec,
    Mechanism,
    Paper,
    Pattern,
    Projection,
    Result,
    Shape,
    Tensors,
    Unsupported,
    at_least,
)
from regard.core.sampling import attention_shapes, normals
from regard.engines import attention_forms
from regard.engines.attention import Visibility, attention_cost, attention_reference, masked_scores_bias, ranks
from regard.engines.cache import KeyValueState, absorb

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        window: how many ranks (left, right) of its own a query sees, each >= 0 or None for no limit; None for no
            window. Self patterns only; in causal-self a query sees nothing after itself, so right is None or 0 there.
        softcap: c > 0 bounds the scores to (-c, c) before biases; None for no bound.
        learn_sink: whether a layer learns the sink, initially 0; functions take it as the tensor `sink`.
    """

    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    learn_sink: bool = False

    def __post_init__(self) -> None:
        if self.window is not None:
            if len(self.window) != 2:
                raise Unsupported(f"window={self.window}", supported="(left, right), or None", nearest="window=None")
            for side in self.window:
                if side is not None:
                    at_least("window", side, 0)
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise Unsupported(f"softcap={self.softcap}", supported="a finite softcap > 0", nearest="softcap=None")


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    sink: Float[Tensor, " h"] | None = None,
    chosen: Bool[Tensor, "b h n"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    visible, bias = masked_scores_bias(where, _visibility(call), call.bias, call.position_bias, call.blocks, q.dtype)
    o = attention_reference(q, k, v, visible, partial(sink_weights, sink), call.scale, bias, call.config.softcap)
    return o if chosen is None else torch.where(chosen[..., None] != 0, o, 0)


def sink_weights(sink: Float[Tensor, " h"] | None, scores: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
    """Softmax over the scores and, if there is one, the sink, whose weight is left out."""
    if sink is None:
        return scores.softmax(-1)
    column = sink[None, :, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    sink: Float[Tensor, " h"] | None = None,
    chosen: Bool[Tensor, "b h n"] | None = None,
) -> Result:
    """Block by block, without an N x M matrix: O(N M) time, O(N) memory."""
    return attention_forms.parallel(call, q, k, v, **_options(call, sink, chosen))


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    sink: Float[Tensor, " h"] | None = None,
    chosen: Bool[Tensor, "b h n"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens; also used as the step."""
    return attention_forms.chunked(call, q, k, v, **_options(call, sink, chosen))


def read(
    call: Call,
    q: Float[Tensor, "b h n d"],
    sink: Float[Tensor, " h"] | None = None,
    chosen: Bool[Tensor, "b h n"] | None = None,
) -> Result:
    """Attend from queries to absorbed memory."""
    return attention_forms.read(call, q, **_options(call, sink, chosen))


def _options(call: Call, sink: Tensor | None, chosen: Tensor | None) -> dict[str, Any]:
    return {"visibility": _visibility(call), "softcap": call.config.softcap, "sink": sink, "chosen": chosen}


def _visibility(call: Call) -> Visibility:
    attention_forms.check_window("softmax attention", call.config.window, call.pattern, none="None")
    left, right = call.config.window or (None, None)
    return Visibility(causal=call.pattern is Pattern.CAUSAL_SELF, left=left, right=right)


class Sink(Projection):
    """Supplies a layer's heads with learned sinks if `learn_sink` is set."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        attention_forms.check_window("softmax attention", spec.config.window, spec.pattern, none="None")
        self.sink = nn.Parameter(torch.zeros(spec.heads)) if spec.config.learn_sink else None

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        return heads if self.sink is None else heads | {"sink": self.sink}


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    config: Config,
    sizes: dict[str, int] | None = None,
    **_: Any,
) -> Tensors:
    """Inputs for tests and timings; a sink only if the options have one, since plain attention is the baseline."""
    size = {"h": 2, "g": 2, "d": 8, "v": 6} | (sizes or {})
    shapes = attention_shapes(batch, n, m, size)
    if config.learn_sink:
        shapes["sink"] = (size["h"],)
    return normals(generator, shapes, dtype)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of two products per pair; a window reduces the pairs (counted as in causal-self), not the cache."""
    left, right = config.window or (None, None)
    near = math.inf if left is None else left + 1 + (0 if right is None else right)
    return attention_cost(shape, near)


MECHANISM = Mechanism(
    name="softmax",
    aliases=("sdpa", "flash", "flash_attention", "vanilla", "full", "exact"),
    kind=Kind.ATTENTION,
    summary="Every query looks at every key; weights are positive and sum to one.",
    paper=Paper("FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", "2205.14135", 2022, 11),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv", "sink?": "h", "chosen?": "bhn"},
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
        "softcap": {"softcap": 0.8},
        "sink": {"learn_sink": True},
        "window": {"window": (3, 0)},
        "window, softcap and sink": {"window": (2, None), "softcap": 2.0, "learn_sink": True},
    },
    variant_patterns={
        "window": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
        "window, softcap and sink": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    },
    engine="attention",
    state=KeyValueState,
    cost=cost,
    honours=frozenset({"bias", "blocks", "dropout", "weights", "lse"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative", "toeplitz"),
    projection=Sink,
    sample_inputs=sample_inputs,
)
