"""Permutation of a sequence's tokens, with a permutation as its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped


class _Reordered(torch.autograd.Function):
    """Permutes tokens, (B, N, ...) -> (B, N, ...).

    The gradient is the inverse permutation. That of `index_select` allows for repeated indices by summing, which takes
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
    """Permute tokens by `order`; `opposite` is its inverse."""
    return x.index_select(1, order) if torch.compiler.is_compiling() else _Reordered.apply(x, order, opposite)


def opposite(order: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The inverse of a permutation."""
    places = order.long()
    return torch.zeros_like(places).scatter(0, places, torch.arange(order.shape[0], device=order.device))
