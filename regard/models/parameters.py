"""Models of equal size: a comparison of mechanisms is fair only at the same number of parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from regard.contract import Unsupported
from regard.models.registry import Config, build_model

AnyConfig = TypeVar("AnyConfig", bound=Config)

ALIGNED = 8
"""Widths that are multiples of this number run faster on most processors."""


def count_parameters(model_or_config: nn.Module | Config) -> int:
    """Count all parameters, trainable or frozen, tied ones once. A config's model is built on the meta device."""
    if not isinstance(model_or_config, nn.Module):
        with torch.device("meta"):
            model_or_config = build_model(model_or_config)
    return sum(parameter.numel() for parameter in model_or_config.parameters())


def match_parameters(config: AnyConfig, target: int) -> AnyConfig:
    """Return the config with the feed-forward width that brings its parameter count nearest to `target`.

    The count is linear in the width, so two counts determine it. A multiple of 8 is preferred if its count is within
    half a percent of the target. Layers with their own ``feed_forward`` in the plan keep it.

    Raises:
        Unsupported: if no width comes within 2 % of the target; the message tells the smallest possible count.
    """
    smallest = count_parameters(replace(config, feed_forward=1))
    slope = count_parameters(replace(config, feed_forward=2)) - smallest
    if slope == 0:
        raise Unsupported("a plan whose every layer fixes feed_forward", supported="at least one layer without")

    def count(width: int) -> int:
        return smallest + slope * (width - 1)

    exact = (target - smallest) / slope + 1
    nearest = max(1, round(exact))
    aligned = max(ALIGNED, round(exact / ALIGNED) * ALIGNED)
    width = aligned if abs(count(aligned) - target) <= 0.005 * target else nearest
    if abs(count(width) - target) > 0.02 * target:
        raise Unsupported(
            f"{target:,} parameters with dim={config.dim} and {config.num_layers} layers",
            supported=f"from {smallest:,} parameters, in steps of {slope:,}",
            nearest=f"{count(width):,} parameters",
        )
    return replace(config, feed_forward=width)
