"""Simulated post-training quantization: the loss in quality from 8-bit weights and activations (arXiv 2306.12929).

::

    found = quantize(model, batches)                       # a copy; the batches are for calibration
    gap = found.model.loss(ids) - model.loss(ids)

Every number is rounded to a uniform grid with one scale for a whole tensor (:mod:`regard.compression.ranges`), and stays
a floating-point number: nothing is faster or smaller, but the loss is that of integers. The ranges of activations are
running means over calibration batches, and then fixed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.compression.points import NEAREST, Point, add_inner_points
from regard.compression.ranges import Grid, RunningRange, asymmetric_grid, simulate, symmetric_grid
from regard.contract import Unsupported, an_instance, one_of
from regard.integrations.conv1d import replace_conv1d
from regard.measurement.outliers import is_norm
from regard.mechanisms.gated_softmax import GatePredictor
from regard.positions.learned import Learned

HEAD = re.compile(r"(^|\.)(lm_)?head$")
"""Names of the modules that produce a model's logits."""


@dataclass(frozen=True)
class Quantized:
    """The result of :func:`quantize`.

    Attributes:
        model: the copy whose weights and activations are simulated.
        weights: grid of each weight, by the name of its module.
        activations: grid of each activation, by the name of the module that returns it, or with ``.input`` appended for
            the module's input; with ``points="all"`` also those of :func:`regard.compression.points.add_inner_points`.
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
    weight_p: float | None = None,
    activation_p: float | None = None,
    activation_kl: bool = False,
    points: str = "linear",
    keep: Callable[[str, nn.Module], bool] = keeps_precision,
    run: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
) -> Quantized:
    """Return a copy of a model with simulated weights and activations, in evaluation mode; `model` stays as it is.

    Quantized are the weights of linear layers, the tables of embeddings and of learned positions, and the inputs and
    outputs of every linear layer and norm: this covers the context of attention (after gates), the activation of
    feed-forward parts, and the sum of embeddings and the residual sums as norms read them. With ``points="all"`` so are
    the sums on the residual stream itself, scores before the mask, and attention weights, and then all that the paper
    quantizes is. Softmax, convolutions and parameters of other modules stay in floating point. A table that is also the
    head is rounded only where it is looked up (the projection of a factorised one in both places); an embedding of a
    class of its own has its own rounded table in the copy, where transformers' Conv1D are linear layers.

    Args:
        model: any module with linear layers; the simulation runs in hooks on them, so compile the returned copy.
        batches: passed to `run` one after the other, with the weights on their grids. The paper's BERT takes 16; its
            OPT 4 with a percentile of 99.999.
        weight_bits, activation_bits: b, >= 2.
        momentum, percentile: for the activations' ranges; see :class:`RunningRange`.
        weight_p, activation_p: p > 0 of ranges with the least L_p error, 2 for the mean squared error; None for ranges
            of all numbers. Each batch takes about 90 roundings of each activation.
        activation_kl: ranges of the activations whose histogram changes least; see :func:`regard.compression.ranges.least_divergence_range`.
        points: ``linear``, or ``all`` for regard's models of `softmax`, `clipped_softmax` and `gated_softmax`, whose
            attention then computes all scores as a tensor, without kernels.
        keep: called with the name and the module; returns whether a module stays as it is, with everything in it.
        run: called with the copy and a batch.

    Raises:
        Unsupported: without a batch, for a model without linear layers, and for torch's own attention modules, which
            compute their projections internally. With ``points="all"``, for mechanisms and models whose scores or sums
            are computed elsewhere.
    """
    one_of("points", points, ("linear", "all"))
    made = copy.deepcopy(model).eval()
    replace_conv1d(made)
    modules = _modules(made, keep)
    weights = _round_weights(modules, weight_bits, weight_p)
    found: dict[str, Point] = {}
    handles: dict[str, Any] = {}

    def make(name: str) -> Point:
        found[name] = Point(RunningRange(momentum, percentile, activation_p, activation_bits, activation_kl))
        return found[name]

    if points == "all":
        add_inner_points(modules, make)
    inner = set(found)
    for name, module in modules.items():
        if isinstance(module, nn.Linear) or is_norm(name, module):
            handles[f"{name}.input"] = module.register_forward_pre_hook(make(f"{name}.input").given)
            handles[name] = module.register_forward_hook(make(name).returned)
    for batch in batches:
        run(made, batch)
    for name, point in found.items():
        low, high = point.range.low, point.range.high
        if low is not None and high is not None:
            point.grid = asymmetric_grid(low, high, activation_bits)
        elif name not in inner:
            handles[name].remove()
    activations = {name: point.grid for name, point in found.items() if point.grid is not None}
    if not activations:
        raise Unsupported("quantization without calibration", supported="a batch or more that passes the linear layers")
    unseen = [name for name in found if name in inner and name not in activations]
    if unseen:
        raise Unsupported(
            f"rounding at {', '.join(unseen)}, which the calibration did not pass",
            supported="blocks that add their branches themselves",
            nearest=NEAREST,
        )
    return Quantized(made, weights, activations)


def _modules(model: nn.Module, keep: Callable[[str, nn.Module], bool]) -> dict[str, nn.Module]:
    """All modules by name, without those that are kept."""
    found: dict[str, nn.Module] = {}
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
        else:
            found[name] = module
    if not any(isinstance(module, nn.Linear) for module in found.values()):
        raise Unsupported(
            f"quantization of {an_instance(model)} without linear layers", supported="models of torch.nn.Linear"
        )
    return found


def _round_weights(modules: dict[str, nn.Module], bits: int, p: float | None) -> dict[str, Grid]:
    """Round the weights of linear layers and the tables in place, or where they are looked up; return their grids."""
    grids: dict[str, Grid] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            grids[name] = symmetric_grid(module.weight, bits, p=p)
            module.weight.copy_(simulate(module.weight, grids[name]))
        elif isinstance(module, Learned):
            grids[name] = symmetric_grid(module.table, bits, p=p)
            module.table.copy_(simulate(module.table, grids[name]))
        elif isinstance(module, nn.Embedding):
            table = module.weight
            grids[name] = symmetric_grid(table, bits, p=p)
            if type(module) is nn.Embedding:
                module.register_forward_hook(partial(_round_rows, grids[name]))
            else:  # it may scale its rows, and its table may be the head
                module.weight = nn.Parameter(simulate(table, grids[name]), requires_grad=table.requires_grad)
    return grids


def _round_rows(grid: Grid, module: nn.Module, given: tuple[Any, ...], result: Tensor) -> Tensor:
    return simulate(result, grid)
