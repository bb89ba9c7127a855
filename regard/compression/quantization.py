"""Simulated post-training quantization: the loss in quality from 8-bit weights and activations (arXiv 2306.12929).

::

    found = quantize(model, batches)                       # a copy; the batches are for calibration
    gap = found.model.loss(ids) - model.loss(ids)

Every number is rounded to a uniform grid with one scale for a whole tensor, and stays a floating-point number: nothing
is faster or smaller, but the loss is that of integers. With b bits

    weights:      scale = max |w| / (2^(b-1) - 1),   integers -2^(b-1) ... 2^(b-1) - 1
    activations:  scale = (max(x_max, 1e-8) - min(x_min, 0)) / (2^b - 1),   integers 0 ... 2^b - 1,   zero = round(-x_min / scale)
    q(x) = scale (clip(round(x / scale) + zero) - zero)

so that 0 is on every grid. x_min and x_max are running means over calibration batches, and then fixed.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.contract import Unsupported, an_instance, at_least
from regard.core.precision import wide
from regard.measurement.outliers import is_norm
from regard.mechanisms.gated_softmax import GatePredictor
from regard.positions.learned import Learned

if TYPE_CHECKING:
    from jaxtyping import Float

EPS = 1e-8

HEAD = re.compile(r"(^|\.)(lm_)?head$")
"""Names of the modules that produce a model's logits."""


@dataclass(frozen=True)
class Grid:
    """The numbers ``scale * (i - zero)`` for the integers i from `low` to `high`."""

    scale: float
    zero: int
    low: int
    high: int


def symmetric_grid(x: Float[Tensor, "..."], bits: int = 8) -> Grid:
    """The grid of weights: symmetric about 0, reaching the largest absolute value."""
    at_least("bits", bits, 2)
    largest = float(x.detach().abs().max()) if x.numel() else 0.0
    half = 2 ** (bits - 1)
    return Grid(max(largest, EPS) / (half - 1), 0, -half, half - 1)


def asymmetric_grid(low: float, high: float, bits: int = 8) -> Grid:
    """The grid of activations from `low` to `high`, always extended to include 0."""
    at_least("bits", bits, 2)
    most = 2**bits - 1
    low = min(low, 0.0)
    scale = (max(high, EPS) - low) / most
    if not math.isfinite(scale):
        raise Unsupported(f"a grid from {low} to {high}", supported="finite activations")
    return Grid(scale, min(max(round(-low / scale), 0), most), 0, most)


class _Round(torch.autograd.Function):
    """Round to the nearest integer, passing gradients straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def simulate(x: Float[Tensor, "..."], grid: Grid) -> Float[Tensor, "..."]:
    """The nearest number of the grid, in the dtype of `x`, computed in at least float32.

    Gradients are those of the clip: 1 on the grid's range, 0 beyond (straight through the rounding).
    """
    precise = wide(x)
    index = (_Round.apply(precise / grid.scale) + grid.zero).clamp(grid.low, grid.high)
    return (grid.scale * (index - grid.zero)).to(x.dtype)


@dataclass
class RunningRange:
    """Running means of the least and the largest number per batch, starting with those of the first batch.

    Attributes:
        momentum: weight of the past at each batch, in [0, 1).
        percentile: the upper end is this percentile of a batch's numbers rather than their maximum, above 50; the lower
            end is the percentile 100 less it. None uses all numbers.
    """

    momentum: float = 0.9
    percentile: float | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise Unsupported(f"momentum={self.momentum}", supported="0 <= momentum < 1", nearest="momentum=0.9")
        if self.percentile is not None and not 50 < self.percentile <= 100:
            raise Unsupported(
                f"percentile={self.percentile}", supported="50 < percentile <= 100", nearest="percentile=99.999"
            )

    def update(self, x: Float[Tensor, "..."]) -> None:
        """Update the range with a batch."""
        if not x.numel():
            return
        if self.percentile is None:
            low, high = (float(end) for end in x.detach().aminmax())
        else:
            numbers = x.detach().double().cpu().numpy()
            low, high = (float(end) for end in np.percentile(numbers, [100 - self.percentile, self.percentile]))
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        else:
            self.low = self.momentum * self.low + (1 - self.momentum) * low
            self.high = self.momentum * self.high + (1 - self.momentum) * high


@dataclass(frozen=True)
class Quantized:
    """The result of :func:`quantize`.

    Attributes:
        model: the copy whose weights and activations are simulated.
        weights: grid of each weight, by the name of its module.
        activations: grid of each activation, by the name of the module that returns it, or with ``.input`` appended for
            the module's input.
    """

    model: Any
    weights: dict[str, Grid]
    activations: dict[str, Grid]


def keeps_precision(name: str, module: nn.Module) -> bool:
    """Return whether the paper leaves a module unquantized: the head, by its name, and gate predictors."""
    return HEAD.search(name) is not None or isinstance(module, GatePredictor)


@torch.no_grad()
def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    momentum: float = 0.9,
    percentile: float | None = None,
    keep: Callable[[str, nn.Module], bool] = keeps_precision,
    run: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
) -> Quantized:
    """Return a copy of a model with simulated weights and activations, in evaluation mode; `model` stays as it is.

    Quantized are the weights of linear layers, the tables of embeddings and of learned positions, and the inputs and
    outputs of every linear layer and norm: this covers the context of attention, the activation of feed-forward parts,
    the sum of embeddings and the residual sums, as norms read them. The residual stream itself, scores and attention
    weights (which are inside kernels), convolutions, and parameters of other modules stay in floating point: the paper
    quantizes the stream, scores and attention weights too, so its gaps are larger. A table that is also the head is
    rounded only where it is looked up; an embedding of a class of its own has its own rounded table in the copy.

    Args:
        model: any module with linear layers; the simulation runs in hooks on them, so compile the returned copy.
        batches: passed to `run` one after the other, with the weights on their grids. The paper's BERT takes 16; its
            OPT 4 with a percentile of 99.999.
        weight_bits, activation_bits: b, >= 2.
        momentum, percentile: for the activations' ranges; see :class:`RunningRange`.
        keep: called with the name and the module; returns whether a module stays as it is, with everything in it.
        run: called with the copy and a batch.

    Raises:
        Unsupported: without a batch, for a model without linear layers, and for torch's own attention modules, which
            compute their projections internally.
    """
    made = copy.deepcopy(model).eval()
    linears, norms, tables = _modules(made, keep)
    weights: dict[str, Grid] = {}
    for name, module in linears.items():
        weights[name] = symmetric_grid(module.weight, weight_bits)
        module.weight.copy_(simulate(module.weight, weights[name]))
    for name, module in tables.items():
        table = module.table if isinstance(module, Learned) else module.weight
        weights[name] = symmetric_grid(table, weight_bits)
        if isinstance(module, Learned):
            table.copy_(simulate(table, weights[name]))
        elif type(module) is not nn.Embedding:  # it may scale its rows, and its table may be the head
            module.weight = nn.Parameter(simulate(table, weights[name]), requires_grad=table.requires_grad)
        else:
            module.register_forward_hook(partial(_round_output, weights[name]))
    ranges: dict[str, RunningRange] = {}
    handles: list[Any] = []
    for name, module in {**linears, **norms}.items():
        given, returned = RunningRange(momentum, percentile), RunningRange(momentum, percentile)
        ranges[f"{name}.input"], ranges[name] = given, returned
        handles.append(module.register_forward_hook(partial(_measure, given, returned)))
    for batch in batches:
        run(made, batch)
    for handle in handles:
        handle.remove()
    activations = {
        name: asymmetric_grid(found.low, found.high, activation_bits)
        for name, found in ranges.items()
        if found.low is not None and found.high is not None
    }
    if not activations:
        raise Unsupported("quantization without calibration", supported="a batch or more that passes the linear layers")
    for name, module in {**linears, **norms}.items():
        if name in activations:
            module.register_forward_pre_hook(partial(_round_input, activations[f"{name}.input"]))
            module.register_forward_hook(partial(_round_output, activations[name]))
    return Quantized(made, weights, activations)


def _modules(
    model: nn.Module, keep: Callable[[str, nn.Module], bool]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Linear layers, norms and tables by name, without modules that are kept."""
    linears, norms, tables = {}, {}, {}
    kept: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in kept):
            continue
        if keep(name, module):
            kept.append(name)
        elif isinstance(module, nn.MultiheadAttention):
            raise Unsupported(
                f"quantization of {name or 'a MultiheadAttention'}, whose projections are inside torch's own function",
                supported="projections that are modules",
                nearest='regard.swap(model, "softmax")',
            )
        elif isinstance(module, nn.Linear):
            linears[name] = module
        elif isinstance(module, nn.Embedding | Learned):
            tables[name] = module
        elif is_norm(name, module):
            norms[name] = module
    if not linears:
        raise Unsupported(
            f"quantization of {an_instance(model)} without linear layers", supported="models of torch.nn.Linear"
        )
    return linears, norms, tables


def _measure(into: RunningRange, out: RunningRange, module: nn.Module, given: tuple[Any, ...], result: Tensor) -> None:
    into.update(given[0])
    out.update(result)


def _round_input(grid: Grid, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return simulate(given[0], grid), *given[1:]


def _round_output(grid: Grid, module: nn.Module, given: tuple[Any, ...], result: Tensor) -> Tensor:
    return simulate(result, grid)
