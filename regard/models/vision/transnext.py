r"""TransNeXt, and MoH-ViT, which is TransNeXt with routed heads.

Shi, arXiv 2311.17132; Jin et al. (MoH), arXiv 2410.11842. Four stages, each at half the resolution of the one before. A
stage is an overlapping convolution (7 x 7 with stride 4, then 3 x 3 with stride 2) with a norm, blocks

    x <- x + DropPath(attend(LN(x))),   x <- x + DropPath(W_2 (gelu(DW3x3(W_g LN(x))) * W_v LN(x)))

and a norm. The head reads the mean of the last map. Attention is cosine attention: with E and tau learned, L_i the
number of keys that query i attends to, and B computed by a small network from the distance of two positions along each
axis,

    s_ij = softplus(tau) log(L_i) (q_i / |q_i| + E) . k_j / |k_j| + B_ij,   o_i = sum_j softmax(s_i)_j v_j

| stage | keys of a query |
|---|---|
| without a reduction (the last one) | all |
| with a reduction r | the `window` x `window` positions around it and the map pooled by r x r, under one softmax |

Aggregated attention, the kind with a reduction, replaces B within the window by a learned bias for each head and window
position, and adds (q_i / |q_i|) . t_p + b_p, with learned t and b, to the weights of the window. The pooled map is
LN(mean over r x r of gelu(W x)).

MoH-ViT multiplies the outputs of the heads by the gates of the catalogue's ``mixture_of_heads``, with numbers of shared
and active heads that vary by stage; :meth:`TransNeXt.forward_with_losses` returns its balance loss, which training adds
with a weight of 0.01.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import Context, LayerCall, LayerSpec, Pattern, Result, Unsupported, at_least
from regard.core.grids import tokens_of
from regard.core.precision import wide_dtype
from regard.engines.aggregated_attention import Problem, aggregated_attention, biases_of_places
from regard.functional import softmax_attention
from regard.layers.drop_path import DropPath, drop_path_rates
from regard.layers.linear import make_linear
from regard.layers.norms import LayerNorm
from regard.mechanisms.mixture_of_heads import Config as HeadConfig
from regard.mechanisms.mixture_of_heads import HeadRouter
from regard.models.vision.backbone import BackboneConfig, Level, check_stages, map_of
from regard.models.vision.patch_tokens import initialise_convolution, initialise_linear
from regard.models.vision.pyramid import PyramidWithLosses, Stage, StagesConfig
from regard.models.vision.vmamba import ConvNorm

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class TransNeXtConfig(StagesConfig):
    """The configuration of a :class:`TransNeXt`.

    Attributes:
        widths, depths, heads, expansions: channels, blocks, heads, and expansion factor of the feed-forward networks
            (whose hidden width is two thirds of it, since they are gated) of each stage.
        patch: stride of the first convolution, whose kernel is 2 patch - 1 pixels wide.
        reductions: r of each stage; 1 for attention to all positions.
        window: side of the window of aggregated attention, odd.
        shared_heads, active_heads: for each stage, as for ``mixture_of_heads``, both or neither; None for heads without
            gates.
        trained_size: height and width, or one number for both, of the images that the position networks were trained
            on; `image_size` when None.
        branch_dropout: dropout probability in the feed-forward networks and at the end of each branch.
    """

    by_stage: ClassVar = ("depths", "heads", "expansions", "reductions")
    widths: tuple[int, ...] = (72, 144, 288, 576)
    depths: tuple[int, ...] = (2, 2, 15, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    expansions: tuple[int, ...] = (8, 8, 4, 4)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    window: int = 3
    shared_heads: tuple[int, ...] | None = None
    active_heads: tuple[int, ...] | None = None
    trained_size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("window", self.window, 1)
        if self.window % 2 == 0:
            raise Unsupported(f"window={self.window}", supported="odd sides", nearest=f"window={self.window + 1}")
        if (self.shared_heads is None) != (self.active_heads is None):
            raise Unsupported("one of shared_heads and active_heads", supported="both, or neither")
        if self.shared_heads is not None:
            check_stages(self, "shared_heads", "active_heads", least=0)
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise Unsupported(f"a width of {width} with {heads} heads", supported=f"multiples of {heads}")

    @property
    def sides(self) -> tuple[int, int]:
        step = math.lcm(*(r * stride for r, stride in zip(self.reductions, self.strides, strict=True)))
        return step, step

    @property
    def trained(self) -> tuple[int, int]:
        """Height and width of the images that the position networks were trained on."""
        if self.trained_size is None:
            return self.size
        return BackboneConfig(image_size=self.trained_size).size

    def routing(self, number: int) -> HeadConfig | None:
        """Return the options of a stage's routers; None without routing."""
        if self.shared_heads is None or self.active_heads is None:
            return None
        return HeadConfig(shared_heads=self.shared_heads[number], active_heads=self.active_heads[number])


def _routed(shared: tuple[int, ...], active: tuple[int, ...]) -> dict[str, Any]:
    return {"shared_heads": shared, "active_heads": active}


MICRO: dict[str, Any] = {"widths": (48, 96, 192, 384), "heads": (2, 4, 8, 16), "drop_path": 0.15}
S: dict[str, Any] = {"depths": (5, 5, 22, 5), "drop_path": 0.45}
B: dict[str, Any] = {
    "widths": (96, 192, 384, 768),
    "depths": (5, 5, 23, 5),
    "heads": (4, 8, 16, 32),
    "drop_path": 0.6,
}
NANO: dict[str, Any] = {
    "image_size": 32,
    "widths": (32, 64, 128),
    "depths": (1, 2, 1),
    "heads": (2, 4, 8),
    "expansions": (4, 4, 4),
    "patch": 2,
    "reductions": (4, 2, 1),
}
"""Preset for images of about 32 pixels."""


class TransNeXt(PyramidWithLosses):
    """TransNeXt and MoH-ViT, see the module.

    Sizes: ``transnext_micro`` and ``transnext_t`` to ``transnext_b``; for MoH-ViT ``moh_transnext_s_80``,
    ``moh_transnext_s_75``, ``moh_transnext_b_75`` and ``moh_transnext_b_50``, named by the percentage of active heads.
    ``transnext_nano`` and ``moh_transnext_nano`` (2 of 2, 3 of 4 and 6 of 8 heads are active) are for images of about 32
    pixels.
    """

    Config = TransNeXtConfig
    scales: ClassVar = {"widths": "heads"}
    config: TransNeXtConfig
    sizes: ClassVar = {
        "transnext_nano": NANO,
        "moh_transnext_nano": {**NANO, **_routed((2, 1, 2), (0, 2, 4))},
        "transnext_micro": MICRO,
        "transnext_t": {"drop_path": 0.25},
        "transnext_s": S,
        "transnext_b": B,
        "moh_transnext_s_80": {**S, **_routed((3, 6, 3, 8), (0, 0, 6, 12))},
        "moh_transnext_s_75": {**S, **_routed((3, 6, 3, 4), (0, 0, 6, 12))},
        "moh_transnext_b_75": {**B, **_routed((4, 8, 4, 5), (0, 0, 8, 16))},
        "moh_transnext_b_50": {**B, **_routed((2, 2, 2, 4), (2, 4, 6, 8))},
    }

    def __init__(self, config: TransNeXtConfig) -> None:
        super().__init__(config)
        rates = drop_path_rates(config.drop_path, config.depths)
        self.stages = nn.ModuleList()
        channels = config.channels
        for number, width in enumerate(config.widths):
            stride = 2 if number else config.patch
            side = 3 if number else 2 * stride - 1
            embedding = ConvNorm(channels, width, side, stride, side // 2)
            blocks = [Block(config, number, rate) for rate in rates[number]]
            self.stages.append(Stage(embedding, blocks, LayerNorm(width, eps=1e-6)))
            channels = width
        self.levels = [Level(*level) for level in zip(config.widths, config.strides, strict=True)]
        self.apply(_initialise)
        self.make_head(channels)

    def pool(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        return features.mean((2, 3))

    def no_weight_decay(self) -> set[str]:
        kept = (".query_embedding", ".temperature", ".window_bias")
        own = {name for name, _ in self.named_parameters() if name.endswith(kept) or ".places." in name}
        return super().no_weight_decay() | own

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: TransNeXtConfig) -> dict[str, Tensor]:
        """Translate weights of `transnext.py` of DaiShiResearch/TransNeXt or SkyworkAI/MoH."""
        names = (
            (r"^patch_embed(\d+)\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.embedding.conv."),
            (r"^patch_embed(\d+)\.norm\.", lambda m: f"stages.{int(m[1]) - 1}.embedding.norm."),
            (r"^block(\d+)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
            (r"^norm(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
            (r"\.attn\.q\.", ".attention.query."),
            (r"\.attn\.proj\.", ".attention.output."),
            (r"\.attn\.sr\.", ".attention.reduction."),
            (r"\.attn\.norm\.", ".attention.reduction_norm."),
            (r"\.attn\.cpb_fc1\.", ".attention.places.up."),
            (r"\.attn\.cpb_fc2\.", ".attention.places.down."),
            (r"\.attn\.relative_pos_bias_local$", ".attention.window_bias"),
            (r"\.attn\.learnable_tokens$", ".attention.window_tokens"),
            (r"\.attn\.learnable_bias$", ".attention.window_weights"),
            (r"\.attn\.wg\.", ".attention.router.logits.routed."),
            (r"\.attn\.wg_0\.", ".attention.router.logits.balance."),
            (r"\.attn\.wg_1\.", ".attention.router.logits.shared."),
            (r"\.attn\.(temperature|query_embedding)$", r".attention.\1"),
            (r"\.mlp\.fc1\.", ".mlp.up."),
            (r"\.mlp\.fc2\.", ".mlp.down."),
            (r"\.mlp\.dwconv\.dwconv\.", ".mlp.depthwise."),
        )
        joined = {".attn.qkv.": ("query", "key", "value"), ".attn.kv.": ("key", "value")}
        found: dict[str, Tensor] = {}
        for name, value in state.items():
            if re.match(r"relative_(pos_index|coords_table)\d+$|.*\.(seq_length_scale|padding_mask)$", name):
                continue
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            if name.endswith(".reduction.weight"):
                value = value.flatten(1)  # from a 1 x 1 convolution
            parts = next((word for word in joined if word in name), None)
            if parts is None:
                found[name] = value
                continue
            for part, own in zip(value.chunk(len(joined[parts])), joined[parts], strict=True):
                found[name.replace(parts, f".attention.{own}.")] = part
        return found


class Block(nn.Module):
    """Attention and a gated convolutional feed-forward network.

    Args:
        config: the backbone's config.
        number: index of the stage.
        drop_path: stochastic depth probability of both branches.
    """

    def __init__(self, config: TransNeXtConfig, number: int, drop_path: float) -> None:
        super().__init__()
        width = config.widths[number]
        self.norm1, self.norm2 = LayerNorm(width, eps=1e-6), LayerNorm(width, eps=1e-6)
        self.attention = (CosineAttention if config.reductions[number] == 1 else AggregatedAttention)(config, number)
        hidden = 2 * config.expansions[number] * width // 3
        self.mlp = GatedConvolution(width, hidden, config.branch_dropout)
        self.dropout, self.drop_path = nn.Dropout(config.branch_dropout), DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Result:
        """Return the new tokens, with the losses of the routers."""
        mixed = self.attention(self.norm1(x), grid)
        x = x + self.drop_path(self.dropout(mixed.output))
        return Result(x + self.drop_path(self.mlp(self.norm2(x), grid)), None, mixed.losses)


class GatedConvolution(nn.Module):
    """W_2 (gelu(DW3x3(W_g x)) * W_v x) of tokens on a grid.

    Args:
        width, hidden: width of the tokens and of the gate.
        dropout: dropout probability after the gate and at the end.
    """

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = make_linear(width, 2 * hidden, bias=True), make_linear(hidden, width, bias=True)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Float[Tensor, "b n c"]:
        gate, value = self.up(x).chunk(2, -1)
        hidden = F.gelu(tokens_of(self.depthwise(map_of(gate, grid)))) * value
        return self.dropout(self.down(self.dropout(hidden)))


class CosineAttention(nn.Module):
    """Cosine attention among all positions, (B, N, C) on a grid -> a Result of (B, N, C).

    Args:
        config: the backbone's config.
        number: index of the stage.
    """

    def __init__(self, config: TransNeXtConfig, number: int) -> None:
        super().__init__()
        width, self.heads = config.widths[number], config.heads[number]
        stride, head_dim = config.strides[number], width // self.heads
        self.trained = (config.trained[0] // stride, config.trained[1] // stride)
        self.query, self.key, self.value, self.output = (make_linear(width, width, bias=True) for _ in range(4))
        self.query_embedding = nn.Parameter(torch.empty(self.heads, 1, head_dim))
        self.temperature = nn.Parameter(torch.full((self.heads, 1, 1), math.log(math.exp(1 / 0.24) - 1)))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        self.places = PlaceBias(self.heads)
        routing, sizes = config.routing(number), (width, width, self.heads, self.heads, head_dim, head_dim)
        self.router: HeadRouter | None = None
        if routing is not None:
            self.router = HeadRouter(LayerSpec(*sizes, Pattern.NONCAUSAL_SELF, routing, make_linear))

    def forward(self, x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Result:
        q, k = self._directions(self.query(x)), self._directions(self.key(x))
        slope = F.softplus(self.temperature) * math.log(k.shape[2])
        scaled = ((q + self.query_embedding) * slope).to(q.dtype)
        bias = biases_of_places(self.places(grid, 1, self.trained), grid, 1)[None]
        o = softmax_attention(
            scaled, k, self._split(self.value(x)), pattern=Pattern.NONCAUSAL_SELF, scale=1.0, bias=bias
        )
        return self._finish(o, x)

    def _split(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _directions(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n d"]:
        return F.normalize(self._split(x), dim=-1).to(x.dtype)

    def _finish(self, o: Float[Tensor, "b h n d"], x: Float[Tensor, "b n c"]) -> Result:
        """Apply the routers' head gates, if there are any, and the output projection."""
        result = Result(o)
        if self.router is not None:
            o = self.router(o, {}, LayerCall(x, x, Context()), result)
        result.output = self.output(o.transpose(1, 2).flatten(2))
        return result


class AggregatedAttention(CosineAttention):
    """Attention of each position to a window around it and to the pooled map, under one softmax.

    Args:
        config: the backbone's config.
        number: index of the stage.
    """

    def __init__(self, config: TransNeXtConfig, number: int) -> None:
        super().__init__(config, number)
        width, places = config.widths[number], config.window**2
        self.window, self.factor = config.window, config.reductions[number]
        self.reduction, self.reduction_norm = make_linear(width, width, bias=True), LayerNorm(width)
        self.window_bias = nn.Parameter(torch.empty(self.heads, places))
        self.window_tokens = nn.Parameter(torch.empty(self.heads, width // self.heads, places))
        self.window_weights = nn.Parameter(torch.zeros(self.heads, 1, places))
        nn.init.trunc_normal_(self.window_bias, std=0.0004)
        nn.init.trunc_normal_(self.window_tokens, std=0.02)

    def forward(self, x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Result:
        pooled = self._pooled(x, grid)
        q, k, v = (self._split(m(x)) for m in (self.query, self.key, self.value))
        far_k, far_v = (self._split(m(pooled)) for m in (self.key, self.value))
        problem = Problem(
            grid,
            self.factor,
            self.window,
            self.query_embedding[:, 0],
            F.softplus(self.temperature)[:, 0, 0],
            self.window_bias,
            self.window_tokens,
            self.window_weights[:, 0],
            self.places(grid, self.factor, self.trained),
        )
        return self._finish(aggregated_attention(q, k, v, far_k, far_v, problem), x)

    def _pooled(self, x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Float[Tensor, "b m c"]:
        factor = self.factor
        places = F.gelu(self.reduction(x)).unflatten(1, (grid[0] // factor, factor, grid[1] // factor, factor))
        # averaging one axis after the other takes a tenth of the time of averaging both at once
        return self.reduction_norm(places.mean(2).mean(3).flatten(1, 2))


class PlaceBias(nn.Module):
    """A relative position bias for each head, computed by a small network from the distances along each axis.

    Distances are scaled so that the first and last position of a map are 8 apart; the network reads
    sign(x) log_8(|x| + 1).

    Args:
        heads: number of heads.
        hidden: hidden width of the network.
    """

    def __init__(self, heads: int, hidden: int = 512) -> None:
        super().__init__()
        self.up, self.down = make_linear(2, hidden, bias=True), make_linear(hidden, heads, bias=True)

    def forward(self, grid: tuple[int, int], factor: int, trained: tuple[int, int]) -> Float[Tensor, "h down across"]:
        """Return a table for queries on a map and keys on the map pooled by `factor` x `factor`.

        See :class:`regard.engines.aggregated_attention.Problem`.

        Args:
            trained: rows and columns of the map that scales the distances.
        """
        like = next(self.parameters())
        down, across = (_distances(*sides, factor, like) for sides in zip(grid, trained, strict=True))
        # the first layer is a sum over the two axes, so it need not be computed for each pair of distances
        rows, columns = self.up(F.pad(down[:, None], (0, 1))), self.up(F.pad(across[:, None], (1, 0)))
        hidden = rows[:, None] + (columns - self.up(like.new_zeros(2)))
        return self.down(hidden.relu_()).permute(2, 0, 1)


def _distances(side: int, whole: int, factor: int, like: Tensor) -> Float[Tensor, " distances"]:
    """Scaled distances of positions from the centres of pooled keys, each of `factor` positions."""
    apart = torch.arange(factor - side, side, device=like.device, dtype=wide_dtype(like)) - (factor - 1) / 2
    scaled = 8 / max(whole - 1, 1) * apart
    return (scaled.sign() * (scaled.abs() + 1).log2() / 3).to(like.dtype)


def _initialise(module: nn.Module) -> None:
    """Initialise as the official code does."""
    initialise_linear(module)
    initialise_convolution(module)
    if isinstance(module, AggregatedAttention):  # a convolution in the official code
        weight: Any = module.reduction.weight
        nn.init.normal_(weight, std=math.sqrt(2 / len(weight)))
