"""PyramidTNT: Transformer in Transformer as a pyramid, with four stages, a convolutional stem and no class token.

Han et al., arXiv 2201.00978. Blocks are those of :mod:`regard.models.vision.tnt`, with 16 words per sentence in every
stage, except that

- only the first block of a stage has words (the first two in a stage of more than six blocks), and the words' norms are
  over all m c features of a sentence;
- sentences attend to fewer keys, which are averages of r x r sentences through a linear layer and a norm, and each head
  of a stage has a learned bias for each pair of sentence and key.

Between stages a convolution merges 2 x 2 sentences into one, and likewise their words, which are first laid out as one
square. Only one image size is accepted, that of the position tables; its sides are multiples of 8.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalogue import resolve
from regard.contract import Context, Mask, Result, Unsupported
from regard.core.grids import tokens_of
from regard.layers.drop_path import drop_path_rates
from regard.layers.linear import make_linear
from regard.layers.norms import LayerNorm
from regard.models.vision.backbone import Backbone, BackboneConfig, Level, check_stages, map_of
from regard.models.vision.blocks import Blocks
from regard.models.vision.tnt import (
    BLOCK_NAMES,
    Block,
    Fusion,
    TransformerBlock,
    cut,
    initialise,
    learned,
    make_attention,
    on_grid,
    renamed,
)

if TYPE_CHECKING:
    from jaxtyping import Float

SIDE = 4
"""Rows and columns of a sentence's words."""

STRIDE = 8
"""Stride of the sentences after the stem in pixels."""


@dataclass(frozen=True, kw_only=True)
class PyramidTNTConfig(BackboneConfig):
    """The configuration of a :class:`PyramidTNT`. Tuples have an entry for each stage.

    Attributes:
        widths, heads: width and heads of sentences.
        inner_widths, inner_heads: width and heads of words.
        depths: number of blocks.
        reductions: r; keys are averages of r x r sentences.
        expansion, excitation, branch_dropout, attention_dropout: as in :class:`regard.models.vision.tnt.TNTConfig`.
        mixer, mixer_options: mechanism of the outer attention; it is called with the grid in stages without a
            reduction, else with the averages as its memory.
        pair_scores: whether each pair of sentence and key has a learned bias, which the mechanism must support.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    heads: tuple[int, ...] = (4, 8, 16, 16)
    inner_widths: tuple[int, ...] = (8, 16, 32, 32)
    inner_heads: tuple[int, ...] = (2, 4, 8, 8)
    depths: tuple[int, ...] = (2, 8, 4, 2)
    reductions: tuple[int, ...] = (4, 2, 1, 1)
    expansion: float = 4.0
    excitation: bool = False
    mixer: str = "softmax"
    mixer_options: Mapping[str, Any] | None = None
    pair_scores: bool = True
    branch_dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self, "widths", "heads", "inner_widths", "inner_heads", "depths", "reductions")
        if self.pair_scores and "bias" not in resolve(self.mixer, dict(self.mixer_options or {}))[0].honours:
            raise Unsupported(
                f"learned scores of pairs with {self.mixer}",
                supported="mechanisms that add to their scores, such as softmax",
                nearest="pair_scores=False",
            )

    @property
    def sides(self) -> tuple[int, int]:
        least = max((reduction - 1) * 2**stage + 1 for stage, reduction in enumerate(self.reductions))
        return least * STRIDE, STRIDE

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of sentences, stage by stage."""
        height, width = self.size[0] // STRIDE, self.size[1] // STRIDE
        return [(-(-height // 2**stage), -(-width // 2**stage)) for stage in range(len(self.widths))]


def _keys(grid: tuple[int, int], reduction: int) -> int:
    return (grid[0] // reduction) * (grid[1] // reduction)


def _size(width: int, inner: int, heads: int, inner_heads: int, depths: tuple[int, ...], image: int) -> dict[str, Any]:
    factors = (1, 2, 4, 4)
    names = {"widths": width, "inner_widths": inner, "heads": heads, "inner_heads": inner_heads}
    by_stage = {name: tuple(factor * first for factor in factors) for name, first in names.items()}
    return {**by_stage, "depths": depths, "image_size": image, "drop_path": 0.1}


class PyramidTNT(Backbone):
    """PyramidTNT, see the module; sizes ``pyramid_tnt_ti``, ``_s``, ``_m``, ``_b``. Features are (B, N, C)."""

    Config = PyramidTNTConfig
    scales: ClassVar = {"widths": "heads", "inner_widths": "inner_heads"}
    made_for_size = "the tables of positions"
    sizes: ClassVar = {
        "pyramid_tnt_nano": {
            "image_size": 32,
            "widths": (64, 128),
            "heads": (2, 4),
            "inner_widths": (8, 16),
            "inner_heads": (2, 4),
            "depths": (2, 2),
            "reductions": (1, 1),
        },
        "pyramid_tnt_ti": _size(80, 5, 2, 1, (2, 6, 3, 2), 192),
        "pyramid_tnt_s": _size(128, 8, 4, 2, (2, 8, 4, 2), 256),
        "pyramid_tnt_m": _size(192, 12, 4, 2, (2, 8, 6, 2), 256),
        "pyramid_tnt_b": _size(256, 16, 4, 2, (2, 10, 6, 2), 256),
    }

    def __init__(self, config: PyramidTNTConfig) -> None:
        super().__init__(config)
        width, inner = config.widths[0], config.inner_widths[0]
        self.stem = Stem(config.channels, inner, width)
        self.inner_positions = learned(SIDE**2, inner)
        self.outer_positions = learned(math.prod(config.grids[0]), width)
        self.dropout = nn.Dropout(config.branch_dropout)
        rates = drop_path_rates(config.drop_path, config.depths)
        self.stages = nn.ModuleList(Stage(config, number, rates[number]) for number in range(len(config.widths)))
        self.norm = LayerNorm(config.widths[-1])
        self.levels = [Level(each, STRIDE * 2**stage) for stage, each in enumerate(config.widths)]
        initialise(self)
        for module in self.modules():
            if isinstance(module, Stem | Merge):
                _initialise_convolutions(module)
        self.make_head(config.widths[-1])

    def encode(
        self, images: Float[Tensor, "b c h w"], keep: Collection[int] = ()
    ) -> tuple[Float[Tensor, "b n c"], dict[int, Float[Tensor, "b c h w"]]]:
        words, sentences = self.stem(images)
        words = words + self.inner_positions
        sentences, maps = sentences + self.dropout(self.outer_positions), {}
        for number, stage in enumerate(self.stages):
            words, sentences = stage(words, sentences)
            if number in keep:
                maps[number] = map_of(sentences, self.config.grids[number])
        return self.norm(sentences), maps

    def pool(self, features: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        return features.mean(1)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"inner_positions", "outer_positions"}

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: PyramidTNTConfig) -> dict[str, Tensor]:
        """Translate weights of huawei-noah/Efficient-AI-Backbones (`tnt_pytorch/pyramid_tnt.py`).

        Tables of other sizes are interpolated.
        """
        stages = range(1, len(config.widths))
        found = renamed(
            state,
            (
                (r"^patch_embed\.common_conv\.", r"stem.common."),
                (r"^patch_embed\.inner_convs\.", r"stem.words."),
                (r"^patch_embed\.outer_convs\.", r"stem.sentences."),
                (r"^(inner|outer)_pos$", r"\1_positions"),
                (r"\.relative_pos$", r".pair_scores"),
                *((rf"^(word|sentence)_merges\.{number - 1}\.", rf"stages.{number}.merge.\1s.") for number in stages),
                (r"\.merge\.(words|sentences)\.conv\.0\.", r".merge.\1."),
                (r"\.merge\.(words|sentences)\.norm\.", r".merge.\1_norm."),
                (r"\.outer_attn\.linear\.", r".outer.attention.projection."),
                (r"\.outer_attn\.norm\.", r".outer.attention.norm."),
                *BLOCK_NAMES,
                (r"\.outer\.attention\.(query|key|value|output)\.", r".outer.attention.layer.\1."),
            ),
        )
        for number, (grid, reduction) in enumerate(zip(config.grids, config.reductions, strict=True)):
            name = f"stages.{number}.pair_scores"
            if name in found:
                found[name] = _resize_pairs(found[name], grid, (grid[0] // reduction, grid[1] // reduction))
        if "outer_positions" in found:
            found["outer_positions"] = on_grid(found["outer_positions"], config.grids[0])
        return found


class Stem(nn.Module):
    """The stem: images -> words (B n, 16, c) and sentences (B, n, D), one every 8 pixels.

    Args:
        channels: channels of the images.
        inner_width, width: c and D.
    """

    def __init__(self, channels: int, inner_width: int, width: int) -> None:
        super().__init__()
        c = inner_width
        self.common = nn.Sequential(*_convolution(channels, 2 * c, 2))
        self.words = nn.Sequential(*_convolution(2 * c, c, 1))
        self.sentences = nn.Sequential(
            *_convolution(2 * c, 4 * c, 2), *_convolution(4 * c, 8 * c, 2), *_convolution(8 * c, width, 1)
        )

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "bn m i"], Float[Tensor, "b n d"]]:
        x = self.common(images).contiguous(memory_format=torch.channels_last)  # ambiguous with one channel
        return tokens_of(cut(self.words(x), SIDE)), tokens_of(self.sentences(x))


def _convolution(channels: int, width: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()


class Merge(nn.Module):
    """Halves the grid by norms and convolutions of stride 2.

    One convolution is over the sentences, one inside the square that the words of 2 x 2 sentences form. Where a side is
    odd, the words are padded with zeros.

    Args:
        grid: rows and columns before.
        widths, inner_widths: widths before and after.
    """

    def __init__(self, grid: tuple[int, int], widths: tuple[int, int], inner_widths: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.words_norm, self.sentences_norm = LayerNorm(inner_widths[0]), LayerNorm(widths[0])
        self.words = nn.Conv2d(*inner_widths, 3, 2, 1)
        self.sentences = nn.Conv2d(*widths, 3, 2, 1)

    def forward(
        self, words: Float[Tensor, "bn m i"], sentences: Float[Tensor, "b n c"]
    ) -> tuple[Float[Tensor, "bn2 m i2"], Float[Tensor, "b n2 c2"]]:
        (height, width), batch = self.grid, sentences.shape[0]
        x = self.words_norm(words).reshape(batch, height, width, SIDE, SIDE, words.shape[-1])
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, width % 2, 0, height % 2))
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        x = x.reshape(batch, rows, 2, columns, 2, SIDE, SIDE, words.shape[-1]).permute(0, 1, 3, 2, 5, 4, 6, 7)
        squares = map_of(x.flatten(0, 2).flatten(1, 4), (2 * SIDE, 2 * SIDE))
        sentences = map_of(self.sentences_norm(sentences), self.grid)
        return tokens_of(self.words(squares)), tokens_of(self.sentences(sentences))


class Stage(nn.Module):
    """A merge (except in the first stage) and blocks: (words, sentences) -> (words, sentences).

    Args:
        config: the backbone's config.
        number: index of the stage.
        drop_path: stochastic depth probability of each block.
    """

    def __init__(self, config: PyramidTNTConfig, number: int, drop_path: list[float]) -> None:
        super().__init__()
        width, inner_width, self.grid = config.widths[number], config.inner_widths[number], config.grids[number]
        self.merge = None
        if number:
            before = number - 1
            widths, inner_widths = (config.widths[before], width), (config.inner_widths[before], inner_width)
            self.merge = Merge(config.grids[before], widths, inner_widths)
        heads, reduction = config.heads[number], config.reductions[number]
        self.blocks = Blocks()
        for index, rate in enumerate(drop_path):
            shared: dict[str, Any] = {
                "expansion": config.expansion,
                "dropout": config.branch_dropout,
                "drop_path": rate,
            }
            dropout, inner, fusion = config.attention_dropout, None, None
            if index == 0 or (index == 1 and len(drop_path) > 6):
                inner_attention = make_attention(
                    "softmax", inner_width, config.inner_heads[number], {"dropout": dropout}
                )
                inner = TransformerBlock(inner_width, inner_attention, norm=partial(WordsNorm, SIDE**2), **shared)
                fusion = Fusion(SIDE**2, inner_width, width)
            options = {"dropout": dropout, **(config.mixer_options or {})}
            attention = ReducedAttention(config.mixer, width, heads, reduction, options)
            outer = TransformerBlock(width, attention, excitation=config.excitation, **shared)
            self.blocks.append(Block(inner, fusion, outer))
        self.pair_scores = None
        if config.pair_scores:
            pairs = torch.empty(1, heads, math.prod(self.grid), _keys(self.grid, reduction))
            self.pair_scores = nn.Parameter(nn.init.normal_(pairs))

    def forward(
        self, words: Float[Tensor, "bn m i"], sentences: Float[Tensor, "b n c"]
    ) -> tuple[Float[Tensor, "bn2 m i2"], Float[Tensor, "b n2 c2"]]:
        if self.merge is not None:
            words, sentences = self.merge(words, sentences)
        mask = None if self.pair_scores is None else Mask(bias=self.pair_scores)
        context = Context(grid=self.grid, mask=mask)
        for block in self.blocks:
            words, sentences = self.blocks.run(block, words, sentences, context)
        return words, sentences


class ReducedAttention(nn.Module):
    """A layer over the tokens of a grid whose keys are averages of r x r tokens, through a linear layer and a norm.

    Args:
        name, width, heads: mechanism, width and heads of the layer; its pattern is ``noncausal-self`` if r is 1, else
            ``noncausal-cross``.
        reduction: r.
        options: options of the layer.
    """

    def __init__(self, name: str, width: int, heads: int, reduction: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.reduction = reduction
        pattern = "noncausal-self" if reduction == 1 else "noncausal-cross"
        self.layer = make_attention(name, width, heads, options, pattern)
        if reduction > 1:
            self.projection, self.norm = make_linear(width, width, bias=True), LayerNorm(width)

    def forward(self, x: Float[Tensor, "b n c"], *, context: Context) -> Result:
        if self.reduction == 1 or context.grid is None:
            return self.layer(x, context=context)
        averages = F.avg_pool2d(map_of(x, (context.grid[0], context.grid[1])), self.reduction)
        memory = self.norm(self.projection(tokens_of(averages)))
        return self.layer(x, memory, context=context.replace(grid=None))


class WordsNorm(LayerNorm):
    """One norm over all words of a sentence, (N, m, c) -> (N, m, c).

    Args:
        words: m.
        width: c.
    """

    def __init__(self, words: int, width: int) -> None:
        super().__init__(words * width)

    def forward(self, x: Float[Tensor, "n m c"]) -> Float[Tensor, "n m c"]:
        return super().forward(x.flatten(1)).view(x.shape)


def _initialise_convolutions(module: nn.Module) -> None:
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            fan_out = each.kernel_size[0] * each.kernel_size[1] * each.out_channels // each.groups
            nn.init.normal_(each.weight, std=math.sqrt(2 / fan_out))
            if each.bias is not None:
                nn.init.zeros_(each.bias)


def _resize_pairs(table: Float[Tensor, "1 h n m"], grid: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """Resize the pair biases to other grids of queries and keys."""
    heads, n = table.shape[1], table.shape[2]
    by_key = on_grid(table.permute(0, 3, 1, 2).flatten(2), keys)
    by_query = by_key.unflatten(2, (heads, n)).permute(0, 3, 2, 1).flatten(2)
    return on_grid(by_query, grid).unflatten(2, (heads, math.prod(keys))).transpose(1, 2)
