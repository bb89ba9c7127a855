"""A trained image model with fewer tokens, compared with itself on all tokens: ``tome:remove=4``, ``evit:keep=0.7``."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regard.compression.tokens import METHODS, Reduction, Tokens, reduce_tokens
from regard.compression.tokens.trained import ChoosingTransformer
from regard.contract import Context, Unsupported, an_instance, closest, read_options
from regard.measurement.timing import calm_clock, interleaved
from regard.models.image_model import ImageModel

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

OPTIONS = ("remove", "keep", "blocks", "proportional", "metric")
AT_ONCE = 16
"""Most images in a timed batch."""
SECONDS = 2.0
"""Timing budget for the comparison of speeds."""


@dataclass(frozen=True)
class Reduced:
    """A copy of a model with token reduction, and the reduction that is active in it."""

    described: str
    plain: ImageModel
    model: ImageModel
    reduction: Reduction

    def speeds(self, inputs: Float[Tensor, "b n f"], grid: tuple[int, ...] | None) -> dict[str, Any]:
        """Images per second with all tokens and with fewer, measured in turn on a batch of at most `AT_ONCE`.

        Returns ``batch``, ``images_per_second`` for ``all`` and ``reduced``, their ratio ``speedup``, and ``tokens``,
        the number that each block passed on.
        """
        inputs = inputs[:AT_ONCE]
        context = Context(grid=grid)
        actions = {
            name: partial(model, inputs, context=context)
            for name, model in (("all", self.plain), ("reduced", self.model))
        }
        with torch.inference_mode():
            found = interleaved(
                actions, seconds=SECONDS, most=500, device=inputs.device, clock=calm_clock(inputs.device)
            )
        rates = {name: len(inputs) / timing.median for name, timing in found.items()}
        return {
            "batch": len(inputs),
            "images_per_second": rates,
            "speedup": rates["reduced"] / rates["all"],
            "tokens": self.reduction.counts,
        }


def patches_in(model: Any, tokens: Tokens) -> Int[Tensor, "b rows columns"]:
    """Where each patch of an ImageModel's backbone went: a token's index, or -1 if it was dropped."""
    backbone = model.backbone.model if isinstance(model.backbone, ChoosingTransformer) else model.backbone
    return tokens.places[:, tokens.protected :].unflatten(1, backbone.config.grid)


def reduced(model: nn.Module, text: str) -> Reduced:
    """Copy a model and apply ``NAME:option=value,option=value`` of :func:`regard.compression.tokens.reduce_tokens` to
    the copy.

    Raises:
        Unsupported: for unknown names, unsuitable values, a method without the number of tokens to drop, and models
            that are not vision transformers, or have no class token where the method needs one.
    """
    name, _, rest = text.partition(":")
    name = name.strip()
    if name not in METHODS:
        raise Unsupported(f"--reduce {name!r}", supported=", ".join(METHODS), nearest=closest(name, METHODS))
    options = read_options(rest, name)
    for option in options:
        if option not in OPTIONS:
            raise Unsupported(
                f"option {option!r} of --reduce {name}", supported=", ".join(OPTIONS), nearest=closest(option, OPTIONS)
            )
    if not {"remove", "keep"} & set(options):
        raise Unsupported(
            f"--reduce {text} without a number of tokens",
            supported="remove, patches that go at each block, or keep, the share that stays at some",
            nearest=f"--reduce {name}:keep=0.7",
        )
    if not isinstance(model, ImageModel):
        raise Unsupported(
            f"--reduce with {an_instance(model)}",
            supported="models of images that are vision transformers",
            nearest="regard train --task images --model vit_nano",
        )
    fewer = copy.deepcopy(model)
    return Reduced(text, model, fewer, reduce_tokens(fewer.backbone, name, **options))


def told(speeds: dict[str, Any]) -> str:
    """Both rates and their ratio, in words."""
    rates = speeds["images_per_second"]
    return (
        f"{rates['reduced']:,.0f} images/s, {speeds['speedup']:.2f} times as many as the {rates['all']:,.0f} with all tokens "
        f"(batches of {speeds['batch']})"
    )
