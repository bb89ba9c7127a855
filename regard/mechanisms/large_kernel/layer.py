"""Modules of large_kernel's layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from regard.contract import (
    Context,
    Mechanism,
    Pattern,
    Result,
    Tensors,
    Unsupported,
    one_of,
)
from regard.layers.linear import make_linear
from regard.layers.mixer import MixerLayer, Tokens
from regard.mechanisms.large_kernel.definition import CONVOLUTIONS, Config


class LargeKernelLayer(MixerLayer):
    """The attention module of the Visual Attention Network: x + W_2 LKA(gelu(W_1 x)), without norm or LayerScale.

    Args:
        card: the mechanism.
        dim: width C of the input and output.
        num_heads: accepted for a uniform signature; every channel has its own filters.
        pattern: noncausal-self, for a sequence or the `grid` of the call; causal-self, for a sequence.
        axes: number of axes of the input grids; 2 in noncausal-self and 1 in causal-self when None.
        linear: kind of the two projections (``dense`` or a projection mechanism).
        config: see :class:`Config`.
    """

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        pattern: str | Pattern = Pattern.NONCAUSAL_SELF,
        axes: int | None = None,
        linear: str = "dense",
        config: Config | None = None,
    ) -> None:
        super().__init__(card, dim, pattern=pattern, config=config)
        self.axes = (1 if self.pattern.causal else 2) if axes is None else axes
        one_of("axes", self.axes, (1,) if self.pattern.causal else CONVOLUTIONS)
        self.grid_axes, self.for_sequences = self.axes, {"axes": 1}
        config = self.config
        self.input_proj = make_linear(dim, dim, bias=True, kind=linear)
        self.output_proj = make_linear(dim, dim, bias=True, kind=linear)
        shapes = {
            "depthwise": (dim, config.depthwise_side**self.axes),
            "dilated": (dim, config.dilated_side**self.axes),
            "pointwise": (dim, dim),
        }
        self.weights = nn.ParameterDict()  # keyed by the mechanism's input names
        for name, shape in shapes.items():
            if name not in config.without:
                self.weights[name] = nn.Parameter(torch.empty(shape))
                self.weights[f"{name}_bias"] = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise with N(0, 2 / fan-out) as for convolutions, biases 0; non-dense projections keep their own."""
        dense = [p for p in (self.input_proj, self.output_proj) if isinstance(p, nn.Linear)]
        for parameter in (*self.weights.values(), *(q for p in dense for q in p.parameters())):
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=math.sqrt(2 / parameter.shape[1]))

    def mix(self, tokens: Tokens, memory: Tokens | None, context: Context, state: Any) -> Result:
        grid = context.grid
        if (1 if grid is None else len(grid)) != self.axes:
            raise Unsupported(
                f"grid={grid} for a layer with filters of {self.axes} axes",
                supported=f"a grid of {self.axes} axes" + (", or a sequence (grid=None)" if self.axes == 1 else ""),
                nearest=f"axes={1 if grid is None else len(grid)}",
            )
        inputs: Tensors = {"x": F.gelu(self.input_proj(tokens.x))}
        inputs |= dict(self.weights.items())
        result = self.call(inputs, tokens, context, state)
        y = self.output_proj(result.output)
        result.output = tokens.x + y if self.config.residual else y
        return result
