"""Modules of universal_rpe's layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.contract import (
    LayerCall,
    LayerSpec,
    Pattern,
    Projection,
    Tensors,
    Unsupported,
)
from regard.mechanisms.universal_rpe.definition import ACTIVATIONS, Config
from regard.positions.relative import Relative
from regard.positions.toeplitz import Toeplitz

STD = 0.02


class Factors(Projection):
    """Supplies a layer's heads with C."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        self.config, self.causal = config, spec.pattern is Pattern.CAUSAL_SELF
        heads, self.heads = 1 if config.share_heads else spec.heads, spec.heads
        on_grid = isinstance(config.max_distance, tuple)
        if on_grid and spec.pattern.cross:
            raise Unsupported(
                f"universal_rpe with max_distance={config.max_distance} in {spec.pattern.value}",
                supported="self patterns",
                nearest="a number",
            )
        self.table: nn.Module | None = None
        self.grid_table: nn.Parameter | None = None
        if config.factors == "bucketed":
            assert isinstance(config.max_distance, int)
            self.table = Relative(heads=spec.heads, num_buckets=config.num_buckets, max_distance=config.max_distance)
        elif config.factors == "unique" and isinstance(config.max_distance, int):
            self.table = Toeplitz(heads=heads, max_distance=config.max_distance)
        elif config.factors == "unique":
            assert isinstance(config.max_distance, tuple)
            self.grid_table = nn.Parameter(torch.empty(heads, *(2 * side + 1 for side in config.max_distance)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for table in self.parameters():
                if self.config.start == "ones":
                    table.zero_()
                else:
                    table.normal_(std=STD).sub_(ACTIVATIONS[self.config.activation][1])

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        activation, one = ACTIVATIONS[self.config.activation]
        if self.grid_table is not None:
            return heads | {"grid_factors": activation(self.grid_table + one)}
        if self.table is None:
            return heads
        assert isinstance(self.config.max_distance, int)
        if isinstance(self.table, Toeplitz):
            table: Tensor = self.table.table
        else:
            reach = self.config.max_distance
            offsets = torch.arange(-reach, reach + 1, device=next(self.parameters()).device)
            table = self.table.by_distance(offsets, self.causal)  # type: ignore[operator]
        return heads | {"factors": activation(table + one)}
