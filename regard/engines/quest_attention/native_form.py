"""Attention to chosen pages in C++ (`native/src/quest_attention.cpp`): one call for bounds, choice and attention."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer
from regard.backends.operators import operator, runs_plainly
from regard.contract import Unsupported
from regard.engines.heads import HEADS, Strides
from regard.engines.quest_attention.problem import Problem


class QuestAttention(library.Arguments):
    kernel = "quest_attention"
    _fields_ = (
        *HEADS,
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("page_size", ctypes.c_int64),
        ("chosen", ctypes.c_int64),
        ("shared", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


def run(problem: Problem) -> Tensor:
    """See :func:`regard.engines.quest_attention.quest_attention`."""
    return _attention(problem)


def refuses(p: Problem) -> str | None:
    """The reason to leave a call, whose tensors fit together, to another backend; None if there is none."""
    if p.records and torch.is_grad_enabled():
        return "it has no gradients"
    tensors = (p.k, p.v, p.low, p.high)
    if not all(x.is_cpu for x in tensors):
        return "it runs on cpu, and not all tensors are there"
    if not all(x.dtype == p.q.dtype for x in tensors):
        return "q, k, v and the bounds have different dtypes"
    return None


@operator("quest_attention")
def _attention(problem: Problem) -> Tensor:
    p = problem
    p.check()
    tensors = (p.q, p.k, p.v, p.low, p.high)
    if not all(x.is_cpu and x.dtype == p.q.dtype for x in tensors) or p.q.dtype not in library.DTYPES:
        raise Unsupported("native attention to pages of such tensors", supported="all in float32 or bfloat16 on cpu")
    if not library.within_range(p.page, p.chosen, *p.k.shape, p.v.shape[3]):
        raise Unsupported("native attention to pages of any size", supported=f"numbers up to {library.MOST}")
    if p.counts.numel() and not 0 <= int(p.counts.min()) <= int(p.counts.max()) <= p.k.shape[2]:
        raise Unsupported(f"counts {p.counts.tolist()}", supported=f"0 to {p.k.shape[2]}")
    q, k, v, low, high, counts = (x.contiguous() for x in (*tensors, p.counts))
    out = p.empty()
    if out.numel():
        layouts = library.layouts(q, k, v, low, high, counts)
        arguments = _template(layouts, p.page, p.chosen, p.shared, p.scale, torch.get_num_threads())
        assert arguments is not None
        _call(arguments, (q, k, v, low, high, counts), out)
    return out


@_attention.register_fake
def _(problem: Problem) -> Tensor:
    return problem.empty()


_attention.refuse_gradient("the gradient of native attention to pages", supported="calls without gradients")


@lru_cache(maxsize=256)
def _template(
    layouts: tuple[Any, ...], page: int, chosen: int, shared: bool, scale: float, threads: int
) -> bytes | None:
    """The struct for tensors with these layouts, without addresses; None if the kernel cannot read them as they are."""
    given = [torch.empty_strided(shape, strides, dtype=dtype, device="meta") for shape, strides, dtype in layouts[:5]]
    q, k, v, low, high = given
    counts = torch.empty_strided(*layouts[5][:2], dtype=layouts[5][2], device="cpu")
    problem = Problem(q, k, v, low, high, counts, page, chosen, shared, scale)
    if min(page, chosen + 1) < 1 or problem.misfit() is not None:
        return None
    batch, heads, _, width = q.shape
    apart = q.stride(1) if heads > 1 else q.stride(0)  # stride between heads, also across rows
    evenly = batch <= 1 or q.stride(0) == heads * apart
    if not evenly or (width > 1 and q.stride(3) != 1) or q.dtype not in library.DTYPES or not q.numel():
        return None
    if not all(x.is_contiguous() for x in (*given[1:], counts)):
        return None
    if any(x.dtype != q.dtype for x in given) or not library.within_range(page, chosen, *k.shape, v.shape[3]):
        return None
    return bytes(
        QuestAttention(
            threads=threads,
            dtype=library.DTYPES[q.dtype],
            batch=batch,
            heads=heads,
            kv_heads=k.shape[1],
            n=1,
            m=k.shape[2],
            width=width,
            value_width=v.shape[3],
            q_strides=Strides(heads * apart, apart, 0),
            k_strides=Strides(*k.stride()[:3]),
            v_strides=Strides(*v.stride()[:3]),
            out_strides=Strides(heads * v.shape[3], v.shape[3], v.shape[3]),
            page_size=page,
            chosen=chosen,
            shared=shared,
            scale=scale,
        )
    )


def _call(template: bytes, tensors: tuple[Tensor, ...], out: Tensor) -> None:
    arguments = QuestAttention.from_buffer_copy(template)
    q, k, v, low, high, counts = tensors
    arguments.q, arguments.k, arguments.v, arguments.out = pointer(q), pointer(k), pointer(v), pointer(out)
    arguments.low, arguments.high, arguments.counts = pointer(low), pointer(high), pointer(counts)
    library.call(arguments)


def plain(p: Problem) -> Tensor | None:
    """A direct kernel call; None for calls that need the general path, such as those that autograd, a profiler or a
    mode must see."""
    tensors = (p.q, p.k, p.v, p.low, p.high, p.counts)
    if not runs_plainly(*tensors):
        return None
    template = _template(library.layouts(*tensors), p.page, p.chosen, p.shared, p.scale, torch.get_num_threads())
    if template is None:
        return None
    out = p.empty()
    _call(template, tensors, out)
    return out
