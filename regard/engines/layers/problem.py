"""The arguments of the operations around the matrix products of a layer as objects, which forms and operators share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.backends.operators import Packed

GATE_FUNCTIONS = ("silu", "sigmoid")
"""Gate functions, in the order of the kernel's numbers."""


@dataclass(frozen=True)
class ShortConvolution(Packed):
    """The arguments of :func:`regard.engines.layers.short_convolution`, all in the dtype of x; with taps `after` the
    token there are no last inputs."""

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
    """The arguments of :func:`regard.engines.layers.rms_norm`; the weight is in at least float32."""

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
    """The arguments of :func:`regard.engines.layers.gated_product`; `function` is an index of `GATE_FUNCTIONS`."""

    x: Tensor
    gate: Tensor
    function: int

    @property
    def learned(self) -> list[Tensor | None]:
        return [self.x, self.gate]
