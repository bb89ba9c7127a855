"""x W^T + b in float32 on a CPU, by the fastest of several libraries, as one differentiable operator.

A *route* computes the product. Which one is fastest depends on the machine (MKL withholds some of its code from
processors of other makers), on the sizes and on the memory layout of the operands, so routes are chosen by measuring.
Products of one *class* have the same layouts, and sizes between the same powers of two; the first product of a class is
measured twice, with its own sizes and strides (a tenth of a second together, at most a second). A route other than
torch's is chosen only if both measurements favour it. Within a process the choice for a class never changes. Weights
that are multiplied by few rows are measured uncached, as a model's weights are in decoding.

A choice on which both measurements agree is stored in ``$XDG_CACHE_HOME/regard/linear_routes.json`` (``~/.cache`` if
the variable is not set) for this processor, torch version, number of threads and list of routes. It is trusted once a
second process has come to the same choice, so that a measurement disturbed by other load does not last.

The environment variable ``REGARD_LINEAR_ROUTE``, or :func:`use_route`, forces a route by name; ``torch`` is plain
``torch.nn.functional.linear``.

The operator is ``regard::linear(x, weight, bias)`` on matrices. Its gradients are products of the same kind, dX = dY
(W^T)^T and dW = dY^T (X^T)^T, with transposed views, so they are routed separately and can be differentiated again.
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
"""Smallest number of weight entries for which a traced graph uses the operator; row counts may be symbolic there."""


MOST_REMEMBERED = 4096
"""Maximum number of products remembered as going to torch."""

CHOICES = Choices(checked_route(os.environ.get("REGARD_LINEAR_ROUTE")))


@contextmanager
def use_route(name: str | None) -> Iterator[None]:
    """Force a route in all threads, for all products that it supports; ``auto`` or None to choose by measuring.

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
    """Compute a product of matrices by the route of its class."""
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
    """`torch.nn.functional.linear`, with faster routes for plain float32 tensors on a CPU."""
    product = None
    if torch.compiler.is_compiling():  # the number of rows may be unknown
        large = weight.numel() >= TRACED_WEIGHT
    else:  # tested first, because most layers of small models end here
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
    """The key under which a product is remembered; None for tensors without strides, and with packed weights, which
    have routes of their own."""
    if LOCAL.frozen is not None or type(weight) not in PLAIN or x.is_nested:
        return None
    if x.layout is not torch.strided or weight.layout is not torch.strided:
        return None
    return x.shape, x.stride(), weight.shape, weight.stride(), torch.get_num_threads()


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether routes support such tensors; False for what `F.linear` rejects, to get its error message."""
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
    """Return whether a product has few rows and a weight large enough for the kernel that reads it once."""
    if x.dim() == 0 or weight.dim() != 2 or weight.numel() < FEW_ROWS_WEIGHT:
        return False
    return 0 < x.numel() <= FEW_ROWS * x.shape[-1]


def _takes_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether to call the few-rows kernel directly: nothing observes the call, and it is the fastest."""
    given = (x, weight) if bias is None else (x, weight, bias)
    if not runs_plainly(*given) or not all(t.is_contiguous() for t in given) or not _unmodified():
        return False
    return CHOICES.find(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), weight) == "native"


def _has_own_route(x: Tensor, weight: Tensor) -> bool:
    """Return whether a route other than torch's computes the product."""
    if torch.compiler.is_compiling():  # not measured here: the operator does so when it runs
        return True
    return CHOICES.find(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), weight) != "torch"


def _unmodified() -> bool:
    """Return whether nothing (autocast, export, function transforms, forward derivatives) changes what operators do."""
    return not (
        torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting() or in_transform() or in_forward_mode()
    )


def chosen_routes() -> dict[str, Any]:
    """The routes chosen so far in this process, for JSON."""
    return CHOICES.as_record()


def take_routes(record: Mapping[str, Any]) -> None:
    """Adopt the :func:`chosen_routes` of another process, so that a run continued from there rounds in the same way.

    Classes that already have a route in this process keep it. Records from another machine or torch version are
    ignored.
    """
    CHOICES.take(record)


def which_route(rows: int, in_features: int, out_features: int) -> str:
    """The name of the route for a linear layer's forward pass on `rows` rows; measures if it is not known yet."""
    return CHOICES.route(Product.plain(rows, out_features, in_features))
