"""Transformer in Transformer: a vision transformer whose patches ("sentences") consist of smaller patches ("words").

Han et al., arXiv 2103.00112. The words Y_j (m, c) of each patch j attend to each other; the sentences Z (1 + n, D), the
class token first, attend to each other and read their words:

    Y_j <- Y_j + DropPath(MHSA(LN(Y_j))),   Y_j <- Y_j + DropPath(MLP(LN(Y_j)))
    Z_j <- Z_j + LN(W LN(vec(Y_j)))
    Z <- Z + DropPath(MHSA(LN(Z))),   Z <- Z + DropPath(MLP(LN(Z)))

Words come from a convolution over one zero-padded patch at a time, and their position embeddings are the same in all
patches, so the words of a patch depend on nothing but its own pixels. The inner attention processes all patches as one
batch. Only one image size is accepted, that of the position table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import Context, Pattern, Unsupported, at_least, one_of
from regard.core.grids import tokens_of
from regard.create import create_layer
from regard.layers.attention import AttentionLayer
from regard.layers.base import Layer
from regard.layers.drop_path import DropPath, drop_path_rates
from regard.layers.feed_forward import MLP
from regard.layers.linear import make_linear
from regard.layers.norms import LayerNorm
from regard.layers.residual import add_feed_forward, fused_attention
from regard.models.layer_plan import check_plan, read_plan
from regard.models.vision.backbone import Backbone, BackboneConfig, Level, map_of
from regard.models.vision.blocks import Blocks
from regard.models.vision.patch_tokens import resize_positions

if TYPE_CHECKING:
    from jaxtyping import Float

POSITIONS = ("both", "inner", "outer", "none")
POOLS = ("class", "mean")


@dataclass(frozen=True, kw_only=True)
class TNTConfig(BackboneConfig):
    """The configuration of a :class:`TNT`.

    Attributes:
        patch: side of a patch in pixels; divides both sides of the image.
        stride: stride of the words in pixels; divides `patch`.
        width, heads: width and heads of sentences.
        inner_width, inner_heads: width and heads of words.
        depth: number of blocks.
        vanilla: indices of blocks without words, as in a plain vision transformer.
        expansion: hidden width of the feed-forward networks, as a multiple of their width.
        excitation: whether a :class:`SqueezeExcitation` follows each outer feed-forward network.
        positions: where learned positions are added: ``inner`` to words, ``outer`` to sentences, ``both`` or ``none``.
        pool: ``class`` reads the class token; ``mean`` has no class token and averages the sentences.
        mixer, mixer_options: mechanism of the outer attention; without a class token it receives the grid.
        legacy: as in timm's `tnt_s_legacy_patch16_224`: the convolution is over the whole image, and the words are only
            normed before the projection to their sentence, each word by itself.
        branch_dropout: dropout probability after position tables, inside the feed-forward networks and at the end of
            each branch.
        attention_dropout: dropout probability of the weights of both attentions.
    """

    patch: int = 16
    stride: int = 4
    width: int = 384
    heads: int = 6
    inner_width: int = 24
    inner_heads: int = 4
    depth: int = 12
    vanilla: tuple[int, ...] = ()
    expansion: float = 4.0
    excitation: bool = False
    positions: str = "both"
    pool: str = "class"
    mixer: str = "softmax"
    mixer_options: Mapping[str, Any] | None = None
    legacy: bool = False
    branch_dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("positions", self.positions, POSITIONS)
        one_of("pool", self.pool, POOLS)
        for name in ("patch", "stride", "width", "heads", "inner_width", "inner_heads", "depth"):
            at_least(name, getattr(self, name), 1)
        if self.patch % self.stride:
            raise Unsupported(f"stride={self.stride} in patches of {self.patch}", supported="a divisor of the patch")
        if not all(0 <= index < self.depth for index in self.vanilla):
            raise Unsupported(f"vanilla={self.vanilla} of {self.depth} blocks", supported=f"0 to {self.depth - 1}")

    @property
    def sides(self) -> tuple[int, int]:
        return self.patch, self.patch

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.size[0] // self.patch, self.size[1] // self.patch

    @property
    def words(self) -> int:
        """Number of words in a patch."""
        return (self.patch // self.stride) ** 2


class TNT(Backbone):
    """TNT, see the module; sizes ``tnt_ti``, ``tnt_s``, ``tnt_b``.

    Every block is a level; features are (B, 1 + n, C).
    """

    Config = TNTConfig
    scales: ClassVar = {"width": "heads", "inner_width": "inner_heads"}
    made_for_size = "the table of positions"
    sizes: ClassVar = {
        "tnt_nano": {
            "image_size": 32,
            "patch": 8,
            "stride": 2,
            "width": 96,
            "heads": 3,
            "inner_width": 8,
            "inner_heads": 2,
            "depth": 6,
        },
        "tnt_ti": {"width": 192, "heads": 3, "inner_width": 12, "inner_heads": 2, "drop_path": 0.1},
        "tnt_s": {"width": 384, "heads": 6, "inner_width": 24, "drop_path": 0.1},
        "tnt_b": {"width": 640, "heads": 10, "inner_width": 40, "drop_path": 0.1},
    }

    def __init__(self, config: TNTConfig) -> None:
        super().__init__(config)
        n, width = math.prod(config.grid), config.width
        self.prefix = int(config.pool == "class")
        self.pools = ("token", "avg") if self.prefix else ("avg",)
        self.words = nn.Conv2d(config.channels, config.inner_width, 7, config.stride, 3)
        self.inner_positions = learned(config.words, config.inner_width, config.positions in ("both", "inner"))
        self.outer_positions = learned(self.prefix + n, width, config.positions in ("both", "outer"))
        self.class_token = learned(1, width, config.pool == "class")
        self.embedding = Fusion(config.words, config.inner_width, width, bias=True)
        self.dropout = nn.Dropout(config.branch_dropout)
        rates = drop_path_rates(config.drop_path, (config.depth,))[0]
        self.blocks = Blocks(self._block(config, index, rate) for index, rate in enumerate(rates))
        self.norm = LayerNorm(width)
        self.levels = [Level(width, config.patch)] * config.depth
        initialise(self)
        self.make_head(width)

    def _block(self, config: TNTConfig, index: int, drop_path: float) -> Block:
        shared: dict[str, Any] = {
            "expansion": config.expansion,
            "dropout": config.branch_dropout,
            "drop_path": drop_path,
        }
        dropout, inner, fusion = config.attention_dropout, None, None
        if index not in config.vanilla:
            attention = make_attention("softmax", config.inner_width, config.inner_heads, {"dropout": dropout})
            inner = TransformerBlock(config.inner_width, attention, **shared)
            fusion = Fusion(config.words, config.inner_width, config.width, bias=config.legacy, legacy=config.legacy)
        options = {"dropout": dropout, **(config.mixer_options or {})}
        attention = make_attention(config.mixer, config.width, config.heads, options)
        if self.prefix and (getattr(attention, "grid_axes", None) or 1) > 1:
            raise Unsupported(
                f"{config.mixer}, which mixes a grid, together with a class token",
                supported="mechanisms that mix sequences",
                nearest="pool='mean'",
            )
        outer = TransformerBlock(config.width, attention, excitation=config.excitation, **shared)
        return Block(inner, fusion, outer, self.prefix)

    def encode(
        self, images: Float[Tensor, "b c h w"], keep: Collection[int] = ()
    ) -> tuple[Float[Tensor, "b n c"], dict[int, Float[Tensor, "b c h w"]]]:
        grid, maps = self.config.grid, {}
        context = Context() if self.prefix else Context(grid=grid)
        words, sentences = self.embed(images)
        for number, block in enumerate(self.blocks):
            words, sentences = self.blocks.run(block, words, sentences, context)
            if number in keep:
                maps[number] = map_of(sentences[:, self.prefix :].contiguous(), grid)
        return self.norm(sentences), maps

    def embed(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "bn m i"], Float[Tensor, "b n c"]]:
        """Return the words of all patches and the sentences, after the class token, with their positions added."""
        if self.config.legacy:
            words = cut(self.words(images), self.config.patch // self.config.stride)
        else:
            words = self.words(cut(images, self.config.patch))
        words = tokens_of(words)
        if self.inner_positions is not None:
            words = words + self.inner_positions
        sentences = self.embedding(words, (images.shape[0], math.prod(self.config.grid)))
        if self.class_token is not None:
            sentences = torch.cat([self.class_token.expand(images.shape[0], -1, -1), sentences], 1)
        if self.outer_positions is not None:
            sentences = sentences + self.outer_positions
        return words, self.dropout(sentences)

    def pool(self, features: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        return features[:, 0] if self.global_pool == "token" else features[:, self.prefix :].mean(1)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {name for name, _ in self.named_parameters(recurse=False)}

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: TNTConfig) -> dict[str, Tensor]:
        """Translate weights of huawei-noah/Efficient-AI-Backbones (`tnt_pytorch/tnt.py`) or of timm.

        Positions of other sizes are interpolated.
        """
        found = renamed(
            {name: value for name, value in state.items() if name != "outer_tokens"},  # unused
            (
                (r"^(patch|pixel)_embed\.proj\.", r"words."),
                (r"^(proj_norm1|norm1_proj)\.", r"embedding.norm1."),
                (r"^(proj_norm2|norm2_proj)\.", r"embedding.norm2."),
                (r"^proj\.", r"embedding.projection."),
                (r"^(inner_pos|pixel_pos)$", r"inner_positions"),
                (r"^(outer_pos|patch_pos)$", r"outer_positions"),
                (r"^cls_token$", r"class_token"),
                (r"\.norm1_proj\.", r".fusion.norm1."),
                (r"\.norm2_proj\.", r".fusion.norm2."),
                (r"\.(norm|attn|mlp)_in\.", r".inner_\1."),
                (r"\.norm_mlp_in\.", r".inner_norm2."),
                (r"\.inner_norm\.", r".inner_norm1."),
                (r"\.(attn|norm)_out\.", r".outer_\1."),
                (r"\.outer_norm\.", r".outer_norm1."),
                (r"\.norm_mlp\.", r".outer_norm2."),
                (r"^(blocks\.\d+)\.mlp\.", r"\1.outer_mlp."),
                *BLOCK_NAMES,
            ),
        )
        table = found.get("inner_positions")
        if table is not None and table.ndim == 4:
            found["inner_positions"] = table.flatten(2).transpose(1, 2)
        table = found.get("outer_positions")
        if table is not None:
            prefix = int(config.pool == "class")
            places = on_grid(table[:, prefix:], config.grid)
            found["outer_positions"] = torch.cat([table[:, :prefix], places], 1)
        return found

    @classmethod
    def options_told(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        legacy = any(name.endswith(".fusion.projection.bias") for name in weights)
        return {"pool": "class" if "class_token" in weights else "mean", "legacy": legacy}


class Block(nn.Module):
    """A block: words (B n, m, c) and sentences (B, prefix + n, D) -> the same.

    Args:
        inner, fusion: modules for the words, and from words to sentences; both None in a block without words.
        outer: module for the sentences.
        prefix: number of tokens before the sentences, which have no words.
    """

    def __init__(self, inner: nn.Module | None, fusion: nn.Module | None, outer: nn.Module, prefix: int = 0) -> None:
        super().__init__()
        self.inner, self.fusion, self.outer, self.prefix = inner, fusion, outer, prefix

    def forward(
        self, words: Float[Tensor, "bn m i"], sentences: Float[Tensor, "b n c"], context: Context
    ) -> tuple[Float[Tensor, "bn m i"], Float[Tensor, "b n c"]]:
        words, sentences = self.read(words, sentences)
        return words, self.outer(sentences, context)

    def read(
        self, words: Float[Tensor, "bn m i"], sentences: Float[Tensor, "b n c"]
    ) -> tuple[Float[Tensor, "bn m i"], Float[Tensor, "b n c"]]:
        """Mix the words of each patch, and add what its sentence reads of them."""
        if self.inner is None or self.fusion is None:
            return words, sentences
        words = self.inner(words)
        added = self.fusion(words, (sentences.shape[0], sentences.shape[1] - self.prefix))
        return words, sentences + F.pad(added, (0, 0, self.prefix, 0))


class Fusion(nn.Module):
    """LN(W LN(vec(Y))) of each sentence's concatenated words: (B n, m, c) -> (B, n, D).

    Args:
        words: m.
        inner_width, width: c and D.
        bias: whether the projection has a bias.
        legacy: W vec(LN(Y)) instead, with one norm over c.
    """

    def __init__(self, words: int, inner_width: int, width: int, *, bias: bool = False, legacy: bool = False) -> None:
        super().__init__()
        self.legacy = legacy
        self.norm1 = LayerNorm(inner_width if legacy else words * inner_width)
        self.projection = make_linear(words * inner_width, width, bias=bias)
        self.norm2 = nn.Identity() if legacy else LayerNorm(width)

    def forward(self, words: Float[Tensor, "bn m i"], shape: tuple[int, int]) -> Float[Tensor, "b n c"]:
        """Return vectors in `shape` (batch, sentences)."""
        normed = self.norm1(words).flatten(1) if self.legacy else self.norm1(words.flatten(1))
        return self.norm2(self.projection(normed)).unflatten(0, shape)


class TransformerBlock(nn.Module):
    """X + DropPath(attention(LN(X))), then X + DropPath(MLP(LN(X))), (B, N, C) -> (B, N, C).

    Args:
        width: C.
        attention: a layer, called with the context.
        expansion: hidden width of the feed-forward network as a multiple of C.
        dropout: dropout probability inside the feed-forward network and at the end of both branches.
        drop_path: stochastic depth probability of both branches.
        excitation: whether a :class:`SqueezeExcitation` follows the feed-forward network.
        norm: creates a norm, given its width.
    """

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        *,
        expansion: float,
        dropout: float,
        drop_path: float,
        excitation: bool = False,
        norm: Callable[[int], nn.Module] = LayerNorm,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attention = attention
        self.mlp = MLP(width, int(expansion * width), dropout=dropout, bias=True)
        self.excitation = SqueezeExcitation(width) if excitation else nn.Identity()
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], context: Context | None = None) -> Float[Tensor, "b n c"]:
        mixed = self.add_attended(x, context)
        return add_feed_forward(mixed, self.norm2, self.mlp, self.dropout, self.excitation, self.drop_path)

    def add_attended(self, x: Float[Tensor, "b n c"], context: Context | None = None) -> Float[Tensor, "b n c"]:
        """X + DropPath(attention(LN(X)))."""
        found = fused_attention(x, self.norm1, self.attention, self.dropout, self.drop_path, context=context)
        if found is not None:
            return found
        return x + self.drop_path(self.dropout(self.attention(self.norm1(x), context=context).output))


class SqueezeExcitation(nn.Module):
    """T + a * T with a = tanh(W_2 relu(W_1 LN(mean of the tokens T))), (B, N, C) -> (B, N, C).

    Args:
        width: C; the hidden width is a quarter of it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.down, self.up = make_linear(width, width // 4, bias=True), make_linear(width // 4, width, bias=True)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return x + torch.tanh(self.up(F.relu(self.down(self.norm(x.mean(1, keepdim=True)))))) * x


BLOCK_NAMES: Sequence[tuple[str, str]] = (
    (r"\.proj_norm1\.", r".fusion.norm1."),
    (r"\.proj_norm2\.", r".fusion.norm2."),
    (r"^((?:stages\.\d+\.)?blocks\.\d+)\.proj\.", r"\1.fusion.projection."),
    (r"\.(inner|outer)_norm(\d)\.", r".\1.norm\2."),
    (r"\.(inner|outer)_attn\.q\.", r".\1.attention.query."),
    (r"\.(inner|outer)_attn\.k\.", r".\1.attention.key."),
    (r"\.(inner|outer)_attn\.v\.", r".\1.attention.value."),
    (r"\.(inner|outer)_attn\.proj\.", r".\1.attention.output."),
    (r"\.(inner|outer)_mlp\.fc1\.", r".\1.mlp.up."),
    (r"\.(inner|outer)_mlp\.fc2\.", r".\1.mlp.down."),
    (r"\.se_layer\.fc\.0\.", r".outer.excitation.norm."),
    (r"\.se_layer\.fc\.1\.", r".outer.excitation.down."),
    (r"\.se_layer\.fc\.3\.", r".outer.excitation.up."),
)
"""Renamings within a block, from the official code."""


def renamed(state: Mapping[str, Tensor], names: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Rename a state dict by patterns and replacements, in order; joint projections (``qk``, ``kv``) are split."""
    found = {}
    for name, value in state.items():
        pair = re.search(r"\.(?:\w+_attn|attn_\w+)\.(qk|kv)\.", name)
        parts = {name: value}
        if pair is not None:
            whole = name[: pair.start(1)], name[pair.end(1) :]
            parts = {kind.join(whole): part for kind, part in zip(pair[1], value.chunk(2), strict=True)}
        for part, own in parts.items():
            for pattern, replacement in names:
                part = re.sub(pattern, replacement, part)
            found[part] = own
    return found


def make_attention(
    name: str, width: int, heads: int, options: Mapping[str, Any], pattern: str = "noncausal-self"
) -> Layer:
    """Create a layer by name; the output projection of attention has a bias, the other projections have none.

    Raises:
        Unsupported: for mechanisms that are not layers of a model or insert tokens, and where `create_layer` raises it.
    """
    check_plan(read_plan([(name, options)], None), Pattern(pattern), "an image backbone")
    given = dict(options)
    if not given.get("dropout"):
        given.pop("dropout", None)  # not every layer has this option
    layer = create_layer(name, width, **{"num_heads": heads, "pattern": pattern, **given})
    if isinstance(layer, AttentionLayer) and isinstance(layer.output, nn.Linear):
        layer.output = make_linear(layer.output.in_features, width, bias=True)
        if layer.card.name == "softmax":
            initialise(layer)
    return layer


def learned(rows: int, width: int, wanted: bool = True) -> nn.Parameter | None:
    """Create a table (1, rows, width) from a truncated normal with std 0.02; None unless `wanted`."""
    if not wanted:
        return None
    table = nn.Parameter(torch.empty(1, rows, width))
    nn.init.trunc_normal_(table, std=0.02)
    return table


def initialise(module: nn.Module) -> None:
    """Initialise linear weights from a truncated normal with std 0.02 and biases to 0, except in mechanism layers."""
    for child in module.children():
        if isinstance(child, nn.Linear):
            nn.init.trunc_normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif not isinstance(child, Layer):
            initialise(child)


def cut(maps: Float[Tensor, "b c h w"], side: int) -> Float[Tensor, "bn c p p"]:
    """Cut maps into squares, row by row, as one channels-last batch."""
    batch, channels, height, width = maps.shape
    squares = maps.reshape(batch, channels, height // side, side, width // side, side)
    return squares.permute(0, 2, 4, 3, 5, 1).flatten(0, 2).permute(0, 3, 1, 2)


def on_grid(table: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Float[Tensor, "b m c"]:
    """Interpolate square position tables to another grid (bicubic), unless the number of positions is equal.

    Raises:
        Unsupported: for a table of another number of positions that is not square.
    """
    places = table.shape[1]
    if places == math.prod(grid):
        return table
    side = math.isqrt(places)
    if side * side != places:
        raise Unsupported(f"positions of {places} places on a grid {grid}", supported="square tables, or the same size")
    return resize_positions(table, 0, (side, side), grid)
