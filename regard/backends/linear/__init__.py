"""x W^T + b in float32 on a CPU by the fastest of several libraries, as one differentiable operator.

A *route* computes the product; which one is fastest depends on the machine (MKL keeps part of its code from processors of
other makers), on the sizes and on how the operands lie in memory, so a route is chosen by measuring. Products of one
*class* have the same layouts, and sizes between the same powers of two; the first product of a class is measured, with
its own sizes and strides, twice (a tenth of a second together, at most a second). Another route than torch's is taken
only where both measurements say so. Within a process the choice for a class never changes. Weights that few rows meet are
measured out of the cache, as a model's are when decoding comes to them.

A choice on which both measurements agree is kept in ``$XDG_CACHE_HOME/regard/linear_routes.json`` (``~/.cache`` when the
variable is not set) for this processor, version of torch, number of threads and list of routes. It is believed once
another process has measured the same, so that what one process measured beside a busy neighbour does not last.

The environment variable ``REGARD_LINEAR_ROUTE``, or :func:`use_route`, forces a route by name: ``torch`` is then plain
``torch.nn.functional.linear``.

The operator is ``regard::linear(x, weight, bias)`` on matrices. Its gradients are products of the same kind,
dX = dY (W^T)^T and dW = dY^T (X^T)^T, with transposed views, so they take routes of their own and can be differentiated
again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from regard.backends.linear.choices import Choices
from regard.backends.linear.product import FEW_ROWS, FEW_ROWS_WEIGHT, Product
from regard.backends.linear.routes import LOCAL, ROUTES, checked_route
from regard.backends.native.few_rows import few_rows
from regard.backends.operators import PLAIN, in_forward_mode, in_transform, operator, runs_plainly

if TYPE_CHECKING:
    from jaxtyping import Float

    Matrix = Float[Tensor, "n k"]

TRACED_WEIGHT = 1 << 16
"""Entries of the smallest weight for which a traced graph has the operator; row counts may be symbols there."""


MOST_REMEMBERED = 4096
"""Products that are remembered as torch's."""

CHOICES = Choices(checked_route(os.environ.get("REGARD_LINEAR_ROUTE")))


@contextmanager
def use_route(name: str | None) -> Iterator[None]:
    """Force a route in all threads, wherever it applies, whatever the size; ``auto`` or None to choose by measuring.

    Raises:
        Unsupported: for an unknown route, or one that this machine lacks.
    """
    choices, before = CHOICES, CHOICES.forced
    choices.force(checked_route(name))
    try:
        yield
    finally:
        choices.force(before)


@operator("linear")
def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product of matrices by the route of its class."""
    return ROUTES[CHOICES.find(x, weight)].run(x, weight, bias)


@_product.register_fake
def _(x: Matrix, weight: Matrix, bias: Tensor | None) -> Matrix:
    return x.new_empty(x.shape[0], weight.shape[0])


@register_flop_formula(torch.ops.regard.linear)
def _flops(x_shape: tuple[int, int], weight_shape: tuple[int, int], *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0]


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    x_needed, weight_needed = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if weight_needed else None, weight if x_needed else None)


def _gradients(ctx: Any, grad: Matrix) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    x_needed, weight_needed, bias_needed = ctx.needs_input_grad[:3]
    return (
        _product(grad, weight.t(), None) if x_needed else None,
        _product(grad.t(), x.t(), None) if weight_needed else None,
        grad.sum(0) if bias_needed else None,
    )


_product.register_autograd(_gradients, setup_context=_save)


def linear(
    x: Float[Tensor, "*b k"], weight: Float[Tensor, "n k"], bias: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "*b n"]:
    """`torch.nn.functional.linear`, by a route of its own where that is faster: plain float32 tensors on a CPU."""
    product = None
    if torch.compiler.is_compiling():  # how many rows there are may not be known
        large = weight.numel() >= TRACED_WEIGHT
    else:  # asked first, because most layers of small models end here
        large = type(x) in PLAIN and 2 * x.numel() * weight.shape[0] >= CHOICES.smallest_work
        product, torchs = _told(x, weight) if large else None, CHOICES.torchs
        if product in torchs:
            return F.linear(x, weight, bias)
        if _are_few(x, weight) and _fits(x, weight, bias) and _takes_native(x, weight, bias):
            return few_rows(x, weight, bias)
    if large and _fits(x, weight, bias):
        if not _has_own_route(x, weight):
            if product is not None:
                if len(torchs) >= MOST_REMEMBERED:
                    torchs.clear()
                torchs.add(product)
        elif _unmodified():
            return _product(x.reshape(-1, x.shape[-1]), weight, bias).reshape(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def _told(x: Tensor, weight: Tensor) -> tuple[Any, ...] | None:
    """What a product is remembered by; None for tensors without strides, and for weights that are packed, which have routes
    of their own."""
    if LOCAL.frozen is not None or type(weight) not in PLAIN or x.is_nested:
        return None
    if x.layout is not torch.strided or weight.layout is not torch.strided:
        return None
    return x.shape, x.stride(), weight.shape, weight.stride(), torch.get_num_threads()


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether routes are for such tensors; also False for what `F.linear` refuses, so that it says why."""
    if type(x) not in PLAIN or type(weight) not in PLAIN:
        return False
    return (
        x.dtype is weight.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and x.layout is weight.layout is torch.strided
        and x.dim() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (
            bias is None
            or (type(bias) in PLAIN and bias.dtype is torch.float32 and bias.is_cpu and bias.shape == weight.shape[:1])
        )
    )


def _are_few(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is one of few rows and a weight that is worth reading fast."""
    if x.dim() == 0 or weight.dim() != 2 or weight.numel() < FEW_ROWS_WEIGHT:
        return False
    return 0 < x.numel() <= FEW_ROWS * x.shape[-1]


def _takes_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether few rows go to the kernel by the shortest way: nobody watches, and it is the fastest."""
    given = (x, weight) if bias is None else (x, weight, bias)
    if not runs_plainly(*given) or not all(t.is_contiguous() for t in given) or not _unmodified():
        return False
    return CHOICES.find(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), weight) == "native"


def _has_own_route(x: Tensor, weight: Tensor) -> bool:
    """Whether another route than torch's computes the product."""
    if torch.compiler.is_compiling():  # nothing is measured here: the operator does that when it runs
        return True
    return CHOICES.find(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), weight) != "torch"


def _unmodified() -> bool:
    """Whether nothing (autocast, export, transforms of functions, forward derivatives) changes what operators do."""
    return not (
        torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting() or in_transform() or in_forward_mode()
    )


def chosen_routes() -> dict[str, Any]:
    """The routes chosen so far in this process, for JSON."""
    return CHOICES.as_record()


def take_routes(record: Mapping[str, Any]) -> None:
    """Go on with the :func:`chosen_routes` of another process, so that a run that it began rounds as it did there.

    Classes of products that this process has chosen for keep their routes, and so do all on another machine or torch.
    """
    CHOICES.take(record)


def which_route(rows: int, in_features: int, out_features: int) -> str:
    """The name of the route that a linear layer's forward takes for so many rows; measures if that is not known yet."""
    return CHOICES.route(Product.plain(rows, out_features, in_features))
