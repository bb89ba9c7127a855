"""The softmax scan in C++ (`native/src/softmax_scan.cpp`): one pass over the values, no states stored for gradients."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer, rows_contiguous
from regard.backends.operators import operator
from regard.contract import Unsupported
from regard.engines.softmax_scan.problem import Carry, Problem

SCORES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of scores, decays and mixing weights, which are all read as float32."""


class Scan(library.Arguments):
    kernel = "softmax_scan"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("s", ctypes.c_void_p),
        ("s_strides", ctypes.c_int64 * 4),
        ("v", ctypes.c_void_p),
        ("v_strides", ctypes.c_int64 * 3),
        ("log_decay", ctypes.c_void_p),
        ("log_decay_strides", ctypes.c_int64 * 3),
        ("mix", ctypes.c_void_p),
        ("mix_strides", ctypes.c_int64 * 4),
        ("m", ctypes.c_void_p),
        ("u", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("m_out", ctypes.c_void_p),
        ("u_out", ctypes.c_void_p),
        ("w_out", ctypes.c_void_p),
    )


class ScanBackward(library.Arguments):
    kernel = "softmax_scan_backward"
    _fields_ = (
        ("forward", ctypes.POINTER(Scan)),
        ("grad_out", ctypes.c_void_p),
        ("grad_out_strides", ctypes.c_int64 * 4),
        ("grad_u", ctypes.c_void_p),
        ("grad_w", ctypes.c_void_p),
        ("grad_s", ctypes.c_void_p),
        ("grad_s_strides", ctypes.c_int64 * 4),
        ("grad_v", ctypes.c_void_p),
        ("grad_mix", ctypes.c_void_p),
        ("grad_carry_m", ctypes.c_void_p),
        ("grad_carry_u", ctypes.c_void_p),
        ("grad_carry_w", ctypes.c_void_p),
    )


def run(problem: Problem, chunk_size: int | None) -> tuple[Tensor, Carry]:
    """See :func:`regard.engines.softmax_scan.softmax_scan`; the kernel chooses its own `chunk_size`."""
    log_decay, mix = (None if x is None else x.float() for x in (problem.log_decay, problem.mix))
    out, m, u, w = _scan(replace(problem, s=problem.s.float(), log_decay=log_decay, mix=mix))
    return (out if mix is not None else out.transpose(2, 3)), Carry(m.detach(), u, w)


def refuses(problem: Problem, chunk_size: int | None) -> str | None:
    """The reason to leave a call to another backend; None if there is none."""
    p = problem
    if p.v.dtype not in library.DTYPES:
        return f"values in {p.v.dtype}"
    read = [x for x in (p.s, p.log_decay, p.mix) if x is not None]
    for x in read:
        if x.dtype not in SCORES:
            return f"scores, decays or mixing weights in {x.dtype}"
    if any(x.dtype != torch.float32 for x in p.carry):
        return "a carry in another dtype than float32"
    if any(x.device.type != "cpu" for x in (*read, p.v, *p.carry)):
        return "tensors on several devices"
    if p.s.ndim != 4 or p.v.ndim != 4:
        return "scores and values of other than 4 axes"
    batch, heads, n, queries = p.s.shape
    width = p.v.shape[3]
    found = p.v.shape[:3] == p.s.shape[:3] and max(queries, width) <= library.MOST
    found = found and p.m.shape == p.u.shape == (batch, heads, queries)
    found = found and p.w.shape == (batch, heads, queries, width) and (p.mix is None or p.mix.shape == p.s.shape)
    if p.log_decay is not None:
        found = found and p.log_decay.ndim == 3 and p.log_decay.shape[2] == n
        found = found and p.log_decay.shape[0] in (1, batch) and p.log_decay.shape[1] in (1, heads)
    return None if found else "shapes that do not belong together"


def _check(p: Problem) -> None:
    reason = refuses(p, 1)
    if reason is None and any(x is not None and x.dtype != torch.float32 for x in (p.s, p.log_decay, p.mix)):
        reason = "scores, decays or mixing weights in another dtype than float32"
    if reason is not None:
        raise Unsupported(f"the native softmax scan with {reason}", nearest="backend='torch'")


def _laid_out(p: Problem) -> Problem:
    """The tensors in the layouts that the kernel reads."""
    m, u, w = (x.contiguous() for x in p.carry)
    return replace(p, v=rows_contiguous(p.v), m=m, u=u, w=w)


def _arguments(p: Problem, out: Tensor) -> Scan:
    """The struct without the final carry. The caller must keep the tensors alive."""
    batch, heads, n, queries = p.s.shape
    gates: dict[str, Any] = {}
    if p.log_decay is not None:
        gates.update(log_decay=pointer(p.log_decay), log_decay_strides=_shared(p.log_decay))
    if p.mix is not None:
        gates.update(mix=pointer(p.mix), mix_strides=p.mix.stride())
    return Scan(
        threads=torch.get_num_threads(),
        dtype=library.DTYPES[p.v.dtype],
        batch=batch,
        heads=heads,
        n=n,
        queries=queries,
        width=p.v.shape[-1],
        s=pointer(p.s),
        s_strides=p.s.stride(),
        **library.strided(v=p.v),
        m=pointer(p.m),
        u=pointer(p.u),
        w=pointer(p.w),
        out=pointer(out),
        **gates,
    )


def _shared(x: Tensor) -> tuple[int, ...]:
    """Strides, with 0 for axes of size 1."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _empty_outputs(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, n, queries = p.s.shape
    shape = (batch, heads, n, p.v.shape[-1]) if p.mix is not None else (batch, heads, queries, n, p.v.shape[-1])
    m, u = (p.s.new_empty(batch, heads, queries) for _ in range(2))
    return p.v.new_empty(shape), m, u, p.w.new_empty(p.w.shape)


@operator("softmax_scan")
def _scan(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs (B, H, Q, N, V) or, with mix, (B, H, N, V), and the carry (m, u, w)."""
    _check(problem)
    given = _laid_out(problem)
    out, m_out, u_out, w_out = _empty_outputs(problem)
    arguments = _arguments(given, out)
    arguments.m_out, arguments.u_out, arguments.w_out = pointer(m_out), pointer(u_out), pointer(w_out)
    library.call(arguments)
    return out, m_out, u_out, w_out


@_scan.register_fake
def _(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(problem)


def _empty_gradients(p: Problem, needed: list[bool]) -> list[Tensor]:
    # gradients of decays are sums of those of scores and of the carry
    return p.empty_gradients([needed[0] or needed[2], *needed[1:4], True, True, True])


@operator("softmax_scan_backward")
def _scan_backward(
    grad_out: Tensor, grad_u: Tensor, grad_w: Tensor, problem: Problem, out: Tensor | None, needed: list[bool]
) -> list[Tensor]:
    """Gradients of the problem's learned tensors, empty where not needed; those of the carry always.

    `out` is needed unless the outputs are mixed."""
    _check(problem)
    expected, _, expected_u, expected_w = _empty_outputs(problem)
    results = [(grad_out, expected), (grad_u, expected_u), (grad_w, expected_w)]
    for x, y in results + ([] if problem.mix is not None else [(out, expected)]):
        if x is None or x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
            raise Unsupported("gradients or outputs that are not the softmax scan's", nearest="backend='torch'")
    given = _laid_out(problem)
    grad_out, grad_u, grad_w = rows_contiguous(grad_out), grad_u.contiguous(), grad_w.contiguous()
    out = expected if out is None else out.contiguous()
    grads = _empty_gradients(problem, needed)
    grad_s, grad_v, grad_decay, grad_mix, grad_m, grad_u_before, grad_w_before = grads
    forward, strides = _arguments(given, out), grad_out.stride()
    library.call(
        ScanBackward(
            forward=ctypes.pointer(forward),
            grad_out=pointer(grad_out),
            grad_out_strides=strides[:4] if problem.mix is None else (strides[0], strides[1], 0, strides[2]),
            grad_u=pointer(grad_u),
            grad_w=pointer(grad_w),
            grad_s=pointer(grad_s) if grad_s.numel() else None,
            grad_s_strides=grad_s.stride(),
            grad_v=pointer(grad_v) if grad_v.numel() else None,
            grad_mix=pointer(grad_mix) if grad_mix.numel() else None,
            grad_carry_m=pointer(grad_m),
            grad_carry_u=pointer(grad_u_before),
            grad_carry_w=pointer(grad_w_before),
        )
    )
    if grad_decay.numel():
        # the decay at token t shifts all earlier exponents; the gradients of an output's exponents sum to 0
        by_token = torch.cat([grad_m.double().sum(-1)[..., None], grad_s.double().sum(-1)[:, :, :-1]], -1)
        grad_decay.copy_(by_token.cumsum(-1).sum_to_size(grad_decay.shape))
    return grads


@_scan_backward.register_fake
def _(
    grad_out: Tensor, grad_u: Tensor, grad_w: Tensor, problem: Problem, out: Tensor | None, needed: list[bool]
) -> list[Tensor]:
    return _empty_gradients(problem, needed)


def _save(ctx: Any, inputs: tuple[Problem], output: tuple[Tensor, ...]) -> None:
    (problem,) = inputs
    problem.keep(ctx, output[0] if problem.mix is None else None)


def _differentiate(
    ctx: Any, grad_out: Tensor, grad_m: Tensor, grad_u: Tensor, grad_w: Tensor
) -> tuple[Tensor | None, ...]:
    problem, (out,) = Problem.kept(ctx)
    needed = problem.needed(ctx)
    return problem.gradients(_scan_backward(grad_out, grad_u, grad_w, problem, out, needed), needed)


_scan.register_autograd(_differentiate, setup_context=_save)
_scan_backward.refuse_gradient("second derivatives of the native softmax scan")
