"""The learned maps of the combiner layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.contract import (
    LayerCall,
    LayerSpec,
    Projection,
    Tensors,
)
from regard.mechanisms.combiner.definition import Config, check_pattern


class LearnedMaps(Projection):
    """The learned maps of a layer, if its options have any: for `deepset` pooling and projected row keys.

    Args:
        spec: the layer's specification; its config decides which maps there are.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        check_pattern(config, spec.pattern)
        self.projected = config.projected
        self.names: dict[str, str] = {}
        if config.pool == "deepset":
            self.names = {"pool_q": "pool_k" if config.share_pool else "pool_q", "pool_k": "pool_k"}
            for name in sorted(set(self.names.values())):
                self.register_parameter(name, nn.Parameter(_xavier(spec.head_dim, spec.head_dim)))
        if config.projected:
            told = spec.head_dim if config.row_keys == "wsum_proj" else spec.value_dim
            self.row_in = nn.Parameter(_xavier(spec.heads * told, spec.dim).unflatten(0, (spec.heads, told)))
            self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(spec.dim)), nn.Parameter(torch.zeros(spec.dim))
            out = _xavier(spec.dim, spec.heads * spec.head_dim).unflatten(1, (spec.heads, spec.head_dim))
            self.row_out = nn.Parameter(out.transpose(0, 1).contiguous())
            self.names = {name: name for name in ("row_in", "norm_weight", "norm_bias", "row_out")}

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        x = call.x
        maps = {name: getattr(self, own) for name, own in self.names.items()}
        return heads | maps | ({"residual": x} if self.projected and x is not None else {})


def _xavier(rows: int, columns: int) -> Tensor:
    return nn.init.xavier_uniform_(torch.empty(rows, columns))
