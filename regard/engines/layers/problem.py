"""Calls of the operations around the products of a layer as objects, which their forms and operators share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.backends.operators import Packed

GATE_FUNCTIONS = ("silu", "sigmoid")
"""In the order of the kernel's numbers."""


@dataclass(frozen=True)
class ShortConvolution(Packed):
    """What :func:`regard.engines.layers.short_convolution` is given, all in the dtype of x; with taps `after` the token
    there are no last inputs."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    cache: Tensor | None
    lengths: Tensor | None
    after: int
    silu: bool

    @property
    def learned(self) -> list[Tensor | None]:
        return [self.x, self.weight, self.bias, self.cache]


@dataclass(frozen=True)
class RMSNorm(Packed):
    """What :func:`regard.engines.layers.rms_norm` is given; the weight has at least float32."""

    x: Tensor
    weight: Tensor | None
    z: Tensor | None
    groups: int
    eps: float
    norm_before_gate: bool

    @property
    def learned(self) -> list[Tensor | None]:
        return [self.x, self.weight, self.z]


@dataclass(frozen=True)
class GatedProduct(Packed):
    """What :func:`regard.engines.layers.gated_product` is given; `function` is a place in `GATE_FUNCTIONS`."""

    x: Tensor
    gate: Tensor
    function: int

    @property
    def learned(self) -> list[Tensor | None]:
        return [self.x, self.gate]
