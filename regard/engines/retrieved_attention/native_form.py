"""Attention to retrieved blocks in C++ (`native/src/retrieved_attention.cpp`), without gradients: a block's keys are
loaded once for all queries that read it, and no temporary is as large as the cache."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.operators import Packed, operator, runs_plainly
from regard.contract import Unsupported
from regard.engines.heads import HEADS, Strides, by_row, heads_arguments
from regard.engines.retrieved_attention.problem import Problem, tolerance

NUMBERS_AT_ONCE = 1 << 24
"""Number of elements for pairs of a query and a block above which queries are processed in parts: 64 MiB."""

MOST_TOKENS = 1 << 15
"""The longest block, and the largest number of blocks that a query reads."""


class RetrievedAttention(library.Arguments):
    kernel = "retrieved_attention"
    _fields_ = (
        *HEADS,
        ("marks", ctypes.c_void_p),
        ("marks_strides", Strides),
        ("closed", ctypes.c_void_p),
        ("cached", ctypes.c_void_p),
        ("length", ctypes.c_void_p),
        ("landmark", ctypes.c_void_p),
        ("chosen", ctypes.c_void_p),
        ("closed_stride", ctypes.c_int64),
        ("landmark_stride", ctypes.c_int64),
        ("chosen_strides", Strides),
        ("block", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("picks", ctypes.c_int64),
        ("turns", ctypes.c_void_p),
        ("positions", ctypes.c_int64),
        ("rotated", ctypes.c_int64),
        ("own", ctypes.c_int64),
        ("found", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("tolerance", ctypes.c_float),
    )


@dataclass(frozen=True)
class PackedProblem(Packed):
    """A :class:`regard.engines.retrieved_attention.problem.Problem` with its queries in float32 and the cache, as the
    operator takes it. `turns` are the cosines and sines of all positions that blocks may take."""

    q: Tensor
    k: Tensor
    v: Tensor
    marks: Tensor
    closed: Tensor
    landmark: Tensor
    cached: Tensor
    length: Tensor
    chosen: Tensor | None
    turns: Tensor | None
    block: int
    top_k: int
    scale: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, p: Problem) -> PackedProblem:
        """Convert a problem to the operator's form, with the angles of all positions that retrieved tokens may take."""
        turns = None if p.rotate is None else _turns_of(p.rotate)(_positions(p.top_k, p.block))
        state = (p.marks, p.closed, p.landmark, p.cached, p.length)
        return cls(q.float(), k, v, *state, p.chosen, turns, p.block, p.top_k, float(p.scale))

    @property
    def picks(self) -> int:
        """The largest number of blocks that a query reads."""
        return min(self.top_k, self.closed.shape[1]) if self.chosen is None else self.chosen.shape[3]


def _turns_of(rotate: Any) -> Any:
    """The method `turns`, a table of rotations, of the position scheme with the method `rotate`; None without one."""
    return getattr(getattr(rotate, "__self__", None), "turns", None)


def _positions(top_k: int, block: int) -> int:
    """The number of positions that keys and the query of a step may take."""
    return (top_k + 2) * (block + 1)


def refuses(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> str | None:
    """The reason why the kernel cannot run a call; None if it can."""
    return _lacks(q, k, v, problem) or _misfit(PackedProblem.of(q, k, v, problem))


def _lacks(q: Tensor, k: Tensor, v: Tensor, p: Problem) -> str | None:
    """The feature of a call that the kernel does not support; None if it supports all."""
    if p.dropout.random:
        return "it has no dropout"
    if p.softmax != "grouped":
        return "it has the softmax in two levels alone"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "it has no gradient"
    if torch.compiler.is_compiling():
        return "graphs may only contain PyTorch operators"
    if p.rotate is not None and _turns_of(p.rotate) is None:
        return "it rotates as the scheme `rotary` does, and no other way"
    tensors = (k, v, p.marks, p.closed, p.landmark, p.cached, p.length, p.chosen)
    if any(x is not None and x.device.type != "cpu" for x in tensors):
        return "tensors on several devices"
    if max(p.block, p.top_k) > MOST_TOKENS:
        return f"blocks of more than {MOST_TOKENS} tokens, or so many of them"
    return None


def _misfit(p: PackedProblem) -> str | None:
    """The mismatch among the tensors, in words; None if they fit together."""
    q, k, v, marks, chosen, turns = p.q, p.k, p.v, p.marks, p.chosen, p.turns
    if not q.ndim == k.ndim == v.ndim == marks.ndim == 4 or p.closed.ndim != 2:
        return "q, k, v and marks that do not have four axes, or ranks that do not have two"
    batch, heads, n, width = q.shape
    kv_heads, m, value_width = v.shape[1:]
    blocks = p.closed.shape[1]
    same = k.shape == (batch, kv_heads, m, width) and v.shape[0] == batch
    same = same and marks.shape == (batch, kv_heads, blocks, width) and p.landmark.shape == (batch, m)
    same = same and p.closed.shape[0] == batch and p.cached.shape == p.length.shape == (batch,)
    if not same or min(kv_heads, width, value_width) < 1 or heads % kv_heads:
        return "tensors of shapes that do not belong together"
    if max(n, m, blocks, width, value_width) > library.MOST:
        return f"more than {library.MOST} tokens or features"
    if q.dtype != torch.float32 or k.dtype not in library.DTYPES or not k.dtype == v.dtype == marks.dtype:
        return "queries in another dtype than float32, or keys, values and marks in several"
    if p.landmark.dtype != torch.bool or not p.closed.dtype == p.cached.dtype == p.length.dtype == torch.int64:
        return "ranks in another dtype than int64, or landmarks in another than bool"
    if chosen is not None and (
        chosen.dtype != torch.int64
        or chosen.ndim != 4
        or chosen.shape[0] != batch
        or chosen.shape[1] != heads
        or chosen.shape[2] not in (1, n)
        or chosen.shape[3] != min(p.top_k, blocks)
    ):
        return "a choice of blocks that does not belong to the queries"
    if turns is not None and (
        turns.dtype != torch.float32
        or turns.ndim != 2
        or turns.shape[0] != _positions(p.top_k, p.block)
        or not 2 <= turns.shape[1] <= width
        or turns.shape[1] % 2
    ):
        return "a table of turns that does not belong to the blocks"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """See :func:`regard.engines.retrieved_attention.retrieved_attention`."""
    packed = PackedProblem.of(q, k, v, problem)
    n, numbers = q.shape[2], q.shape[0] * q.shape[1] * packed.picks * (v.shape[3] + 16)
    step = max(1, NUMBERS_AT_ONCE // max(numbers, 1))
    if n <= step:
        return _retrieved_attention(packed)
    parts = []
    for start in range(0, n, step):
        rows, chosen = slice(start, start + step), packed.chosen
        if chosen is not None and chosen.shape[2] > 1:
            chosen = chosen[:, :, rows]
        parts.append(_retrieved_attention(replace(packed, q=packed.q[:, :, rows], chosen=chosen)))
    outputs, lses = zip(*parts, strict=True)
    return torch.cat(outputs, 2), torch.cat(lses, 2)


def _arguments(p: PackedProblem, out: Tensor, lse: Tensor) -> tuple[RetrievedAttention, list[Tensor | None]]:
    """The struct, and the tensors that it points to."""
    q, k, v, marks, closed, landmark = map(library.rows_contiguous, (p.q, p.k, p.v, p.marks, p.closed, p.landmark))
    cached, length = p.cached.contiguous(), p.length.contiguous()
    chosen = None if p.chosen is None else library.rows_contiguous(p.chosen)
    turns = None if p.turns is None else p.turns.contiguous()
    arguments = RetrievedAttention(
        **heads_arguments(q, k, v, out, lse) | {"dtype": library.DTYPES[k.dtype]},
        **library.strided(marks=marks),
        closed=library.pointer(closed),
        cached=library.pointer(cached),
        length=library.pointer(length),
        landmark=library.pointer(landmark),
        closed_stride=by_row(closed),
        landmark_stride=by_row(landmark),
        block=p.block,
        top_k=p.top_k,
        blocks=closed.shape[1],
        picks=p.picks,
        scale=p.scale,
        tolerance=tolerance(k.dtype),
    )
    if chosen is not None:
        arguments.chosen = library.pointer(chosen)
        by_query = 0 if chosen.shape[2] == 1 else chosen.stride(2)
        arguments.chosen_strides = Strides(chosen.stride(0), chosen.stride(1), by_query)
    if turns is not None:
        arguments.turns, arguments.positions, arguments.rotated = library.pointer(turns), *turns.shape
    return arguments, [q, k, v, marks, closed, landmark, cached, length, chosen, turns, out, lse]


def _empty_outputs(p: PackedProblem) -> tuple[Tensor, Tensor]:
    """Output (B, H, n, V) and log-sum-exp (B, H, n)."""
    return p.q.new_empty(*p.q.shape[:3], p.v.shape[3]), p.q.new_empty(p.q.shape[:3])


@operator("retrieved_attention")
def _retrieved_attention(problem: PackedProblem) -> tuple[Tensor, Tensor]:
    p = problem
    reason = None
    if not (library.within_range(p.block, p.top_k, least=1) and max(p.block, p.top_k) <= MOST_TOKENS):
        reason = f"{p.top_k} blocks of {p.block} tokens"
    reason = reason or _misfit(p)
    if reason is None and not library.within_range(p.closed, p.cached, p.length, p.chosen):
        reason = f"ranks beyond {library.MOST}"
    if reason is not None:
        raise Unsupported(f"native attention to retrieved blocks with {reason}", nearest="backend='torch'")
    out, lse = _empty_outputs(p)
    if p.k.shape[2] == 0 or p.picks == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    arguments, kept = _arguments(p, out, lse)
    library.call(arguments)
    del kept
    return out, lse


@_retrieved_attention.register_fake
def _(problem: PackedProblem) -> tuple[Tensor, Tensor]:
    return _empty_outputs(problem)


_retrieved_attention.refuse_gradient("the gradient of native attention to retrieved blocks")


class Step(NamedTuple):
    """The output of a step, and what the kernel found in the cache.

    Attributes:
        output: (B, H, 1, V) in float32.
        open: for each row, the number of tokens between the last landmark and the query's own token.
        closes: for each row, whether the query's own token is a landmark.
    """

    output: Tensor
    open: list[int]
    closes: list[int]


def step(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Step | None:
    """See :func:`regard.engines.retrieved_attention.retrieving_step`."""
    p = problem
    if q.shape[2] != 1 or k.shape[2] == 0 or p.chosen is not None or v.dtype not in library.DTYPES:
        return None
    if not runs_plainly(q, k, v, p.marks) or _lacks(q, k, v, p) is not None:
        return None
    packed = PackedProblem.of(q, k, v, p)
    if _misfit(packed) is not None:
        return None
    out, lse = _empty_outputs(packed)
    batch = out.shape[0]
    found = (ctypes.c_int64 * (2 * batch))()
    arguments, kept = _arguments(packed, out, lse)
    arguments.own, arguments.found = 1, ctypes.addressof(found)
    library.call(arguments)
    del kept
    return Step(out, found[::2], found[1::2])
