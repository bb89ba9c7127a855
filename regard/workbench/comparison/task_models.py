"""The models that a comparison trains on a task: the backbone with each mechanism, all of about equal size."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from regard.catalogue import get_mechanism
from regard.contract import Kind, Pattern, Unsupported
from regard.models import StackConfig, build_model, config_for, count_parameters, match_parameters
from regard.models.frames import in_frame
from regard.models.image_model import ImageModelConfig
from regard.models.placing import EMBEDDED_POSITIONS
from regard.models.segmentation_model import SegmentationModelConfig
from regard.models.variants import Variant
from regard.models.vision.segmentation import SEGMENTERS
from regard.tasks import Task
from regard.workbench.comparison.settings import CompareSettings


def model_config(
    variant: Variant, task: Task, settings: CompareSettings, frame: str, longest: int | None = None
) -> Any:
    """The backbone for a task with `variant` in place: in every layer, as the pool, or as the projections.

    A mechanism with a constant that depends on the training length gets the task's length, or `longest`.

    In a cross pattern the variant is used between the two sequences, and softmax within each: one pattern is replaced
    at a time, as in the Comprehensive Attention Benchmark (arXiv 2210.07661).
    """
    if variant.backbone is not None:
        return backbone_config(variant, task, settings, longest)
    # the meaning of a pixel or patch depends on its place, which relative positions along the rows do not give
    placed = task.grid is not None and all("sinusoidal" in card.accepts_positions for card in variant.cards)
    plan = _plan(variant, variant.plan(settings.layers), task, task.pattern, frame, placed, longest)
    sizes: dict[str, Any] = {"dim": settings.dim, "num_layers": settings.layers, "num_heads": settings.heads}
    # a scheme of the input that is named for all layers is the model's
    named = {options.get("positions") for _, options in plan}
    if named <= {*EMBEDDED_POSITIONS} and len(named) == 1 and not task.pattern.cross:
        positions = named.pop()
    else:
        positions = "sinusoidal" if placed else "auto"
    sizes |= {"stack": settings.stack, "positions": positions}
    sizes["max_length"] = max(task.length, task.memory_length or 0, *settings.lengths)
    if variant.cards[0].kind is Kind.POOLING:
        sizes["pool"], sizes["pool_options"] = variant.layers[0]
    within = (("encoder", variant.encoder, Pattern.NONCAUSAL_SELF), ("decoder", variant.decoder, Pattern.CAUSAL_SELF))
    own: dict[str, Any] = {f"layers of the {name}": layers for name, layers, _ in within}
    own["the width of the encoder"] = variant.encoder_dim
    for what, given in own.items():
        if given and task.pattern is not Pattern.CAUSAL_CROSS:
            raise Unsupported(
                f"{variant.name}, which names {what}, on the task {task.name}",
                supported="tasks that read a memory and write tokens",
            )
    for name, layers, pattern in within:
        if layers:
            sizes[f"{name}_plan"] = _plan(variant, layers, task, pattern, frame, placed, longest)
    if variant.encoder:
        sizes["encoder_layers"] = len(variant.encoder)
    if variant.encoder_dim is not None:
        sizes["encoder_dim"] = variant.encoder_dim
    return config_for(task, plan, settings.model, **sizes)


def _plan(
    variant: Variant,
    layers: Sequence[tuple[str, Mapping[str, Any]]],
    task: Task,
    pattern: Pattern,
    frame: str,
    placed: bool,
    longest: int | None,
) -> list[tuple[str, dict[str, Any]]]:
    """The layers for one pattern in their frame, with the lengths and axes of a task."""
    plan = []
    lengths = {Pattern.NONCAUSAL_SELF: task.memory_length, Pattern.CAUSAL_SELF: task.length}
    own_length = task.length if not task.pattern.cross else lengths.get(pattern, task.memory_length)
    for name, given in layers:
        card = get_mechanism(name)
        own: dict[str, Any] = {}
        if "length" in card.config.__dataclass_fields__:  # type: ignore[attr-defined]
            own["length"] = (longest or own_length) * given.get("memory_layers", 1)
        if card.module is not None and "axes" in inspect.signature(card.module).parameters:
            own["axes"] = len(task.grid) if task.grid else 1
        options = {**own, **given}
        if card.kind is Kind.PROJECTION:
            name, options = "softmax", {"linear": name, **({"linear_options": options} if options else {})}
        elif card.kind is not Kind.POOLING:
            card.require_pattern(pattern)
        elif task.objective != "classification" or len(variant.cards) > 1:
            raise Unsupported(
                f"{variant.name}, which pools a sequence, on the task {task.name}",
                supported="classification tasks: listops, images, documents, matching",
            )
        if card.kind is Kind.POOLING:
            name, options = "softmax", {}
        plan.append((name, in_frame(name, options, frame, pattern, rotary=not placed)))
    return plan


def backbone_config(variant: Variant, task: Task, settings: CompareSettings, longest: int | None) -> ImageModelConfig:
    """An image backbone or segmenter in its published size for a task, or for a square or cube of `longest` patches."""
    name, options = variant.backbone or ("", {})
    if settings.model is not None or settings.stack != StackConfig():
        given = "--stack" if settings.model is None else "--model"
        raise Unsupported(f"{given} with the backbone {name}", supported=f"{given} with mechanisms")
    config = network_config(name, options, task)
    return config if longest is None else replace(config, grid=square_grid(longest, len(config.grid)))


def network_config(name: str, options: Mapping[str, Any], task: Task) -> ImageModelConfig:
    """An image backbone or segmentation network with these options for a task."""
    return (SegmentationModelConfig if name in SEGMENTERS else ImageModelConfig).for_task(task, name, options)


def square_grid(length: int, axes: int) -> tuple[int, ...]:
    """The sides of the largest square or cube with at most `length` tokens."""
    side = round(length ** (1 / axes))
    return (side - (side**axes > length),) * axes


def matched(variant: Variant, task: Task, settings: CompareSettings, frame: str, target: int) -> Any:
    """The backbone with about `target` parameters; unchanged for image backbones and plans that give all widths."""
    config = model_config(variant, task, settings, frame)
    return config if variant.backbone is not None or variant.sized else match_parameters(config, target)


def parameters_of(variant: Variant, task: Task, settings: CompareSettings, frame: str) -> int:
    """Parameter count of the backbone before matching.

    Raises:
        Unsupported: for a width or a number of heads that the mechanism cannot have; suggests others that it can.
    """
    config = model_config(variant, task, settings, frame)
    try:
        return count_parameters(config)
    except Unsupported as error:
        sizes = [] if variant.backbone is not None else _other_sizes(variant, task, settings, frame)
        if not sizes:  # another width would not help
            raise
        raise Unsupported(
            f"{variant.name} with --dim {settings.dim} and --heads {settings.heads} ({error.asked})",
            supported=error.supported,
            nearest=", or ".join([*sizes, f"--mechanisms without {variant.name}"][:2]),
        ) from None


def _other_sizes(variant: Variant, task: Task, settings: CompareSettings, frame: str) -> list[str]:
    """Options to suggest when a mechanism refuses its sizes: heads for its width, and a width for its heads."""
    found = []
    for name, asked, reach in (("heads", settings.heads, settings.heads), ("dim", settings.dim, 2 * settings.heads)):
        for value in sorted(range(max(1, asked - reach), asked + reach + 1), key=lambda value: abs(value - asked)):
            other = replace(settings, **{name: value})  # type: ignore[arg-type]
            try:
                count_parameters(model_config(variant, task, other, frame))
            except Unsupported:
                continue
            found.append(f"--{name} {value}")
            break
    return found


def target_of(task: Task, settings: CompareSettings) -> int:
    """The parameter count of every model: that of softmax, or else of the first mechanism, in the first frame."""
    names = [name for name in settings.names if name not in settings.unmatched] or settings.names
    measure = "softmax" if "softmax" in names else names[0]
    return parameters_of(settings.variants[measure], task, settings, settings.frames[0])


DEFAULTS = ("softmax", "local", "gated_linear", "delta_rule", "linear", "flow_attention")
"""Exact attention, local attention, and recurrences: the kinds that differ most in cost and recall."""


def default_mechanisms(*tasks: Task) -> tuple[str, ...]:
    """The mechanisms compared if none is named: the first four of `DEFAULTS` that have the patterns of all tasks."""
    patterns = {task.pattern for task in tasks}
    return tuple(name for name in DEFAULTS if patterns <= set(get_mechanism(name).patterns))[:4]


def default_frames(*tasks: Task) -> tuple[str, ...]:
    """The frames if none is named: those of the settings, or the one without convolutions where the order of tokens means
    nothing."""
    return CompareSettings.frames if all(task.memory_ordered for task in tasks) else ("bare",)


def fitting(tasks: Sequence[Task], settings: CompareSettings) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names of the mechanisms that have a matched model for every task, and the reasons why others do not."""
    targets = [target_of(task, settings) for task in tasks]
    kept, refused = [], {}
    for name, variant in settings.variants.items():
        try:
            for task, target in zip(tasks, targets, strict=True):
                matched(variant, task, settings, settings.frames[0], target)
        except Unsupported as error:
            refused[name] = f"{error.asked}; supported: {error.supported}"
        else:
            kept.append(name)
    return tuple(kept), refused


def build(config: Any, seed: int, device: str = "cpu") -> nn.Module:
    """Build a model with the initial weights of a seed, which are the same on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(config).to(device)
