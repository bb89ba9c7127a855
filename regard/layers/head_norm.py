"""Normalisation over the outputs of all heads together, as if they were concatenated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.contract import LayerSpec, Merge

if TYPE_CHECKING:
    from jaxtyping import Float

HEAD_NORMS = ("simple_rms", "rms", "layer", "none")

WITH_PARAMETERS = ("rms", "layer")
"""Norms that a layer follows with a learned weight (and a bias, for ``layer``)."""

EPS = {"simple_rms": 1e-8, "rms": 1e-6, "layer": 1e-5}


def norm_over_heads(o: Float[Tensor, "b h n v"], name: str) -> Float[Tensor, "b h n v"]:
    """Normalise each token's outputs over its heads and features; zeros stay zeros, with finite gradients.

    ``simple_rms``: o / (rms + 1e-8) (TransNormer, arXiv 2210.10340); ``rms``: o / sqrt(rms^2 + 1e-6); ``layer``:
    centred, then divided by sqrt(var + 1e-5). In the dtype of `o`, which should be at least float32.
    """
    if name == "none":
        return o
    if name == "layer":
        o = o - o.mean((1, 3), keepdim=True)
    if name == "simple_rms":
        # at zeros vector_norm has the gradient 0, a square root an infinite one
        length = torch.linalg.vector_norm(o, dim=(1, 3), keepdim=True)
        return o / (length * (o.shape[1] * o.shape[3]) ** -0.5 + EPS[name])
    return o * torch.rsqrt(o.square().mean((1, 3), keepdim=True) + EPS[name])


class HeadNormWeights(Merge):
    """The learned part of a norm over heads (`spec.config.output_norm`), as a merge for the attention shell."""

    each_token_alone = True  # so padding may lie anywhere

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        name, shape = spec.config.output_norm, (spec.heads, 1, spec.value_dim)
        self.weight = nn.Parameter(torch.ones(shape)) if name in WITH_PARAMETERS else None
        self.bias = nn.Parameter(torch.zeros(shape)) if name == "layer" else None

    def forward(self, y: Float[Tensor, "b h n v"], *_: object) -> Float[Tensor, "b h n v"]:
        y = y if self.weight is None else y * self.weight.to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)
