"""Softmax in two levels in C++ (`native/src/grouped_attention.cpp`), with the scores of a few groups at a time."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.operators import operator
from regard.contract import Unsupported
from regard.engines.grouped_attention.problem import Problem
from regard.engines.heads import (
    HEAD_GRADIENTS,
    HEADS,
    PackedHeads,
    by_row,
    empty_output,
    heads_arguments,
)


class GroupedAttention(library.Arguments):
    kernel = "grouped_attention"
    _fields_ = (
        *HEADS,
        ("query_ranks", ctypes.c_void_p),
        ("key_ranks", ctypes.c_void_p),
        ("own", ctypes.c_void_p),
        ("landmark", ctypes.c_void_p),
        ("query_ranks_stride", ctypes.c_int64),
        ("key_ranks_stride", ctypes.c_int64),
        ("own_stride", ctypes.c_int64),
        ("landmark_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int32),
    )


class GroupedAttentionBackward(library.Arguments):
    kernel = "grouped_attention_backward"
    _fields_ = (
        ("forward", ctypes.POINTER(GroupedAttention)),
        *HEAD_GRADIENTS,
    )


@dataclass(frozen=True)
class PackedProblem(PackedHeads):
    """A :class:`regard.engines.grouped_attention.problem.Problem` with its queries, keys and values, as the operator
    takes it."""

    query_ranks: Tensor
    key_ranks: Tensor
    landmark: Tensor
    own: Tensor | None
    causal: bool
    scale: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, p: Problem) -> PackedProblem:
        """Convert a problem to the operator's form."""
        return cls(q, k, v, p.ranks.queries, p.ranks.keys, p.landmark, p.own, p.causal, float(p.scale))


def refuses(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> str | None:
    """The reason why the kernel cannot run a call; None if it can."""
    p = problem
    if p.dropout.random:
        return "it has no dropout"
    if p.want_weights:
        return "it does not store the weights"
    if p.want_lse and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "the log-sum-exp has no gradient"
    if p.bias is not None or p.position_bias is not None or p.blocks is not None:
        return "it has no biases and no block mask"
    if k.dtype not in library.DTYPES or v.dtype not in library.DTYPES:
        return "keys or values in another dtype than float32 and bfloat16"
    if any(x is not None and x.device.type != "cpu" for x in (k, v, p.landmark, p.own, p.ranks.queries, p.ranks.keys)):
        return "tensors on several devices"
    return _misfit(PackedProblem.of(q, k, v, p))


def _misfit(p: PackedProblem) -> str | None:
    """The mismatch among the tensors, in words; None if they fit together."""
    q, k, v = p.q, p.k, p.v
    if not q.ndim == k.ndim == v.ndim == 4:
        return "q, k and v that do not have four axes"
    batch, n, m = q.shape[0], q.shape[2], k.shape[2]
    if (reason := p.heads_misfit()) is not None:
        return reason
    rows = [(p.query_ranks, n, torch.int64), (p.key_ranks, m, torch.int64), (p.landmark, m, torch.bool)]
    rows += [] if p.own is None else [(p.own, n, torch.int64)]
    for x, slots, dtype in rows:
        if x.dtype != dtype or x.ndim != 2 or x.shape[0] not in (1, batch) or x.shape[1] != slots:
            return "ranks, landmarks or groups that do not belong to the tokens"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, None, Tensor | None]:
    """See :func:`regard.engines.grouped_attention.grouped_attention`."""
    dtype = v.dtype
    if not q.dtype == k.dtype == v.dtype:
        q, k, v = q.float(), k.float(), v.float()
    out, lse = _grouped_attention(PackedProblem.of(q, k, v, problem))
    return out.to(dtype), None, lse if problem.want_lse else None


def _check(p: PackedProblem) -> None:
    """Raise Unsupported for tensors that are unsafe to pass to the kernel."""
    reason = _misfit(p)
    if reason is None and (p.q.dtype not in library.DTYPES or not p.q.dtype == p.k.dtype == p.v.dtype):
        reason = "q, k and v in other dtypes than one of float32 and bfloat16"
    if reason is None and not library.within_range(p.query_ranks, p.key_ranks, p.own):
        reason = f"ranks or groups beyond {library.MOST}"
    if reason is not None:
        raise Unsupported(f"native grouped attention with {reason}", nearest="backend='torch'")


def _arguments(p: PackedProblem, out: Tensor, lse: Tensor) -> tuple[GroupedAttention, list[Tensor]]:
    """The forward struct, and the tensors that it points to."""
    q, k, v = map(library.rows_contiguous, (p.q, p.k, p.v))
    arguments = GroupedAttention(**heads_arguments(q, k, v, out, lse), scale=p.scale, causal=p.causal)
    kept = [q, k, v, out, lse]
    for name in ("query_ranks", "key_ranks", "own", "landmark"):
        x = getattr(p, name)
        if x is not None:
            x = library.rows_contiguous(x)
            kept.append(x)
            setattr(arguments, name, library.pointer(x))
            setattr(arguments, f"{name}_stride", by_row(x))
    return arguments, kept


def _empty_outputs(p: PackedProblem) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, V) and the log-sum-exp of the upper level (B, H, N)."""
    return empty_output(p.q, p.v), p.q.new_empty(p.q.shape[:3], dtype=torch.float32)


@operator("grouped_attention")
def _grouped_attention(problem: PackedProblem) -> tuple[Tensor, Tensor]:
    _check(problem)
    outputs = _empty_outputs(problem)
    arguments, kept = _arguments(problem, *outputs)
    library.call(arguments)
    del kept
    return outputs


@_grouped_attention.register_fake
def _(problem: PackedProblem) -> tuple[Tensor, Tensor]:
    return _empty_outputs(problem)


@operator("grouped_attention_backward")
def _grouped_attention_backward(
    grad_out: Tensor, problem: PackedProblem, out: Tensor, lse: Tensor, needed: list[bool]
) -> list[Tensor]:
    """Gradients of q, k and v; empty tensors for those not needed."""
    _check(problem)
    tokens = tuple(problem.q.shape[:3])
    for name, x in (("out", out), ("grad_out", grad_out)):
        library.same(name, x, (*tokens, problem.v.shape[3]), problem.q.dtype)
    library.same("lse", lse, tokens, torch.float32)
    out, grad_out, lse = library.rows_contiguous(out), library.rows_contiguous(grad_out), lse.contiguous()
    forward, kept = _arguments(problem, out, lse)
    grads = problem.run_backward(GroupedAttentionBackward, forward, grad_out, needed)
    del kept
    return grads


@_grouped_attention_backward.register_fake
def _(grad_out: Tensor, problem: PackedProblem, out: Tensor, lse: Tensor, needed: list[bool]) -> list[Tensor]:
    return problem.empty_gradients(needed)


def _keep(ctx: Any, inputs: tuple[PackedProblem], output: tuple[Tensor, Tensor]) -> None:
    inputs[0].keep(ctx, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    problem, (out, lse) = PackedProblem.kept(ctx)
    needed = problem.needed(ctx)
    if grad_out is None or not any(needed):
        return (None,) * len(ctx.needs_input_grad)
    return problem.gradients(_grouped_attention_backward(grad_out, problem, out, lse, needed), needed)


_grouped_attention.register_autograd(_differentiate, setup_context=_keep)
_grouped_attention_backward.refuse_gradient("gradients of gradients of native grouped attention")
