"""Modules of landmark's layer."""

from __future__ import annotations

import torch
from torch import nn

from regard.contract import (
    LayerCall,
    LayerSpec,
    Pattern,
    Projection,
    Tensors,
    Unsupported,
)


class MissKey(Projection):
    """Supplies a layer's heads with learned miss keys if `miss` is set."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        if spec.config.miss and spec.pattern is not Pattern.CAUSAL_SELF:
            raise Unsupported(f"miss=True in {spec.pattern.value}", supported="causal-self", nearest="miss=False")
        self.miss = nn.Parameter(0.02 * torch.randn(spec.kv_heads, spec.head_dim)) if spec.config.miss else None

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        return heads if self.miss is None else heads | {"miss": self.miss}
