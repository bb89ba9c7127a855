"""Vision Mamba (Vim): patches as one sequence, read forwards and backwards by selective scans in every block.

Zhu et al., arXiv 2401.09417. Patches of 16 pixels with a class token in the middle of the sequence, learned positions,
and blocks, where BiMamba is the layer of the mechanism ``bidirectional_mamba`` (version 2):

    X <- X + DropPath(BiMamba(RMSNorm(X)))

Logits come from the class token after a last norm. X is kept in at least float32. There is no feed-forward network.
Deviations: dt is initialised alike in both directions, while the code sets the backward bias to 0 (`mixer` with
``symmetric_dt_init=False``); when weights for another size are loaded, the patches' positions are interpolated around
the class token's, while the code takes the first position for the class token's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import at_least, one_of
from regard.core.precision import wide
from regard.create import create_layer
from regard.layers.drop_path import DropPath, drop_path_rates
from regard.layers.norms import RMSNorm
from regard.layers.patches import PatchEmbedding
from regard.models.vision.backbone import Backbone, BackboneConfig, Level, map_of
from regard.models.vision.blocks import Blocks

if TYPE_CHECKING:
    from jaxtyping import Float

CLASS_TOKENS = ("middle", "first", "last", "none")

FIRST_VERSION: dict[str, Any] = {"convolution": "once", "combine": "sum", "shared": ("conv", "x_proj", "dt", "D")}
"""`mixer` for the code's ``bimamba_type="v1"``, whose directions share everything except A."""

BOTH_DIRECTIONS = {"A_log": ("A_log", "A_b_log"), "D": ("D", "D_b"), "dt_bias": ("dt_proj.bias", "dt_proj_b.bias")}
"""Parameter names here -> the code's names for each direction."""


@dataclass(frozen=True, kw_only=True)
class VimConfig(BackboneConfig):
    """The configuration of a :class:`Vim`.

    Attributes:
        width, depth: width of the tokens and number of blocks.
        patch, stride: side and stride of the patches in pixels (the code fine-tunes with a stride of 8).
        class_token: position of the class token: ``middle``, ``first`` or ``last``; ``none`` for the mean of all
            tokens.
        mixer: options of the mechanism ``bidirectional_mamba``.
    """

    width: int = 192
    depth: int = 24
    patch: int = 16
    stride: int = 16
    class_token: str = "middle"
    mixer: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("depth", "patch", "stride"):
            at_least(name, getattr(self, name), 1)
        one_of("class_token", self.class_token, CLASS_TOKENS)

    @property
    def sides(self) -> tuple[int, int]:
        return self.patch, self.stride


class Vim(Backbone):
    """Vision Mamba, see the module; sizes ``vim_t``, ``vim_s``, ``vim_b``. Images must have the config's size."""

    Config = VimConfig
    scales: ClassVar = {"width": 4}
    made_for_size = "the table of positions"
    channels_last = False  # patches are cut out of any layout
    sizes: ClassVar = {
        "vim_nano": {"image_size": 32, "patch": 4, "stride": 4, "width": 96, "depth": 6},
        "vim_t": {"width": 192, "drop_path": 0.1},
        "vim_s": {"width": 384, "drop_path": 0.1},
        "vim_b": {"width": 768, "drop_path": 0.1},
    }

    def __init__(self, config: VimConfig) -> None:
        super().__init__(config)
        width = config.width
        self.embedding = PatchEmbedding(config.channels, width, config.patch, stride=config.stride, bias=True)
        self.grid = self.embedding.grid(*config.size)
        patches = math.prod(self.grid)
        self.place = _place(config.class_token, patches)
        self.pools = ("avg",) if self.place is None else ("token", "avg")
        self.class_token = None if self.place is None else nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, patches + (self.place is not None), width))
        rates = drop_path_rates(config.drop_path, (config.depth,))[0]
        self.blocks = Blocks(Block(width, config.mixer or {}, rate) for rate in rates)
        self.levels = [Level(width, config.stride)] * config.depth
        self.norm = RMSNorm(width, eps=1e-5)
        self._initialise()
        self.make_head(width)

    def _initialise(self) -> None:
        projection = self.embedding.projection
        if isinstance(projection, nn.Linear):
            size = projection.in_features**-0.5 / 0.8796  # corrects for the truncation at two sigma
            nn.init.trunc_normal_(projection.weight, std=size, a=-2 * size, b=2 * size)
            nn.init.zeros_(projection.bias)
        for tokens in (self.class_token, self.positions):
            if tokens is not None:
                nn.init.trunc_normal_(tokens, std=0.02)
        for name, module in self.blocks.named_modules():
            if name.endswith("mixer.out_proj") and isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                with torch.no_grad():
                    module.weight /= math.sqrt(self.config.depth)

    def encode(
        self, images: Float[Tensor, "b c h w"], keep: Collection[int] = ()
    ) -> tuple[Float[Tensor, "b n c"], dict[int, Float[Tensor, "b c h w"]]]:
        x = self.embedding(images)
        if self.place is not None and self.class_token is not None:
            token = self.class_token.expand(x.shape[0], -1, -1).to(x.dtype)
            x = torch.cat([x[:, : self.place], token, x[:, self.place :]], 1)
        x, maps = wide(x + self.positions), {}
        for number, block in enumerate(self.blocks):
            x = self.blocks.run(block, x)
            if number in keep:
                maps[number] = map_of(self._patches(x), self.grid).to(self.positions.dtype)
        return x, maps

    def _patches(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b patches c"]:
        return x if self.place is None else torch.cat([x[:, : self.place], x[:, self.place + 1 :]], 1)

    def pool(self, features: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        token = self.place if self.global_pool == "token" else None
        chosen = self._patches(features) if token is None else features[:, token : token + 1]
        return self.norm(chosen).to(self.positions.dtype).mean(1)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"class_token", "positions"}

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: VimConfig) -> dict[str, Tensor]:
        """Translate weights of hustvl/Vim (`vim/models_mamba.py`); square position tables are interpolated."""
        names = (
            (r"^cls_token$", "class_token"),
            (r"^pos_embed$", "positions"),
            (r"^patch_embed\.proj\.", "embedding.projection."),
            (r"^norm_f\.", "norm."),
            (r"^layers\.", "blocks."),
            (r"\.mixer\.conv1d\.", ".mixer.convs.0."),
            (r"\.mixer\.conv1d_b\.", ".mixer.convs.1."),
            (r"\.mixer\.x_proj\.weight$", ".mixer.x_proj.0.weight"),
            (r"\.mixer\.x_proj_b\.", ".mixer.x_proj.1."),
            (r"\.mixer\.dt_proj\.weight$", ".mixer.dt_proj.0.weight"),
            (r"\.mixer\.dt_proj_b\.weight$", ".mixer.dt_proj.1.weight"),
        )
        rest, found = dict(state), dict[str, Tensor]()
        for number in {m[1] for name in state if (m := re.match(r"layers\.(\d+)\.mixer\.A_log$", name))}:
            for own, parts in BOTH_DIRECTIONS.items():
                keys = [f"layers.{number}.mixer.{part}" for part in parts]
                both = [rest.pop(key) for key in keys if key in rest]
                found |= {f"blocks.{number}.mixer.{own}": torch.stack(both)} if both else {}
        for name, value in rest.items():
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            filters = value.ndim > 2 and (".convs." in name or name.startswith("embedding."))
            found[name] = value.flatten(1) if filters else value
        if "positions" in found:
            found["positions"] = _fit(found["positions"], config)
        return found


def _place(class_token: str, patches: int) -> int | None:
    return {"middle": patches // 2, "first": 0, "last": patches, "none": None}[class_token]


def _fit(positions: Float[Tensor, "1 n c"], config: VimConfig) -> Float[Tensor, "1 m c"]:
    """Interpolate positions of a square grid to the config's grid; others are returned as they are, to be refused."""
    grid = tuple((side - config.patch) // config.stride + 1 for side in config.size)
    patches = positions.shape[1] - (config.class_token != "none")
    side = math.isqrt(max(patches, 0))
    if patches == math.prod(grid) or side**2 != patches:
        return positions
    table, own = positions, []
    place = _place(config.class_token, patches)
    if place is not None:
        table = torch.cat([positions[:, :place], positions[:, place + 1 :]], 1)
        own = [positions[:, place : place + 1]]
    table = F.interpolate(map_of(table, (side, side)), grid, mode="bicubic").flatten(2).mT
    now = _place(config.class_token, math.prod(grid)) or 0
    return torch.cat([table[:, :now], *own, table[:, now:]], 1)


class Block(nn.Module):
    """X + DropPath(BiMamba(RMSNorm(X))), (B, N, C) -> (B, N, C) in the dtype of X.

    Args:
        width: number of channels.
        options: options of the mechanism.
        drop_path: stochastic depth probability of the branch.
    """

    def __init__(self, width: int, options: Mapping[str, Any], drop_path: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps=1e-5)
        self.mixer = create_layer("bidirectional_mamba", width, 1, pattern="noncausal-self", **options)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        assert self.norm.weight is not None  # a parametric norm
        normed = self.norm(x).to(self.norm.weight.dtype)
        return x + self.drop_path(self.mixer(normed).output)
