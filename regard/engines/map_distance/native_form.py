"""The distance of an estimated map from exact attention in C++ (`native/src/map_distance.cpp`): scores are computed
tile by tile and never stored. Without a teacher, the sums over pixels are kept, and backward recomputes no scores."""

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
from regard.engines.heads import PackedHeads, Strides, empty_gradient
from regard.engines.map_distance.problem import Problem
from regard.engines.pixel_attention.native_form import map_arguments, map_misfit, map_out_of_range
from regard.engines.pixel_attention.problem import slots_by_rank


class MapDistance(library.Arguments):
    kernel = "map_distance"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("q_strides", Strides),
        ("k_strides", Strides),
        ("estimate", ctypes.c_void_p),
        ("estimate_strides", Strides),
        ("pixels", ctypes.c_int64),
        ("target", ctypes.c_void_p),
        ("target_strides", Strides),
        ("totals", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("jitter", ctypes.c_void_p),
        ("totals_stride", ctypes.c_int64),
        ("slots_stride", ctypes.c_int64),
        ("jitter_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("kl", ctypes.c_void_p),
        ("squares", ctypes.c_void_p),
        ("mass", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
    )


class MapDistanceBackward(library.Arguments):
    kernel = "map_distance_backward"
    _fields_ = (
        ("forward", ctypes.POINTER(MapDistance)),
        ("grad_kl", ctypes.c_void_p),
        ("grad_squares", ctypes.c_void_p),
        ("grad_estimate", ctypes.c_void_p),
        ("grad_q", ctypes.c_void_p),
        ("grad_k", ctypes.c_void_p),
        ("grad_q_strides", Strides),
        ("grad_k_strides", Strides),
    )


@dataclass(frozen=True)
class PackedProblem(Packed):
    """A :class:`regard.engines.map_distance.problem.Problem` with queries, keys and maps, as the operators take it."""

    estimate: Tensor
    q: Tensor
    k: Tensor
    target: Tensor | None
    totals: Tensor
    slots: Tensor | None
    jitter: Tensor | None
    scale: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor, estimate: Tensor, p: Problem) -> PackedProblem:
        """Convert a problem to the operator's form: maps in float32, and q and k as constants without a teacher."""
        dtype = q.dtype if q.dtype == k.dtype else torch.float32
        if p.target is None:
            q, k = q.detach(), k.detach()
        return cls(
            estimate=estimate.float(),
            q=q.to(dtype),
            k=k.to(dtype),
            target=None if p.target is None else p.target.float(),
            totals=p.totals,
            slots=slots_by_rank(p.ranks, q.shape[0]),
            jitter=p.jitter,
            scale=float(p.scale),
        )

    @property
    def learned(self) -> list[Tensor | None]:
        return [self.estimate, self.q, self.k]

    def empty_gradients(self, needed: Sequence[bool]) -> list[Tensor]:
        """Contiguous for the estimate; for queries and keys, a token's heads are side by side if the inputs' are."""
        made = [self.estimate.new_empty(self.estimate.shape) if needed[0] else self.estimate.new_empty(0)]
        of_scores = zip((self.q, self.k), needed[1:], strict=True)
        return made + [empty_gradient(x) if need else x.new_empty(0) for x, need in of_scores]


def refuses(q: Tensor, k: Tensor, estimate: Tensor, problem: Problem) -> str | None:
    """The reason why the kernel cannot run a call; None if it can."""
    p = problem
    given = [x for x in (q, k, estimate, p.target) if x is not None]
    if any(x.dtype not in library.DTYPES for x in given):
        return "tensors in another dtype than float32 and bfloat16"
    if any(x.device.type != "cpu" for x in (*given, p.totals, p.ranks.keys)):
        return "tensors on several devices"
    if p.target is not None and p.target.requires_grad and torch.is_grad_enabled():
        return "it has no gradient of a teacher's weights"
    return _misfit(PackedProblem.of(q, k, estimate, p))


def _misfit(p: PackedProblem) -> str | None:
    """The mismatch among the tensors, in words; None if they fit together."""
    if not p.q.ndim == p.k.ndim == 4:
        return "heads that do not have four axes"
    if (reason := PackedHeads(p.q, p.k, p.k).heads_misfit()) is not None:
        return reason
    if (reason := map_misfit(p.q, p.k, p.estimate, p.totals, p.slots, p.jitter)) is not None:
        return reason
    pairs = (*p.q.shape[:3], p.k.shape[2])
    if p.target is not None and (p.target.shape != pairs or p.target.dtype != torch.float32):
        return "a teacher's weights that do not belong to the pairs"
    return None


def run(q: Tensor, k: Tensor, estimate: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """See :func:`regard.engines.map_distance.map_distance`."""
    packed = PackedProblem.of(q, k, estimate, problem)
    kl, squares, *_ = _map_distance(packed, torch.is_grad_enabled() and packed.records)
    return kl, squares


def _check(p: PackedProblem) -> None:
    """Raise Unsupported for tensors that are unsafe to pass to the kernel."""
    reason = _misfit(p)
    if reason is None and (p.q.dtype not in library.DTYPES or p.q.dtype != p.k.dtype):
        reason = "q and k in other dtypes than one of float32 and bfloat16"
    if reason is None:
        reason = map_out_of_range(p.k.shape[2], p.totals, p.slots, p.jitter)
    if reason is not None:
        raise Unsupported(f"a native distance of maps with {reason}", nearest="backend='torch'")


def _arguments(p: PackedProblem, mass: Tensor, rows: Tensor, **results: Tensor) -> tuple[MapDistance, list[Any]]:
    """The forward struct, and the tensors that it points to."""
    q, k = map(library.rows_contiguous, (p.q, p.k))
    target = None if p.target is None else library.rows_contiguous(p.target)
    fields, held = map_arguments(p.estimate, p.totals, p.slots, p.jitter)
    arguments = MapDistance(
        threads=torch.get_num_threads(),
        dtype=library.DTYPES[q.dtype],
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        n=q.shape[2],
        m=k.shape[2],
        width=q.shape[3],
        **library.strided(q=q, k=k, target=target),
        **fields,
        scale=p.scale,
        mass=library.pointer(mass) if mass.numel() else None,
        rows=library.pointer(rows) if rows.numel() else None,
        **{name: library.pointer(x) for name, x in results.items()},
    )
    return arguments, [q, k, target, *held]


def _empty_results(p: PackedProblem, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = p.q.shape[:3]
    shapes = [
        tokens,
        tokens,
        p.estimate.shape if keep else (0,),
        (*tokens, 3) if keep and p.target is not None else (0,),
    ]
    kl, squares, mass, rows = (p.q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return kl, squares, mass, rows


@operator("map_distance")
def _map_distance(problem: PackedProblem, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kl and squares (B, H, N), and with `keep` the input of backward: the sum of weights for each pixel (B, H, N, C),
    and with a teacher three numbers per query (B, H, N, 3)."""
    _check(problem)
    kl, squares, mass, rows = results = _empty_results(problem, keep)
    arguments, held = _arguments(problem, mass, rows, kl=kl, squares=squares)
    library.call(arguments)
    del held
    return results


@_map_distance.register_fake
def _(problem: PackedProblem, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_results(problem, keep)


@operator("map_distance_backward")
def _map_distance_backward(
    grad_kl: Tensor | None,
    grad_squares: Tensor | None,
    problem: PackedProblem,
    mass: Tensor,
    rows: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of the estimate and, with a teacher, of q and k; empty tensors for those not needed."""
    _check(problem)
    tokens = tuple(problem.q.shape[:3])
    library.same("mass", mass, tuple(problem.estimate.shape), torch.float32)
    library.same("rows", rows, (0,) if problem.target is None else (*tokens, 3), torch.float32)
    for name, x in (("grad_kl", grad_kl), ("grad_squares", grad_squares)):
        if x is not None:
            library.same(name, x, tokens, torch.float32)
    if problem.target is None and any(needed[1:]):
        raise Unsupported("gradients of queries and keys that are compared with no teacher", supported="the estimate's")
    grad_kl, grad_squares = (None if x is None else x.contiguous() for x in (grad_kl, grad_squares))
    mass, rows = mass.contiguous(), rows.contiguous()
    forward, held = _arguments(problem, mass, rows)
    grads = problem.empty_gradients(needed)
    grad_estimate, grad_q, grad_k = (x if need else None for x, need in zip(grads, needed, strict=True))
    library.call(
        MapDistanceBackward(
            forward=ctypes.pointer(forward),
            grad_kl=library.pointer(grad_kl),
            grad_squares=library.pointer(grad_squares),
            grad_estimate=library.pointer(grad_estimate),
            **library.strided(grad_q=grad_q, grad_k=grad_k),
        )
    )
    del held
    return grads


@_map_distance_backward.register_fake
def _(
    grad_kl: Tensor | None,
    grad_squares: Tensor | None,
    problem: PackedProblem,
    mass: Tensor,
    rows: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    return problem.empty_gradients(needed)


def _keep(ctx: Any, inputs: tuple[PackedProblem, bool], output: tuple[Tensor, ...]) -> None:
    problem, ctx.keep = inputs
    problem.keep(ctx, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_kl: Tensor | None, grad_squares: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(ctx.needs_input_grad)
    problem, (mass, rows) = PackedProblem.kept(ctx)
    needed = problem.needed(ctx)
    if problem.target is None:
        needed[1:] = False, False
    if grad_kl is grad_squares is None or not any(needed):
        return nothing
    if not ctx.keep:
        raise Unsupported("the gradient of distances of maps called with keep=False", supported="keep=True")
    found = _map_distance_backward(grad_kl, grad_squares, problem, mass, rows, needed)
    grads = problem.gradients(found, needed)
    return *grads, *nothing[len(grads) :]


_map_distance.register_autograd(_differentiate, setup_context=_keep)
_map_distance_backward.refuse_gradient("gradients of gradients of native distances of maps")
