"""Vision transformers as trained methods that leave out tokens see them: the parts before, in and after their blocks."""

from __future__ import annotations

import importlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import Context, Mask, Mechanism, Result, Unsupported, an_instance, valid_from_lengths
from regard.core.precision import wide, wide_dtype
from regard.core.ragged import packed
from regard.layers.attention import AttentionLayer
from regard.models.vision import tnt
from regard.models.vision.patch_tokens import context_of
from regard.models.vision.released import check_fit
from regard.models.vision.vit import VisionBlock, VisionTransformer

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

HOSTS = "regard's VisionTransformer and TNT, timm's VisionTransformer of plain blocks"
Attend = Callable[[Tensor], Tensor]
"""A function from the scores of an attention layer (B, H, N, N) to its weights."""


def host_of(model: nn.Module) -> Host:
    """The parts of a vision transformer; raises Unsupported for other models."""
    timm = sys.modules.get("timm.models.vision_transformer")
    if isinstance(model, VisionTransformer):
        return OwnHost(model)
    if isinstance(model, tnt.TNT):
        return TNTHost(model)
    if timm is not None and isinstance(model, timm.VisionTransformer):
        return TimmHost(model)
    raise Unsupported(f"fewer tokens in {an_instance(model)}", supported=HOSTS)


class Host(ABC):
    """A vision transformer whose head reads class tokens, which come first, or averages the patches.

    Tokens that are left are a batch (B, N, C) with, if some were left out, their `places` (B, N), the numbers that they
    had among all tokens, class tokens included.

    Args:
        model: shared, not copied.

    Attributes:
        protected: number of class tokens and registers, which come first and always stay.
        class_token: whether the first token is a class token.
        width: width of the tokens, as small networks read them.
        heads: number of heads of a block.

    Raises:
        Unsupported: for another head, for other blocks, and for a model that is reduced already.
    """

    protected: int
    class_token: bool
    width: int
    heads: int

    def __init__(self, model: Any) -> None:
        self.model = model
        if any(hasattr(block, "reduction") for block in self.blocks):
            raise Unsupported("a second reduction of a model", supported="one at a time", nearest="undo() of the first")
        reason = self._why_not()
        if reason:
            raise Unsupported(
                f"fewer tokens in {an_instance(model)} {reason}",
                supported="vision transformers of regard, and of timm with plain blocks, whose head reads a class token or "
                "averages the patches",
            )

    @property
    def blocks(self) -> list[Any]:
        """The blocks, in order."""
        return list(self.model.blocks)

    @property
    def averages(self) -> bool:
        """Whether the head averages the patches."""
        return self.model.global_pool == "avg"

    @property
    @abstractmethod
    def ends(self) -> list[nn.Module]:
        """The modules after the blocks."""

    @abstractmethod
    def check_softmax(self) -> None:
        """Raise Unsupported unless :meth:`run_under` can replace the softmax of every block."""

    @abstractmethod
    def load_released(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights with timm's names; raises Unsupported if they do not fit."""

    @abstractmethod
    def grid(self, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """Rows and columns of an image's patches."""

    @abstractmethod
    def embed(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n c"], Context]:
        """All tokens, as the first block gets them, and what all blocks share: the grid of all patches, and the position
        vectors of all tokens, if the model has them."""

    @abstractmethod
    def run(
        self,
        blocks: Sequence[Any],
        x: Float[Tensor, "b n c"],
        context: Context,
        *,
        alive: Bool[Tensor, "b n"] | None = None,
        places: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """The output of blocks.

        Args:
            blocks: some of the host's, in order.
            x: tokens.
            context: from :meth:`embed`.
            alive: tokens that attention sees, the others being masked; all when None.
            places: see the class; None while all tokens are there.
        """

    @abstractmethod
    def run_under(
        self, block: Any, x: Float[Tensor, "b n c"], context: Context, attend: Attend
    ) -> Float[Tensor, "b n c"]:
        """The output of a block whose softmax is replaced by `attend`; all tokens must be there."""

    def run_kept(
        self,
        blocks: Sequence[Any],
        x: Float[Tensor, "b n c"],
        context: Context,
        stays: Bool[Tensor, "b n"],
        places: Int[Tensor, "b n"],
    ) -> tuple[Float[Tensor, "b m c"], Bool[Tensor, "b m"], Int[Tensor, "b m"]]:
        """The output of blocks for the tokens that stay, which may be more in some rows than in others.

        Returns:
            the tokens, padded on the right to the longest row, which of them are no padding, and their places.
        """
        lengths = stays.sum(1)
        longest = int(lengths.max()) if len(lengths) else x.shape[1]
        alive = valid_from_lengths(lengths, longest)
        kept, where = x[stays], places[stays]
        places = _padded(where, alive)
        if bool(alive.all()):
            whole = longest == math.prod(context.grid or ()) + self.protected
            left = kept.view(len(x), longest, x.shape[2])
            return self.run(blocks, left, context, places=None if whole else places), alive, places
        return self.run_ragged(blocks, kept, context, alive, places), alive, places

    def run_ragged(
        self,
        blocks: Sequence[Any],
        kept: Float[Tensor, "tokens c"],
        context: Context,
        alive: Bool[Tensor, "b m"],
        places: Int[Tensor, "b m"],
    ) -> Float[Tensor, "b m c"]:
        """:meth:`run` for rows of unequal lengths, given one after the other: padded and masked, unless a host can do
        better."""
        return self.run(blocks, _padded(kept, alive), context, alive=alive, places=places)

    def vectors(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n width"]:
        """What small networks read of tokens."""
        return x

    def norm(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n width"]:
        """The features of the last block's output."""
        return self.model.norm(self.vectors(x))

    def logits(
        self, features: Float[Tensor, "b n width"], kept: Float[Tensor, "b n"] | Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b k"]:
        """The logits of features. An average of patches is that of those with 1 or True in `kept`; of all when None."""
        if kept is not None and self.averages:
            counts = kept[:, self.protected :].to(wide_dtype(features))
            counts = counts * counts.shape[1] / counts.sum(1, keepdim=True).clamp(min=0.5)  # for the head's mean
            weights = F.pad(counts, (self.protected, 0), value=1.0)
            features = (features * weights[..., None]).to(features.dtype)
        return self.model.forward_head(features)

    @abstractmethod
    def _why_not(self) -> str:
        """Why the model is no such host, in words that follow its name; empty if it is one."""


class OwnHost(Host):
    """A :class:`regard.models.vision.vit.VisionTransformer` with layers of any mechanism.

    A layer whose position scheme takes positions (``rotary``) gets the places of the tokens, or the position vectors of
    these places, which the model encodes once for all layers (``seqpe_mul``); layers that count ranks
    count the tokens that are left, and fill a grid with them row by row. Rows of unequal lengths are packed one after
    the other, which the layers of all mechanisms take.
    """

    def __init__(self, model: VisionTransformer | tnt.TNT) -> None:
        super().__init__(model)
        self.protected, self.width, self.heads = self._sizes()
        self.class_token = self.protected > 0

    def _sizes(self) -> tuple[int, int, int]:
        config = self.model.config
        return config.class_tokens, config.dim, config.num_heads

    def _why_not(self) -> str:
        if not self.model.global_pool:
            return "without a pool"
        for block in self.blocks:
            card = card_of(block)
            if card is not None and card.keeps_places and sees_grid(block):
                return f"with a layer of {card.name}, which reads the grid of all patches"
        return ""

    @property
    def ends(self) -> list[nn.Module]:
        parts = (self.model.norm, self.model.head, self.model.distillation_head)
        return [part for part in parts if part is not None]

    def check_softmax(self) -> None:
        for block in self.blocks:
            layer = attention_of(block)
            if layer is None or layer.card.name != "softmax":
                asked = f"a layer of {layer.card.name if layer else type(mixer_of(block)).__name__}"
            elif layer.config != layer.card.options() or layer.convolutions:
                asked = "softmax attention with a window, softcap, sink or convolution"
            elif layer.positions.bias is not None:
                asked = f"{layer.positions.name} positions, which add to the scores,"
            else:
                continue
            raise Unsupported(
                f"{asked} in a block whose softmax follows a policy",
                supported="plain softmax, also in a mixture of heads",
            )

    def load_released(self, weights: Mapping[str, Tensor]) -> None:
        self.model.load_released(weights)

    def grid(self, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        return self.model.embedding.grid(*images.shape[2:])

    def embed(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n c"], Context]:
        x, context, _ = self.model.place(self.model.check_images(images))
        return x, context

    def run(
        self,
        blocks: Sequence[Any],
        x: Float[Tensor, "b n c"],
        context: Context,
        *,
        alive: Bool[Tensor, "b n"] | None = None,
        places: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        if alive is None and places is not None and any(map(reads_grid, blocks)):
            alive = torch.ones_like(places, dtype=torch.bool)  # without a mask, tokens would have to fill the grid
        context = self._context(context, x, None if alive is None else Mask(valid=alive))
        return self._through(blocks, x, context, places)

    def run_ragged(
        self,
        blocks: Sequence[Any],
        kept: Float[Tensor, "tokens c"],
        context: Context,
        alive: Bool[Tensor, "b m"],
        places: Int[Tensor, "b m"],
    ) -> Float[Tensor, "b m c"]:
        context = self._context(context, places, packed(alive.sum(1), len(kept), alive.shape[1]))
        if context.roles is not None:
            context = context.replace(roles=context.roles[alive][None])
        found = self._through(blocks, kept[None], context, places[alive][None])
        return _padded(found[0], alive)

    def run_under(
        self, block: VisionBlock, x: Float[Tensor, "b n c"], context: Context, attend: Attend
    ) -> Float[Tensor, "b n c"]:
        layer = attention_of(block)
        assert layer is not None

        def mix(card: Mechanism, heads: dict[str, Tensor], **options: Any) -> Result:
            query, key, value = (heads[name] for name in "qkv")
            key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
            weights = attend(wide(query @ key.mT * query.shape[-1] ** -0.5)).to(value.dtype)
            return Result(F.dropout(weights, options.get("dropout", 0.0)) @ value)

        vars(layer)["mix"] = mix  # as torch.compile can follow it
        try:
            return self.run([block], x, context)
        finally:
            del vars(layer)["mix"]

    def _context(self, context: Context, tokens: Tensor, mask: Mask | None) -> Context:
        """The context of the tokens (B, N, ...) that are left."""
        assert context.grid is not None
        roles = context_of(context.grid, self.protected, tokens).roles
        return context.replace(mask=mask, roles=roles)

    def _through(
        self, blocks: Sequence[Any], x: Tensor, context: Context, places: Tensor | None
    ) -> Float[Tensor, "b n c"]:
        for block in blocks:
            x = block(x, context=context if places is None else placed(block, context, places)).output
        return x


class TNTHost(OwnHost):
    """A :class:`regard.models.vision.tnt.TNT`, whose tokens are sentences, each followed by its words.

    Words leave with their sentence; small networks read sentences. A class token has words too, which nothing reads.
    """

    def _sizes(self) -> tuple[int, int, int]:
        return self.model.prefix, self.model.config.width, self.model.config.heads

    def _why_not(self) -> str:
        if self.model.config.excitation:
            return "with an excitation, which averages over all patches"
        return super()._why_not()

    @property
    def ends(self) -> list[nn.Module]:
        return [self.model.norm, self.model.head]

    def grid(self, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        return self.model.config.grid

    def embed(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n c"], Context]:
        words, sentences = self.model.embed(self.model.check_images(images))
        each = words.flatten(1).unflatten(0, (len(images), sentences.shape[1] - self.protected))
        own = F.pad(each, (0, 0, self.protected, 0))
        return torch.cat([sentences, own], -1), Context(grid=self.model.config.grid)

    def vectors(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n width"]:
        return x[..., : self.width]

    def _context(self, context: Context, tokens: Tensor, mask: Mask | None) -> Context:
        return context.replace(mask=mask, grid=None if self.protected else context.grid)

    def _through(
        self, blocks: Sequence[Any], x: Tensor, context: Context, places: Tensor | None
    ) -> Float[Tensor, "b n c"]:
        sentences, words = x[..., : self.width], x[..., self.width :]
        words = words.unflatten(-1, (self.model.config.words, self.model.config.inner_width)).flatten(0, 1)
        here = torch.arange(x.shape[1], device=x.device)[None] if places is None else places
        patch = (here >= self.protected)[..., None]
        for block in blocks:
            if block.inner is not None:
                words = block.inner(words)
                sentences = sentences + torch.where(patch, block.fusion(words, sentences.shape[:2]), 0)
            sentences = block.outer(sentences, context if places is None else placed(block, context, places))
        return torch.cat([sentences, words.flatten(1).unflatten(0, sentences.shape[:2])], -1)


class TimmHost(Host):
    """timm's `VisionTransformer`, or a class of its that only has other class tokens, with plain blocks."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.protected, self.width = model.num_prefix_tokens, model.embed_dim
        self.class_token, self.heads = model.has_class_token, model.blocks[0].attn.num_heads

    def _why_not(self) -> str:
        timm = importlib.import_module("timm.models.vision_transformer")
        model = self.model
        if model.global_pool not in ("token", "avg") or (model.global_pool == "avg" and model.pool_include_prefix):
            return "whose head reads neither a class token nor the average of the patches"
        if not isinstance(model.patch_drop, nn.Identity):
            return "that drops patches at random"
        for block in self.blocks:
            if type(block) is not timm.Block or type(block.attn) is not timm.Attention:
                return f"with a {type(block).__name__} of {type(block.attn).__name__}"
        return ""

    @property
    def ends(self) -> list[nn.Module]:
        names = ("norm", "fc_norm", "head", "head_dist")
        return [getattr(self.model, name) for name in names if hasattr(self.model, name)]

    def check_softmax(self) -> None:
        pass  # all its blocks have it

    def load_released(self, weights: Mapping[str, Tensor]) -> None:
        check_fit(self.model, weights)
        self.model.load_state_dict(weights)

    def grid(self, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        return self.model.patch_embed.dynamic_feat_size(tuple(images.shape[2:]))

    def embed(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n c"], Context]:
        x = self.model.norm_pre(self.model._pos_embed(self.model.patch_embed(images)))
        return x, Context(grid=self.grid(images))

    def run(
        self,
        blocks: Sequence[Any],
        x: Float[Tensor, "b n c"],
        context: Context,
        *,
        alive: Bool[Tensor, "b n"] | None = None,
        places: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        mask = None if alive is None else alive[:, None, None]
        for block in blocks:
            x = block(x, attn_mask=mask)
        return x

    def run_under(
        self, block: Any, x: Float[Tensor, "b n c"], context: Context, attend: Attend
    ) -> Float[Tensor, "b n c"]:
        layer, normed = block.attn, block.norm1(x)
        query, key, value = layer.qkv(normed).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = layer.q_norm(query), layer.k_norm(key)
        weights = layer.attn_drop(attend(wide(query @ key.mT * layer.scale)).to(value.dtype))
        mixed = layer.norm((weights @ value).transpose(1, 2).flatten(2))
        if layer.gate is not None:
            mixed = mixed * layer.gate(normed).sigmoid()
        x = x + block.drop_path1(block.ls1(layer.proj_drop(layer.proj(mixed))))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def mixer_of(block: VisionBlock | tnt.Block) -> Any:
    """The layer that mixes the tokens of patches in a block."""
    return block.outer.attention if isinstance(block, tnt.Block) else block.mixer


def attention_of(block: VisionBlock | tnt.Block) -> AttentionLayer | None:
    """The attention layer of a block, of a mixture of heads the one whose heads are routed; None if there is none."""
    mixer = mixer_of(block)
    attention = getattr(mixer, "attention", mixer)
    return attention if isinstance(attention, AttentionLayer) else None


def card_of(block: VisionBlock | tnt.Block) -> Mechanism | None:
    """The mechanism of a block's layer, of a mixture of heads the one whose heads are routed; None without a mechanism."""
    return getattr(attention_of(block) or mixer_of(block), "card", None)


def sees_grid(block: VisionBlock | tnt.Block) -> bool:
    """Whether a block's layer is given the grid of patches."""
    return not block.prefix if isinstance(block, tnt.Block) else block.sees_grid


def reads_grid(block: VisionBlock | tnt.Block) -> bool:
    """Whether a block's layer depends on the grid of patches."""
    card = card_of(block)
    return card is not None and sees_grid(block) and (card.keeps_places or bool(card.grid_variants))


def placed(block: VisionBlock | tnt.Block, context: Context, places: Int[Tensor, "b n"]) -> Context:
    """A block's context for tokens of which others are gone, given their places among all tokens: with their positions
    and their rows of position vectors."""
    vectors = context.position_vectors
    if vectors is not None:
        rows = places[..., None].expand(-1, -1, vectors.shape[-1])
        context = context.replace(position_vectors=vectors.expand(len(places), -1, -1).gather(1, rows))
    return context.replace(positions=places) if _takes_positions(block) else context


def _takes_positions(block: VisionBlock | tnt.Block) -> bool:
    layer = attention_of(block)
    if layer is None or layer.places_keys or layer.positions.bias is not None:
        return False
    return layer.positions.embed is not None or layer.positions.rotate is not None


def _padded(rows: Tensor, alive: Bool[Tensor, "b m"]) -> Tensor:
    """Rows that follow one another (tokens, ...) as a batch (B, M, ...), with zeros in the padding."""
    padded = rows.new_zeros(*alive.shape, *rows.shape[1:])
    padded[alive] = rows
    return padded
