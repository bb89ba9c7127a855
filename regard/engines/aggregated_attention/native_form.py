"""Aggregated attention in C++ (`native/src/aggregated_attention.cpp`): directions, scores, softmax and both sums in one pass
over the map. For gradients nothing is kept but the log-sum-exp of a query."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.operators import Packed, operator
from regard.contract import Unsupported
from regard.engines.aggregated_attention.problem import Problem
from regard.engines.heads import Strides, empty_gradient, empty_output

HEADS = ("q", "k", "v", "far_k", "far_v")
LEARNED = ("moved", "slope", "near_bias", "near_tokens", "near_weights", "table")

MOST_SIDE = 1 << 14
"""The longest side of a map or window, so that numbers of places stay far below `library.MOST`."""


class AggregatedAttention(library.Arguments):
    kernel = "aggregated_attention"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in HEADS),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("factor", ctypes.c_int64),
        ("window", ctypes.c_int64),
        *((f"{name}_strides", Strides) for name in (*HEADS, "out")),
        *((name, ctypes.c_void_p) for name in LEARNED),
    )


class AggregatedAttentionBackward(library.Arguments):
    kernel = "aggregated_attention_backward"
    _fields_ = (
        ("forward", ctypes.POINTER(AggregatedAttention)),
        ("grad_out", ctypes.c_void_p),
        ("grad_out_strides", Strides),
        *((f"grad_{name}", ctypes.c_void_p) for name in HEADS),
        *((f"grad_{name}_strides", Strides) for name in HEADS),
        *((f"grad_{name}", ctypes.c_void_p) for name in LEARNED),
    )


@dataclass(frozen=True)
class PackedProblem(Packed):
    """A :class:`regard.engines.aggregated_attention.problem.Problem` with its heads, as the operators take it."""

    q: Tensor
    k: Tensor
    v: Tensor
    far_k: Tensor
    far_v: Tensor
    moved: Tensor
    slope: Tensor
    near_bias: Tensor
    near_tokens: Tensor
    near_weights: Tensor
    table: Tensor
    rows: int
    columns: int
    factor: int
    window: int

    @classmethod
    def of(cls, heads: tuple[Tensor, ...], p: Problem) -> PackedProblem:
        """Convert a problem to the operator's form: heads in one dtype, learned tensors in float32."""
        dtype = heads[0].dtype if len({x.dtype for x in heads}) == 1 else torch.float32
        q, k, v, far_k, far_v = (x.to(dtype) for x in heads)
        learned = {name: getattr(p, name).float() for name in LEARNED}
        rows, columns = p.grid
        return cls(q, k, v, far_k, far_v, **learned, rows=rows, columns=columns, factor=p.factor, window=p.window)

    @property
    def heads(self) -> tuple[Tensor, ...]:
        """Queries, keys and values, of the map and pooled."""
        return self.q, self.k, self.v, self.far_k, self.far_v

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The learned tensors, in the order of the struct."""
        return self.moved, self.slope, self.near_bias, self.near_tokens, self.near_weights, self.table

    @property
    def learned(self) -> list[Tensor | None]:
        return [*self.heads, *self.parameters]

    def empty_gradients(self, needed: Sequence[bool]) -> list[Tensor]:
        """Gradients of heads keep the heads of a token side by side if the input has them so; others are contiguous."""
        made = [empty_gradient(x) if need else x.new_empty(0) for x, need in zip(self.heads, needed, strict=False)]
        rest = zip(self.parameters, needed[len(made) :], strict=True)
        return made + [x.new_empty(x.shape if need else (0,)) for x, need in rest]


def refuses(q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, problem: Problem) -> str | None:
    """The reason why the kernel cannot run a call; None if it can."""
    heads = (q, k, v, far_k, far_v)
    if any(x.dtype not in library.DTYPES for x in (*heads, *problem.tensors)):
        return "tensors in another dtype than float32 and bfloat16"
    if any(x.device.type != "cpu" for x in (*heads, *problem.tensors)):
        return "tensors on several devices"
    return _misfit(PackedProblem.of(heads, problem))


def _misfit(p: PackedProblem) -> str | None:
    """The mismatch among the tensors, in words; None if they fit together."""
    sides = (p.rows, p.columns, p.factor, p.window)
    if not (0 <= p.rows <= MOST_SIDE and 0 <= p.columns <= MOST_SIDE and p.factor >= 1 and 1 <= p.window <= MOST_SIDE):
        return f"a map, squares and windows of sides {sides}, or more than {MOST_SIDE} places to a side"
    if p.rows % p.factor or p.columns % p.factor or p.window % 2 == 0:
        return f"a map of {p.rows} x {p.columns} in squares of {p.factor}, or an even window"
    if p.q.ndim != 4:
        return "heads that do not have four axes"
    batch, heads, n, width = p.q.shape
    pooled = p.rows // p.factor * (p.columns // p.factor)
    if n != p.rows * p.columns or not p.q.shape == p.k.shape == p.v.shape or width < 1 or width > library.MOST:
        return "q, k and v that do not belong to the map"
    if not p.far_k.shape == p.far_v.shape == (batch, heads, pooled, width):
        return "pooled keys and values that do not belong to the map"
    places = p.window**2
    table = (heads, 2 * p.rows - p.factor, 2 * p.columns - p.factor) if n else tuple(p.table.shape)
    shapes = ((heads, width), (heads,), (heads, places), (heads, width, places), (heads, places), table)
    if any(x.shape != shape for x, shape in zip(p.parameters, shapes, strict=True)):
        return "biases and weights that do not belong to the heads, the window or the map"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, problem: Problem) -> Tensor:
    """See :func:`regard.engines.aggregated_attention.aggregated_attention`."""
    packed = PackedProblem.of((q, k, v, far_k, far_v), problem)
    out, _ = _aggregated_attention(packed, torch.is_grad_enabled() and packed.records)
    return out.to(v.dtype)


def _check(p: PackedProblem) -> None:
    """Raise Unsupported for tensors that are unsafe to pass to the kernel."""
    reason = _misfit(p)
    if reason is None and (p.q.dtype not in library.DTYPES or any(x.dtype != p.q.dtype for x in p.heads)):
        reason = "heads in other dtypes than one of float32 and bfloat16"
    if reason is None and any(x.dtype != torch.float32 for x in p.parameters):
        reason = "biases and weights in another dtype than float32"
    if reason is not None:
        raise Unsupported(f"native aggregated attention with {reason}", nearest="backend='torch'")


def _arguments(p: PackedProblem, out: Tensor | None, lse: Tensor) -> tuple[AggregatedAttention, list[Tensor]]:
    """The forward struct, and the tensors that it points to."""
    heads = [library.rows_contiguous(x) for x in p.heads]
    parameters = [x.contiguous() for x in p.parameters]
    batch, count, _, width = p.q.shape
    arguments = AggregatedAttention(
        threads=torch.get_num_threads(),
        dtype=library.DTYPES[p.q.dtype],
        batch=batch,
        heads=count,
        width=width,
        rows=p.rows,
        columns=p.columns,
        factor=p.factor,
        window=p.window,
        lse=library.pointer(lse) if lse.numel() else None,
        **library.strided(**dict(zip(HEADS, heads, strict=True)), out=out),
        **{name: library.pointer(x) for name, x in zip(LEARNED, parameters, strict=True)},
    )
    return arguments, heads + parameters


def _empty_results(p: PackedProblem, keep: bool) -> tuple[Tensor, Tensor]:
    lse = p.q.new_empty(p.q.shape[:3] if keep else (0,), dtype=torch.float32)
    return empty_output(p.q, p.v), lse


@operator("aggregated_attention")
def _aggregated_attention(problem: PackedProblem, keep: bool) -> tuple[Tensor, Tensor]:
    """The output (B, H, N, D), and with `keep` the log-sum-exp of the scores (B, H, N)."""
    _check(problem)
    results = _empty_results(problem, keep)
    arguments, held = _arguments(problem, *results)
    library.call(arguments)
    del held
    return results


@_aggregated_attention.register_fake
def _(problem: PackedProblem, keep: bool) -> tuple[Tensor, Tensor]:
    return _empty_results(problem, keep)


@operator("aggregated_attention_backward")
def _aggregated_attention_backward(
    grad_out: Tensor, problem: PackedProblem, lse: Tensor, needed: list[bool]
) -> list[Tensor]:
    """Gradients of the heads and of the learned tensors, in the order of the fields; empty where not needed."""
    _check(problem)
    library.same("grad_out", grad_out, tuple(problem.q.shape), problem.v.dtype)
    library.same("lse", lse, tuple(problem.q.shape[:3]), torch.float32)
    grads = problem.empty_gradients(needed)
    if problem.q.numel() == 0:
        return [x.zero_() for x in grads]
    grad_out, lse = library.rows_contiguous(grad_out), lse.contiguous()
    forward, held = _arguments(problem, None, lse)
    wanted = [x if need else None for x, need in zip(grads, needed, strict=True)]
    names = [f"grad_{name}" for name in (*HEADS, *LEARNED)]
    of_heads = dict(zip(names[: len(HEADS)], wanted, strict=False))
    library.call(
        AggregatedAttentionBackward(
            forward=ctypes.pointer(forward),
            **library.strided(grad_out=grad_out, **of_heads),
            **{name: library.pointer(x) for name, x in zip(names[len(HEADS) :], wanted[len(HEADS) :], strict=True)},
        )
    )
    del held
    return grads


@_aggregated_attention_backward.register_fake
def _(grad_out: Tensor, problem: PackedProblem, lse: Tensor, needed: list[bool]) -> list[Tensor]:
    return problem.empty_gradients(needed)


def _keep(ctx: Any, inputs: tuple[PackedProblem, bool], output: tuple[Tensor, Tensor]) -> None:
    problem, ctx.keep = inputs
    problem.keep(ctx, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(ctx.needs_input_grad)
    problem, (lse,) = PackedProblem.kept(ctx)
    needed = problem.needed(ctx)
    if grad_out is None or not any(needed):
        return nothing
    if not ctx.keep:
        raise Unsupported("the gradient of aggregated attention called with keep=False", supported="keep=True")
    grads = problem.gradients(_aggregated_attention_backward(grad_out, problem, lse, needed), needed)
    return *grads, *nothing[len(grads) :]


_aggregated_attention.register_autograd(_differentiate, setup_context=_keep)
_aggregated_attention_backward.refuse_gradient("gradients of gradients of native aggregated attention")
