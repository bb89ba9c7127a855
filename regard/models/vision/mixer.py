"""Isotropic image networks without attention: MLP-Mixer, NiNformer and Activator.

All three cut an image into patches, which are the tokens of all blocks, and classify their mean. In the blocks, FF is a
feed-forward network along channels, and the units are the layers of the mechanisms of the same names:

    MLP-Mixer (Tolstikhin et al., arXiv 2105.01601)     X <- X + mlp_mixer(LN(X)),   X <- X + FF(LN'(X))
    NiNformer (Abdullah & Aydin, arXiv 2403.02411)      X <- X + ninformer(LN(X)),   X <- X + FF(LN(X))
    Activator (the same, arXiv 2405.15953)              X <- X + activator(LN(X)),   X <- X + FF(LN(X))

In NiNformer and Activator, both branches of a block use the same norm module, LN; ``activator_geglu`` has only the
first branch. MLP-Mixer has a norm before the mean, the others have none. The published Activator does not mix tokens:
patches only meet in the mean, so its logits are the same for every order of the patches (options in `unit` repair
this).

The networks along tokens have weights for each position, so MLP-Mixer and NiNformer only take images of `image_size`.
Weights for another size are resized when they are loaded: weights that read a position are divided among the positions
that replace it, and weights that write a position are interpolated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import Context, Unsupported, at_least
from regard.core.grids import tokens_of
from regard.core.precision import wide
from regard.create import create_layer
from regard.layers.drop_path import DropPath, drop_path_rates
from regard.layers.feed_forward import MLP
from regard.layers.norms import LayerNorm
from regard.layers.residual import add_feed_forward
from regard.mechanisms.mlp_mixer import lecun_normal_
from regard.models.vision.backbone import Backbone, BackboneConfig, Level, map_of
from regard.models.vision.blocks import Blocks

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class PatchConfig(BackboneConfig):
    """The options that all three networks have.

    Attributes:
        patch: side of a patch, a divisor of the sides of images.
        width: number of channels.
        hidden: hidden width of the feed-forward networks along channels.
        depth: number of blocks.
        branch_dropout: dropout probability after each linear layer of every feed-forward network.
    """

    patch: int = 16
    width: int = 512
    hidden: int = 2048
    depth: int = 8
    branch_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch", "width", "hidden", "depth"):
            at_least(name, getattr(self, name), 1)

    @property
    def sides(self) -> tuple[int, int]:
        return self.patch, self.patch

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's patches."""
        return self.size[0] // self.patch, self.size[1] // self.patch

    @property
    def places(self) -> int:
        """Number of patches of an image."""
        return math.prod(self.grid)


class PatchNetwork(Backbone):
    """A patch embedding, blocks of one width, and a mean over patches.

    Args:
        config: see :class:`PatchConfig`.
        blocks: the blocks, each called with tokens and the context.
        norm: the norm of the tokens before the mean.
        fixed: whether only images of the config's size are accepted.
    """

    def __init__(self, config: PatchConfig, blocks: list[nn.Module], norm: nn.Module, *, fixed: bool = True) -> None:
        super().__init__(config)
        self.made_for_size = "the weights along tokens" if fixed else ""
        self.embedding = nn.Conv2d(config.channels, config.width, config.patch, config.patch)
        self.blocks, self.norm = Blocks(blocks), norm
        self.levels = [Level(config.width, config.patch)] * config.depth

    def encode(
        self, images: Float[Tensor, "b c h w"], keep: Collection[int] = ()
    ) -> tuple[Float[Tensor, "b n c"], dict[int, Float[Tensor, "b c h w"]]]:
        """Return the tokens after the last norm; the maps are the blocks' outputs, without that norm."""
        embedded = self.embedding(images)
        grid, maps = (embedded.shape[2], embedded.shape[3]), {}
        x, context = tokens_of(embedded), Context(grid=grid)
        for number, block in enumerate(self.blocks):
            x = self.blocks.run(block, x, context)
            if number in keep:
                maps[number] = map_of(x, grid)
        return self.norm(x), maps

    def pool(self, features: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        return features.mean(1)


@dataclass(frozen=True, kw_only=True)
class MixerConfig(PatchConfig):
    """The configuration of an :class:`MLPMixer`.

    Attributes:
        token_hidden: hidden width of the feed-forward networks along tokens.
    """

    token_hidden: int = 256


class MLPMixer(PatchNetwork):
    """MLP-Mixer, see the module; sizes ``mixer_s32`` to ``mixer_l16``, named by patch size.

    The size ``mixer_nano``, for images of 32 pixels, is not the paper's.
    """

    Config = MixerConfig
    scales: ClassVar = {"width": 4, "hidden": 4, "token_hidden": 4}
    sizes: ClassVar = {
        "mixer_nano": {"image_size": 32, "patch": 4, "width": 128, "hidden": 512, "depth": 4, "token_hidden": 64},
        **{
            f"mixer_{name}{patch}": {"patch": patch, **options}
            for name, options in {
                "s": {"width": 512, "hidden": 2048, "depth": 8, "token_hidden": 256},
                "b": {"width": 768, "hidden": 3072, "depth": 12, "token_hidden": 384},
                "l": {"width": 1024, "hidden": 4096, "depth": 24, "token_hidden": 512},
            }.items()
            for patch in (32, 16)
        },
    }

    def __init__(self, config: MixerConfig) -> None:
        (rates,) = drop_path_rates(config.drop_path, [config.depth])
        super().__init__(config, [MixerBlock(config, rate) for rate in rates], LayerNorm(config.width, eps=1e-6))
        self.apply(_initialise)
        self.make_head(config.width)

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: MixerConfig) -> dict[str, Tensor]:
        """Translate weights of timm's `models/mlp_mixer.py`, resized if the images had another size."""
        names = (
            (r"^stem\.proj\.", "embedding."),
            (r"\.mlp_tokens\.fc1\.weight$", ".tokens.weights.up"),
            (r"\.mlp_tokens\.fc2\.weight$", ".tokens.weights.down"),
            (r"\.mlp_tokens\.fc1\.bias$", ".tokens.weights.up_bias"),
            (r"\.mlp_tokens\.fc2\.bias$", ".tokens.weights.down_bias"),
            (r"\.mlp_channels\.fc1\.", ".channels.up."),
            (r"\.mlp_channels\.fc2\.", ".channels.down."),
        )
        return resize_places(_renamed(state, names), config.grid)


class MixerBlock(nn.Module):
    """A network along tokens and one along channels, each after a norm, (B, N, C) -> (B, N, C).

    Args:
        config: the backbone's config.
        drop_path: stochastic depth probability of both branches.
    """

    def __init__(self, config: MixerConfig, drop_path: float) -> None:
        super().__init__()
        width, dropout = config.width, config.branch_dropout
        self.norm1, self.norm2 = LayerNorm(width, eps=1e-6), LayerNorm(width, eps=1e-6)
        options: dict[str, Any] = {"length": config.places, "hidden": config.token_hidden, "dropout": dropout}
        self.tokens = create_layer("mlp_mixer", width, pattern="noncausal-self", **options)
        self.channels = MLP(width, config.hidden, dropout=dropout, bias=True)
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], context: Context) -> Float[Tensor, "b n c"]:
        x = x + self.drop_path(self.tokens(self.norm1(x), context=context).output)
        return add_feed_forward(x, self.norm2, self.channels, self.dropout, self.drop_path)


@dataclass(frozen=True, kw_only=True)
class NiNformerConfig(PatchConfig):
    """The configuration of a :class:`NiNformer`: by default the published one, for CIFAR-10.

    Attributes:
        unit: options of the mechanism ``ninformer`` other than its sizes.
    """

    image_size: int | tuple[int, int] = 32
    num_classes: int = 10
    patch: int = 4
    width: int = 256
    hidden: int = 512
    depth: int = 4
    branch_dropout: float = 0.5
    unit: Mapping[str, Any] | None = None


class NiNformer(PatchNetwork):
    """NiNformer, see the module; the one published size is ``ninformer_net``."""

    Config = NiNformerConfig
    scales: ClassVar = {"width": 4, "hidden": 4}
    sizes: ClassVar = {"ninformer_net": {}}

    def __init__(self, config: NiNformerConfig) -> None:
        options: dict[str, Any] = {"length": config.places}
        options |= {"token_hidden": config.hidden, "channel_hidden": config.hidden}
        options |= {"dropout": config.branch_dropout, **(config.unit or {})}
        (rates,) = drop_path_rates(config.drop_path, [config.depth])
        blocks: list[nn.Module] = []
        for rate in rates:
            unit = create_layer("ninformer", config.width, pattern="noncausal-self", **options)
            blocks.append(GatedBlock(unit, config, rate))
        super().__init__(config, blocks, nn.Identity())
        self.make_head(config.width)

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: NiNformerConfig) -> dict[str, Tensor]:
        """Translate weights of Abdullah-88/NiNformer's image classifier, resized if the images had another size."""
        names = [*OFFICIAL, (r"\.mgu\.proj\.", ".unit.project.")]
        for network in ("token", "channel"):
            inner = rf"\.mgu\.Mixer\.{network}_mix\.(?:\d+)\."
            for old, new in (("weight", "norm"), ("bias", "norm_bias")):
                names.append((rf"{inner}{old}$", f".unit.weights.{network}_{new}"))
            for old, new in (("0", "up"), ("3", "down")):
                names.append((rf"{inner}net\.{old}\.weight$", f".unit.weights.{network}_{new}"))
                names.append((rf"{inner}net\.{old}\.bias$", f".unit.weights.{network}_{new}_bias"))
        return resize_places(_renamed(state, names), config.grid)


@dataclass(frozen=True, kw_only=True)
class ActivatorConfig(NiNformerConfig):
    """The configuration of an :class:`Activator`: by default the published one, for CIFAR-10.

    Attributes:
        unit: options of the mechanism ``activator`` other than its width, such as `mixing`.
        feed_forward: whether blocks have the feed-forward branch; without it `branch_dropout` must be 0.
    """

    feed_forward: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.feed_forward and self.branch_dropout:
            raise Unsupported(
                f"branch_dropout={self.branch_dropout} without feed-forward networks", supported="branch_dropout=0.0"
            )


class Activator(PatchNetwork):
    """Activator, see the module; ``activator_net`` has feed-forward networks, ``activator_geglu`` only gated units."""

    Config = ActivatorConfig
    scales: ClassVar = {"width": 4, "hidden": 4}
    sizes: ClassVar = {"activator_net": {}, "activator_geglu": {"feed_forward": False, "branch_dropout": 0.0}}

    def __init__(self, config: ActivatorConfig) -> None:
        options: dict[str, Any] = {"hidden": config.hidden, "axes": 2, **(config.unit or {})}
        (rates,) = drop_path_rates(config.drop_path, [config.depth])
        blocks: list[nn.Module] = []
        for rate in rates:
            unit = create_layer("activator", config.width, pattern="noncausal-self", **options)
            blocks.append(GatedBlock(unit, config, rate, feed_forward=config.feed_forward))
        super().__init__(config, blocks, nn.Identity(), fixed=False)
        self.make_head(config.width)

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: ActivatorConfig) -> dict[str, Tensor]:
        """Translate weights of Abdullah-88/Activator (`ACTIVATORImageClassification`)."""
        names = [*OFFICIAL]
        for old, new in (("proj_1", "gate"), ("proj_2", "value"), ("proj_3", "down"), ("norm", "norm")):
            names.append((rf"\.actgu\.{old}\.weight$", f".unit.weights.{new}"))
            names.append((rf"\.actgu\.{old}\.bias$", f".unit.weights.{new}_bias"))
        return _renamed(state, names)


class GatedBlock(nn.Module):
    """A gating unit and a feed-forward network with the same norm module, (B, N, C) -> (B, N, C).

    Args:
        unit: layer of a mechanism.
        config: the backbone's config.
        drop_path: stochastic depth probability of both branches.
        feed_forward: whether the block has the second branch.
    """

    def __init__(
        self, unit: nn.Module, config: NiNformerConfig, drop_path: float, *, feed_forward: bool = True
    ) -> None:
        super().__init__()
        width, dropout = config.width, config.branch_dropout
        self.norm, self.unit = LayerNorm(width), unit
        self.mlp = MLP(width, config.hidden, dropout=dropout, bias=True) if feed_forward else None
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], context: Context) -> Float[Tensor, "b n c"]:
        x = x + self.drop_path(self.unit(self.norm(x), context=context).output)
        return x if self.mlp is None else add_feed_forward(x, self.norm, self.mlp, self.dropout, self.drop_path)


OFFICIAL = (
    (r"^patcher\.", "embedding."),
    (r"^classifier\.", "head."),
    (r"^model\.", "blocks."),
    (r"\.ffn\.net\.0\.", ".mlp.up."),
    (r"\.ffn\.net\.3\.", ".mlp.down."),
)
"""Renamings that the NiNformer and Activator repositories have in common."""


def _renamed(state: Mapping[str, Tensor], names: Collection[tuple[str, str]]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


PLACES = re.compile(r"\.weights\.(?:token_)?(up|down|down_bias)$")
"""Weights of the networks along tokens that have an entry for each position."""


def resize_places(state: Mapping[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """Resize the weights of the networks along tokens to a grid, from any square one.

    A uniformly coloured image gives the same hidden values after resizing.

    Raises:
        Unsupported: for weights of another number of positions that is not a square.
    """
    found = dict(state)
    for name, value in state.items():
        match = PLACES.search(name)
        if match is not None:
            found[name] = _resized(value.mT, grid, shared=True).mT if match[1] == "up" else _resized(value, grid)
    return found


def _resized(
    table: Float[Tensor, "places ..."], grid: tuple[int, int], *, shared: bool = False
) -> Float[Tensor, "places2 ..."]:
    """Resize a table of positions, row by row, to another grid, keeping its sum if `shared`, else its mean."""
    count, wanted = len(table), math.prod(grid)
    side = math.isqrt(count)
    if count == wanted:
        return table
    if side**2 != count:
        raise Unsupported(
            f"weights of {count} places for a grid {grid}", supported=f"{wanted} places, or a square grid"
        )
    image = wide(table).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, grid, mode="bilinear", align_corners=False, antialias=True)
    resized = image.flatten(2)[0].mT.reshape(wanted, *table.shape[1:])
    return (resized * (count / wanted) if shared else resized).to(table.dtype)


def _initialise(module: nn.Module) -> None:
    """Initialise as MLP-Mixer's official code does: LeCun normal weights and zero biases (except along tokens)."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        lecun_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
