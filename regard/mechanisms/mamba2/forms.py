"""The fast forms of mamba2: parallel, chunked, step, and reading from a state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from regard.contract import (
    Call,
    Pattern,
    Result,
)
from regard.core.precision import wide_dtype
from regard.core.ragged import take_queries
from regard.engines import recurrent_forms
from regard.engines.recurrent_forms import MatrixState
from regard.mechanisms.mamba2.definition import check_skip, repeat

if TYPE_CHECKING:
    from jaxtyping import Float


def parallel(
    call: Call,
    q: Float[Tensor, "b g n k"],
    k: Float[Tensor, "b g m k"],
    v: Float[Tensor, "b h m v"],
    dt: Float[Tensor, "b h m"],
    a: Float[Tensor, " h"],
    skip: Float[Tensor, "h v"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """Causal: the chunked form. Noncausal: both directions. Cross: absorb the memory, then read it."""
    if call.pattern is Pattern.CAUSAL_SELF:
        return chunked(call, q, k, v, dt, a, skip).output
    if call.pattern.cross:
        return read(call.replace(state=absorb(call.replace(state=None), k, v, dt, a, skip)), q).output.to(v.dtype)
    y = recurrent_forms.bidirectional(_chunk(call), _queries(call, q), *_writes(k, v, dt, a))
    return _skip(call, y, v, skip)


def chunked(
    call: Call,
    q: Float[Tensor, "b g n k"],
    k: Float[Tensor, "b g m k"],
    v: Float[Tensor, "b h m v"],
    dt: Float[Tensor, "b h m"],
    a: Float[Tensor, " h"],
    skip: Float[Tensor, "h v"] | None = None,
) -> Result:
    """Causal-self with state in and out; no cumulative sums are subtracted, and masked entries are -inf before exp."""
    y, state = recurrent_forms.chunked(_chunk(call), _queries(call, q), *_writes(k, v, dt, a))
    return Result(_skip(call, y, v, skip), state)


def step(
    call: Call,
    q: Float[Tensor, "b g 1 k"],
    k: Float[Tensor, "b g 1 k"],
    v: Float[Tensor, "b h 1 v"],
    dt: Float[Tensor, "b h 1"],
    a: Float[Tensor, " h"],
    skip: Float[Tensor, "h v"] | None = None,
) -> Result:
    """One token of :func:`chunked` computed by the recurrence itself."""
    y, state = recurrent_forms.step(call, _queries(call, q), *_writes(k, v, dt, a))
    return Result(_skip(call, y, v, skip), state)


def absorb(
    call: Call,
    k: Float[Tensor, "b g m k"],
    v: Float[Tensor, "b h m v"],
    dt: Float[Tensor, "b h m"],
    a: Float[Tensor, " h"],
    skip: Float[Tensor, "h v"] | None = None,
) -> MatrixState:
    """Write memory to S, in order; more may follow."""
    check_skip(call, skip)
    return recurrent_forms.absorb(_chunk(call), *_writes(k, v, dt, a))


def read(call: Call, q: Float[Tensor, "b g n k"], a: Tensor | None = None, skip: Tensor | None = None) -> Result:
    """Read absorbed memory with queries; `a` is ignored, the state includes its effect."""
    check_skip(call, skip)
    y = recurrent_forms.read(call, repeat(_queries(call, q), call.state.memory))
    return Result(y.to(q.dtype), call.state)


def _queries(call: Call, q: Tensor) -> Tensor:
    return recurrent_forms.scaled(q, call.scale)


def _writes(k: Tensor, v: Tensor, dt: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values times dt, and log decays dt a. In padding dt is 0: no write and no decay."""
    dtype = wide_dtype(v)
    dt = dt.to(dtype)[..., None]
    return recurrent_forms.readable(k), dt * v, dt * a.to(dtype)[:, None, None]


def _skip(call: Call, y: Tensor, v: Tensor, skip: Tensor | None) -> Tensor:
    """y + D x, in the dtype of v; queries align with the last tokens of each row."""
    if skip is not None:
        direct = skip.to(y.dtype)[:, None] * v.to(y.dtype)
        n, m = y.shape[2], v.shape[2]
        aligned = n == m and call.lengths is call.memory_lengths
        y = y + (direct if aligned else take_queries(direct, n, call.lengths, call.memory_lengths))
    return y.to(v.dtype)


def _chunk(call: Call) -> Call:
    return call if call.chunk_size else call.replace(chunk_size=call.config.chunk_size)
