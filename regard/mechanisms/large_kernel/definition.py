"""The definition of large_kernel: its options and its reference, written to be read."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    Call,
    Pattern,
    Unsupported,
    at_least,
    one_of,
)

if TYPE_CHECKING:
    from jaxtyping import Float


GATINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multiply": lambda a, x: a * x,
    "add": lambda a, x: a + x,
    "none": lambda a, x: a,
}


NAMES = ("depthwise", "dilated", "pointwise")


CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Config:
    """Options. Functions use `kernel`, `dilation`, `gating` and `sigmoid`, and the convolutions passed to them.

    Attributes:
        kernel: K, the side that is decomposed, >= 1.
        dilation: d, >= 1; d (ceil(K / d) - 1) must be even, so that the dilated filter can be centred.
        gating: how A is combined with the input: ``multiply``, ``add``, or ``none`` (A is the output).
        sigmoid: whether A goes through a sigmoid first.
        without: those of ``depthwise``, ``dilated`` and ``pointwise`` that the layer omits; not both of the first two.
        residual: whether the layer adds its input to its output.
    """

    kernel: int = 21
    dilation: int = 3
    gating: str = "multiply"
    sigmoid: bool = False
    without: tuple[str, ...] = ()
    residual: bool = True

    def __post_init__(self) -> None:
        at_least("kernel", self.kernel, 1)
        at_least("dilation", self.dilation, 1)
        one_of("gating", self.gating, GATINGS)
        if self.dilated_span % 2 == 0:
            raise Unsupported(
                f"kernel={self.kernel} with dilation={self.dilation}, whose dilated filter has no centre",
                supported="dilation * (ceil(kernel / dilation) - 1) even",
                nearest=f"kernel={self.kernel + self.dilation}",
            )
        for name in self.without:
            one_of("without", name, NAMES)
        if {"depthwise", "dilated"} <= set(self.without):
            raise Unsupported(f"without={self.without}, where no tokens mix", supported="depthwise or dilated kept")

    @property
    def depthwise_side(self) -> int:
        """k1, the side of DW."""
        return 2 * self.dilation - 1

    @property
    def dilated_side(self) -> int:
        """k2, the side of DWD in taps."""
        return -(-self.kernel // self.dilation)

    @property
    def dilated_span(self) -> int:
        """Side of the neighbourhood of the dilated filter, d (k2 - 1) + 1; even spans cannot be centred."""
        return self.dilation * (self.dilated_side - 1) + 1

    @property
    def receptive_field(self) -> int:
        """Side of the neighbourhood that A sees with both convolutions."""
        return self.depthwise_side + self.dilated_span - 1


def reference(
    call: Call,
    x: Float[Tensor, "b n c"],
    depthwise: Float[Tensor, "c j"] | None = None,
    depthwise_bias: Float[Tensor, " c"] | None = None,
    dilated: Float[Tensor, "c i"] | None = None,
    dilated_bias: Float[Tensor, " c"] | None = None,
    pointwise: Float[Tensor, "o c"] | None = None,
    pointwise_bias: Float[Tensor, " o"] | None = None,
) -> Float[Tensor, "b n c"]:
    """The definition: each convolution as a sum over its taps of the shifted grid."""
    config: Config = call.config
    sides = _sides(call, x, depthwise, depthwise_bias, dilated, dilated_bias, pointwise, pointwise_bias)

    def convolve(a: Tensor, weight: Tensor, bias: Tensor | None, side: int, dilation: int) -> Tensor:
        reach = dilation * (side - 1)
        before = reach if call.pattern.causal else reach // 2
        padded = F.pad(a, (0, 0, *(before, reach - before) * len(sides)))
        total = torch.zeros_like(a) if bias is None else bias.expand_as(a)
        for tap, at in enumerate(itertools.product(range(side), repeat=len(sides))):
            window = [slice(dilation * i, dilation * i + size) for i, size in zip(at, sides, strict=True)]
            total = total + weight[:, tap] * padded[:, *window]
        return total if call.valid is None else torch.where(call.valid.view(-1, *sides, 1), total, 0)

    a = x.reshape(x.shape[0], *sides, x.shape[-1])
    if depthwise is not None:
        a = convolve(a, depthwise, depthwise_bias, config.depthwise_side, 1)
    if dilated is not None:
        a = convolve(a, dilated, dilated_bias, config.dilated_side, config.dilation)
    a = a.reshape(x.shape)
    if pointwise is not None:
        a = torch.einsum("oc,bnc->bno", pointwise, a) + (0 if pointwise_bias is None else pointwise_bias)
    return GATINGS[config.gating](a.sigmoid() if config.sigmoid else a, x)


def _sides(call: Call, x: Tensor, *weights: Tensor | None) -> tuple[int, ...]:
    """Sides of the grid, (N,) for a sequence; raises Unsupported if the grid or the weights do not fit."""
    config: Config = call.config
    sides = (x.shape[1],) if call.grid is None else tuple(call.grid)
    if call.grid is not None and call.pattern.causal:
        raise Unsupported(
            f"large_kernel on a grid in {call.pattern.value}",
            supported="a sequence (grid=None)",
            nearest=Pattern.NONCAUSAL_SELF.value,
        )
    if len(sides) not in CONVOLUTIONS:
        raise Unsupported(f"large_kernel on a grid of {len(sides)} axes", supported="1, 2 or 3 axes")
    depthwise, depthwise_bias, dilated, dilated_bias, pointwise, pointwise_bias = weights
    if depthwise is None and dilated is None:
        raise Unsupported("large_kernel without depthwise and dilated", supported="one of them at least")
    for name, weight, bias in (
        ("depthwise", depthwise, depthwise_bias),
        ("dilated", dilated, dilated_bias),
        ("pointwise", pointwise, pointwise_bias),
    ):
        if weight is None and bias is not None:
            raise Unsupported(f"large_kernel with {name}_bias and without {name}", supported=f"{name}, or neither")
    for name, weight, width in (
        ("depthwise", depthwise, config.depthwise_side ** len(sides)),
        ("dilated", dilated, config.dilated_side ** len(sides)),
        ("pointwise", None if pointwise is None else pointwise.mT, x.shape[2]),
    ):
        if weight is not None and weight.shape[1] != width:
            raise Unsupported(
                f"large_kernel: {name} with {weight.shape[1]} numbers a channel",
                supported=f"{width} (kernel={config.kernel}, dilation={config.dilation}, {len(sides)} axes)",
            )
    return sides
