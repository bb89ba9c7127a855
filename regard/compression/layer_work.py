"""Compressing one linear layer by a recipe: its zeros, its grids, and its error."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.compression.calibration import Statistics
from regard.compression.pruning.steps import Masking, SparseGpt, Wanda
from regard.compression.pruning.weights import magnitude, sparsegpt, wanda
from regard.compression.recipes import Awq, Gptq, LlmInt8, Recipe, Rounding, Scaling, SmoothQuant
from regard.compression.weights.gptq import gptq
from regard.compression.weights.grids import round_to_nearest
from regard.compression.weights.scaling import activation_scale, smooth_scale
from regard.contract import Unsupported
from regard.layers.quantized import Codes, QuantizedLinear


@dataclass(frozen=True)
class LayerReport:
    """The outcome for one layer.

    Attributes:
        name: name of its module.
        format: format of its weight, in words.
        error: ``||Q - W|| / ||W||``.
        output_error: ``||X Q^T - X W^T|| / ||X W^T||`` on the calibration data, where second moments of X were
            collected.
        alpha: the exponent that AWQ chose.
        float_columns: number of input columns that stayed in floating point.
        zeros: the share of weights that a step set to 0, where one did.
    """

    name: str
    format: str
    error: float
    output_error: float | None = None
    alpha: float | None = None
    float_columns: int = 0
    zeros: float | None = None


def compress_layer(
    name: str, linear: nn.Linear, recipe: Recipe, statistics: Statistics | None, *, mask: Tensor | None = None
) -> tuple[nn.Linear | QuantizedLinear, LayerReport]:
    """Return a linear layer with the zeros and on the grids of a recipe, and a report of its error.

    Args:
        statistics: statistics of its inputs, where the recipe needs them.
        mask: True for weights that earlier steps have not set to 0, where there were such steps.
    """
    weight = linear.weight.detach()
    second = None if statistics is None else statistics.second
    work = weight
    if recipe.masking is not None:
        try:
            work, mask = _with_zeros(weight, recipe.masking, statistics)
        except Unsupported as error:
            raise Unsupported(f"{name}: {error.asked}", supported=error.supported, nearest=error.nearest) from None
    zeros = None if mask is None else 1 - float(mask.double().mean())
    rounding = recipe.rounding
    if rounding is None:
        words = f"{recipe.masking.pattern if recipe.masking else ''} zeros in {str(weight.dtype)[6:]}"
        lost = None if second is None else relative_error(work, weight, second)
        return with_weight(linear, work), LayerReport(name, words, relative_error(work, weight), lost, zeros=zeros)
    made, alpha = _rounded(linear, work, mask, rounding, recipe.scaling, statistics)
    found = made.dequantized()
    return made, LayerReport(
        name,
        str(rounding.format),
        relative_error(found, weight),
        None if second is None else relative_error(found, weight, second),
        alpha,
        made.float_columns,
        zeros,
    )


def _with_zeros(weight: Tensor, step: Masking, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
    """Return a weight with zeros, and the mask of the weights that are kept."""
    if isinstance(step, SparseGpt):
        assert statistics is not None and statistics.second is not None
        return sparsegpt(weight, statistics.second, step.ratio, step.pattern, damping=step.damping)
    if isinstance(step, Wanda):
        assert statistics is not None
        mask = wanda(weight, statistics.squares, step.ratio, step.pattern)
    else:
        mask = magnitude(weight, step.ratio, step.pattern)
    return torch.where(mask, weight, 0), mask


def with_weight(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    """Return a copy of the layer with another weight."""
    made = copy.copy(linear)
    made._parameters = dict(linear._parameters)
    made.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    return made


def _rounded(
    linear: nn.Linear,
    weight: Tensor,
    mask: Tensor | None,
    rounding: Rounding,
    scaling: Scaling | None,
    statistics: Statistics | None,
) -> tuple[QuantizedLinear, float | None]:
    """Return the layer with `weight` on its grids, and the exponent that AWQ chose."""
    format, work = rounding.format, weight
    second = None if statistics is None else statistics.second
    scale: Tensor | None = None
    alpha: float | None = None
    columns: Tensor | None = None
    if isinstance(scaling, SmoothQuant):
        assert statistics is not None
        scale = smooth_scale(statistics.largest, weight, scaling.alpha)
    elif isinstance(scaling, Awq):
        assert statistics is not None and second is not None
        scale, alpha = activation_scale(
            statistics.mean, second, weight, lambda scaled: round_to_nearest(scaled, format)
        )
    if scale is not None:
        work = weight * scale
    if isinstance(rounding, LlmInt8):
        assert statistics is not None
        largest = statistics.largest if scale is None else statistics.largest / scale
        columns = (largest >= rounding.threshold).nonzero()[:, 0]
        work = work.index_fill(1, columns, 0.0)
    codes: Codes
    if isinstance(rounding, Gptq):
        assert second is not None
        seen = second if scale is None else second / (scale[:, None] * scale)
        options = {"calibrate": rounding.calibrate, "damping": rounding.damping, "order": rounding.order}
        codes = gptq(work, seen, format, mask=mask, **options)  # type: ignore[arg-type]
    else:
        importance = None if statistics is None else statistics.squares
        if importance is not None and scale is not None:
            importance = importance / scale.square()
        codes = round_to_nearest(work, format, rounding.calibrate, importance=importance)
    inverse = None if scale is None else 1 / scale
    return QuantizedLinear.of(linear, codes, format, input_scale=inverse, float_columns=columns), alpha


def relative_error(found: Tensor, weight: Tensor, second: Tensor | None = None) -> float:
    """How far a layer's outputs move when `found` replaces its weight, relative to the outputs: the root of
    the ratio of mean squares.

    Args:
        second: second moment of the inputs, (in, in); without it the weights themselves are compared.
    """
    difference, weight = (found - weight).double(), weight.double()
    if second is None:
        lost, whole = difference.square().sum(), weight.square().sum()
    else:
        lost, whole = (((x @ second.double()) * x).sum() for x in (difference, weight))
    return float((lost.clamp(min=0) / whole).sqrt()) if whole > 0 else 0.0
