r"""RWKV-7: a delta rule that forgets, erases and writes under separate keys, each key feature at its own rate.

When to pick it: tracking a state over long sequences (permutations, regular languages), with linear time and a state of
fixed size.
When not: on a CPU, if one key for both erasing and writing is enough (`delta_rule` with a diagonal gate has native
kernels); exact recall of more items than a key has features (softmax).

Definition (the time mixing of Peng et al., arXiv 2503.14456):

    S_t = S_{t-1} (diag(w_t) - kappa_t^T (a_t * kappa_t)) + v_t^T k_t,     o_t = r_t S_t^T

with row vectors and kappa of unit length: the value stored under kappa is read *before* the memory decays, and is
subtracted along a * kappa. The transition diag(w) - kappa^T (a * kappa) is not symmetric: it can copy one feature of
the memory over another, which no single step of the delta rule can. The triangular system of a chunk has different keys
on its two sides (`regard.engines.generalized_delta`):

    (I + A(kappa, a * kappa)) U = A(kappa, k) V + ...

| paper | here |
|---|---|
| r_t, receptance | `q` (B, H, N, K), not scaled |
| k~_t, replacement key | `k` (B, H, M, K) |
| kappa_t, removal key | `removal_key` (B, H, M, K); the function divides it by its norm |
| a_t, in-context learning rate | `rate` (B, H, M, K), 0 to 1, or to 2 for negative eigenvalues |
| log w_t | `log_decay` (B, H, M, K) or (B, H, M, 1), natural logarithms <= 0; no decay when not given |
| wkv_t (V x K) | `MatrixState.memory`, (B, H, K, V) |
| bonus, g_t and LayerNorm of the heads | the layer's `Output` |

Layout: (B, H, N, D), heads before time. Noncausal-self is a forward pass that reads after writing plus a backward pass
that reads before writing (the decayed state). In cross patterns the memory is absorbed in order and every query reads
the final state: the order of the memory matters.

The layer: log w = -exp(-1/2) sigmoid(low-rank(x)), a = sigmoid(low-rank(x)), kappa = xi * k, k~ = k (1 + (a - 1)
alpha), and in self patterns the output of a head is (LayerNorm(o) + (r . (rho * k~)) v) * g with a low-rank gate g.

Each of r, k, v, w and a is projected from its own mixture of x_t and x_{t-1} (token shift).

Deviations: the output gate reads x_t without a token shift. Values are not mixed with those of the first layer, since a
layer sees only its own input. In patterns other than causal-self, which the paper does not have, tokens are shifted in
the same direction, and cross patterns have no bonus.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Cost,
    Kind,
    LayerCall,
    LayerSpec,
    Mechanism,
    Merge,
    Paper,
    Projection,
    Result,
    Shape,
    State,
    Tensors,
    Unsupported,
    Waiver,
    at_least,
    lengths_after,
    state_field,
)
from regard.core.precision import wide
from regard.core.ragged import flip_rows
from regard.engines import recurrent_forms
from regard.engines.generalized_delta import generalized_delta, generalized_delta_step
from regard.engines.layers import short_convolution
from regard.engines.recurrent_forms import MatrixState
from regard.layers.attention import AttentionLayer
from regard.layers.linear import make_linear

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        eps: added under the square root in the norm of removal keys, > 0.
        gate_rank: rank of the two projections of each of the layer's decay, rate and output gate, >= 1.
    """

    eps: float = 1e-12
    gate_rank: int = 32

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise Unsupported(f"eps={self.eps}", supported="eps > 0", nearest="eps=1e-12")
        at_least("gate_rank", self.gate_rank, 1)


def reference(
    call: Call,
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    removal_key: Float[Tensor, "b h m k"],
    rate: Float[Tensor, "b h m k"],
    log_decay: Float[Tensor, "b h m #k"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The recurrence, token by token: read, decay, erase, write."""
    q = call.scale * q
    kappa = removal_key / (removal_key.square().sum(-1, keepdim=True) + call.config.eps).sqrt()
    decay = torch.ones_like(k) if log_decay is None else log_decay.exp().expand_as(k)
    n, m = q.shape[2], k.shape[2]
    empty = torch.zeros_like(k[..., None] * v[..., None, :]).sum(2)  # (b, h, k, v)

    def write(order: range) -> list[tuple[Tensor, Tensor]]:
        """For each token, the decayed S before its write and S after it."""
        state, states = empty, []
        for t in order:
            stored = kappa[:, :, t, None] @ state  # (b, h, 1, v)
            before = decay[:, :, t, :, None] * state
            state = before - (rate * kappa)[:, :, t, :, None] * stored + k[:, :, t, :, None] * v[:, :, t, None]
            states.append((before, state))
        return states

    forward = write(range(m))
    if call.pattern.cross:
        return q @ (forward[-1][1] if forward else empty)
    if call.pattern.causal:
        seen = [forward[i + m - n][1] if i + m >= n else empty for i in range(n)]
    else:
        backward = write(range(m - 1, -1, -1))[::-1]
        seen = [after + before for (_, after), (before, _) in zip(forward, backward, strict=True)]
    return torch.stack([q[:, :, i, None] @ seen[i] for i in range(n)], 2)[:, :, :, 0] if n else q @ empty


def parallel(
    call: Call,
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    removal_key: Float[Tensor, "b h m k"],
    rate: Float[Tensor, "b h m k"],
    log_decay: Float[Tensor, "b h m #k"] | None = None,
) -> Result:
    """Whole sequences, from an empty state."""
    call = call if call.state is None else call.replace(state=None)
    if call.pattern.cross:
        return read(call.replace(state=absorb(call, k, v, removal_key, rate, log_decay)), q)
    if call.pattern.causal:
        return chunked(call, q, k, v, removal_key, rate, log_decay)
    inputs = _queries(call, q), *_writes(call, k, v, removal_key, rate, log_decay)
    forward, _ = _run(call, *inputs)
    flipped = [None if x is None else flip_rows(x, call.lengths, axis=2) for x in inputs]
    backward, _ = _run(call, *flipped, inclusive=False)  # type: ignore[arg-type]
    assert forward is not None and backward is not None
    return Result((forward + flip_rows(backward, call.lengths, axis=2)).to(v.dtype))


def chunked(
    call: Call,
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    removal_key: Float[Tensor, "b h m k"],
    rate: Float[Tensor, "b h m k"],
    log_decay: Float[Tensor, "b h m #k"] | None = None,
) -> Result:
    """Causal-self with state in and out, in chunks of 64 unless the call says otherwise."""
    writes = _writes(call, k, v, removal_key, rate, log_decay)
    output, memory = _run(call, recurrent_forms.beside_keys(call, _queries(call, q), k.shape[2]), *writes)
    assert output is not None
    output = recurrent_forms.of_queries(call, output, q.shape[2])
    return Result(output.to(v.dtype), MatrixState(memory, recurrent_forms.length_after(call, k)))


def step(
    call: Call,
    q: Float[Tensor, "b h 1 k"],
    k: Float[Tensor, "b h 1 k"],
    v: Float[Tensor, "b h 1 v"],
    removal_key: Float[Tensor, "b h 1 k"],
    rate: Float[Tensor, "b h 1 k"],
    log_decay: Float[Tensor, "b h 1 #k"] | None = None,
) -> Result:
    """One token of :func:`chunked` computed by the recurrence itself."""
    inputs = _queries(call, q), *_writes(call, k, v, removal_key, rate, log_decay)
    token = [None if x is None else x[:, :, 0] for x in inputs]
    output, memory = generalized_delta_step(*token, call.state.memory, backend=call.backend)  # type: ignore[arg-type, misc]
    return Result(output[:, :, None].to(v.dtype), MatrixState(memory, recurrent_forms.length_after(call, k)))


def absorb(
    call: Call,
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    removal_key: Float[Tensor, "b h m k"],
    rate: Float[Tensor, "b h m k"],
    log_decay: Float[Tensor, "b h m #k"] | None = None,
) -> MatrixState:
    """Write memory to S, in order; more may follow."""
    _, memory = _run(call, None, *_writes(call, k, v, removal_key, rate, log_decay))
    return MatrixState(memory, recurrent_forms.length_after(call, k))


def read(call: Call, q: Float[Tensor, "b h n k"]) -> Result:
    """Read absorbed memory with queries."""
    return Result(recurrent_forms.read(call, _queries(call, q)).to(q.dtype), call.state)


def _queries(call: Call, q: Tensor) -> Tensor:
    return call.scale * wide(q)


def _writes(
    call: Call, k: Tensor, v: Tensor, removal_key: Tensor, rate: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Keys, values, removal keys, erase directions and log decays, in at least float32. Padding holds zeros and has no
    effect."""
    if log_decay is not None and log_decay.shape[-1] not in (1, k.shape[-1]):
        raise Unsupported(
            f"log_decay with {log_decay.shape[-1]} features for keys with {k.shape[-1]}",
            supported=f"(B, H, M, 1), or (B, H, M, {k.shape[-1]}) for a decay of each key feature",
        )
    kappa = wide(removal_key)
    kappa = kappa * torch.rsqrt(kappa.square().sum(-1, keepdim=True) + call.config.eps)
    return wide(k), wide(v), kappa, wide(rate) * kappa, None if log_decay is None else wide(log_decay)


def _run(
    call: Call,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    probe: Tensor,
    erase: Tensor,
    log_decay: Tensor | None,
    *,
    inclusive: bool = True,
) -> tuple[Tensor | None, Tensor]:
    return generalized_delta(
        q,
        k,
        v,
        probe,
        erase,
        log_decay,
        state=recurrent_forms.memory_of(call),
        chunk_size=call.chunk_size or 64,
        inclusive=inclusive,
        backend=call.backend,
    )


class TokenShift(nn.Module):
    """Mixes each token with the one before it: x_t + mix (x_{t-1} - x_t), with a learned share for each channel.

    Args:
        dim: number of channels C.
        power: the shares start at 1 - (c / C)^power for channel c.
    """

    def __init__(self, dim: int, power: float) -> None:
        super().__init__()
        self.mix = nn.Parameter(1 - (torch.arange(dim) / dim) ** power)

    def forward(
        self, x: Float[Tensor, "b n c"], lengths: Int[Tensor, " b"] | None, cache: Float[Tensor, "b 1 c"] | None
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b 1 c"] | None]:
        """The mixed tokens, zero beyond a row's length, and the last valid token of each row."""
        taps = torch.stack([self.mix, 1 - self.mix], -1)
        return short_convolution(x, taps, cache=cache, lengths=lengths, silu=False)


@dataclass(frozen=True)
class ShiftState(State):
    """The last token of each row and the number of tokens so far."""

    last: Float[Tensor, "b 1 c"] = state_field()
    length: Int[Tensor, " b"] = state_field()


class Rates(Projection):
    """The layer's removal keys, rates, decays and replacement keys, computed from the sequence that is written.

    There is one set per key/value head, shared by the query heads of its group. Biases and factors start as in the
    first layer of the official code.
    """

    mixes_tokens = True

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.heads, width = spec.kv_heads, spec.kv_heads * spec.head_dim
        self.decay_shift, self.rate_shift = (TokenShift(spec.memory_dim, 0.9) for _ in range(2))
        self.decay = _low_rank(spec, spec.memory_dim, width, nn.Tanh())
        self.rate = _low_rank(spec, spec.memory_dim, width, nn.Identity())
        rising = torch.linspace(0, 1, width)
        place = torch.linspace(-1, 1, spec.head_dim).repeat(spec.kv_heads)
        place = place * place.abs()
        self.decay_bias = nn.Parameter(6 * rising - 5.5 + 2.5 * place)
        self.rate_bias = nn.Parameter(0.4 * rising - 0.39 + 0.3 * place)
        self.removal = nn.Parameter(0.76 - 0.1 * rising)
        self.replacement = nn.Parameter(torch.full((width,), 1.02))

    def forward(self, heads: Tensors, call: LayerCall) -> tuple[Tensors, ShiftState | None]:
        """The heads with removal keys, rates and decays added and keys replaced, and the new shift state."""
        source, memory_lengths, state = call.memory, call.memory_lengths, call.state
        if source is None:
            return heads, state
        cache = None if state is None else state.last
        for_decay, last = self.decay_shift(source, memory_lengths, cache)
        for_rate, _ = self.rate_shift(source, memory_lengths, cache)
        decay = torch.sigmoid(self._split(self.decay(for_decay)) + self._each(self.decay_bias))
        rate = torch.sigmoid(self._split(self.rate(for_rate)) + self._each(self.rate_bias))
        k = wide(heads["k"])
        heads |= {"removal_key": k * self._each(self.removal), "rate": rate, "log_decay": -math.exp(-0.5) * decay}
        heads["k"] = (k * (1 + (rate - 1) * self._each(self.replacement))).to(heads["k"].dtype)
        before = None if state is None else state.length
        length = lengths_after(before, memory_lengths, source.shape[0], source.shape[1], source.device)
        return heads, ShiftState(last, length)

    def _split(self, x: Float[Tensor, "b m c"]) -> Float[Tensor, "b h m k"]:
        return wide(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _each(self, parameter: Float[Tensor, " c"]) -> Float[Tensor, "h 1 k"]:
        return wide(parameter).view(self.heads, 1, -1)


class Output(Merge):
    """Output norm with weights per head, the current token's bonus (self patterns only), and the output gate."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.eps = 64e-5
        self.weight = nn.Parameter(torch.ones(spec.heads, 1, spec.value_dim))
        self.bias = nn.Parameter(torch.zeros(spec.heads, 1, spec.value_dim))
        shape = (spec.heads, 1, spec.head_dim)
        self.bonus = None if spec.pattern.cross else nn.Parameter(torch.full(shape, -0.04))
        self.gate = _low_rank(spec, spec.dim, spec.heads * spec.value_dim, nn.Sigmoid())

    def forward(
        self, y: Float[Tensor, "b h n v"], heads: Tensors, call: LayerCall, result: Result
    ) -> Float[Tensor, "b h n v"]:
        x = call.x
        o = F.layer_norm(wide(y), y.shape[-1:], eps=self.eps) * wide(self.weight) + wide(self.bias)
        if self.bonus is not None:
            k, v = (wide(heads[name]) for name in ("k", "v"))
            k, v = (t.repeat_interleave(y.shape[1] // t.shape[1], 1) for t in (k, v))
            o = o + (wide(heads["q"]) * wide(self.bonus) * k).sum(-1, keepdim=True) * v
        return o.to(y.dtype) * self.gate(x).unflatten(-1, (y.shape[1], -1)).transpose(1, 2)


class TimeMixing(AttentionLayer):
    """The attention shell with a token shift before each of the projections of r, k and v."""

    takes_convolutions: ClassVar[bool] = False

    @functools.wraps(AttentionLayer.__init__)  # type: ignore[misc]
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        sources = ((self.dim, 0.2), (self.spec.memory_dim, 0.7), (self.spec.memory_dim, 0.7))
        self.convolutions = nn.ModuleList(TokenShift(width, power) for width, power in sources)

    def _heads(
        self,
        module: nn.Module,
        x: Tensor,
        index: int,
        heads: int,
        lengths: Tensor | None,
        caches: list[Tensor | None],
    ) -> Float[Tensor, "b h n d"]:
        x, caches[index] = self.convolutions[index](x, lengths, caches[index])
        y = module(x)
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)


def _low_rank(spec: LayerSpec, source: int, width: int, activation: nn.Module) -> nn.Sequential:
    rank = spec.config.gate_rank
    return nn.Sequential(spec.linear(source, rank), activation, make_linear(rank, width))


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern in chunks of 64, with the triangular systems of the removals."""
    key, value = shape.dim_key, shape.dim_value
    tokens = shape.batch * shape.heads * shape.m
    return Cost(
        flops=2.0 * tokens * (5 * key * value + 64 * (4 * key + 4 * value)),
        memory=float(tokens * (6 * 64 + 5 * key + 3 * value)),
        state=float(shape.heads * key * value),
        step_flops=9.0 * shape.batch * shape.heads * key * value,
    )


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    sizes: dict[str, int] | None = None,
    **_: Any,
) -> Tensors:
    """Inputs for tests, with decays from nearly 1 to nearly 0."""
    size = {"h": 2, "k": 8, "v": 6} | (sizes or {})

    def normal(tokens: int, features: int) -> Tensor:
        return torch.randn(batch, size["h"], tokens, features, generator=generator, dtype=torch.float64)

    tensors = {"q": normal(n, size["k"]), "k": normal(m, size["k"]), "v": normal(m, size["v"])}
    tensors |= {"removal_key": normal(m, size["k"]), "rate": torch.sigmoid(normal(m, size["k"]))}
    tensors["log_decay"] = -F.softplus(2 * normal(m, size.get("l", size["k"])))
    return {name: x.to(dtype) for name, x in tensors.items()}


MECHANISM = Mechanism(
    name="rwkv7",
    aliases=("rwkv", "rwkv_7", "goose"),
    kind=Kind.ATTENTION,
    summary="A delta rule that forgets, erases and writes under keys of their own, each feature at its own rate.",
    paper=Paper('RWKV-7 "Goose" with Expressive Dynamic State Evolution', "2503.14456", 2025),
    inputs={
        "q": "bhnk",
        "k": "bhmk",
        "v": "bhmv",
        "removal_key": "bhmk",
        "rate": "bhmk",
        "log_decay?": "bhml",
    },
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
        "narrow gates": {"eps": 1e-3, "gate_rank": 3},
    },
    engine="generalized_delta",
    state=MatrixState,
    combines="matrix",
    cost=cost,
    default_scale=1.0,
    weights="implicit",
    domains={"rate": "unit", "log_decay": "log_decay"},
    sample_inputs=sample_inputs,
    projection=Rates,
    merge=Output,
    module=TimeMixing,
    waivers=(Waiver("layer_lengths", "its number of chunks is fixed when the program is compiled"),),
)
