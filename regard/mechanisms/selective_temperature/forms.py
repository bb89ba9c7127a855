"""The fast forms of selective_temperature: parallel, chunked, and reading from a state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import (
    Call,
    Pattern,
    Result,
    Unsupported,
    state_field,
)
from regard.core.precision import wide_dtype
from regard.engines.attention import Ranks, ranks
from regard.engines.attention_forms import attend, by_pattern
from regard.engines.cache import KeyValueState, append, extend

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class SelectiveState(KeyValueState):
    """Keys and values so far: scaled by temperatures in causal-self, else unscaled and with their tokens' terms."""

    k_token: Float[Tensor, "b g past"] | None = state_field()
    v_token: Float[Tensor, "b g past"] | None = state_field()


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
    """Multiply queries, keys and values by their temperatures, then apply softmax attention."""
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
    """Continue a cached sequence by any number of tokens; also used as the step. Positions count earlier tokens."""
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
    """Append memory to the cache; more may follow. Temperatures are applied once the number of keys is known."""
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
    """Attend from queries to absorbed memory."""
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
    """x times 1 + token + slope log(keys), in at least float32 unless `round_scaled`."""
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


def _key_places(call: Call, k: Tensor, totals: Int[Tensor, " b"] | None) -> Int[Tensor, "#b #m"]:
    """n for new keys: their positions, counted from 1, in causal-self; otherwise the `totals` of their rows."""
    if call.pattern is not Pattern.CAUSAL_SELF:
        assert totals is not None
        return totals[:, None]
    places = torch.arange(1, k.shape[2] + 1, device=k.device)[None]
    return places if call.state is None else places + call.state.length[:, None]


def _append(name: str, past: Tensor | None, new: Tensor | None) -> Tensor | None:
    if past is None and new is None:
        return None
    if past is None or new is None:
        raise Unsupported(f"memory with {name} for only a part", supported=f"{name} for all of it or none")
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
    if q_slope is None:
        in_sight = totals[:, None]
    else:
        in_sight = by_pattern(call).count(where.queries, totals[:, None])
    dtype, q = q.dtype, _scaled(call, q, in_sight, q_token, q_slope)
    widest = torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))
    result = attend(call, q.to(widest), k, v, where, state)
    result.output = result.output.to(dtype)
    if "weights" in result.extras:
        result.extras["weights"] = result.extras["weights"].to(dtype)
    return result
