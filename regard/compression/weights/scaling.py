"""Scales that move difficulty between the inputs of a layer and its weight: x W^T = (x / s) (W s)^T for any s > 0.

SmoothQuant (arXiv 2211.10438) relieves inputs that are rounded: ``s_j = max |x_j|^a / max |W_j|^(1 - a)``.
AWQ (arXiv 2306.00978) protects the weights that meet large inputs: ``s_j = mean |x_j|^a``, with the a that loses least.

Both papers fold 1 / s into the preceding norm or layer. Here a layer multiplies its inputs itself
(:class:`regard.layers.quantized.QuantizedLinear`), so that models need not declare which layer precedes which, and
layers after the same norm each have an s of their own. It costs a product of K numbers for each token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.layers.quantized import Codes

if TYPE_CHECKING:
    from jaxtyping import Float

LEAST = 1e-5
"""The smallest size of inputs and weights that is distinguished."""

ALPHAS = 20
"""Number of exponents that AWQ tries: 0, 1/20, ..., 19/20."""


def smooth_scale(largest: Float[Tensor, " k"], weight: Float[Tensor, "n k"], alpha: float) -> Float[Tensor, " k"]:
    """SmoothQuant's s, which divides the inputs.

    Args:
        largest: max |x_j| over the calibration data.
        alpha: share of the difficulty that moves to the weight; at 0.5 inputs and weight have the same maxima
            afterwards.
    """
    inputs, weights = largest.clamp(min=LEAST), weight.abs().amax(0).clamp(min=LEAST)
    return inputs**alpha / weights ** (1 - alpha)


def activation_scale(
    mean: Float[Tensor, " k"],
    second: Float[Tensor, "k k"],
    weight: Float[Tensor, "n k"],
    rounded: Callable[[Float[Tensor, "n k"]], Codes],
) -> tuple[Float[Tensor, " k"], float]:
    """AWQ's s, and its exponent: of :data:`ALPHAS` candidates, the one whose outputs have the least squared error.

    The error is computed from the second moments, ``trace(D X^T X D^T)`` with D = Q / s - W, so that no inputs are kept.

    Args:
        mean: mean |x_j|.
        second: X^T X.
        rounded: rounds a weight to its grids.
    """
    columns = weight.shape[1]
    best, chosen, least = torch.ones_like(mean), 0.0, float("inf")
    for step in range(ALPHAS):
        alpha = step / ALPHAS
        scale = mean.clamp(min=LEAST) ** alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        difference = rounded(weight * scale).weight(weight.dtype)[:, :columns] / scale - weight
        error = float(((difference @ second) * difference).sum())
        if error < least:
            best, chosen, least = scale, alpha, error
    return best, chosen
