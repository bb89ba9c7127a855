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
2 H d + H parameters more. To begin near a trained model use `position_start=-10`; u begins at 0 always. The authors' code
trains alpha alone at a much higher rate than other weights; it has no weight decay here.
Deviations: the authors publish the position's term for queries only; the rest follows the paper. What noncausal and cross
patterns do is ours. Of what the paper compares with, a constant temperature (YaRN's too) is the function's `scale`; one by
the frequency of a token needs counts of ids, which no layer sees, and functions take it as `q_token`; keeping the largest
scores of a row is an analysis of trained models in the authors' code, not the method, and needs whole rows of scores,
which softmax kernels do not keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Cost,
    Kind,
    LayerSpec,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    Tensors,
    Unsupported,
    at_least,
    one_of,
    state_field,
)
from regard.core.precision import wide, wide_dtype
from regard.core.sampling import attention_shapes
from regard.engines.attention import Ranks, Visibility, attention, attention_reference, masked_scores_bias, ranks
from regard.engines.cache import KeyValueState, append, extend
from regard.layers.linear import make_linear
from regard.layers.parts import LayerCall, Projection

if TYPE_CHECKING:
    from jaxtyping import Float, Int

TERMS = ("none", "position", "token", "both")
POSITION_FORMS = {"sigmoid": 0.0, "double_exp": 2.0, "linear": 1e-5}
"""Forms of s, with where alpha starts."""


@dataclass(frozen=True)
class Config:
    """Options, of layers but for the last: functions take the terms that they are given.

    Attributes:
        q_temperature: terms of the queries' temperature: ``none``, ``position``, ``token`` or ``both``.
        k_temperature: likewise of the keys.
        v_temperature: likewise of the values.
        token_features: what f reads: ``heads`` (the head's own query, key or value) or ``tokens`` (the layer's input).
        hidden: width of f's hidden layer with ``tokens``, >= 1; that of the input when None.
        share_heads: whether all heads have the same u, with ``heads``.
        position_form: s is ``sigmoid`` (of alpha), ``double_exp`` (exp(-exp(alpha))) or ``linear`` (alpha itself, at
            least 0).
        position_start: alpha at the start, finite (>= 0 with ``linear``); when None 0, 2 and 0.00001 for the three forms.
        position_granularity: ``head`` for one alpha a head, ``layer`` for one in all.
        round_scaled: in half precision, round q', k' and v' to the inputs' dtype, so that kernels for it can run. Errors
            in bfloat16 then are up to twice those published. Otherwise the attention is computed in float32.
    """

    q_temperature: str = "both"
    k_temperature: str = "none"
    v_temperature: str = "both"
    token_features: str = "heads"
    hidden: int | None = None
    share_heads: bool = False
    position_form: str = "sigmoid"
    position_start: float | None = None
    position_granularity: str = "head"
    round_scaled: bool = False

    def __post_init__(self) -> None:
        for name in ("q_temperature", "k_temperature", "v_temperature"):
            one_of(name, getattr(self, name), TERMS)
        one_of("token_features", self.token_features, ("heads", "tokens"))
        one_of("position_form", self.position_form, POSITION_FORMS)
        one_of("position_granularity", self.position_granularity, ("head", "layer"))
        if self.hidden is not None:
            at_least("hidden", self.hidden, 1)
            if self.token_features == "heads":
                raise Unsupported(
                    f"hidden={self.hidden} with token_features='heads'",
                    supported="token_features='tokens'",
                    nearest="hidden=None",
                )
        if self.share_heads and self.token_features == "tokens":
            raise Unsupported(
                "share_heads with token_features='tokens'",
                supported="token_features='heads'",
                nearest="share_heads=False",
            )
        lowest = 0.0 if self.position_form == "linear" else -math.inf
        if self.position_start is not None and not (
            math.isfinite(self.position_start) and self.position_start >= lowest
        ):
            raise Unsupported(
                f"position_start={self.position_start} with position_form={self.position_form!r}",
                supported="a finite number, >= 0 when linear",
                nearest="position_start=None",
            )

    @property
    def terms(self) -> dict[str, str]:
        """By the name of the heads."""
        return {"q": self.q_temperature, "k": self.k_temperature, "v": self.v_temperature}


@dataclass(frozen=True)
class SelectiveState(KeyValueState):
    """Keys and values so far: with their temperatures in causal-self, without and with their tokens' terms elsewhere."""

    k_token: Float[Tensor, "b g past"] | None = state_field()
    v_token: Float[Tensor, "b g past"] | None = state_field()


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    q_token: Float[Tensor, "b h n"] | None = None,
    k_token: Float[Tensor, "b g m"] | None = None,
    v_token: Float[Tensor, "b g m"] | None = None,
    q_slope: Float[Tensor, " h"] | None = None,
    k_slope: Float[Tensor, " g"] | None = None,
    v_slope: Float[Tensor, " g"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the whole score matrix and keys counted one by one."""
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    rule = _visibility(call)
    visible, bias = masked_scores_bias(where, rule, call.bias, call.position_bias, call.blocks, q.dtype)
    in_sight = rule.mask(where.queries, where.keys).expand(-1, q.shape[2], -1).sum(-1)
    before = rule.mask(where.keys, where.keys).expand(-1, k.shape[2], -1).sum(-1)

    def tau(n: Tensor, token: Tensor | None, slope: Tensor | None) -> Tensor:
        position = 0 if slope is None else slope[:, None] * n.clamp(min=1).to(q.dtype).log()[:, None]
        return (1 + (0 if token is None else token) + position) * torch.ones_like(n[:, None], dtype=q.dtype)

    sharpened = tau(in_sight, q_token, q_slope)[..., None] * q
    keys = tau(before, k_token, k_slope)[..., None] * k
    values = tau(before, v_token, v_slope)[..., None] * v
    return attention_reference(sharpened, keys, values, visible, lambda s: s.softmax(-1), call.scale, bias)


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    q_token: Float[Tensor, "b h n"] | None = None,
    k_token: Float[Tensor, "b g m"] | None = None,
    v_token: Float[Tensor, "b g m"] | None = None,
    q_slope: Float[Tensor, " h"] | None = None,
    k_slope: Float[Tensor, " g"] | None = None,
    v_slope: Float[Tensor, " g"] | None = None,
) -> Result:
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    if call.memory_lengths is None:
        totals = torch.full((1,), k.shape[2], device=k.device)
    else:
        totals = call.memory_lengths
    places = _key_places(call, k, totals)
    k, v = _scaled(call, k, places, k_token, k_slope), _scaled(call, v, places, v_token, v_slope)
    return _attend(call, q, k, v, q_token, q_slope, where, totals)


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    q_token: Float[Tensor, "b h n"] | None = None,
    k_token: Float[Tensor, "b g m"] | None = None,
    v_token: Float[Tensor, "b g m"] | None = None,
    q_slope: Float[Tensor, " h"] | None = None,
    k_slope: Float[Tensor, " g"] | None = None,
    v_slope: Float[Tensor, " g"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens; also the step. A token's place counts those before it."""
    places = _key_places(call, k, None)
    k, v = _scaled(call, k, places, k_token, k_slope), _scaled(call, v, places, v_token, v_slope)
    cache, where = extend(call, k, v, q.shape[2])
    state = SelectiveState(cache.k, cache.v, cache.ranks, cache.length, None, None)
    return _attend(call, q, state.k, state.v, q_token, q_slope, where, state.length, state)


def absorb(
    call: Call,
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    k_token: Float[Tensor, "b g m"] | None = None,
    v_token: Float[Tensor, "b g m"] | None = None,
) -> SelectiveState:
    """Memory into a cache; more may follow. Temperatures wait until the number of keys is known."""
    past: SelectiveState | None = call.state
    cache = extend(call, k, v, 0)[0]
    tokens = {"k_token": k_token, "v_token": v_token}
    if past is not None:
        tokens = {name: _append(name, getattr(past, name), new) for name, new in tokens.items()}
    return SelectiveState(cache.k, cache.v, cache.ranks, cache.length, **tokens)


def read(
    call: Call,
    q: Float[Tensor, "b h n d"],
    q_token: Float[Tensor, "b h n"] | None = None,
    q_slope: Float[Tensor, " h"] | None = None,
    k_slope: Float[Tensor, " g"] | None = None,
    v_slope: Float[Tensor, " g"] | None = None,
) -> Result:
    """Queries on absorbed memory."""
    state: SelectiveState = call.state
    where = ranks(call, q.shape[2], 0, q.device, state.ranks)
    n = state.length[:, None]
    k, v = _scaled(call, state.k, n, state.k_token, k_slope), _scaled(call, state.v, n, state.v_token, v_slope)
    return _attend(call, q, k, v, q_token, q_slope, where, state.length, state)


def _scaled(
    call: Call,
    x: Float[Tensor, "b h n d"],
    keys: Int[Tensor, "#b #n"],
    token: Float[Tensor, "b h n"] | None,
    slope: Float[Tensor, " h"] | None,
) -> Float[Tensor, "b h n d"]:
    """x times 1 + token + slope log(keys), in at least float32 unless it is to be rounded."""
    if token is None and slope is None:
        return x
    dtype = wide_dtype(x)
    tau = torch.ones((), dtype=dtype, device=x.device)
    if token is not None:
        tau = tau + token.to(dtype)
    if slope is not None:
        tau = tau + slope.to(dtype)[:, None] * keys.clamp(min=1).to(dtype).log()[:, None]
    x_scaled = tau[..., None] * x
    return x_scaled.to(x.dtype) if call.config.round_scaled else x_scaled


def _visibility(call: Call) -> Visibility:
    return Visibility(causal=call.pattern is Pattern.CAUSAL_SELF)


def _key_places(call: Call, k: Tensor, totals: Int[Tensor, " b"] | None) -> Int[Tensor, "#b #m"]:
    """n of new keys: their places, counted from 1, in causal-self, and elsewhere the `totals` of their rows."""
    if call.pattern is not Pattern.CAUSAL_SELF:
        assert totals is not None
        return totals[:, None]
    places = torch.arange(1, k.shape[2] + 1, device=k.device)[None]
    return places if call.state is None else places + call.state.length[:, None]


def _append(name: str, past: Tensor | None, new: Tensor | None) -> Tensor | None:
    if past is None and new is None:
        return None
    if past is None or new is None:
        raise Unsupported(f"memory of which a part has {name}", supported=f"{name} for all of it, or for nothing")
    return append(past, new.to(past.dtype), 2)


def _attend(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_token: Tensor | None,
    q_slope: Tensor | None,
    where: Ranks,
    totals: Int[Tensor, " b"],
    state: SelectiveState | None = None,
) -> Result:
    visibility = _visibility(call)
    if q_slope is None:
        in_sight = totals[:, None]
    else:
        in_sight = visibility.count(where.queries, totals[:, None])
    dtype, q = q.dtype, _scaled(call, q, in_sight, q_token, q_slope)
    widest = torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))
    output, weights, lse = attention(
        q.to(widest),
        k,
        v,
        where,
        visibility=visibility,
        scale=call.scale,
        bias=call.bias,
        position_bias=call.position_bias,
        blocks=call.blocks,
        dropout=call.dropout,
        generator=call.generator,
        want_weights="weights" in call.want,
        want_lse="lse" in call.want,
        backend=call.backend,
    )
    extras = {} if weights is None else {"weights": weights.to(dtype)}
    extras |= {} if lse is None else {"lse": lse}
    return Result(output.to(dtype), state, extras=extras)


class Temperatures(Projection):
    """A layer's terms: adds ``q_token``, ``q_slope`` and so on to the heads, as its options ask.

    The last weights of every f start at 0, and so do the tokens' terms.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        self.config, self.kv_heads = config, spec.kv_heads
        sizes = {
            "q": (spec.heads, spec.head_dim, spec.dim),
            "k": (spec.kv_heads, spec.head_dim, spec.memory_dim),
            "v": (spec.kv_heads, spec.value_dim, spec.memory_dim),
        }
        self.weights = nn.ParameterDict()
        self.functions = nn.ModuleDict()
        for name, terms in config.terms.items():
            if terms not in ("token", "both"):
                continue
            heads, width, dim = sizes[name]
            if config.token_features == "heads":
                self.weights[name] = nn.Parameter(torch.zeros(1 if config.share_heads else heads, width))
            else:
                hidden = dim if config.hidden is None else config.hidden
                last = make_linear(hidden, heads, bias=False)
                nn.init.zeros_(last.weight)  # type: ignore[arg-type]
                self.functions[name] = nn.Sequential(make_linear(dim, hidden, bias=True), nn.GELU(), last)
        self.alpha: nn.Parameter | None = None
        if any(terms in ("position", "both") for terms in config.terms.values()):
            start = POSITION_FORMS[config.position_form] if config.position_start is None else config.position_start
            number = spec.heads if config.position_granularity == "head" else 1
            self.alpha = nn.Parameter(torch.full((number,), start))
        self.heads = spec.heads
        if "q" in self.weights or "k" in self.weights:
            self.reads_unrotated = ("queries and keys", 'token_features="tokens"')

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        x, source = call.x, call.memory
        found = dict(heads)
        tokens = {"q": x, "k": source, "v": source}
        for name, terms in self.config.terms.items():
            if terms in ("position", "both"):
                found[f"{name}_slope"] = self._slopes(self.heads if name == "q" else self.kv_heads)
            if terms in ("token", "both") and tokens[name] is not None:
                found[f"{name}_token"] = self._token_terms(name, heads, tokens[name])
        return found

    def _token_terms(self, name: str, heads: Tensors, tokens: Tensor | None) -> Float[Tensor, "b h n"]:
        if name in self.functions:
            f = self.functions[name](tokens).mT
            return wide(f).tanh()
        x, u = heads[name], self.weights[name]
        dtype = wide_dtype(x)
        return (F.gelu(x.to(dtype)) * u.to(dtype)[:, None]).sum(-1).tanh()

    def _slopes(self, heads: int) -> Float[Tensor, " h"]:
        """s of each head; a head of keys or values that several queries share has the mean alpha of theirs."""
        assert self.alpha is not None
        alpha = wide(self.alpha)
        alpha = alpha.expand(heads) if alpha.shape[0] == 1 else alpha.unflatten(0, (heads, -1)).mean(-1)
        if self.config.position_form == "sigmoid":
            return alpha.sigmoid()
        return (-alpha.exp()).exp() if self.config.position_form == "double_exp" else alpha


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
    projection=Temperatures,
)
