"""The fast forms of mamba: parallel, chunked, step, and reading from a state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import (
    Call,
    Pattern,
    Result,
)
from regard.core.precision import wide
from regard.core.ragged import flip_rows, place_queries, take_queries
from regard.engines.selective_scan import SelectiveState, selective_read, selective_scan
from regard.mechanisms.mamba.definition import _gate, check_skip

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def parallel(
    call: Call,
    x: Float[Tensor, "b m e"],
    dt: Float[Tensor, "b m e"],
    a: Float[Tensor, "e k"],
    b: Float[Tensor, "b m g k"],
    c: Float[Tensor, "b n g k"],
    skip: Float[Tensor, " e"] | None = None,
    dt_bias: Float[Tensor, " e"] | None = None,
    z: Float[Tensor, "b n e"] | None = None,
) -> Float[Tensor, "b n e"]:
    """Causal: the chunked form. Noncausal: both directions. Cross: absorb the memory, then read it."""
    if call.pattern is Pattern.CAUSAL_SELF:
        return chunked(call, x, dt, a, b, c, skip, dt_bias, z).output
    if call.pattern.cross:
        state = absorb(call.replace(state=None), x, dt, a, b, skip, dt_bias)
        return read(call.replace(state=state), c, z=z).output.to(x.dtype)
    tokens = wide(x)  # avoids rounding each direction separately
    c = call.scale * c
    forward, _ = _scan(call, tokens, dt, b, c, a, dt_bias, skip=skip)
    tokens, dt, b, c = (flip_rows(t, call.lengths, axis=1) for t in (tokens, dt, b, c))
    backward, _ = _scan(call, tokens, dt, b, c, a, dt_bias, inclusive=False)
    assert forward is not None and backward is not None  # there is a c
    return _gate(forward + flip_rows(backward, call.lengths, axis=1), z).to(x.dtype)


def chunked(
    call: Call,
    x: Float[Tensor, "b m e"],
    dt: Float[Tensor, "b m e"],
    a: Float[Tensor, "e k"],
    b: Float[Tensor, "b m g k"],
    c: Float[Tensor, "b n g k"],
    skip: Float[Tensor, " e"] | None = None,
    dt_bias: Float[Tensor, " e"] | None = None,
    z: Float[Tensor, "b n e"] | None = None,
) -> Result:
    """Causal-self with state in and out; queries align bottom-right if their number differs from that of the keys."""
    n, m = c.shape[1], x.shape[1]
    c = call.scale * c
    aligned = n == m and call.lengths is call.memory_lengths
    if not aligned:
        c = place_queries(c, m, call.lengths, call.memory_lengths, axis=1)
        z = None if z is None else place_queries(z, m, call.lengths, call.memory_lengths, axis=1)
    y, memory = _scan(call, x, dt, b, c, a, dt_bias, skip=skip, z=z)
    assert y is not None  # there is a c
    if not aligned:
        y = take_queries(y, n, call.lengths, call.memory_lengths, axis=1)
    return Result(y, SelectiveState(memory, _length_after(call, x)))


def step(
    call: Call,
    x: Float[Tensor, "b 1 e"],
    dt: Float[Tensor, "b 1 e"],
    a: Float[Tensor, "e k"],
    b: Float[Tensor, "b 1 g k"],
    c: Float[Tensor, "b 1 g k"],
    skip: Float[Tensor, " e"] | None = None,
    dt_bias: Float[Tensor, " e"] | None = None,
    z: Float[Tensor, "b 1 e"] | None = None,
) -> Result:
    """One token, as a chunk: the engine needs no preparation for it."""
    return chunked(call, x, dt, a, b, c, skip, dt_bias, z)


def absorb(
    call: Call,
    x: Float[Tensor, "b m e"],
    dt: Float[Tensor, "b m e"],
    a: Float[Tensor, "e k"],
    b: Float[Tensor, "b m g k"],
    skip: Float[Tensor, " e"] | None = None,
    dt_bias: Float[Tensor, " e"] | None = None,
) -> SelectiveState:
    """Write memory to h, in order; more may follow."""
    check_skip(call, skip)
    _, memory = _scan(call, x, dt, b, None, a, dt_bias)
    return SelectiveState(memory, _length_after(call, x))


def read(
    call: Call,
    c: Float[Tensor, "b n g k"],
    a: Float[Tensor, "e k"] | None = None,
    skip: Float[Tensor, " e"] | None = None,
    dt_bias: Float[Tensor, " e"] | None = None,
    z: Float[Tensor, "b n e"] | None = None,
) -> Result:
    """Read absorbed memory with queries; `a` and `dt_bias` are ignored, the state includes their effect."""
    check_skip(call, skip)
    y = _gate(selective_read(call.state.memory, call.scale * c), z)
    return Result(y.to(c.dtype), call.state)


def _scan(
    call: Call,
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor | None,
    a: Tensor,
    dt_bias: Tensor | None,
    *,
    skip: Tensor | None = None,
    z: Tensor | None = None,
    inclusive: bool = True,
) -> tuple[Tensor | None, Tensor]:
    return selective_scan(
        x,
        dt,
        a,
        b,
        c,
        skip=skip,
        dt_bias=dt_bias,
        z=z,
        state=None if call.state is None else call.state.memory,
        lengths=call.memory_lengths,
        chunk_size=call.chunk_size or call.config.chunk_size,
        inclusive=inclusive,
        backend=call.backend,
    )


def _length_after(call: Call, x: Float[Tensor, "b m e"]) -> Int[Tensor, " b"]:
    """The number of tokens in each row after this call."""
    new = call.memory_lengths
    if new is None:
        new = torch.full(x.shape[:1], x.shape[1], device=x.device)
    return new if call.state is None else call.state.length + new
