"""The Vision Transformer (ViT, DeiT) with any mechanism of the catalogue in any layer, and Agent-DeiT.

Dosovitskiy et al., arXiv 2010.11929; Touvron et al. (DeiT), arXiv 2012.12877. Patches become tokens, a class token is
prepended, learned positions are added, and pre-norm blocks follow:

    x <- x + DropPath(mix(LN(x))),   x <- x + DropPath(W_2 gelu(W_1 LN(x)))

``mix`` is a layer of the `plan`, softmax attention by default. The head reads the class token after a last norm, or the
mean of the patches if there is no class token. Layers that honour roles receive the class token's role and the patches'
grid; other layers see a plain sequence of tokens, with the grid only if there is no class token.

Agent-DeiT (Han et al., arXiv 2312.08874) has agent attention with all its biases: with 49 agents in all layers of T and
S, and with 81 agents in the first 4 layers of B.

``moh_deit_s`` and ``moh_deit_b`` are DeiT with mixture-of-head attention (Jin et al., arXiv 2410.11842). They are not
published models: the paper's MoH-ViT is a TransNeXt, a pyramid with cosine attention and positions of its own
(:mod:`regard.models.vision.transnext`). The routers, gates and balance loss are those of the catalogue's
``mixture_of_heads``; with 12 heads, 3 are shared and 6 of the other 9 active, as in the 12-head stage of the paper's S
model; with 6 heads, 2 are shared and 2 of the other 4 active. :meth:`VisionTransformer.forward_with_losses` returns the
balance loss, which training adds with a weight of 0.01.

With SeqPE (Li et al., arXiv 2506.13277) one encoder reads the row and column of each patch, for all layers. The class
tokens, which have neither, have learned vectors in place of the encoder's. :meth:`VisionTransformer.forward_with_losses`
returns its two losses, which training adds with a weight of 0.1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import Context, Loss, Pattern, Result, Unsupported, at_least, one_of
from regard.layers.attention import AttentionLayer
from regard.layers.drop_path import DropPath, drop_path_rates
from regard.layers.feed_forward import MLP
from regard.layers.norms import LayerNorm
from regard.layers.patches import PatchEmbedding
from regard.layers.residual import Branch, fused, is_called_plainly
from regard.models.blocks import Block, check_sequences
from regard.models.layer_plan import check_plan, read_plan
from regard.models.losses import add_losses
from regard.models.placing import SHARED_POSITIONS, input_positions, make_input_positions, place_input
from regard.models.stack import StackConfig
from regard.models.vision.backbone import Backbone, BackboneConfig, Level, map_of
from regard.models.vision.blocks import Blocks
from regard.models.vision.patch_tokens import agent_table, context_of, fit_tables, options_on
from regard.positions import Positions, Rotary, create_positions
from regard.positions.protocol import locate
from regard.positions.seqpe.schemes import SeqpeInside

if TYPE_CHECKING:
    from jaxtyping import Float, Int

POOLS = ("class", "mean")


@dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig(BackboneConfig):
    """The configuration of a :class:`VisionTransformer`.

    Attributes:
        dim, num_layers, num_heads: width, number of blocks, and heads per block.
        patch: side of a patch in pixels; it divides the sides of the images.
        plan: as in :class:`regard.models.LanguageModelConfig`: a mechanism for all layers, or one (with options) for each.
            The default `bias_grid` of agent attention is the grid of patches.
        expansion: hidden width of the feed-forward networks as a multiple of `dim`, unless set in the plan.
        positions: ``learned``, a table for one image size with a row for every token; ``sinusoidal``, fixed, with half
            of the features for the row and half for the column, for patches only; ``none``; ``seqpe``, added to the
            patches; ``seqpe_mul``, ``seqpe_add`` or ``seqpe_scalar``, one encoder for all layers; or another scheme
            inside the layers, such as ``rotary``, over the sequence of tokens, or with ``axes=2`` in `position_options` over
            rows and columns, where class tokens are not turned; ``auto`` as in
            :class:`regard.models.LanguageModelConfig`. Layers may also have a scheme of their own (`positions` in the
            plan's options). Images of other sizes than `image_size` are taken unless positions are ``learned``.
        position_options: options of the scheme. SeqPE reads rows and columns unless its `axes` is 1.
        max_length: for SeqPE, a bound of positions: its square root bounds the rows and the columns of patches.
        pool: ``class`` reads a class token; ``mean`` averages the patches, without a class token.
        distillation_token: whether there is a second class token with its own head; the logits are then the mean of
            both heads.
        bias: whether the projections of attention layers have biases, unless set in the plan. For an attention layer
            inside a wrapper, the plan's `mechanism_options` decide.
        layer_scale: initial LayerScale of both branches; None for none.
        branch_dropout: dropout probability of the input tokens and at the end of each branch.
    """

    dim: int = 192
    num_layers: int | None = 12
    num_heads: int = 3
    patch: int = 16
    plan: Any = "softmax"
    expansion: float = 4.0
    positions: str = "learned"
    position_options: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 10_000
    pool: str = "class"
    distillation_token: bool = False
    bias: bool = True
    layer_scale: float | None = None
    branch_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("dim", self.dim, 1)
        at_least("patch", self.patch, 1)
        at_least("max_length", self.max_length, 1)
        one_of("pool", self.pool, POOLS)
        if self.distillation_token and self.pool != "class":
            raise Unsupported(
                f"distillation_token=True with pool={self.pool!r}", supported="pool='class'", nearest="pool='class'"
            )
        object.__setattr__(self, "plan", read_plan(self.plan, self.num_layers))
        object.__setattr__(self, "num_layers", len(self.plan))

    @property
    def sides(self) -> tuple[int, int]:
        return self.patch, self.patch

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.size[0] // self.patch, self.size[1] // self.patch

    @property
    def class_tokens(self) -> int:
        """Number of tokens before the patches."""
        return (self.pool == "class") + self.distillation_token


DEIT_T, DEIT_S, DEIT_B = ({"dim": 64 * heads, "num_heads": heads, "drop_path": 0.1} for heads in (3, 6, 12))


def _agents(layers: int, number: int, of: int = 12) -> list[Any]:
    return [("agent", {"num_agents": number, "agent_bias": "all"})] * layers + ["softmax"] * (of - layers)


def _routed(shared: int, active: int) -> list[Any]:
    options = {"shared_heads": shared, "active_heads": active, "mechanism_options": {"bias": True}}
    return [("mixture_of_heads", options)] * 12


class VisionTransformer(Backbone):
    """ViT, DeiT and Agent-DeiT, see the module.

    Sizes: ``vit_t`` to ``vit_h``, ``deit_t`` to ``deit_b``, ``agent_deit_t`` to ``agent_deit_b``, ``moh_deit_s`` and
    ``moh_deit_b``.
    """

    Config = VisionTransformerConfig
    scales: ClassVar = {"dim": "num_heads"}
    channels_last = False  # patches are cut out of any layout
    config: VisionTransformerConfig
    sizes: ClassVar = {
        "vit_nano": {"image_size": 32, "patch": 4, "dim": 96, "num_layers": 6, "num_heads": 3},
        "vit_t": {"dim": 192, "num_heads": 3},
        "vit_s": {"dim": 384, "num_heads": 6},
        "vit_b": {"dim": 768, "num_heads": 12},
        "vit_l": {"dim": 1024, "num_heads": 16, "num_layers": 24},
        "vit_h": {"dim": 1280, "num_heads": 16, "num_layers": 32, "patch": 14},
        "deit_t": DEIT_T,
        "deit_s": DEIT_S,
        "deit_b": DEIT_B,
        "agent_deit_t": {**DEIT_T, "plan": _agents(12, 49), "drop_path": 0.0},
        "agent_deit_s": {**DEIT_S, "plan": _agents(12, 49)},
        "agent_deit_b": {**DEIT_B, "plan": _agents(4, 81), "drop_path": 0.3},
        "moh_deit_s": {**DEIT_S, "plan": _routed(2, 2)},
        "moh_deit_b": {**DEIT_B, "plan": _routed(3, 6)},
    }

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__(config)
        check_plan(config.plan, Pattern.NONCAUSAL_SELF, "a vision transformer")
        scheme = input_positions(config.plan, config.positions)
        width, shape = config.dim, _BlockShape(config)
        self.embedding = PatchEmbedding(config.channels, width, config.patch)
        rows, columns = self.embedding.grid(*config.size)
        before = config.class_tokens
        self.class_tokens = nn.Parameter(torch.empty(before, width)) if before else None
        if before:
            self.pools = ("token",) if config.distillation_token else ("token", "avg")
        learned = scheme == "learned"
        if learned and config.position_options:
            raise Unsupported("position_options of learned positions", supported="position_options={}")
        self.positions = nn.Parameter(torch.empty(before + rows * columns, width)) if learned else None
        self.made_for_size = "the table of positions" if learned else ""
        self.sinusoids: Positions | None = None
        if scheme == "sinusoidal":
            if width % 2:
                raise Unsupported(f"sinusoidal positions of rows and columns with dim={width}", supported="an even dim")
            heads = config.num_heads
            self.sinusoids = create_positions(
                scheme, dim=width // 2, heads=heads, head_dim=width // heads, **config.position_options
            )
        #: SeqPE: the encoder, and the vectors that it has for class tokens
        self.encoding = make_input_positions(scheme, shape) if scheme in ("seqpe", *SHARED_POSITIONS) else None
        self.class_positions: nn.Parameter | None = None
        if before and isinstance(self.encoding, SeqpeInside):
            self.class_positions = nn.Parameter(torch.empty(before, self.encoding.query_width))
        rates = drop_path_rates(config.drop_path, [len(config.plan)])[0]
        self.blocks = Blocks(
            VisionBlock(_entry(entry, config), shape, before, rate)
            for entry, rate in zip(config.plan, rates, strict=True)
        )
        if before:
            check_sequences(
                self.blocks, "a vision transformer with a class token", supported="pool='mean', without a class token"
            )
            _check_own_positions(self.blocks)
        self.norm = LayerNorm(width, eps=1e-6)
        self.levels = [Level(width, config.patch)] * len(self.blocks)
        self.apply(_initialise)
        for table in (self.class_tokens, self.positions, self.class_positions):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
        self.distillation_head: nn.Module | None = None
        self.make_head(width)

    def encode(
        self, images: Float[Tensor, "b c h w"], keep: Collection[int] = ()
    ) -> tuple[Float[Tensor, "b n c"], dict[int, Float[Tensor, "b c h w"]]]:
        features, maps, _ = self._run(images, keep)
        return features, maps

    def _run(
        self, images: Float[Tensor, "b c h w"], keep: Collection[int] = ()
    ) -> tuple[Float[Tensor, "b n c"], dict[int, Float[Tensor, "b c h w"]], dict[str, Loss]]:
        """Return the normed tokens (class tokens first), the maps of the levels in `keep`, and the layers' losses."""
        x, context, losses = self.place(images)
        maps: dict[int, Tensor] = {}
        found = None if keep else fused_blocks(self.blocks, x)
        if found is not None:
            return self.norm(found), maps, losses
        for number, block in enumerate(self.blocks):
            result = self.blocks.run(block, x, context=context)
            x = result.output
            add_losses(losses, result.losses)
            if number in keep:
                maps[number] = map_of(x[:, self.config.class_tokens :], self.embedding.grid(*images.shape[2:]))
        return self.norm(x), maps, losses

    def embed(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
        """Return the first block's input: class tokens and patches with their positions."""
        return self.place(images)[0]

    def place(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n c"], Context, dict[str, Loss]]:
        """Return the first block's input, the blocks' context, and the losses of positions."""
        x, grid = self.embedding(images), self.embedding.grid(*images.shape[2:])
        if self.sinusoids is not None:
            rows, columns = (place.flatten()[None] for place in _places(grid, x.device))
            halves = x.chunk(2, -1)
            embed: Any = self.sinusoids.embed
            x = torch.cat([embed(h, at) for h, at in zip(halves, (rows, columns), strict=True)], -1)
        places = torch.arange(x.shape[1], device=x.device)[None]
        x, placed, losses = place_input(
            self.encoding, x, places, Context(grid=grid), movable=True, before=self.class_positions
        )
        if self.class_tokens is not None:
            x = torch.cat([self.class_tokens.expand(x.shape[0], -1, -1).to(x.dtype), x], 1)
        if self.positions is not None:
            x = x + self.positions.to(x.dtype)
        context = context_of(grid, self.config.class_tokens, x).replace(position_vectors=placed.position_vectors)
        return F.dropout(x, self.config.branch_dropout, self.training), context, losses

    def pool(self, features: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        before = self.config.class_tokens
        return (features[:, :before] if self.global_pool == "token" else features[:, before:]).mean(1)

    def forward_head(self, features: Float[Tensor, "b n c"], pre_logits: bool = False) -> Float[Tensor, "b k"]:
        """Return logits of features (the mean of both heads, if there are two), or pooled vectors with `pre_logits`."""
        if self.distillation_head is None or pre_logits or not self.num_classes:
            return super().forward_head(features, pre_logits)
        return sum(self._two_heads(features)) / 2  # type: ignore[return-value]

    def _two_heads(self, features: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
        one, other = F.dropout(features[:, :2], self.config.dropout, self.training).unbind(1)
        assert self.distillation_head is not None
        return self.head(one), self.distillation_head(other)

    def forward_distilled(self, images: Float[Tensor, "b c h w"]) -> tuple[Result, Float[Tensor, "b k"]]:
        """Return the class token's logits, with the layers' losses, and the distillation token's logits.

        The latter are trained on a teacher's classes.

        Raises:
            Unsupported: without a distillation token.
        """
        if self.distillation_head is None:
            raise Unsupported(
                "forward_distilled without a distillation token",
                supported="distillation_token=True",
                nearest="forward(images)",
            )
        features, _, losses = self._run(self.check_images(images))
        one, other = self._two_heads(features)
        return Result(one, None, losses), other

    def forward_with_losses(self, images: Float[Tensor, "b c h w"]) -> Result:
        features, _, losses = self._run(self.check_images(images))
        return Result(self.forward_head(features), None, losses)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.config.distillation_token:
            head = self.head
            super().reset_classifier(num_classes, global_pool)
            self.distillation_head, self.head = self.head, head

    def no_weight_decay(self) -> set[str]:
        own = ("class_tokens", "positions", "class_positions")
        return super().no_weight_decay() | {name for name in own if getattr(self, name) is not None}

    @classmethod
    def translate(cls, state: Mapping[str, Tensor], config: VisionTransformerConfig) -> dict[str, Tensor]:
        """Translate weights of timm (`vision_transformer.py`, `deit.py`), facebookresearch/deit or Agent-Attention.

        Tables of positions and of agent biases are interpolated if the images had another size.
        """
        names = (
            (r"^patch_embed\.proj\.", "embedding.projection."),
            (r"^pos_embed$", "positions"),
            (r"^head_dist\.", "distillation_head."),
            (r"\.norm1\.", ".mixer_norm."),
            (r"\.norm2\.", ".feed_forward_norm."),
            (r"\.attn\.proj\.", ".mixer.output."),
            (r"\.attn\.dwc\.", ".mixer.merge.convolution."),
            (r"\.attn\.(\w\w_bias)$", r".mixer.\1"),
            (r"\.mlp\.fc1\.", ".feed_forward.up."),
            (r"\.mlp\.fc2\.", ".feed_forward.down."),
            (r"\.ls1\.gamma$", ".mixer_end.scale.factors"),
            (r"\.ls2\.gamma$", ".feed_forward_end.scale.factors"),
        )
        found, first = {}, [state[name][0] for name in ("cls_token", "dist_token") if name in state]
        if first:
            found["class_tokens"] = torch.cat(first)
        for name, value in state.items():
            if name in ("cls_token", "dist_token"):
                continue
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            if ".attn.qkv." in name:
                for part, own in zip(value.chunk(3), ("query", "key", "value"), strict=True):
                    found[name.replace(".attn.qkv.", f".mixer.{own}.")] = part
                continue
            if name == "positions" and value.ndim == 3:
                value = value[0]
            elif name == "embedding.projection.weight":
                value = value.flatten(1)
            name, value = agent_table(name, value)
            found[name] = value
        with torch.device("meta"):
            own_state = cls(config).state_dict()
        return fit_tables(found, own_state, {"positions": (config.class_tokens, config.grid)}, "bicubic")

    @classmethod
    def options_told(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        tokens = len(weights.get("class_tokens", ()))
        return {"pool": "class" if tokens else "mean", "distillation_token": tokens == 2}


class VisionBlock(Block):
    """A block for tokens on a grid, possibly after class tokens, with stochastic depth of both branches.

    Args:
        entry: mechanism and options.
        config: a config with the fields that :class:`regard.models.blocks.Block` reads.
        before: number of class tokens.
        drop_path: stochastic depth probability of both branches.
    """

    def __init__(self, entry: tuple[str, Mapping[str, Any]], config: Any, before: int, drop_path: float) -> None:
        super().__init__(entry, config, Pattern.NONCAUSAL_SELF)
        self.sees_grid = (self.takes_roles or not before) and getattr(self.mixer, "grid_axes", None) != 1
        self.before = before
        self.turned_axes = max((part.axes for part in self.mixer.modules() if isinstance(part, Rotary)), default=1)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c"] | None = None,
        *,
        context: Context,
        state: Any = None,
    ) -> Result:
        """Return the new tokens, with the layer's losses; a layer that cannot use the grid sees a sequence."""
        mixed = self.add_mixed(x, memory, self.drop_path, context=self.seen(x, context), state=state)
        x = mixed.output
        if self.feed_forward is not None:
            x = self.add_fed(x, self.drop_path, context=context, losses=mixed.losses)
        return Result(x, mixed.state, mixed.losses, mixed.extras)

    def seen(self, x: Float[Tensor, "b n c"], context: Context) -> Context:
        """Return the mixer's context, given the model's with places of the tokens as positions, or None for ranks."""
        seen = context if self.sees_grid else context.replace(grid=None, roles=None)
        return seen if self.turned_axes == 1 else seen.replace(positions=self._coordinates(x, context))

    def _coordinates(self, x: Float[Tensor, "b n c"], context: Context) -> Int[Tensor, "b n axes"]:
        """Return the row and column of each token, whose place among all tokens is its rank or given; 0 for class tokens."""
        places = torch.arange(x.shape[1], device=x.device)[None] if context.positions is None else context.positions
        patches = (places - self.before).clamp(min=0).expand(x.shape[0], -1)
        return locate(Rotary.name, patches, context.grid, self.turned_axes)


def fused_blocks(blocks: Blocks, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"] | None:
    """Run all blocks with one native call for each branch; None if some branch has no native form."""
    branches: list[Branch] = []
    for block in blocks:
        if type(block) is not VisionBlock or not is_called_plainly(block) or (block.training and block.dropout):
            return None
        branches.append((block.mixer_norm, block.mixer, (block.mixer_end, block.drop_path)))
        norm, network, end = block.feed_forward_norm, block.feed_forward, block.feed_forward_end
        if norm is not None and network is not None and end is not None:
            branches.append((norm, network, (end, block.drop_path)))
    return fused(x, branches)


class _BlockShape:
    """The part of a model's config that its blocks and :func:`regard.models.placing.make_input_positions` read."""

    head_dim = num_kv_heads = None
    norm = "layer:1e-6"

    def __init__(self, config: VisionTransformerConfig) -> None:
        self.dim, self.num_heads, self.positions = config.dim, config.num_heads, config.positions
        axes = {"axes": 2} if config.positions in ("seqpe", *SHARED_POSITIONS) else {}
        self.position_options, self.max_length = {**axes, **config.position_options}, config.max_length
        self.feed_forward = int(config.expansion * config.dim)
        self.dropout = config.branch_dropout
        self.stack = StackConfig(layer_scale=config.layer_scale)


def _entry(entry: tuple[str, Mapping[str, Any]], config: VisionTransformerConfig) -> tuple[str, dict[str, Any]]:
    """Return a plan's entry with the defaults of a vision transformer's layers."""
    options = options_on(entry, config.grid, bias=config.bias)
    if options.get("feed_forward") != 0 and "feed_forward_kind" not in options:
        options |= {"feed_forward_kind": "gelu"}
        options["feed_forward_options"] = {"bias": True, **options.get("feed_forward_options", {})}
    return entry[0], options


def _check_own_positions(blocks: Blocks) -> None:
    """Raise Unsupported for a layer with its own encoder of rows and columns, beside class tokens, which have none."""
    for block in blocks:
        scheme = getattr(block.mixer, "positions", None)
        if isinstance(scheme, SeqpeInside) and scheme.axes > 1 and not scheme.shared:
            raise Unsupported(
                f"{scheme.name} positions of {scheme.axes} axes for one layer of a vision transformer with a class token",
                supported="one encoder for all layers, or pool='mean'",
                nearest=f"positions={scheme.name!r} in the model's config",
            )


def _places(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row and column of each patch."""
    rows, columns = (torch.arange(side, device=device) for side in grid)
    return torch.meshgrid(rows, columns, indexing="ij")  # type: ignore[return-value]


def _initialise(module: nn.Module) -> None:
    """Initialise as DeiT does: truncated normal weights, zero biases; other parameters as their mechanisms do."""
    linears: tuple[nn.Module | None, ...] = ()
    if isinstance(module, AttentionLayer):
        linears = (module.query, module.key, module.value, module.output)
    elif isinstance(module, MLP):
        linears = (module.up, module.down)
    for linear in linears:
        if isinstance(linear, nn.Linear):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
