"""Attention to chosen pixels in C++ (`native/src/pixel_attention.cpp`): only kept keys are read. Choice, attention,
gates and mean are one pass; for gradients, only the log-sum-exp of each query and one bit per pixel are stored."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.backends.native import library
from regard.backends.operators import operator
from regard.contract import Unsupported
from regard.engines.heads import (
    HEAD_GRADIENTS,
    HEADS,
    PackedHeads,
    Strides,
    by_row,
    empty_output,
    heads_arguments,
)
from regard.engines.pixel_attention.problem import Mix, Problem, slots_by_rank
from regard.engines.pixel_attention.torch_form import kept_pixels


class PixelAttention(library.Arguments):
    kernel = "pixel_attention"
    _fields_ = (
        *HEADS,
        ("estimate", ctypes.c_void_p),
        ("estimate_strides", Strides),
        ("pixels", ctypes.c_int64),
        ("kept", ctypes.c_void_p),
        ("chosen", ctypes.c_void_p),
        ("totals", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("jitter", ctypes.c_void_p),
        ("totals_stride", ctypes.c_int64),
        ("slots_stride", ctypes.c_int64),
        ("jitter_stride", ctypes.c_int64),
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
        ("grad_row_logit", ctypes.c_void_p),
        ("grad_mix_logit", ctypes.c_void_p),
        ("grad_first", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class PackedProblem(PackedHeads):
    """A :class:`regard.engines.pixel_attention.problem.Problem` and its `Mix` with the queries, keys and values, as the
    operators take them."""

    row_logit: Tensor | None
    mix_logit: Tensor | None
    first: Tensor | None
    before: Tensor | None
    estimate: Tensor
    chosen: Tensor | None
    totals: Tensor
    slots: Tensor | None
    jitter: Tensor | None
    count: int
    top_k: float
    oversample: float
    together: bool
    scale: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, p: Problem, mix: Mix) -> PackedProblem:
        """Convert a problem to the operator's form: estimate and mix in float32, and q, k and v in one dtype."""
        dtype = v.dtype if q.dtype == k.dtype == v.dtype else torch.float32
        row_logit, mix_logit, first = (None if x is None else x.float() for x in mix.tensors)
        mean = None if mix_logit is None else mix.mean
        return cls(
            q=q.to(dtype),
            k=k.to(dtype),
            v=v.to(dtype),
            row_logit=row_logit,
            mix_logit=mix_logit,
            first=None if mean is None else first,
            before=None if mean is None else mean.before,
            estimate=p.estimate.detach().float(),
            chosen=None,
            totals=p.totals,
            slots=slots_by_rank(p.ranks, q.shape[0]),
            jitter=p.jitter,
            count=0 if mean is None else mean.count,
            top_k=float(p.top_k),
            oversample=float(p.oversample),
            together=p.grouping == "row",
            scale=float(p.scale),
        )

    @property
    def learned(self) -> list[Tensor | None]:
        return [self.q, self.k, self.v, self.row_logit, self.mix_logit, self.first]

    def empty_gradients(self, needed: Sequence[bool]) -> list[Tensor]:
        mixed = [
            x.new_empty(x.shape) if need and x is not None else self.q.new_empty(0)
            for x, need in zip(self.learned[3:], needed[3:], strict=True)
        ]
        return super().empty_gradients(needed[:3]) + mixed

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """The shape of the bit mask of kept pixels, with 32 bits per number."""
        return (*self.estimate.shape[:3], -(-self.estimate.shape[3] // 32))


def refuses(q: Tensor, k: Tensor, v: Tensor, problem: Problem, mix: Mix) -> str | None:
    """The reason why the kernel cannot run a call; None if it can."""
    p = problem
    if p.want_weights:
        return "it does not store the weights"
    given = [x for x in (q, k, v, p.estimate, *mix.tensors) if x is not None]
    if any(x.dtype not in library.DTYPES for x in given):
        return "tensors in another dtype than float32 and bfloat16"
    if any(x.device.type != "cpu" for x in (*given, p.totals, p.ranks.keys)):
        return "tensors on several devices"
    return _misfit(PackedProblem.of(q, k, v, p, mix))


def _misfit(p: PackedProblem) -> str | None:
    """The mismatch among the tensors, in words; None if they fit together."""
    if p.v.ndim != 4:
        return "values that do not have four axes"
    if (reason := p.heads_misfit() if p.q.ndim == p.k.ndim == 4 else "heads that do not have four axes") is not None:
        return reason
    if (reason := map_misfit(p.q, p.k, p.estimate, p.totals, p.slots, p.jitter)) is not None:
        return reason
    if p.chosen is not None and (p.chosen.shape != p.kept_shape or p.chosen.dtype != torch.int32):
        return "chosen pixels that do not belong to the estimate"
    if not (p.top_k > 0 and p.oversample >= 1):
        return f"top_k={p.top_k} and oversample={p.oversample}"
    return _mix_misfit(p)


def map_misfit(
    q: Tensor, k: Tensor, estimate: Tensor, totals: Tensor, slots: Tensor | None, jitter: Tensor | None
) -> str | None:
    """The mismatch between heads (already checked), a map, and the map's keys, in words; None if there is none."""
    batch, n, m = q.shape[0], q.shape[2], k.shape[2]
    if estimate.ndim != 4 or estimate.shape[:3] != q.shape[:3] or estimate.dtype != torch.float32:
        return "an estimate that does not belong to the queries"
    if not 1 <= estimate.shape[3] <= library.MOST:
        return f"maps of {estimate.shape[3]} pixels"
    if totals.ndim != 2 or totals.shape[0] not in (1, batch) or totals.shape[1] != n:
        return "numbers of keys that do not belong to the queries"
    if slots is not None and slots.shape != (batch, m):
        return "slots that do not belong to the keys"
    if any(x is not None and x.dtype != torch.int64 for x in (totals, slots)):
        return "numbers of keys or slots in another dtype than int64"
    if jitter is not None and (jitter.shape != (batch, m) or jitter.dtype != torch.float64):
        return "a jitter that does not belong to the keys"
    return None


def map_out_of_range(m: int, totals: Tensor, slots: Tensor | None, jitter: Tensor | None) -> str | None:
    """The unsafe value, in words, in tensors that :func:`map_misfit` has accepted; None if there is none."""
    if not library.within_range(totals):
        return f"numbers of keys beyond {library.MOST}"
    if slots is not None and slots.numel():
        low, high = torch.aminmax(slots)
        if int(low) < 0 or int(high) >= m:
            return "slots out of range"
    if jitter is not None and jitter.numel():
        low, high = torch.aminmax(jitter)
        if not -1 < float(low) <= float(high) < 1:
            return "a jitter by one rank or more"
    return None


def map_arguments(
    estimate: Tensor, totals: Tensor, slots: Tensor | None, jitter: Tensor | None
) -> tuple[dict[str, Any], list[Tensor | None]]:
    """The struct fields of a map and its keys, and the tensors that they point to."""
    estimate, totals = library.rows_contiguous(estimate), library.rows_contiguous(totals)
    slots, jitter = (None if x is None else library.rows_contiguous(x) for x in (slots, jitter))
    fields = {
        **library.strided(estimate=estimate),
        "pixels": estimate.shape[3],
        "totals": library.pointer(totals),
        "totals_stride": by_row(totals),
        "slots": library.pointer(slots),
        "slots_stride": 0 if slots is None else by_row(slots),
        "jitter": library.pointer(jitter),
        "jitter_stride": 0 if jitter is None else by_row(jitter),
    }
    return fields, [estimate, totals, slots, jitter]


def _mix_misfit(p: PackedProblem) -> str | None:
    batch, heads, n, _ = p.q.shape
    kv_heads, m, width = p.v.shape[1:]
    for x in (p.row_logit, p.mix_logit):
        if x is not None and (x.shape != (batch, heads, n) or x.dtype != torch.float32):
            return "logits that do not belong to the queries"
    if (p.mix_logit is None) != (p.first is None) or (p.first is None and p.before is not None):
        return "a mean without its logit, or a logit without its mean"
    if p.first is not None:
        means = kv_heads if p.before is not None or (p.first.ndim == 3 and p.first.shape[1] == kv_heads) else heads
        if p.first.shape != (batch, means, width) or p.first.dtype != torch.float32:
            return "means that do not belong to the values"
    if p.before is not None and (p.before.shape != (batch,) or p.before.dtype != torch.int64):
        return "numbers of values that do not belong to the rows"
    if not 0 <= p.count <= m or (p.before is None and p.count):
        return f"running means of {p.count} of {m} values after others"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, problem: Problem, mix: Mix) -> tuple[Tensor, None]:
    """See :func:`regard.engines.pixel_attention.pixel_attention`."""
    packed = PackedProblem.of(q, k, v, problem, mix)
    if problem.grouping not in ("row", "query"):  # the kernel only ranks the pixels of single queries
        packed = replace(packed, chosen=_bits(kept_pixels(problem)))
    return _pixel_attention(packed, torch.is_grad_enabled() and packed.records)[0], None


def _bits(kept: Tensor) -> Tensor:
    """Pack booleans along the last axis into bits, 32 per number."""
    padded = F.pad(kept, (0, -kept.shape[-1] % 32)).unflatten(-1, (-1, 32)).int()
    return (padded << torch.arange(32, dtype=torch.int32, device=kept.device)).sum(-1, dtype=torch.int32)


def _check(p: PackedProblem) -> None:
    """Raise Unsupported for tensors that are unsafe to pass to the kernel."""
    reason = _misfit(p)
    if reason is None and (p.q.dtype not in library.DTYPES or not p.q.dtype == p.k.dtype == p.v.dtype):
        reason = "q, k and v in other dtypes than one of float32 and bfloat16"
    if reason is None:
        reason = map_out_of_range(p.k.shape[2], p.totals, p.slots, p.jitter)
    if reason is None and not library.within_range(p.before):
        reason = f"more than {library.MOST} values before"
    if reason is not None:
        raise Unsupported(f"native pixel attention with {reason}", nearest="backend='torch'")


def _arguments(p: PackedProblem, out: Tensor, lse: Tensor, kept: Tensor) -> tuple[PixelAttention, list[Tensor | None]]:
    """The forward struct, and the tensors that it points to."""
    q, k, v = map(library.rows_contiguous, (p.q, p.k, p.v))
    fields, held = map_arguments(p.estimate, p.totals, p.slots, p.jitter)
    given = {name: getattr(p, name) for name in ("row_logit", "mix_logit", "first", "before", "chosen")}
    given = {name: None if x is None else x.contiguous() for name, x in given.items()}
    arguments = PixelAttention(
        **heads_arguments(q, k, v, out, lse),
        **fields,
        kept=library.pointer(kept) if kept.numel() else None,
        top_k=p.top_k,
        oversample=p.oversample,
        scale=p.scale,
        together=p.together,
        **{name: library.pointer(x) for name, x in given.items()},
        first_heads=0 if p.first is None else p.first.shape[1],
        count=p.count,
    )
    return arguments, [q, k, v, *held, *given.values()]


def _empty_results(p: PackedProblem, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    lse = p.q.new_empty(p.q.shape[:3] if keep else (0,), dtype=torch.float32)
    return empty_output(p.q, p.v), lse, p.q.new_empty(p.kept_shape if keep else (0,), dtype=torch.int32)


@operator("pixel_attention")
def _pixel_attention(problem: PackedProblem, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The output (B, H, N, V), and with `keep` the log-sum-exp of the scores (B, H, N) and the kept pixels' bits."""
    _check(problem)
    results = _empty_results(problem, keep)
    arguments, held = _arguments(problem, *results)
    library.call(arguments)
    del held
    return results


@_pixel_attention.register_fake
def _(problem: PackedProblem, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(problem, keep)


@operator("pixel_attention_backward")
def _pixel_attention_backward(
    grad_out: Tensor, problem: PackedProblem, lse: Tensor, kept: Tensor, needed: list[bool]
) -> list[Tensor]:
    """Gradients of q, k, v, both logits and `first`; empty tensors for those not needed."""
    _check(problem)
    tokens = tuple(problem.q.shape[:3])
    library.same("grad_out", grad_out, (*tokens, problem.v.shape[3]), problem.q.dtype)
    library.same("lse", lse, tokens, torch.float32)
    library.same("kept", kept, problem.kept_shape, torch.int32)
    grad_out, lse, kept = library.rows_contiguous(grad_out), lse.contiguous(), kept.contiguous()
    forward, held = _arguments(problem, grad_out, lse, kept)  # grad_out stands in for the output, which is not written
    grads = problem.empty_gradients(needed)
    there = [
        x if need and old is not None else None for x, need, old in zip(grads, needed, problem.learned, strict=True)
    ]
    grad_q, grad_k, grad_v, grad_row_logit, grad_mix_logit, grad_first = there
    library.call(
        PixelAttentionBackward(
            forward=ctypes.pointer(forward),
            **library.strided(grad_out=grad_out, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v),
            grad_row_logit=library.pointer(grad_row_logit),
            grad_mix_logit=library.pointer(grad_mix_logit),
            grad_first=library.pointer(grad_first),
        )
    )
    del held
    return grads


@_pixel_attention_backward.register_fake
def _(grad_out: Tensor, problem: PackedProblem, lse: Tensor, kept: Tensor, needed: list[bool]) -> list[Tensor]:
    return problem.empty_gradients(needed)


def _keep(ctx: Any, inputs: tuple[PackedProblem, bool], output: tuple[Tensor, Tensor, Tensor]) -> None:
    problem, ctx.keep = inputs
    problem.keep(ctx, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(ctx.needs_input_grad)
    problem, (lse, kept) = PackedProblem.kept(ctx)
    needed = problem.needed(ctx)
    if grad_out is None or not any(needed):
        return nothing
    if not ctx.keep:
        raise Unsupported("the gradient of pixel attention called with keep=False", supported="keep=True")
    found = problem.gradients(_pixel_attention_backward(grad_out, problem, lse, kept, needed), needed)
    return *found, *nothing[len(found) :]


_pixel_attention.register_autograd(_differentiate, setup_context=_keep)
_pixel_attention_backward.refuse_gradient("gradients of gradients of native pixel attention")
