"""Image backbones of equal size or cost: their widths are scaled until one quantity is near that of the first.

Depths and everything else stay as published. A backbone whose widths come in large steps is matched as nearly as they allow,
and how nearly is told.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from regard import backends
from regard.contract import Context, Unsupported
from regard.measurement import units
from regard.models import build_model, count_parameters
from regard.models.image_model import ImageModelConfig
from regard.models.variants import Variant
from regard.models.vision.scaling import scaled_widths
from regard.tasks import Task
from regard.training import TrainConfig, runner_of
from regard.workbench.comparison.settings import MATCHED, CompareSettings

STEPS = 5
"""Training steps that a time is the median of."""


@dataclass(frozen=True)
class Matched:
    """A backbone after matching.

    Attributes:
        options: those that differ from its published size.
        value: of the quantity.
        off: relative difference from the first backbone's.
        fixed: whether its widths cannot be changed.
    """

    options: Mapping[str, Any]
    value: float
    off: float
    fixed: bool = False


def match(task: Task, settings: CompareSettings) -> dict[str, dict[str, Any]]:
    """Options of each backbone of the settings with which `settings.match` is nearest to that of the first; as JSON.

    Raises:
        Unsupported: for sizes that a backbone cannot take.
    """
    assert settings.match is not None
    measure = _measures(task, settings)[settings.match]
    found: dict[str, Matched] = {}
    target = math.nan
    for name, variant in settings.variants.items():
        config = _config(variant, task)
        own = measure(config)
        target = target if found else own
        found[name] = Matched({}, own, own / target - 1)
        if len(found) > 1:
            found[name] = _nearest(variant, task, measure, found[name], target)
    return {name: vars(one) for name, one in found.items()}


def with_options(settings: CompareSettings, found: Mapping[str, Mapping[str, Any]]) -> CompareSettings:
    """The settings with the backbones that :func:`match` found, under their names."""
    variants = []
    for name, variant in settings.variants.items():
        backbone, options = variant.backbone or ("", {})
        variants.append(replace(variant, backbone=(backbone, {**options, **found[name]["options"]})))
    return replace(settings, mechanisms=tuple(variants))


def sentence(quantity: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """What was matched, and how nearly."""
    first, *others = found
    shown = {"parameters": units.count, "flops": units.count, "time": units.duration}[quantity]
    parts = []
    for name in others:
        one = found[name]
        widths = ", ".join(f"{option} {_plain(value)}" for option, value in one["options"].items())
        how = "its widths are fixed" if one["fixed"] else widths or "as published"
        parts.append(f"{name} {one['off']:+.1%} ({how})")
    own = shown(found[first]["value"])
    return f"Matched in {MATCHED[quantity]} to {first}, which has {own}: " + "; ".join(parts) + "."


def _plain(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, Sequence) else str(value)


def _config(variant: Variant, task: Task, options: Mapping[str, Any] | None = None) -> ImageModelConfig:
    name, given = variant.backbone or ("", {})
    return ImageModelConfig.for_task(task, name, {**given, **(options or {})})


def _nearest(
    variant: Variant, task: Task, measure: Callable[[ImageModelConfig], float], own: Matched, target: float
) -> Matched:
    """By bisection over its widths, since what is measured rises with them."""
    try:
        candidates = scaled_widths(*_config(variant, task).read())
    except Unsupported:
        return replace(own, fixed=True)
    best = own
    low, high = 0, len(candidates) - 1
    while low <= high:
        middle = (low + high) // 2
        try:
            value = measure(_config(variant, task, candidates[middle]))
        except Unsupported:  # widths that do not go together
            del candidates[middle]
            high -= 1
            continue
        if abs(math.log(value / target)) < abs(math.log(best.value / target)):
            best = Matched(_changed(variant, task, candidates[middle]), value, value / target - 1)
        if value < target:
            low = middle + 1
        else:
            high = middle - 1
    return best


def _changed(variant: Variant, task: Task, options: Mapping[str, Any]) -> dict[str, Any]:
    published = _config(variant, task).read()[1]
    return {name: value for name, value in options.items() if value != getattr(published, name)}


def _measures(task: Task, settings: CompareSettings) -> dict[str, Callable[[ImageModelConfig], float]]:
    def seconds(config: ImageModelConfig) -> float:
        model = build_model(config).to(settings.device)
        batch = max(1, settings.batch_tokens // task.length)
        training = TrainConfig(steps=STEPS + 2, batch_size=batch, precision=settings.precision, measure_memory=False)
        history = runner_of(task).train(model, task, training, deadline=time.monotonic() + 60)
        return statistics.median(point.seconds for point in history.curve[2:] or history.curve)

    def parameters(config: Any) -> float:
        return float(count_parameters(config))

    return {"parameters": parameters, "flops": flops, "time": seconds}


def flops(config: ImageModelConfig) -> float:
    """FLOPs of the products and convolutions of one image, as torch counts them."""
    with torch.device("meta"):
        model = build_model(config).eval()
        inputs = torch.empty(1, math.prod(config.grid), config.patch ** len(config.grid) * config.channels)
    # of tensors without values, which no fused kernel takes that the counter does not know
    with torch.no_grad(), backends.only("torch"), FlopCounterMode(display=False) as counter:
        model(inputs, context=Context(grid=config.grid))
    return float(counter.get_total_flops())
