"""Modules of reformer's layer."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.contract import (
    LayerCall,
    LayerSpec,
    Projection,
    Tensors,
)
from regard.mechanisms.reformer.definition import Config


class Rotations(Projection):
    """Supplies a layer's heads with their rotations.

    Args:
        spec: the layer's specification.
    """

    rotations: Tensor

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.config: Config = spec.config
        shape = (spec.heads, self.config.rounds, spec.head_dim, self.config.buckets // 2)
        self.register_buffer("rotations", torch.randn(shape))

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        context = call.context
        rotations = self.rotations
        if self.training and self.config.fresh:
            rotations = torch.randn(
                rotations.shape, generator=context.generator, device=rotations.device, dtype=rotations.dtype
            )
        return {**heads, "rotations": rotations}
