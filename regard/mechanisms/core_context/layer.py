"""The gate of the core_context layer."""

from __future__ import annotations

import torch
from torch import nn

from regard.contract import (
    LayerCall,
    LayerSpec,
    Projection,
    Tensors,
)
from regard.mechanisms.core_context.definition import check_pattern


class Gate(Projection):
    """A layer's gate between tokens and cores, one number per head, if the fusion is gated.

    Args:
        spec: the layer's specification.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        check_pattern(spec.config, spec.pattern)
        if spec.config.pool_keys == "pre_rope":
            self.reads_unrotated = ("keys", 'pool_keys="post_rope"')
        self.gate = nn.Parameter(torch.zeros(spec.heads)) if spec.config.fusion == "gated" else None

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        return heads if self.gate is None else heads | {"gate": self.gate}
