"""Products of few rows with a quantized weight in C++ (`native/src/quantized_linear.cpp`), in float32."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.backends.linear.product import FEW_ROWS
from regard.backends.native import library
from regard.backends.native.few_rows import QuantizedLinear
from regard.backends.native.library import pointer, rows_contiguous
from regard.backends.operators import operator, runs_plainly
from regard.contract import Unsupported
from regard.engines.quantized_linear.problem import Problem

SMALLEST_GROUP = 32


def quantized_linear(problem: Problem) -> Tensor:
    """See :func:`regard.engines.quantized_linear.quantized_linear`."""
    return _product(problem)


def refuses(p: Problem) -> str | None:
    """The reason to leave a call to another backend; None if there is none."""
    if p.x.requires_grad and torch.is_grad_enabled():
        return "it has no gradients"
    return _misfit(p)


def _misfit(p: Problem) -> str | None:
    """The reason why the kernel cannot take such tensors; None if it can."""
    tensors = [x for x in (p.x, p.codes, p.scale, p.offset, p.bias) if x is not None]
    if not all(x.is_cpu for x in tensors):
        return "it runs on the processor"
    return _unfit(p)


def _unfit(p: Problem) -> str | None:
    """:func:`_misfit` for tensors on the CPU; rejects more than a few rows, for which the kernel would be slow."""
    if p.x.dtype != torch.float32 or p.x.ndim < 1:
        return f"it computes in float32, not in {str(p.x.dtype)[6:]}"
    if p.rows > FEW_ROWS:
        return f"{p.rows} rows, for which a copy of the weight is faster"
    if p.codes.dtype not in (torch.int8, torch.uint8) or p.codes.ndim != 2 or p.scale.ndim != 2:
        return "codes that are no matrix of int8 or uint8"
    n, groups, k = p.codes.shape[0], p.scale.shape[1], p.x.shape[-1]
    held = [x for x in (p.scale, p.offset) if x is not None]
    if any(x.shape != (n, groups) or x.dtype != torch.bfloat16 for x in held):
        return "scales or offsets of other shapes, or not in bfloat16"
    if p.bias is not None and (p.bias.shape != (n,) or p.bias.dtype != torch.float32):
        return "a bias of another shape, or not in float32"
    if not all(x is None or x.is_contiguous() for x in (p.codes, *held, p.bias)):
        return "a weight that is not contiguous"
    if p.bits == 8:
        fits = groups == 1 and p.offset is None and p.columns == k
    else:
        fits = groups > 0 and p.columns % groups == 0 and p.group % SMALLEST_GROUP == 0 and p.columns >= k
    return None if fits and max(n, p.columns) <= library.MOST else "shapes that do not belong together"


def _arguments(p: Problem, x: Tensor, y: Tensor) -> QuantizedLinear:
    return QuantizedLinear(
        torch.get_num_threads(),
        p.bits,
        p.rows,
        p.codes.shape[0],
        x.shape[-1],
        p.columns,
        p.group,
        pointer(x),
        x.stride(0),
        pointer(p.codes),
        pointer(p.scale),
        pointer(p.offset),
        pointer(p.bias),
        pointer(y),
    )


@operator("quantized_linear")
def _product(problem: Problem) -> Tensor:
    reason = _misfit(problem)
    if reason is not None:
        raise Unsupported(f"a native product of such tensors: {reason}", nearest="backend='torch'")
    x = rows_contiguous(problem.x.reshape(problem.rows, problem.x.shape[-1]))
    y = problem.empty()
    library.call(_arguments(problem, x, y))
    return y


@_product.register_fake
def _(problem: Problem) -> Tensor:
    return problem.empty()


_product.refuse_gradient("gradients of a native product with a quantized weight")


@lru_cache(maxsize=256)
def _template(layouts: tuple[library.Layout | None, ...], rounded: bool, threads: int) -> bytes | None:
    """The struct for tensors with these layouts, without addresses; None if the kernel cannot read them as they are."""
    given: list[Any] = [
        None if layout is None else torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta")
        for layout in layouts
    ]
    problem = Problem(*given)
    x = problem.x
    if _unfit(problem) is not None or not x.is_contiguous() or not x.numel() or (rounded and problem.bits != 8):
        return None
    sizes = problem.rows, problem.codes.shape[0], x.shape[-1], problem.columns, problem.group
    return bytes(QuantizedLinear(threads, problem.bits, *sizes, None, x.shape[-1], rounded=rounded))


def plain(
    x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None, *, rounded: bool = False
) -> Tensor | None:
    """:func:`quantized_linear`, or :func:`dynamic_linear` if inputs are `rounded`, by a direct kernel call; None for
    calls that need the general path, such as those that autograd, a profiler or a mode must see."""
    if not runs_plainly(x, codes, scale, *[t for t in (offset, bias) if t is not None]):
        return None
    layouts = library.layouts(x, codes, scale, offset, bias)
    template = _template(layouts, rounded, torch.get_num_threads())
    if template is None:
        return None
    problem = Problem(x, codes, scale, offset, bias)
    arguments, y = QuantizedLinear.from_buffer_copy(template), problem.empty()
    arguments.x, arguments.codes, arguments.scale = pointer(x), pointer(codes), pointer(scale)
    arguments.offset, arguments.bias, arguments.y = pointer(offset), pointer(bias), pointer(y)
    library.call(arguments)
    return y
