r"""Sigmoid attention: every key gets its own weight between 0 and 1, independently of the other keys.

When to pick it: softmax quality without competition between keys (a head may attend to nothing), simpler kernels, and
partial outputs that merge by addition.
When not: long streams (the state grows with every token), or if the training length is unknown and rows may differ
widely in length (see `length` and `schedule`).

Definition (Ramapuram et al., arXiv 2409.04431, equations 3-4):

    S = tau Q K^T + bias,   P_ij = sigma(e^t S_ij + b) for visible j and 0 for hidden ones,   O = P V

| paper | here |
|---|---|
| sigma | `activation="sigmoid"`; also `relu`, `relu_squared` (prior art: with `norm="seq"` these are relu / n) |
| b | `sigmoid_bias`, or -ln(`length`); `schedule="position"` for b_i = -ln c_i; plus `head_bias` |
| n in b = -ln n | `length`: the training length, a constant of the layer |
| t | `log_temperature` |
| P_ij / (i + 1), P_ij / sqrt(i + 1) | `norm="seq"`, `norm="sqrt"`: divided by c_i, sqrt(c_i) |
| tau | `scale`, D^-0.5 by default |

c_i is the number of keys that query i may see by pattern, window and length (i + 1 in causal-self; all valid keys in
noncausal patterns); keys hidden by a bias of -inf or a block mask are included.

Without a bias and with scores near 0, a row of weights sums to n/2 instead of 1 and early training suffers: pass
`length=` with the training length, or `schedule="position"`, whenever there are more than a few keys. The bias is never
derived from the call's N, which differs between decoding and prefill; at lengths beyond `length`, row sums grow by N/n.

Sensitivity: with queries, keys and values from inputs of norms up to R and `scale=1`, the Jacobian's largest singular
value is at most 1 + R^2 / 2 with `norm="seq"`, however many keys there are, and at most n (1 + R^2 / 2) without a norm,
whatever the bias. That of softmax can exceed the first bound: two clusters of exp(R^2 / 4) tokens raise it to about R^2
exp(R^2 / 8).

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). A query that sees no key gives 0.
Deviations: `learn_bias` gives a layer one bias per head, trained as the difference from b. The paper's recommendations
around the mechanism are options elsewhere: of the layer, `query_key_norm="layer"` (before any rotation), and
`value_norm="layer"` in cross patterns, where the authors' code always has it; of a model's `stack`, `layer_scale=1e-4`
(vision) and `branch_norm="mixer"`, the hybrid norm x + norm(attend(norm(x))) (larger language models). ALiBi in
noncausal patterns decreases with distance on both sides, where in the authors' code keys after the query gain. Windows
do not trim the cache of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    Waiver,
    at_least,
    one_of,
)
from regard.core.precision import wide, wide_dtype
from regard.core.visibility import DistanceBias
from regard.engines.attention import Ranks, Visibility, attention_cost, masked_scores_bias, ranks
from regard.engines.attention_forms import attend, check_window
from regard.engines.cache import KeyValueState, extend

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ACTIVATIONS = {"sigmoid": torch.sigmoid, "relu": torch.relu, "relu_squared": lambda x: torch.relu(x).square()}


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        sigmoid_bias: b, one finite number or one per head; None for -ln(`length`), or 0 without a length.
        length: the training length n in b = -ln n, >= 1; only without `sigmoid_bias`.
        schedule: ``constant`` for b as above; ``position`` for b_i = -ln c_i, only without `sigmoid_bias` and `length`.
        learn_bias: whether a layer learns one number per head, added to b and initially 0.
        log_temperature: t, any finite number.
        norm: ``none``, ``seq`` or ``sqrt``; all but ``none`` need b = 0.
        activation: ``sigmoid``, ``relu`` or ``relu_squared``.
        window: how many ranks (before, after) its own a query sees; None for no limit. Self patterns only; in
            causal-self a query sees nothing after itself, so the second entry is None or 0 there.
    """

    sigmoid_bias: float | tuple[float, ...] | None = None
    length: int | None = None
    schedule: str = "constant"
    learn_bias: bool = False
    log_temperature: float = 0.0
    norm: str = "none"
    activation: str = "sigmoid"
    window: tuple[int | None, int | None] = (None, None)

    def __post_init__(self) -> None:
        one_of("schedule", self.schedule, ("constant", "position"))
        one_of("norm", self.norm, ("none", "seq", "sqrt"))
        one_of("activation", self.activation, ACTIVATIONS)
        if self.length is not None:
            at_least("length", self.length, 1)
            if self.sigmoid_bias is not None:
                raise Unsupported("both sigmoid_bias and length", supported="one of them", nearest="length=None")
        if self.schedule == "position" and (self.length is not None or self.sigmoid_bias is not None):
            raise Unsupported(
                "schedule='position' with a constant bias",
                supported="neither sigmoid_bias nor length",
                nearest="schedule='constant'",
            )
        if not all(map(math.isfinite, self.biases)):
            raise Unsupported(
                f"sigmoid_bias={self.sigmoid_bias}",
                supported="a finite number, or one a head",
                nearest="sigmoid_bias=None",
            )
        biased = self.schedule == "position" or self.learn_bias or any(b != 0 for b in self.biases)
        if self.norm != "none" and biased:
            raise Unsupported(
                f"norm={self.norm!r} with a bias", supported="a normalised form without a bias", nearest="norm='none'"
            )
        if len(self.window) != 2:
            raise Unsupported(f"window={self.window}", supported="(before, after)", nearest="window=(None, None)")
        for side in self.window:
            if side is not None:
                at_least("window", side, 0)

    @property
    def biases(self) -> tuple[float, ...]:
        """b: one number, or one per head."""
        if self.sigmoid_bias is None:
            return (0.0 if self.length is None else -math.log(self.length),)
        return self.sigmoid_bias if isinstance(self.sigmoid_bias, tuple) else (self.sigmoid_bias,)


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    head_bias: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    config: Config = call.config
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    rule = _visibility(call)
    seen = rule.mask(where.queries, where.keys).expand(-1, q.shape[2], -1)
    counts = seen.sum(-1)[:, None, :, None].clamp(min=1).to(q.dtype)
    visible, added = masked_scores_bias(where, rule, call.bias, call.position_bias, call.blocks, q.dtype)
    groups = q.shape[1] // k.shape[1]
    scores = call.scale * q @ k.repeat_interleave(groups, 1).mT
    scores = scores if added is None else scores + added
    b = torch.tensor(config.biases, dtype=q.dtype, device=q.device)[:, None, None]
    if config.schedule == "position":
        b = -counts.log()
    if head_bias is not None:
        b = b + head_bias[:, None, None]
    weights = ACTIVATIONS[config.activation](math.exp(config.log_temperature) * scores + b)
    weights = torch.where(visible, weights, 0)
    if config.norm != "none":
        weights = weights / (counts if config.norm == "seq" else counts.sqrt())
    return weights @ v.repeat_interleave(groups, 1)


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    head_bias: Float[Tensor, " h"] | None = None,
) -> Result:
    """Attention by the engine, with the activation in place of the softmax: outputs of blocks of keys add up without a
    normaliser."""
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    return _attend(call, q, k, v, head_bias, where, _totals(call, k))


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    head_bias: Float[Tensor, " h"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens; also used as the step."""
    state, where = extend(call, k, v, q.shape[2])
    return _attend(call, q, state.k, state.v, head_bias, where, state.length, state)


def absorb(
    call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], head_bias: Float[Tensor, " h"] | None = None
) -> KeyValueState:
    """Append memory to the cache; more may follow. `head_bias` is ignored; it only affects queries."""
    return extend(call, k, v, 0)[0]


def read(call: Call, q: Float[Tensor, "b h n d"], head_bias: Float[Tensor, " h"] | None = None) -> Result:
    """Attend from queries to absorbed memory."""
    state: KeyValueState = call.state
    where = ranks(call, q.shape[2], 0, q.device, state.ranks, state.length)
    return _attend(call, q, state.k, state.v, head_bias, where, state.length, state)


def _visibility(call: Call) -> Visibility:
    config: Config = call.config
    left, right = config.window
    check_window("sigmoid attention", config.window, call.pattern, none="(None, None)")
    return Visibility(causal=call.pattern is Pattern.CAUSAL_SELF, left=left, right=right)


def _totals(call: Call, k: Tensor) -> Int[Tensor, " b"]:
    """The number of keys in each row."""
    if call.memory_lengths is not None:
        return call.memory_lengths
    return torch.full((k.shape[0],), k.shape[2], device=k.device)


def _attend(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_bias: Tensor | None,
    where: Ranks,
    totals: Tensor,
    state: KeyValueState | None = None,
) -> Result:
    config: Config = call.config
    visibility = _visibility(call)
    temperature = math.exp(config.log_temperature)
    narrow, dtype = q.dtype, wide_dtype(q)
    if config.norm != "none":  # round sums once, after the division
        q, k, v = wide(q), wide(k), wide(v)
    counts = visibility.count(where.queries, totals[:, None]).clamp(min=1)[:, None, :, None].to(dtype)

    bias = None if call.bias is None else temperature * call.bias.to(dtype)
    for term in _bias_terms(config, head_bias, counts, q):
        bias = term if bias is None else bias + term
    position_bias = call.position_bias
    if isinstance(position_bias, DistanceBias):
        position_bias = position_bias.scaled(temperature, dtype)
    elif position_bias is not None:
        by_rank = position_bias
        position_bias = lambda i, j: temperature * by_rank(i, j).to(dtype)  # noqa: E731

    result = attend(
        call,
        q,
        k,
        v,
        where,
        state,
        visibility=visibility,
        scale=temperature * call.scale,
        rule=config.activation,
        shift=config.biases[0] if len(config.biases) == 1 else 0.0,
        bias=bias,
        position_bias=position_bias,
    )
    if config.norm == "none":
        return result
    divisor = counts if config.norm == "seq" else counts.sqrt()
    extras = {name: (x / divisor).to(narrow) for name, x in result.extras.items()}
    return Result((result.output / divisor).to(narrow), state, extras=extras)


def _bias_terms(config: Config, head_bias: Tensor | None, counts: Tensor, q: Tensor) -> list[Tensor]:
    """The parts of b that vary by head (1, h, 1, 1) or by query (b, 1, n, 1)."""
    terms = []
    if len(config.biases) > 1:
        if len(config.biases) != q.shape[1]:
            raise Unsupported(
                f"sigmoid attention with {len(config.biases)} biases for {q.shape[1]} heads",
                supported="one number, or one a head",
            )
        terms.append(torch.tensor(config.biases, dtype=counts.dtype, device=q.device)[None, :, None, None])
    if config.schedule == "position":
        terms.append(-counts.log())
    if head_bias is not None:
        terms.append(head_bias.to(counts.dtype)[None, :, None, None])
    return terms


class HeadBias(Projection):
    """Supplies a layer's heads with a learned bias if `learn_bias` is set."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        check_window("sigmoid attention", spec.config.window, spec.pattern, none="(None, None)")
        if len(spec.config.biases) not in (1, spec.heads):
            raise Unsupported(
                f"sigmoid attention with {len(spec.config.biases)} biases for {spec.heads} heads",
                supported="one number, or one a head",
            )
        self.head_bias = nn.Parameter(torch.zeros(spec.heads)) if spec.config.learn_bias else None

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        return heads if self.head_bias is None else heads | {"head_bias": self.head_bias}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost as for softmax attention: a window reduces the pairs, not the cache."""
    left, right = config.window
    near = math.inf if left is None else left + 1 + (0 if right is None else right)
    return attention_cost(shape, near)


MECHANISM = Mechanism(
    name="sigmoid",
    aliases=("flash_sigmoid", "sigmoid_self_attention"),
    kind=Kind.ATTENTION,
    summary="Every key gets its own weight between 0 and 1, whatever the other keys are.",
    paper=Paper("Theory, Analysis, and Best Practices for Sigmoid Self-Attention", "2409.04431", 2024, 22),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv", "head_bias?": "h"},
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
        "by length": {"length": 9, "log_temperature": 0.7, "learn_bias": True},
        "a bias for each head": {"sigmoid_bias": (-1.0, 0.5)},
        "by position": {"schedule": "position"},
        "normalised": {"norm": "seq", "activation": "relu"},
        "normalised by the root": {"norm": "sqrt", "activation": "relu_squared"},
        "window": {"window": (3, None), "norm": "sqrt"},
        "window by position": {"window": (3, 0), "schedule": "position"},
    },
    variant_patterns={
        "window": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
        "window by position": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    },
    in_trained_models=lambda model: {"length": model.length},
    engine="attention",
    state=KeyValueState,
    cost=cost,
    honours=frozenset({"bias", "blocks", "dropout", "weights"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative", "toeplitz"),
    projection=HeadBias,
    waivers=(Waiver("grouped_heads", "its two biases are for two heads", variants=("a bias for each head",)),),
)
