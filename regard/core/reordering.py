"""Sequences whose tokens are put in another order, with a gradient that is an order too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped


class _Reordered(torch.autograd.Function):
    """Tokens in an order that has each of them once, (B, N, ...) -> (B, N, ...).

    Its gradient is the opposite order. That of `index_select` is a sum over places that might come twice, which takes
    many times as long.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor, opposite: Tensor) -> Tensor:
        return x.index_select(1, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return reorder(tangent, *ctx.saved_tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        order, opposite = ctx.saved_tensors
        return reorder(grad, opposite, order), None, None


def reorder(
    x: Shaped[Tensor, "b n ..."], order: Int[Tensor, " n"], opposite: Int[Tensor, " n"]
) -> Shaped[Tensor, "b n ..."]:
    """Tokens in an order that has each of them once; `opposite` is the way back."""
    return x.index_select(1, order) if torch.compiler.is_compiling() else _Reordered.apply(x, order, opposite)


def opposite(order: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The order that undoes one."""
    places = order.long()
    return torch.zeros_like(places).scatter(0, places, torch.arange(order.shape[0], device=order.device))
