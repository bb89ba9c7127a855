"""The backbones: small models of the benchmark's tasks, in which the attention of one pattern is replaced at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import Context, Pattern, Result
from regard.models import (
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    Forecaster,
    ForecasterConfig,
    LanguageModel,
    LanguageModelConfig,
)
from regard.models.blocks import Block
from regard.models.variants import read_variant
from regard.tasks import Task

if TYPE_CHECKING:
    from jaxtyping import Float

NOTHING = "nothing"
"""In the place of a mechanism: an attention whose output is zero."""
NS, CS, NC, CC = Pattern


class Plans:
    """The layers of a backbone: those of one pattern are the mechanism's, the others softmax attention.

    Args:
        mechanism: by name, or `NOTHING`.
        pattern: that is replaced.
        longest: tokens of the longest call, for mechanisms with a greatest length.
    """

    def __init__(self, mechanism: str, pattern: Pattern, longest: int) -> None:
        self.mechanism, self.pattern, self.longest = mechanism, pattern, longest

    def __call__(self, pattern: Pattern, layers: int) -> list[tuple[str, dict[str, Any]]]:
        if pattern is not self.pattern or self.mechanism == NOTHING:
            return [("softmax", {})] * layers
        variant = read_variant(self.mechanism)
        longest = {"length": self.longest} if variant.card.length == "max" else {}
        return [(name, {**longest, **options}) for name, options in variant.plan(layers)]

    def silence(self, pattern: Pattern, blocks: Sequence[Any]) -> None:
        """Leave attention out of the blocks of a pattern, where nothing is in its place."""
        if self.mechanism == NOTHING and pattern is self.pattern:
            for block in blocks:
                block.mixer = _Nothing()


class _Nothing(nn.Module):
    def forward(self, x: Tensor, memory: Tensor | None = None, **call: Any) -> Result:
        return Result(torch.zeros_like(x))


def language_model(task: Task, sizes: Mapping[str, Any], plans: Plans) -> nn.Module:
    """GPT-mini."""
    config = LanguageModelConfig(
        vocab_size=task.vocab_size or 0, plan=plans(CS, sizes["layers"]), dim=sizes["dim"], num_heads=sizes["heads"]
    )
    model = LanguageModel(config)
    plans.silence(CS, model.blocks)
    return model


def masked_model(task: Task, sizes: Mapping[str, Any], plans: Plans) -> nn.Module:
    """An encoder with a token at each place."""
    size = task.vocab_size or 0
    config = EncoderConfig(
        size, size, plan=plans(NS, sizes["layers"]), dim=sizes["dim"], num_heads=sizes["heads"], pool="none"
    )
    model = Encoder(config)
    plans.silence(NS, model.blocks)
    return model


def forecaster(task: Task, sizes: Mapping[str, Any], plans: Plans) -> nn.Module:
    """Informer-mini: the past is encoded, each point of the horizon reads it, all at once."""
    config = ForecasterConfig(
        task.features or 0,
        task.memory_features or 0,
        encoder_plan=plans(NS, sizes["layers"]),
        cross_plan=plans(NC, max(1, sizes["layers"] // 2)),
        dim=sizes["dim"],
        num_heads=sizes["heads"],
    )
    model = Forecaster(config)
    plans.silence(NS, model.encoder_blocks)
    return model


def summarizer(task: Task, sizes: Mapping[str, Any], plans: Plans) -> nn.Module:
    """An encoder-decoder."""
    layers = sizes["layers"]
    config = EncoderDecoderConfig(
        vocab_size=task.vocab_size or 0,
        memory_vocab_size=task.memory_vocab_size,
        encoder_plan=plans(NS, layers),
        decoder_plan=plans(CS, layers),
        cross_plan=plans(CC, layers),
        dim=sizes["dim"],
        num_heads=sizes["heads"],
    )
    model = EncoderDecoder(config)
    plans.silence(NS, model.encoder_blocks)
    return model


class Upscaler(nn.Module):
    """SR3-mini in one step: a convolution, blocks of attention over all pixels, a convolution of what is to be added."""

    def __init__(self, task: Task, sizes: Mapping[str, Any], plans: Plans) -> None:
        super().__init__()
        assert task.grid is not None
        dim, config = sizes["dim"], _block_config(sizes)
        self.grid = task.grid
        self.stem = nn.Conv2d(task.features or 0, dim, 3, padding=1)
        self.places = nn.Parameter(0.02 * torch.randn(task.length, dim))
        self.blocks = nn.ModuleList(Block(entry, config, NS) for entry in plans(NS, sizes["layers"]))
        plans.silence(NS, self.blocks)
        self.head = nn.Conv2d(dim, task.num_targets or 0, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias if self.head.bias is not None else self.head.weight)

    def forward(self, inputs: Float[Tensor, "b n f"], *, context: Context | None = None) -> Result:
        picture = self.stem(inputs.mT.unflatten(-1, self.grid) - 0.5)
        x = picture.flatten(2).mT + self.places
        context = Context() if context is None else context
        for block in self.blocks:
            x = block(x, context=context).output
        return Result(self.head(x.mT.unflatten(-1, self.grid)).flatten(2).mT)


def _block_config(sizes: Mapping[str, Any]) -> Any:
    """What :class:`regard.models.blocks.Block` reads of a model's config."""
    return EncoderConfig(1, features=1, dim=sizes["dim"], num_heads=sizes["heads"], num_layers=1, positions="none")
