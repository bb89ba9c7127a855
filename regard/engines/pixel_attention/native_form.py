"""Attention to chosen pixels in C++ (`native/src/pixel_attention.cpp`): only kept keys are read, and nothing is stored but
the result. Where no gradient is wanted, the choice, attention, the gates and the mean are one pass."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.operators import operator
from regard.contract import Unsupported
from regard.engines.attention.native_form import (
    HEAD_GRADIENTS,
    HEADS,
    PackedHeads,
    Strides,
    by_row,
    empty_output,
    heads_arguments,
)
from regard.engines.pixel_attention import torch_form
from regard.engines.pixel_attention.problem import Mix, Problem


class PixelAttention(library.Arguments):
    kernel = "pixel_attention"
    _fields_ = (
        *HEADS,
        ("estimate", ctypes.c_void_p),
        ("estimate_strides", Strides),
        ("pixels", ctypes.c_int64),
        ("kept", ctypes.c_void_p),
        ("totals", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("totals_stride", ctypes.c_int64),
        ("slots_stride", ctypes.c_int64),
        ("top_k", ctypes.c_double),
        ("oversample", ctypes.c_double),
        ("scale", ctypes.c_float),
        ("together", ctypes.c_int32),
        ("row_logit", ctypes.c_void_p),
        ("mix_logit", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("before", ctypes.c_void_p),
        ("first_heads", ctypes.c_int64),
        ("count", ctypes.c_int64),
    )


class PixelAttentionBackward(library.Arguments):
    kernel = "pixel_attention_backward"
    _fields_ = (
        ("forward", ctypes.POINTER(PixelAttention)),
        *HEAD_GRADIENTS,
    )


@dataclass(frozen=True)
class PackedProblem(PackedHeads):
    """A :class:`regard.engines.pixel_attention.problem.Problem` as the operators have it, with its queries, keys and
    values."""

    estimate: Tensor
    totals: Tensor
    slots: Tensor | None
    top_k: float
    oversample: float
    together: bool
    scale: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, p: Problem) -> PackedProblem:
        dtype = v.dtype if q.dtype == k.dtype == v.dtype else torch.float32
        return cls(
            q=q.to(dtype),
            k=k.to(dtype),
            v=v.to(dtype),
            estimate=p.estimate.detach().float(),
            totals=p.totals,
            slots=p.slots(),
            top_k=float(p.top_k),
            oversample=float(p.oversample),
            together=p.grouping == "row",
            scale=float(p.scale),
        )

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Of the bits that say which pixels are kept, 32 in a number."""
        return (*self.estimate.shape[:3], -(-self.estimate.shape[3] // 32))


def refuses(q: Tensor, k: Tensor, v: Tensor, problem: Problem, mix: Mix) -> str | None:
    """Why the kernel does not take such a call; None when it does."""
    p = problem
    if p.grouping not in ("row", "query"):
        return "it ranks the pixels of one query together, not those of several"
    if p.jitter is not None:
        return "it does not move the keys' ranks"
    if p.want_weights:
        return "it does not store the weights"
    given = [x for x in (q, k, v, p.estimate, *mix.tensors) if x is not None]
    if any(x.dtype not in library.DTYPES for x in given):
        return "tensors in another dtype than float32 and bfloat16"
    if any(x.device.type != "cpu" for x in (*given, p.totals, p.ranks.keys)):
        return "tensors on several devices"
    return _misfit(PackedProblem.of(q, k, v, p))


def _misfit(p: PackedProblem) -> str | None:
    """The mismatch among the tensors, in words; None when they belong together."""
    q, k, v = p.q, p.k, p.v
    if not q.ndim == k.ndim == v.ndim == p.estimate.ndim == 4:
        return "q, k, v and an estimate that do not have four axes"
    batch, n, m = q.shape[0], q.shape[2], k.shape[2]
    if (reason := p.heads_misfit()) is not None:
        return reason
    pixels = p.estimate.shape[3]
    if p.estimate.shape[:3] != q.shape[:3] or not 1 <= pixels <= library.MOST or p.estimate.dtype != torch.float32:
        return "an estimate that does not belong to the queries"
    if p.totals.ndim != 2 or p.totals.shape[0] not in (1, batch) or p.totals.shape[1] != n:
        return "numbers of keys that do not belong to the queries"
    if p.slots is not None and p.slots.shape != (batch, m):
        return "slots that do not belong to the keys"
    if any(x is not None and x.dtype != torch.int64 for x in (p.totals, p.slots)):
        return "numbers of keys or slots in another dtype than int64"
    if not (p.top_k > 0 and p.oversample >= 1):
        return f"top_k={p.top_k} and oversample={p.oversample}"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, problem: Problem, mix: Mix) -> tuple[Tensor, None]:
    """See :func:`regard.engines.pixel_attention.pixel_attention`."""
    learned = (q, k, v, *mix.tensors)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learned):
        packed = PackedProblem.of(q.float(), k.float(), v.float(), problem)
        output, _, _ = _pixel_attention(packed)
        return torch_form.mixed(output, None, v, problem, mix)[0], None
    row_logit, mix_logit, first = (None if x is None else x.float() for x in mix.tensors)
    if mix_logit is None:
        first = None
    before, count = (None, 0) if first is None or mix.mean is None else (mix.mean.before, mix.mean.count)
    return _mixed(PackedProblem.of(q, k, v, problem), row_logit, mix_logit, first, before, count), None


def _check(p: PackedProblem) -> None:
    """Raise Unsupported for tensors that the kernel must not be given."""
    reason = _misfit(p)
    if reason is None and (p.q.dtype not in library.DTYPES or not p.q.dtype == p.k.dtype == p.v.dtype):
        reason = "q, k and v in other dtypes than one of float32 and bfloat16"
    if reason is None and not library.within_range(p.totals):
        reason = f"numbers of keys beyond {library.MOST}"
    if reason is None and p.slots is not None and p.slots.numel():
        low, high = torch.aminmax(p.slots)
        reason = "slots that are none" if int(low) < 0 or int(high) >= p.k.shape[2] else None
    if reason is not None:
        raise Unsupported(f"native pixel attention with {reason}", nearest="backend='torch'")


def _arguments(p: PackedProblem, out: Tensor, lse: Tensor | None) -> tuple[PixelAttention, list[Tensor]]:
    """The forward struct, and the tensors whose memory it points at."""
    q, k, v = map(library.rows_contiguous, (p.q, p.k, p.v))
    estimate, totals = library.rows_contiguous(p.estimate), library.rows_contiguous(p.totals)
    arguments = PixelAttention(
        **heads_arguments(q, k, v, out, out.new_empty(0) if lse is None else lse),
        **library.strided(estimate=estimate),
        pixels=estimate.shape[3],
        totals=library.pointer(totals),
        totals_stride=by_row(totals),
        top_k=p.top_k,
        oversample=p.oversample,
        scale=p.scale,
        together=p.together,
    )
    kept = [q, k, v, estimate, totals]
    if p.slots is not None:
        slots = library.rows_contiguous(p.slots)
        arguments.slots, arguments.slots_stride = library.pointer(slots), by_row(slots)
        kept.append(slots)
    return arguments, kept


def _empty_outputs(p: PackedProblem) -> tuple[Tensor, Tensor, Tensor]:
    """P V (B, H, N, V), the log-sum-exp of the scores (B, H, N), and the bits of the kept pixels."""
    lse = p.q.new_empty(p.q.shape[:3], dtype=torch.float32)
    return empty_output(p.q, p.v), lse, p.q.new_empty(p.kept_shape, dtype=torch.int32)


@operator("pixel_attention")
def _pixel_attention(problem: PackedProblem) -> tuple[Tensor, Tensor, Tensor]:
    _check(problem)
    out, lse, kept = _empty_outputs(problem)
    arguments, inputs = _arguments(problem, out, lse)
    arguments.kept = library.pointer(kept)
    library.call(arguments)
    del inputs
    return out, lse, kept


@_pixel_attention.register_fake
def _(problem: PackedProblem) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(problem)


@operator("pixel_attention_backward")
def _pixel_attention_backward(
    grad_out: Tensor, problem: PackedProblem, lse: Tensor, kept: Tensor, needed: list[bool]
) -> list[Tensor]:
    """Gradients of q, k and v; empty tensors for those not needed."""
    _check(problem)
    tokens = tuple(problem.q.shape[:3])
    library.same("grad_out", grad_out, (*tokens, problem.v.shape[3]), problem.q.dtype)
    library.same("lse", lse, tokens, torch.float32)
    library.same("kept", kept, problem.kept_shape, torch.int32)
    grad_out, lse, kept = library.rows_contiguous(grad_out), lse.contiguous(), kept.contiguous()
    forward, inputs = _arguments(problem, grad_out, lse)  # which has the shape of the output, and is not written
    forward.kept = library.pointer(kept)
    grads = problem.run_backward(PixelAttentionBackward, forward, grad_out, needed)
    del inputs
    return grads


@_pixel_attention_backward.register_fake
def _(grad_out: Tensor, problem: PackedProblem, lse: Tensor, kept: Tensor, needed: list[bool]) -> list[Tensor]:
    return problem.empty_gradients(needed)


def _keep(ctx: Any, inputs: tuple[PackedProblem], output: tuple[Tensor, Tensor, Tensor]) -> None:
    inputs[0].keep(ctx, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    problem, (lse, kept) = PackedProblem.kept(ctx)
    needed = problem.needed(ctx)
    if grad_out is None or not any(needed):
        return (None,) * len(ctx.needs_input_grad)
    return problem.gradients(_pixel_attention_backward(grad_out, problem, lse, kept, needed), needed)


_pixel_attention.register_autograd(_differentiate, setup_context=_keep)
_pixel_attention_backward.refuse_gradient("gradients of gradients of native pixel attention")


@operator("pixel_attention_mixed")
def _mixed(
    problem: PackedProblem,
    row_logit: Tensor | None,
    mix_logit: Tensor | None,
    first: Tensor | None,
    before: Tensor | None,
    count: int,
) -> Tensor:
    """With the gates and the mean, for calls without a gradient."""
    _check(problem)
    batch, heads, n, _ = problem.q.shape
    kv_heads, m, width = problem.v.shape[1:]
    for name, x in (("row_logit", row_logit), ("mix_logit", mix_logit)):
        if x is not None:
            library.same(name, x, (batch, heads, n), torch.float32)
    if (mix_logit is None) != (first is None) or (first is None and before is not None):
        raise Unsupported("native pixel attention with a mean and no logit of it, or the other way round")
    if first is not None:
        means = kv_heads if before is not None or (first.ndim == 3 and first.shape[1] == kv_heads) else heads
        library.same("first", first, (batch, means, width), torch.float32)
    if before is not None:
        library.same("before", before, (batch,), torch.int64)
    if not 0 <= count <= m or (before is None and count) or not library.within_range(before):
        raise Unsupported(f"native pixel attention with running means of {count} of {m} values after others")
    out = empty_output(problem.q, problem.v)
    arguments, inputs = _arguments(problem, out, None)
    given = [None if x is None else x.contiguous() for x in (row_logit, mix_logit, first, before)]
    for name, x in zip(("row_logit", "mix_logit", "first", "before"), given, strict=True):
        setattr(arguments, name, library.pointer(x))
    arguments.first_heads, arguments.count = 0 if first is None else first.shape[1], count
    library.call(arguments)
    del inputs, given
    return out


@_mixed.register_fake
def _(
    problem: PackedProblem,
    row_logit: Tensor | None,
    mix_logit: Tensor | None,
    first: Tensor | None,
    before: Tensor | None,
    count: int,
) -> Tensor:
    return empty_output(problem.q, problem.v)


_mixed.refuse_gradient("gradients of native pixel attention with its gates and mean")
