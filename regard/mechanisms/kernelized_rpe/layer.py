"""Random features and offset biases of the kernelized_rpe layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.contract import (
    LayerCall,
    LayerSpec,
    Pattern,
    Projection,
    Tensors,
    Unsupported,
    at_least,
)
from regard.core.precision import wide_dtype
from regard.mechanisms.kernelized_rpe.definition import POSITIVE_RANDOM, Config
from regard.positions.alibi import Alibi
from regard.positions.protocol import Positions
from regard.positions.relative import Relative

if TYPE_CHECKING:
    from jaxtyping import Float


def draw_features(
    features: int, dim: int, *, heads: int = 1, orthogonal: bool = False, generator: torch.Generator | None = None
) -> Float[Tensor, "heads features dim"]:
    """Draw the directions w of positive random features, N(0, I) each, in float32.

    Args:
        features: F, >= 1.
        dim: width of a head.
        heads: number of independent draws; 1 serves all heads.
        orthogonal: whether directions are orthogonal within each group of `dim`, with norms drawn as for independent
            ones.
        generator: source of the draws.
    """
    at_least("features", features, 1)
    if not orthogonal:
        return torch.randn(heads, features, dim, generator=generator)
    groups = math.ceil(features / dim)
    q, r = torch.linalg.qr(torch.randn(heads, groups, dim, dim, generator=generator))
    directions = (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT  # uniform, whichever signs QR chose
    norms = torch.randn(heads, features, dim, generator=generator).norm(dim=-1, keepdim=True)
    return norms * directions.flatten(1, 2)[:, :features]


class Offsets(Projection):
    """Gives a layer's heads their random features, offset biases and temperature."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        self.config, self.heads, self.head_dim = config, spec.heads, spec.head_dim
        self.causal = spec.pattern is Pattern.CAUSAL_SELF
        self.calls = 0
        self.random_features: Tensor | None
        self.register_buffer("random_features", self._draw(None) if config.feature_map == POSITIVE_RANDOM else None)
        self.log_temperature = nn.Parameter(torch.zeros(spec.heads)) if config.learn_temperature else None
        self.class_bias = nn.Parameter(torch.zeros(spec.heads)) if config.learn_class_bias else None
        self.offset_bias = self.grid_bias = self.exponent = None
        self.scheme: Positions | None = None
        heads = 1 if config.share_offsets else spec.heads
        if isinstance(config.max_offset, tuple):
            if spec.pattern.cross:
                raise Unsupported(
                    f"kernelized_rpe with max_offset={config.max_offset} in {spec.pattern.value}",
                    supported="noncausal-self, causal-self",
                    nearest=f"max_offset={max(config.max_offset)}",
                )
            if config.offsets == "learned":
                self.grid_bias = nn.Parameter(torch.zeros(heads, *(2 * side + 1 for side in config.max_offset)))
        elif config.offsets == "learned":
            self.offset_bias = nn.Parameter(torch.zeros(heads, 2 * config.max_offset + 1))
        elif config.offsets == "power":
            self.exponent = nn.Parameter(torch.ones(spec.heads))
        elif config.offsets == "bucketed":
            self.scheme = Relative(heads=spec.heads, max_distance=config.max_offset, std=0.0)
        elif config.offsets == "alibi":
            self.scheme = Alibi(heads=spec.heads)

    def _draw(self, generator: torch.Generator | None) -> Float[Tensor, "h f d"]:
        config = self.config
        features = self.head_dim if config.features is None else config.features
        heads = 1 if config.share_features else self.heads
        return draw_features(features, self.head_dim, heads=heads, orthogonal=config.orthogonal, generator=generator)

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Replace the random features with new ones."""
        if self.random_features is not None:
            self.random_features.copy_(self._draw(generator))

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        context = call.context
        if self.training and self.config.redraw:
            self.calls += 1
            if self.calls % self.config.redraw == 0:
                self.redraw(context.generator)
        made = {
            "offset_bias": self._table(next(iter(heads.values())).device),
            "grid_bias": self.grid_bias,
            "random_features": self.random_features,
            "log_temperature": self.log_temperature,
            "class_bias": self.class_bias,
        }
        return heads | {name: x for name, x in made.items() if x is not None}

    def _table(self, device: torch.device) -> Float[Tensor, "h offsets"] | None:
        if self.exponent is None and self.scheme is None:
            return self.offset_bias
        assert isinstance(self.config.max_offset, int)
        offsets = torch.arange(-self.config.max_offset, self.config.max_offset + 1, device=device)
        if self.scheme is not None:
            assert self.scheme.by_distance is not None
            return self.scheme.by_distance(offsets, self.causal)
        assert self.exponent is not None
        precise = wide_dtype(self.exponent)
        return -self.exponent.clamp(min=0)[:, None] * offsets.abs().to(precise).log1p()
