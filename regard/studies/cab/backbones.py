"""Backbones: small models for the benchmark's tasks, in which the attention of one pattern is replaced at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Context, Mask, Pattern, Result
from regard.models import (
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    LanguageModel,
    LanguageModelConfig,
)
from regard.models.blocks import Block
from regard.models.layer_plan import layer_accepts
from regard.models.variants import read_variant
from regard.positions import Sinusoidal
from regard.tasks import Task

if TYPE_CHECKING:
    from jaxtyping import Float

NOTHING = "nothing"
"""Name used in place of a mechanism for an attention whose output is zero."""
NS, CS, NC, CC = Pattern


class Plans:
    """Layer plans of a backbone: the mechanism for one pattern, softmax attention for the others.

    Args:
        mechanism: its name, or `NOTHING`.
        pattern: the pattern whose attention is replaced.
        longest: tokens of the longest call, for mechanisms with a maximum length.
    """

    def __init__(self, mechanism: str, pattern: Pattern, longest: int) -> None:
        self.mechanism, self.pattern, self.longest = mechanism, pattern, longest

    def __call__(self, pattern: Pattern, layers: int) -> list[tuple[str, dict[str, Any]]]:
        if pattern is not self.pattern or self.mechanism == NOTHING:
            return [("softmax", {})] * layers
        variant = read_variant(self.mechanism)
        own: dict[str, Any] = {"length": self.longest} if variant.card.length == "max" else {}
        if "sinusoidal" not in variant.card.accepts_positions and layer_accepts(variant.card, "positions"):
            own["positions"] = "none"  # explicit, since encoder-decoders otherwise add positions to their input
        return [(name, {**own, **options}) for name, options in variant.plan(layers)]

    def silence(self, pattern: Pattern, blocks: Iterable[Any]) -> None:
        """Replace the attention of a pattern's blocks by zeros if the mechanism is `NOTHING`."""
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
    """An encoder that predicts a token at each position."""
    size = task.vocab_size or 0
    config = EncoderConfig(
        size, size, plan=plans(NS, sizes["layers"]), dim=sizes["dim"], num_heads=sizes["heads"], pool="none"
    )
    model = Encoder(config)
    plans.silence(NS, model.blocks)
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
    """SR3-mini in one step: a convolution, attention blocks over all pixels, a convolution that gives the residual."""

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
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.zero_()  # the initial output is the enlarged picture

    def forward(self, inputs: Float[Tensor, "b n f"], *, context: Context | None = None) -> Result:
        picture = self.stem(inputs.mT.unflatten(-1, self.grid) - 0.5)
        x = picture.flatten(2).mT + self.places
        context = Context() if context is None else context
        for block in self.blocks:
            x = block(x, context=context).output
        return Result(self.head(x.mT.unflatten(-1, self.grid)).flatten(2).mT)


class Informer(nn.Module):
    """Informer-mini (Zhou et al., arXiv 2012.07436): an encoder that distils the past, and a decoder.

    The encoder reads the past, and its tokens are distilled to half as many after each layer but the last. The decoder
    begins with the last points of the past, followed by the points to predict, whose values are zero; it sees them
    causally, then reads the encoded past, and predicts all points at once.
    """

    def __init__(self, task: Task, sizes: Mapping[str, Any], plans: Plans) -> None:
        super().__init__()
        dim, layers, config = sizes["dim"], sizes["layers"], _block_config(sizes)
        self.start, known = sizes["start"], 1 + (task.features or 0)
        self.past, self.points = nn.Linear(task.memory_features or 0, dim), nn.Linear(known, dim)
        self.places = Sinusoidal(dim=dim)
        self.encoder_blocks = nn.ModuleList(Block(entry, config, NS) for entry in plans(NS, layers))
        plans.silence(NS, self.encoder_blocks)
        self.distil = nn.ModuleList([*(_distilling(dim) for _ in range(layers - 1)), nn.Identity()])
        self.encoder_norm = nn.LayerNorm(dim)
        self.blocks = _decoder_blocks(plans, NC, max(1, layers // 2), config)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, task.num_targets or 0)

    def forward(
        self, inputs: Float[Tensor, "b n f"], memory: Float[Tensor, "b m g"], *, context: Context | None = None
    ) -> Result:
        context = Context() if context is None else context
        x = self._placed(self.past(memory), -memory.shape[1])
        for block, distil in zip(self.encoder_blocks, self.distil, strict=True):
            x = distil(block(x, context=context).output.mT).mT
        encoded = self.encoder_norm(x)
        seen = memory[:, -self.start :, : 1 + inputs.shape[2]]  # the target, and what is known ahead too
        y = self._placed(self.points(torch.cat([seen, F.pad(inputs, (1, 0))], 1)), -seen.shape[1])
        for block in self.blocks:
            y = block(y, encoded if block.cross else None, context=context).output
        return Result(self.head(self.norm(y[:, seen.shape[1] :])))

    def _placed(self, x: Float[Tensor, "b n c"], first: int) -> Float[Tensor, "b n c"]:
        """Add sinusoids of the time, which is 0 at the first point to predict."""
        return self.places.embed(x, torch.arange(first, first + x.shape[1], device=x.device)[None])


def _distilling(dim: int) -> nn.Sequential:
    """Informer's distilling of tokens (B, C, N) to half as many, (B, C, ceil(N / 2))."""
    return nn.Sequential(
        nn.Conv1d(dim, dim, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm1d(dim),
        nn.ELU(),
        nn.MaxPool1d(3, stride=2, padding=1),
    )


def _decoder_blocks(plans: Plans, cross: Pattern, layers: int, config: Any) -> nn.ModuleList:
    """Blocks of causal attention, each followed by one of cross-attention with the layer's feed-forward network."""
    blocks = nn.ModuleList()
    for own, other in zip(plans(CS, layers), plans(cross, layers), strict=True):
        blocks.append(Block(own, config, CS, feed_forward=0))
        blocks.append(Block(other, config, cross))
    return blocks


class Completer(nn.Module):
    """PoinTr-mini: half of the output are given points; the other half begin as places on a sphere, get a coarse guess,
    and are refined by cross-attention to the encoded given points and their neighbourhoods."""

    def __init__(self, task: Task, sizes: Mapping[str, Any], plans: Plans) -> None:
        super().__init__()
        dim, layers, config = sizes["dim"], sizes["layers"], _block_config(sizes)
        self.around = nn.Sequential(nn.Linear(6, dim), nn.GELU(), nn.Linear(dim, dim))
        self.encoder_blocks = nn.ModuleList(Block(entry, config, NS) for entry in plans(NS, layers))
        plans.silence(NS, self.encoder_blocks)
        self.guess = nn.Sequential(nn.Linear(dim + 3, dim), nn.GELU(), nn.Linear(dim, 3))
        self.query = nn.Linear(dim + 6, dim)
        self.blocks = nn.ModuleList(Block(entry, config, NC) for entry in plans(NC, layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 3)

    def forward(
        self, inputs: Float[Tensor, "b n 3"], memory: Float[Tensor, "b m 3"], *, context: Context | None = None
    ) -> Result:
        context = Context() if context is None else context
        x = self.around(_neighbourhoods(memory)).amax(2)  # (B, M, dim)
        for block in self.encoder_blocks:
            x = block(x, context=context).output
        half = inputs.shape[1] // 2
        given = memory[:, torch.arange(half, device=memory.device) % memory.shape[1]]
        places = inputs[
            :, torch.arange(inputs.shape[1] - half, device=inputs.device) * inputs.shape[1] // (inputs.shape[1] - half)
        ]
        whole = x.amax(1, keepdim=True).expand(-1, places.shape[1], -1)
        coarse = self.guess(torch.cat([whole, places], -1))
        y = self.query(torch.cat([whole, places, coarse], -1))
        for block in self.blocks:
            y = block(y, x, context=context).output
        return Result(torch.cat([given, coarse + self.head(self.norm(y))], 1))


NEIGHBOURS = 8


def _neighbourhoods(points: Float[Tensor, "b m 3"]) -> Float[Tensor, "b m k 6"]:
    """Each point with the offsets to its nearest neighbours."""
    near = torch.cdist(points, points).topk(min(NEIGHBOURS, points.shape[1]), dim=2, largest=False).indices
    others = points[torch.arange(len(points))[:, None, None], near]
    own = points[:, :, None].expand_as(others)
    return torch.cat([own, others - own], -1)


class _Speaker(nn.Module):
    """Text encoder shared by both speech models."""

    def __init__(self, task: Task, sizes: Mapping[str, Any], plans: Plans) -> None:
        super().__init__()
        dim, self.layers = sizes["dim"], sizes["layers"]
        self.config = _block_config(sizes)
        self.text = nn.Linear(task.memory_features or 0, dim)
        self.places = Sinusoidal(dim=dim)
        self.encoder_blocks = nn.ModuleList(Block(entry, self.config, NS) for entry in plans(NS, self.layers))
        plans.silence(NS, self.encoder_blocks)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, task.num_targets or 0)

    def placed(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return self.places.embed(x, torch.arange(x.shape[1], device=x.device)[None])

    def encode(self, memory: Float[Tensor, "b m f"], mask: Mask | None) -> Float[Tensor, "b m c"]:
        x = self.placed(self.text(memory))
        for block in self.encoder_blocks:
            x = block(x, context=Context(mask=mask)).output
        return x


class FastSpeech(_Speaker):
    """FastSpeech2-mini: all characters last equally long, and all frames are generated at once."""

    def __init__(self, task: Task, sizes: Mapping[str, Any], plans: Plans) -> None:
        super().__init__(task, sizes, plans)
        self.frames = nn.Linear((task.features or 0) + 1, sizes["dim"])
        self.blocks = nn.ModuleList(Block(entry, self.config, NS) for entry in plans(NS, self.layers))
        plans.silence(NS, self.blocks)

    def forward(
        self, inputs: Float[Tensor, "b n f"], memory: Float[Tensor, "b m g"], *, context: Context | None = None
    ) -> Result:
        mask, memory_mask = _right_padded(context)
        x = self.encode(memory, memory_mask)
        frames, letters = (
            torch.full((len(inputs),), n) if one is None or one.lengths is None else one.lengths
            for one, n in ((mask, inputs.shape[1]), (memory_mask, memory.shape[1]))
        )
        at = torch.arange(inputs.shape[1]) * letters[:, None] / frames[:, None].clamp(min=1)
        letter = at.floor().long().clamp(max=memory.shape[1] - 1)
        within = (at - letter)[..., None].to(inputs.dtype)
        y = x.take_along_dim(letter[..., None], 1) + self.frames(torch.cat([inputs, within], -1))
        y = self.placed(y)
        for block in self.blocks:
            y = block(y, context=Context(mask=mask)).output
        return Result(self.head(self.norm(y)))


class TransformerSpeech(_Speaker):
    """Transformer-TTS-mini: generates groups of frames one by one from the text and the previous groups.

    It reads the true previous groups in training (:class:`regard.studies.cab.benches.Groups`), and its own otherwise.
    """

    def __init__(self, task: Task, sizes: Mapping[str, Any], plans: Plans) -> None:
        super().__init__(task, sizes, plans)
        self.before = nn.Linear(task.features or 0, sizes["dim"])
        self.blocks = _decoder_blocks(plans, CC, self.layers, self.config)

    def forward(
        self, inputs: Float[Tensor, "b n f"], memory: Float[Tensor, "b m g"], *, context: Context | None = None
    ) -> Result:
        mask, memory_mask = _right_padded(context)
        encoded = self.encode(memory, memory_mask)
        if self.training:
            return Result(self.decode(inputs, encoded, mask, memory_mask))
        groups = inputs.new_zeros(len(inputs), 1, inputs.shape[2])
        for _ in range(inputs.shape[1] - 1):
            made = self.decode(groups, encoded, None, memory_mask)
            groups = torch.cat([groups, made[:, -1:]], 1)
        return Result(self.decode(groups, encoded, None, memory_mask))

    def decode(self, groups: Tensor, encoded: Tensor, mask: Mask | None, memory_mask: Mask | None) -> Tensor:
        """The next group of frames after each of `groups`, with causal attention between groups."""
        y = self.placed(self.before(groups))
        for block in self.blocks:
            y = block(
                y,
                encoded if block.cross else None,
                context=Context(mask=mask, memory_mask=memory_mask if block.cross else None),
            ).output
        return self.head(self.norm(y))


def _right_padded(context: Context | None) -> tuple[Mask | None, Mask | None]:
    """Masks as lengths, for a task whose padding is on the right."""

    def lengths(mask: Mask | None) -> Mask | None:
        return None if mask is None or mask.valid is None else Mask(lengths=mask.valid.sum(1))

    return (None, None) if context is None else (lengths(context.mask), lengths(context.memory_mask))


def _block_config(sizes: Mapping[str, Any]) -> Any:
    """A config with the fields that :class:`regard.models.blocks.Block` reads."""
    return EncoderConfig(1, features=1, dim=sizes["dim"], num_heads=sizes["heads"], num_layers=1, positions="none")
