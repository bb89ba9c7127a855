"""`nn.MultiheadAttention` and timm's ViT attention with another mechanism inside, on the same weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Context, Pattern, Role, Unsupported
from regard.integrations.chosen import Chosen
from regard.integrations.collecting import context_of, hand_back
from regard.integrations.heads import HeadAttention
from regard.integrations.masks import Visible, find_causal, read_mask

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class Swapped(nn.Module):
    """A module that replaces another and uses its parts.

    Args:
        original: the module whose parts are used (not copied), or an earlier replacement of it.
    """

    PARTS: ClassVar[tuple[str, ...]] = ()
    attend: HeadAttention
    _original: tuple[nn.Module, ...]

    def __init__(self, original: Any) -> None:
        super().__init__()
        self._original = (
            original._original if isinstance(original, Swapped) else (original,)
        )  # inside a tuple, so that it is not a submodule

    def original(self) -> nn.Module:
        """The original module, with the parts as they are now."""
        (module,) = self._original
        for name in self.PARTS:
            if hasattr(self, name):
                setattr(module, name, getattr(self, name))
        return module.train(self.training)


class MultiheadAttention(Swapped):
    """Replaces :class:`torch.nn.MultiheadAttention`, with the same calls and parameters.

    Its state_dict has the original names, and names under `attend` for what the mechanism learns in addition.

    Args:
        original: an `nn.MultiheadAttention`, or its replacement, whose parameters are used (not copied).
        chosen: the mechanism.
        pattern: pattern of its calls, for which the learned parts are made. As in torch, a call of a self pattern is
            causal if its mask is; calls with another pattern need a mechanism that has both and learns nothing specific
            to one.
    """

    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    _qkv_same_embed_dim = False  # PyTorch's encoder layers take a fused path around the module when this is True
    WEIGHTS: ClassVar = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
    PARTS: ClassVar = (*WEIGHTS, "out_proj")

    def __init__(self, original: Any, chosen: Chosen, pattern: Pattern) -> None:
        super().__init__(original)
        self.embed_dim, self.num_heads, self.head_dim = original.embed_dim, original.num_heads, original.head_dim
        self.kdim, self.vdim = original.kdim, original.vdim
        self.batch_first, self.dropout, self.pattern = original.batch_first, original.dropout, pattern
        for name in self.WEIGHTS:
            self.register_parameter(name, getattr(original, name))
        self.out_proj = original.out_proj
        self.attend = HeadAttention(
            chosen,
            dim=self.embed_dim,
            memory_dim=self.kdim,
            heads=self.num_heads,
            head_dim=self.head_dim,
            pattern=pattern,
        ).to(original.out_proj.weight)
        self.train(original.training)

    def forward(
        self,
        query: Float[Tensor, "b n c"],
        key: Float[Tensor, "b m c2"],
        value: Float[Tensor, "b m c3"],
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n m"] | None]:
        """Attend as torch's module: time first unless `batch_first`, masks True (or -inf) where a pair must not attend.

        Returns:
            The output and the weights; the weights are None if not needed or if the mechanism has no exact ones.

        Raises:
            Unsupported: for a mask that the mechanism cannot honour.
        """
        batched = query.ndim == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        batch, n, m = query.shape[0], query.shape[1], key.shape[1]
        own = key is value and query.shape == key.shape and (key is query or query.data_ptr() == key.data_ptr())
        q, k, v = self._project(query, key, value)
        visible = self._visible(key_padding_mask, attn_mask, is_causal, batch, n, m, q.dtype, own)
        context = context_of(self)
        result = self.attend(
            q,
            k,
            v,
            query,
            key,
            pattern=self.pattern,
            visible=visible,
            dropout=self.dropout if self.training else 0.0,
            context=context.replace(want=context.want | {"weights"}) if need_weights else context,
        )
        hand_back(self, result)
        output = self.out_proj(result.output.transpose(1, 2).flatten(2))
        weights = result.extras.get("weights") if need_weights else None
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is not None:
            weights: Any = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return [y.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for y in projected]

    def _visible(
        self,
        missing: Tensor | None,
        hidden: Tensor | None,
        is_causal: bool,
        batch: int,
        n: int,
        m: int,
        dtype: torch.dtype,
        own_queries: bool,
    ) -> Visible:
        if is_causal and hidden is None:
            raise Unsupported("is_causal=True without attn_mask", supported="the mask itself, as in torch")
        mask: Tensor | None = None
        if hidden is not None:
            mask = ~hidden if hidden.dtype == torch.bool else hidden
            mask = mask.view(1, 1, n, m) if mask.ndim == 2 else mask.view(batch, self.num_heads, n, m)
        if missing is not None:
            keys = (~missing if missing.dtype == torch.bool else missing)[:, None, None, :]
            mask = keys if mask is None else _both(mask, keys)
        if mask is not None:
            mask = mask.expand(*mask.shape[:2], n, m)
        as_bias = "bias" in self.attend.card.honours
        visible = read_mask(mask, False, batch=batch, n=n, m=m, dtype=dtype, own_queries=own_queries, as_bias=as_bias)
        return visible if self.pattern.cross or n == 1 else find_causal(visible, otherwise=is_causal)


def _both(a: Tensor, b: Tensor) -> Tensor:
    """Combine two pairwise masks, each True = may attend or scores to add."""
    if a.dtype == b.dtype == torch.bool:
        return a & b
    scores = next(x for x in (a, b) if x.dtype != torch.bool)
    both = [
        torch.zeros_like(x, dtype=scores.dtype).masked_fill(~x, -torch.inf) if x.dtype == torch.bool else x
        for x in (a, b)
    ]
    return both[0] + both[1]


class VisionAttention(Swapped):
    """Replaces timm's `Attention`, with the same calls and submodules.

    Args:
        original: the module whose submodules are used.
        chosen: the mechanism.
        pattern: pattern of its calls.
        grid: number of tokens before the patches (a class token), and the sides of the grid of patches, for mechanisms
            that arrange tokens on a grid (for those that support no class token, only where there is none). None for
            plain sequences.
    """

    PARTS: ClassVar = ("qkv", "proj", "q_norm", "k_norm", "attn_drop", "proj_drop", "norm", "gate")

    def __init__(
        self,
        original: Any,
        chosen: Chosen,
        pattern: Pattern,
        *,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(original)
        self.num_heads, self.head_dim, self.pattern = original.num_heads, original.head_dim, pattern
        card = chosen.card
        told = "roles" in card.honours or (card.keeps_places and grid is not None and grid[0] == 0)
        self.grid = grid if told and pattern is Pattern.NONCAUSAL_SELF else None
        self.qkv, self.proj = original.qkv, original.proj
        self.q_norm, self.k_norm = original.q_norm, original.k_norm
        self.attn_drop, self.proj_drop = original.attn_drop, original.proj_drop
        self.norm, self.gate = getattr(original, "norm", None), getattr(original, "gate", None)
        self.attend = HeadAttention(
            chosen,
            dim=self.qkv.in_features,
            heads=self.num_heads,
            head_dim=self.head_dim,
            pattern=pattern,
        ).to(self.qkv.weight)
        self.train(original.training)

    def forward(self, x: Float[Tensor, "b n c"], attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend as timm's module: a mask is True where a pair may attend, or holds scores to add."""
        batch, n, _ = x.shape
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if attn_mask is not None:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
            attn_mask = attn_mask.expand(*attn_mask.shape[:2], n, n)
        sees: dict[str, Any] = {"batch": batch, "n": n, "m": n, "dtype": q.dtype, "own_queries": True}
        visible = read_mask(attn_mask, is_causal, as_bias="bias" in self.attend.card.honours, **sees)
        result = self.attend(
            q,
            k,
            v,
            x,
            x,
            pattern=self.pattern,
            visible=visible,
            dropout=self.attn_drop.p if self.training else 0.0,
            context=self._context(x),
        )
        hand_back(self, result)
        y = result.output.transpose(1, 2).flatten(2)
        y = y if self.norm is None else self.norm(y)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))

    def _context(self, x: Float[Tensor, "b n c"]) -> Context:
        """The context of the call, with the grid of the tokens."""
        context = context_of(self)
        if self.grid is None:
            return context
        before, *sides = self.grid
        batch, n = x.shape[:2]
        if n != before + math.prod(sides):
            raise Unsupported(
                f"{n} tokens of a grid of {' x '.join(map(str, sides))} and {before} before it",
                supported="whole images of the size that the model was made for",
            )
        roles = torch.zeros(batch, n, dtype=torch.long, device=x.device)
        roles[:, :before] = int(Role.CLS)
        return context.replace(grid=tuple(sides), roles=roles if before else None)
