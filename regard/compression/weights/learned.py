"""Grids whose steps are learned together with the weights: LSQ (arXiv 1902.08153), quantization while training.

With b bits, Q_n = 2^(b-1) and Q_p = 2^(b-1) - 1, a weight w of a group with step s acts as

    w' = s round(clip(w / s, -Q_n, Q_p))

Gradients go straight through the rounding: to w where it is not clipped, and to s as round(w/s) - w/s there, -Q_n or Q_p
where it is. The gradient of a step is multiplied with 1 / sqrt(n Q_p), n the weights of its group, which makes it as large
beside the step as those of weights are beside the weights (the paper's Section 2.2). A step begins at 2 mean|w| / sqrt(Q_p).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from regard.compression.descent import by_path, descend, mean_loss
from regard.compression.layers import Run
from regard.compression.pruning.losses import Losses
from regard.compression.weights.grids import TINY, Grids, as_codes, in_groups
from regard.layers.quantized import Codes, Format
from regard.measurement import units

KEPT = "learned.safetensors"


class LearnedSteps(nn.Module):
    """A weight (N, K) as its codes hold it, for :func:`torch.nn.utils.parametrize.register_parametrization`.

    Args:
        weight: of which the steps are made.
        format: symmetric.
    """

    def __init__(self, weight: Tensor, format: Format) -> None:
        super().__init__()
        self.format = format
        rows, self.groups = in_groups(weight.detach(), format)
        low, high = format.codes
        self.low, self.high = float(low), float(high)
        counted = min(rows.shape[1], weight.shape[1])
        self.share = 1 / math.sqrt(max(counted * self.high, 1.0))
        self.scale = nn.Parameter((2 * rows.abs().sum(1) / (counted * math.sqrt(self.high))).clamp(min=TINY))

    def forward(self, weight: Tensor) -> Tensor:
        rows, _ = in_groups(weight, self.format)
        scaled = self.scale * self.share + (self.scale * (1 - self.share)).detach()
        step = scaled - scaled.detach() + _stored(scaled)  # exactly what is stored, with the gradient of the step
        places = (rows / step[:, None]).clamp(self.low, self.high)
        rounded = places - places.detach() + places.round().detach()
        return (rounded * step[:, None]).reshape(len(weight), -1)[:, : weight.shape[1]]

    def codes(self, weight: Tensor) -> Codes:
        """What :meth:`forward` makes of a weight, as it is held."""
        rows, groups = in_groups(weight.detach(), self.format)
        grids = Grids(_stored(self.scale.detach()).to(torch.bfloat16), None, int(self.low), int(self.high))
        return as_codes(grids.codes(rows), grids, groups)


def _stored(scale: Tensor) -> Tensor:
    """A step as codes hold it: a positive bfloat16."""
    return scale.detach().clamp(min=TINY).to(torch.bfloat16).to(scale.dtype)


def learn_codes(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    format: Format,
    batches: Sequence[Any],
    run: Run,
    losses: Losses,
    *,
    steps: int,
    learning_rate: float,
    folder: Path | None = None,
    on_step: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Codes], str]:
    """Codes of some layers, after their weights and steps were trained with what they lose, and what came of it in a sentence;
    the layers stay as they were.

    Trained by Adam at a rate that falls to 0 along a cosine, one batch a step, in turn. Adam takes no notice of how large a
    gradient is, so the rate of a step is smaller than that of weights by as much as steps are smaller, in place of the factor
    of its gradient. All else in the model stays, and is in evaluation mode.

    Args:
        folder: where the state is kept each minute and when it is interrupted, so that the same call goes on.
        on_step: told how many steps are done.

    Raises:
        Unsupported: where the loss is not finite.
    """

    def loss_of(step: int) -> Tensor:
        return losses(model, batches[step % len(batches)], run).mean()

    with _trained_alone(model, layers, format) as learned:
        before = mean_loss(loss_of, len(batches))
        done, seconds = descend(
            by_path({f"{name}/{key}": one for name, own in learned.items() for key, one in own.items()}),
            _groups(learned),
            loss_of,
            what="learned grids",
            steps=steps,
            learning_rate=learning_rate,
            file=None if folder is None else folder / KEPT,
            on_step=on_step,
        )
        after = mean_loss(loss_of, len(batches))
        found = {}
        for name, linear in layers.items():
            one: Any = linear
            parametrization: Any = one.parametrizations.weight[0]
            found[name] = parametrization.codes(one.parametrizations.weight.original)
    return found, (
        f"grids learned in {done} steps on {len(batches)} batches, {units.duration(seconds)}: loss on these data "
        f"{units.number(before)} before, {units.number(after)} after"
        + ("" if after <= before else ", which is worse: more batches, or a smaller learning_rate")
    )


def _groups(learned: Mapping[str, Mapping[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Parameters for an optimizer, each with what its learning rate is multiplied with."""
    groups: list[dict[str, Any]] = []
    for own in learned.values():
        size = float(own["weight"].detach().abs().mean().clamp(min=TINY))
        groups.append({"params": [own["weight"]], "factor": 1.0})
        groups.append({"params": [own["scale"]], "factor": float(own["scale"].detach().mean()) / size})
    return groups


@contextmanager
def _trained_alone(
    model: nn.Module, layers: Mapping[str, nn.Linear], format: Format
) -> Iterator[dict[str, dict[str, nn.Parameter]]]:
    """The layers on learned grids, whose weights and steps alone have gradients; all as it was when left."""
    before = {name: linear.weight.detach().clone() for name, linear in layers.items()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in required:
        parameter.requires_grad_(False)
    learned: dict[str, dict[str, nn.Parameter]] = {}
    try:
        for name, linear in layers.items():
            steps = LearnedSteps(linear.weight, format)
            parametrize.register_parametrization(linear, "weight", steps, unsafe=True)
            one: Any = linear
            original: nn.Parameter = one.parametrizations.weight.original
            original.requires_grad_(True)
            learned[name] = {"weight": original, "scale": steps.scale}
        yield learned
    finally:
        for name in learned:
            parametrize.remove_parametrizations(layers[name], "weight", leave_parametrized=False)
            layers[name].weight.data = before[name]
        for parameter, needed in required.items():
            parameter.requires_grad_(needed)
