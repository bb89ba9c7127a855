"""Learning the steps of grids together with the weights: LSQ (arXiv 1902.08153), quantization-aware training.

With b bits, Q_n = 2^(b-1) and Q_p = 2^(b-1) - 1, a weight w in a group with step s acts as

    w' = s round(clip(w / s, -Q_n, Q_p))

Gradients go straight through the rounding: to w where it is not clipped, and to s as round(w/s) - w/s there, and as
-Q_n or Q_p where it is clipped. The gradient of a step is multiplied by 1 / sqrt(n Q_p), n the weights of its group, so
that its size relative to the step is like that of the weights' gradients relative to the weights (the paper's Section
2.2). A step starts at 2 mean|w| / sqrt(Q_p).

Deviation: the paper learns the steps of activations too; no format here has fixed scales of inputs.
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
    """A weight (N, K) as its codes represent it, for :func:`torch.nn.utils.parametrize.register_parametrization`.

    Args:
        weight: determines the initial steps.
        format: a symmetric format.
    """

    share: Tensor

    def __init__(self, weight: Tensor, format: Format) -> None:
        super().__init__()
        self.format = format
        rows, self.groups = in_groups(weight.detach(), format)
        low, high = format.codes
        self.low, self.high = float(low), float(high)
        counted = in_groups(torch.ones_like(weight), format)[0].sum(1).clamp(min=1)  # without padding
        self.register_buffer("share", (counted * self.high).clamp(min=1).rsqrt(), persistent=False)
        self.scale = nn.Parameter((2 * rows.abs().sum(1) / (counted * math.sqrt(self.high))).clamp(min=TINY))

    def forward(self, weight: Tensor) -> Tensor:
        rows, _ = in_groups(weight, self.format)
        scaled = self.scale * self.share + (self.scale * (1 - self.share)).detach()
        step = scaled - scaled.detach() + _stored(scaled)  # exactly what is stored, with the gradient of the step
        places = (rows / step[:, None]).clamp(self.low, self.high)
        rounded = places - places.detach() + places.round().detach()
        return (rounded * step[:, None]).reshape(len(weight), -1)[:, : weight.shape[1]]

    def codes(self, weight: Tensor) -> Codes:
        """The codes that represent the output of :meth:`forward` for a weight."""
        rows, groups = in_groups(weight.detach(), self.format)
        grids = Grids(_stored(self.scale.detach()).to(torch.bfloat16), None, int(self.low), int(self.high))
        return as_codes(grids.codes(rows), grids, groups)


def _stored(scale: Tensor) -> Tensor:
    """A step as stored with the codes: a positive bfloat16."""
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
    """Train the weights and steps of some layers on the model's loss; return their codes, and a sentence on the result.
    The layers themselves are restored.

    Training uses Adam with a cosine schedule down to 0, one batch per step, in turn. Adam ignores the scale of gradients,
    so the learning rate of a step is scaled by the size of steps relative to weights, in place of the factor on its
    gradient. Everything else in the model is left alone, and the model is in evaluation mode.

    Args:
        folder: where the state is saved every minute and on interruption, so that the same call resumes.
        on_step: called with the number of steps done.

    Raises:
        Unsupported: if the loss is not finite.
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
    """Parameters for an optimizer, each with the factor on its learning rate."""
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
    """Put the layers on learned grids, with gradients only for their weights and steps; all is restored on exit."""
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
            layers[name].weight.data.copy_(before[name])
        for parameter, needed in required.items():
            parameter.requires_grad_(needed)
