"""Matching of image backbones or segmentation networks: widths are scaled until size or cost is close to the first
one's.

Depths and everything else stay as published. A backbone whose widths change in large steps is matched as closely as
they allow, and the remaining difference is reported. Times are measured in turn with the first backbone's, since the
speed of machines drifts. The closest candidates are measured again and judged by medians, since the closest of several
noisy measurements looks closer than it is.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from regard import backends
from regard.contract import Context, Unsupported
from regard.measurement import units
from regard.measurement.flops import flop_counter
from regard.models import build_model, count_parameters
from regard.models.image_model import ImageModelConfig
from regard.models.variants import Variant
from regard.models.vision.scaling import scaled_widths
from regard.tasks import Task
from regard.training import TrainConfig, runner_of
from regard.workbench.comparison.settings import MATCHED, CompareSettings
from regard.workbench.comparison.task_models import network_config

STEPS = 3
"""Training steps whose median time is taken."""
NEAREST, AGAIN = 2, 3
"""Number of widths whose time is measured again, and how often."""


@dataclass(frozen=True)
class Matched:
    """A backbone after matching.

    Attributes:
        options: the options that differ from the published ones.
        value: the matched quantity.
        off: relative difference from the first backbone.
        fixed: True if its widths cannot be changed.
    """

    options: Mapping[str, Any]
    value: float
    off: float
    fixed: bool = False


def match(task: Task, settings: CompareSettings) -> dict[str, dict[str, Any]]:
    """Find the options for each backbone with which `settings.match` is closest to that of the first; as JSON.

    Raises:
        Unsupported: for sizes that a backbone does not support.
    """
    assert settings.match is not None
    measure = _measures(task, settings)[settings.match]
    (first, *others) = settings.variants.items()
    target = _config(first[1], task)
    fixed = measure(target)

    def beside(config: ImageModelConfig) -> tuple[float, float]:
        """The quantity of a backbone, and its ratio to that of the first."""
        value = measure(config)
        return value, value / (measure(target) if settings.match == "time" else fixed)

    found = {first[0]: Matched({}, fixed, 0.0)}
    for name, variant in others:
        tried = sorted(_tried(variant, task, beside), key=_distance)
        if settings.match == "time":
            tried = [_again(one, variant, task, beside) for one in tried[:NEAREST]]
        found[name] = min(tried, key=_distance)
    return {name: vars(one) for name, one in found.items()}


def with_options(settings: CompareSettings, found: Mapping[str, Mapping[str, Any]]) -> CompareSettings:
    """The settings with the backbones that :func:`match` found, under the same names."""
    variants = []
    for name, variant in settings.variants.items():
        backbone, options = variant.backbone or ("", {})
        variants.append(replace(variant, backbone=(backbone, {**options, **found[name]["options"]})))
    return replace(settings, mechanisms=tuple(variants))


def sentence(quantity: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """A sentence on what was matched, and how closely."""
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
    return network_config(name, {**given, **(options or {})}, task)


def _tried(variant: Variant, task: Task, beside: Callable[[ImageModelConfig], tuple[float, float]]) -> list[Matched]:
    """The backbone as it is, and with the widths of a bisection; the quantity grows with the widths."""
    value, ratio = beside(_config(variant, task))
    try:
        candidates = scaled_widths(*_config(variant, task).read())
    except Unsupported:
        return [Matched({}, value, ratio - 1, fixed=True)]
    tried = [Matched({}, value, ratio - 1)]
    low, high = 0, len(candidates) - 1
    while low <= high:
        middle = (low + high) // 2
        try:
            value, ratio = beside(_config(variant, task, candidates[middle]))
        except Unsupported:  # incompatible widths
            del candidates[middle]
            high -= 1
            continue
        tried.append(Matched(_changed(variant, task, candidates[middle]), value, ratio - 1))
        if ratio < 1:
            low = middle + 1
        else:
            high = middle - 1
    return tried


def _distance(one: Matched) -> float:
    return abs(math.log(1 + one.off))


def _again(
    one: Matched, variant: Variant, task: Task, beside: Callable[[ImageModelConfig], tuple[float, float]]
) -> Matched:
    """The same widths with medians of further measurements."""
    values, ratios = zip(*(beside(_config(variant, task, one.options)) for _ in range(AGAIN)), strict=True)
    return replace(one, value=statistics.median(values), off=statistics.median(ratios) - 1)


def _changed(variant: Variant, task: Task, options: Mapping[str, Any]) -> dict[str, Any]:
    published = _config(variant, task).read()[1]
    return {name: value for name, value in options.items() if value != getattr(published, name)}


def _measures(task: Task, settings: CompareSettings) -> dict[str, Callable[[ImageModelConfig], float]]:
    def seconds(config: ImageModelConfig) -> float:
        model = build_model(config).to(settings.device)
        batch = settings.batch_size(task)
        training = TrainConfig(steps=STEPS + 1, batch_size=batch, precision=settings.precision, measure_memory=False)
        history = runner_of(task).train(model, task, training, deadline=time.monotonic() + 60)
        return statistics.median(point.seconds for point in history.curve[1:] or history.curve)

    def parameters(config: Any) -> float:
        return float(count_parameters(config))

    return {"parameters": parameters, "flops": flops, "time": seconds}


def flops(config: ImageModelConfig) -> float:
    """FLOPs of the matrix products, convolutions and scans for one image."""
    with torch.device("meta"):
        model = build_model(config).eval()
        inputs = torch.empty(1, math.prod(config.grid), config.patch ** len(config.grid) * config.channels)
    # on meta tensors, which fused kernels unknown to the counter do not accept
    with torch.no_grad(), backends.only("torch"), flop_counter() as counter:
        model(inputs, context=Context(grid=config.grid))
    return float(counter.get_total_flops())
