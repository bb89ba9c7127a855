"""The forms of mechanisms built on the gated recurrence: chunked, step, bidirectional, absorb and read.

A mechanism computes its queries, keys, values and gates from its inputs (including scale, feature maps and normalisers;
keys, decay and beta must be zero at padding) and calls these functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Call, Result, State, lengths_after, state_field
from regard.core.precision import wide, without_autocast
from regard.core.ragged import flip_rows, place_queries, take_queries
from regard.engines.gated_recurrence import gated_recurrence, gated_recurrence_step

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class MatrixState(State):
    """S of each head, in at least float32, and the number of tokens written into it."""

    memory: Float[Tensor, "b h k v"] = state_field()
    length: Int[Tensor, " b"] = state_field()


def readable(x: Tensor) -> Tensor:
    """`x` in a dtype that engines read without loss: bfloat16, which they convert themselves, or at least float32."""
    return x if x.dtype in (torch.float32, torch.bfloat16) else wide(x)


def scaled(q: Tensor, scale: float) -> Tensor:
    """`scale` q for an engine; in bfloat16 if the product is exact, as for powers of two."""
    if scale == 1:
        return readable(q)
    exact = math.frexp(scale)[0] == 0.5
    return scale * (readable(q) if exact else wide(q))


def chunked(
    call: Call,
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    log_decay: Float[Tensor, "b h m #k"] | None = None,
    beta: Float[Tensor, "b h m"] | None = None,
) -> tuple[Float[Tensor, "b h n v"], MatrixState]:
    """Causal-self with state in and out; queries are aligned bottom-right if their number differs from that of keys."""
    o, memory = gated_recurrence(
        beside_keys(call, q, k.shape[2]),
        k,
        v,
        log_decay,
        beta,
        state=memory_of(call),
        chunk_size=call.chunk_size or 64,
        backend=call.backend,
    )
    assert o is not None
    return of_queries(call, o, q.shape[2]), MatrixState(memory, length_after(call, k))


def beside_keys(call: Call, q: Float[Tensor, "b h n k"], m: int) -> Float[Tensor, "b h m k"]:
    """Queries aligned bottom-right with the `m` keys; zeros at keys that precede all queries."""
    if q.shape[2] == m and call.lengths is call.memory_lengths:
        return q
    return place_queries(q, m, call.lengths, call.memory_lengths)


def of_queries(call: Call, o: Float[Tensor, "b h m v"], n: int) -> Float[Tensor, "b h n v"]:
    """The outputs of the `n` queries, from outputs aligned with keys (:func:`beside_keys`)."""
    if o.shape[2] == n and call.lengths is call.memory_lengths:
        return o
    return take_queries(o, n, call.lengths, call.memory_lengths)


def step(
    call: Call,
    q: Float[Tensor, "b h 1 k"],
    k: Float[Tensor, "b h 1 k"],
    v: Float[Tensor, "b h 1 v"],
    log_decay: Float[Tensor, "b h 1 #k"] | None = None,
    beta: Float[Tensor, "b h 1"] | None = None,
) -> tuple[Float[Tensor, "b h 1 v"], MatrixState]:
    """One token of :func:`chunked`, by the recurrence itself."""
    decay = None if log_decay is None else log_decay.select(2, 0)
    rate = None if beta is None else beta.select(2, 0)
    token = q.select(2, 0), k.select(2, 0), v.select(2, 0)
    o, memory = gated_recurrence_step(*token, decay, rate, call.state.memory, backend=call.backend)
    return o.unsqueeze(2), MatrixState(memory, length_after(call, k))


def bidirectional(
    call: Call,
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b h n k"],
    v: Float[Tensor, "b h n v"],
    log_decay: Float[Tensor, "b h n #k"] | None = None,
    beta: Float[Tensor, "b h n"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """Noncausal-self: a forward pass that reads after writing plus a backward pass that reads before writing, so that a
    token counts itself once. In at least float32, since the results are added."""
    v = wide(v)
    size = call.chunk_size or 64
    forward, _ = gated_recurrence(q, k, v, log_decay, beta, chunk_size=size, backend=call.backend)
    flipped = [None if x is None else flip_rows(x, call.lengths, axis=2) for x in (q, k, v, log_decay, beta)]
    backward, _ = gated_recurrence(*flipped, chunk_size=size, inclusive=False, backend=call.backend)  # type: ignore[arg-type]
    assert forward is not None and backward is not None
    return forward + flip_rows(backward, call.lengths, axis=2)


def absorb(
    call: Call,
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    log_decay: Float[Tensor, "b h m #k"] | None = None,
    beta: Float[Tensor, "b h m"] | None = None,
) -> MatrixState:
    """Write memory into S, in order; more may follow."""
    _, memory = gated_recurrence(
        None, k, v, log_decay, beta, state=memory_of(call), chunk_size=call.chunk_size or 64, backend=call.backend
    )
    return MatrixState(memory, length_after(call, k))


def read(call: Call, q: Float[Tensor, "b h n k"]) -> Float[Tensor, "b h n v"]:
    """Read absorbed memory with queries, in the state's dtype."""
    with without_autocast(q.device):
        return q.to(call.state.memory.dtype) @ call.state.memory


def length_after(call: Call, k: Float[Tensor, "b h m k"]) -> Int[Tensor, " b"]:
    """Number of tokens in each row after the keys of this call."""
    before = None if call.state is None else call.state.length
    return lengths_after(before, call.memory_lengths, k.shape[0], k.shape[2], k.device)


def memory_of(call: Call) -> Tensor | None:
    """The S that a call continues from."""
    return None if call.state is None else call.state.memory


def by_columns(
    form: Callable[..., Result], call: Call, shared: tuple[Tensor | None, ...], columns: tuple[Tensor, ...]
) -> Result:
    """Run a form with every column of S as a head of its own, for gates or rates that differ between value features.

    This costs as much as V times as many heads.

    Args:
        form: called as ``form(call, *shared, *columns)`` with H * V heads and values one feature wide.
        shared: inputs that all columns share, (B, H, N, width) each or None.
        columns: (B, H, N, V) each; every column becomes a head with (B, H * V, N, 1).
    """
    width = columns[0].shape[-1]

    def split(x: Tensor) -> Tensor:
        return x.movedim(-1, 2).flatten(1, 2)[..., None]

    def join(x: Tensor) -> Tensor:
        return x[..., 0].unflatten(1, (-1, width)).movedim(2, -1)

    def repeat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.repeat_interleave(width, 1)

    if call.state is not None:
        call = call.replace(state=MatrixState(split(call.state.memory), call.state.length))
    result = form(call, *map(repeat, shared), *map(split, columns))
    state = None if result.state is None else MatrixState(join(result.state.memory), result.state.length)
    return Result(join(result.output), state)
