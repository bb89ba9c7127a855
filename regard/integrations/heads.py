"""A mechanism between the projections of another library's attention module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.apply import apply
from regard.contract import Context, Kind, LayerSpec, Mask, Mechanism, Pattern, Result, Unsupported
from regard.core.ragged import gathering, gathering_in_place, inner_mask
from regard.layers.linear import make_linear
from regard.layers.parts import LayerCall, Merge, Projection

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def check_swappable(card: Mechanism) -> None:
    """Raise Unsupported, with the reason, for a mechanism that cannot take the queries, keys and values of others."""
    reason = None
    if card.kind is not Kind.ATTENTION:
        reason = f"is a {card.kind.value}, which has no queries, keys and values of a head"
    elif card.prepare is not None:
        reason = "inserts tokens into its input"
    elif lacking := [
        what for name, what in (("q", "queries"), ("k", "keys"), ("v", "values")) if name not in card.inputs
    ]:
        reason = f"takes no {' and no '.join(lacking)} and would drop the model's"
    elif "n" not in card.inputs["q"]:
        reason = "learns its own query and would drop the model's"
    elif card.module is not None:
        reason = "is a layer of its own, which makes keys of its earlier inputs"
    if reason is not None:
        raise Unsupported(
            f"swapping to {card.name}, which {reason}",
            supported="attention mechanisms of queries, keys and values",
            nearest="softmax, linear, gated_linear, delta_rule, sigmoid, local",
        )


@dataclass(frozen=True)
class Visible:
    """The meaning of a mask, in the words of the contract.

    Attributes:
        causal: whether a query sees nothing after itself (bottom-right).
        keys: keys that exist; None for all.
        bias: scores to add that say the rest, -inf hides a pair; None when there is no rest.
    """

    causal: bool
    keys: Bool[Tensor, "b m"] | None = None
    bias: Float[Tensor, "#b #h n m"] | None = None


def read_mask(
    mask: Tensor | None,
    causal: bool,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    own_queries: bool,
    prefer_causal: bool = False,
) -> Visible:
    """Understand a mask of pairs: causality and missing keys where that is all it says, a bias otherwise.

    Args:
        mask: True = may attend, or scores to add; broadcasts to (B, H, N, M).
        causal: whether causality comes on top of it.
        own_queries: whether queries and keys are the same tokens, so that a query whose key is missing is padding and
            may see anything.
        prefer_causal: whether a mask that is both (a single query that sees all) counts as causal.
    """
    if mask is None:
        return Visible(causal)
    visible = mask if mask.dtype == torch.bool else _hides_only(mask)
    if visible is not None and not torch.compiler.is_compiling():
        shared = visible[:, :1]
        if bool((visible == shared).all()):
            pairs = shared[:, 0].expand(-1, n, m)  # (B or 1, n, m)
            below = torch.ones(n, m, dtype=torch.bool, device=mask.device).tril(m - n)
            keys = pairs.any(1)  # (B or 1, m)
            padding = ~keys[:, m - n :, None] if own_queries and m >= n else torch.zeros_like(pairs[:, :, :1])
            for order in sorted((True, False), reverse=prefer_causal):
                expected = keys[:, None, :] & below if order or causal else keys[:, None, :].expand_as(pairs)
                found = pairs & below if causal else pairs
                if bool(((found == expected) | padding).all()):
                    every = None if bool(keys.all()) else keys.expand(batch, m)
                    return Visible(order or causal, every)
    if mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    else:
        bias = mask.to(dtype)
    return Visible(causal, None, bias)


def _hides_only(scores: Tensor) -> Tensor | None:
    """Visibility behind scores that are 0 or hide a pair (-inf, or the lowest number); None for other scores."""
    if torch.compiler.is_compiling():
        return None
    hidden = scores <= torch.finfo(scores.dtype).min
    return ~hidden if bool((hidden | (scores == 0)).all()) else None


class HeadAttention(nn.Module):
    """Queries, keys and values of heads -> output of heads, by a mechanism; learns what else the mechanism takes.

    Args:
        card: see :func:`check_swappable`.
        dim, memory_dim: widths of the tokens that gates and the like are learned from.
        heads, kv_heads, head_dim, value_dim: of the tensors it is called with.
        pattern: of its calls, as far as its learned parts depend on it.
        options: of the mechanism.

    Attributes:
        learns: whether it has parameters of its own.
    """

    def __init__(
        self,
        card: Mechanism,
        *,
        dim: int,
        memory_dim: int | None = None,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int,
        value_dim: int | None = None,
        pattern: Pattern = Pattern.NONCAUSAL_SELF,
        **options: Any,
    ) -> None:
        super().__init__()
        check_swappable(card)
        self.card, self.config = card, card.options(**options)
        spec = LayerSpec(
            dim,
            dim if memory_dim is None else memory_dim,
            heads,
            heads if kv_heads is None else kv_heads,
            head_dim,
            head_dim if value_dim is None else value_dim,
            card.require_pattern(pattern),
            self.config,
            make_linear,
        )
        self.pattern = spec.pattern
        self.projection: Projection | None = None if card.projection is None else card.projection(spec)
        self.merge: Merge | None = None if card.merge is None else card.merge(spec)
        self.learns = next(self.parameters(), None) is not None
        self.needs_losses: tuple[Pattern, ...] = () if self.projection is None else self.projection.learns_from_losses
        if spec.pattern in self.needs_losses:
            raise Unsupported(
                f"{card.name} in {spec.pattern.value} in a model that does not add up the losses it learns from",
                supported=", ".join(p.value for p in card.patterns if p not in self.needs_losses),
                nearest="regard.models.LanguageModel with regard.training.distillation_loss",
            )

    @property
    def adds(self) -> bool:
        """Whether it is more than its mechanism of queries, keys and values: it learns, or changes heads that are merged."""
        return self.learns or self.merge is not None

    @property
    def needs_whole_sequences(self) -> bool:
        """Whether it cannot go on from a cache of keys and values: it reads past tokens, or is defined for N = M alone."""
        return not self.card.uneven or (self.projection is not None and self.learns)

    @property
    def mixes_tokens(self) -> bool:
        """Whether its projection or its merge reads neighbours, so that padding has to be gathered away first."""
        merges = self.merge is not None and not self.merge.each_token_alone
        return merges or (self.projection is not None and self.projection.mixes_tokens)

    def check_rotated(self) -> None:
        """Raise Unsupported where queries and keys that the model has rotated would be misread."""
        nearest = ""
        if "rotary" not in self.card.accepts_positions:
            reason = self.card.refused_positions or "takes no rotary positions"
        elif self.card.maps_before_rotation:
            reason = "it maps queries and keys before their rotation"
        elif self.projection is not None and (told := self.projection.reads_unrotated):
            reason, nearest = f"it reads {told[0]} before their rotation", told[1]
        else:
            return
        raise Unsupported(
            f"{self.card.name} where the model rotates queries and keys ({reason})",
            supported="models without rotary positions",
            nearest=nearest or "softmax, linear, gated_linear",
        )

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g m d"],
        v: Float[Tensor, "b g m v"],
        x: Float[Tensor, "b n c"] | None = None,
        source: Float[Tensor, "b m c2"] | None = None,
        *,
        pattern: Pattern,
        visible: Visible,
        scale: float | None = None,
        dropout: float = 0.0,
        want: frozenset[str] = frozenset(),
        context: Context | None = None,
        **inputs: Tensor,
    ) -> Result:
        """Attend.

        Args:
            x, source: the tokens of queries and keys, which learned gates read.
            pattern: the call's. In self patterns `visible` decides whether it is causal; noncausal-self with other than as
                many keys as queries is noncausal-cross.
            visible: what :func:`read_mask` found.
            context: grid and roles of the tokens.
            inputs: other inputs of the mechanism.

        Raises:
            Unsupported: for a mask that the mechanism cannot honour.
        """
        heads: dict[str, Tensor] = {"q": q, "k": k, "v": v, **inputs}
        context = Context() if context is None else context
        n, m = q.shape[2], k.shape[2]
        if self.projection is not None and self.learns and (source is None or source.shape[1] != m):
            raise Unsupported(
                f"{self.card.name}, whose gates are learned from the tokens, with a cache of keys and values",
                supported="whole sequences",
                nearest="use_cache=False",
            )
        mixing = self.mixes_tokens
        bias = visible.bias
        if pattern.cross and visible.causal:
            raise Unsupported(
                f"{self.card.name} with a causal mask across sequences", supported="a mask of keys", nearest="no mask"
            )
        if not pattern.cross and pattern.causal != visible.causal and n > 1:
            pattern = self.card.require_pattern(Pattern.CAUSAL_SELF if visible.causal else Pattern.NONCAUSAL_SELF)
        if pattern is Pattern.NONCAUSAL_SELF and n != m:
            pattern = self.card.require_pattern(Pattern.NONCAUSAL_CROSS)
        if pattern is Pattern.CAUSAL_SELF and n != m and not self.card.uneven:
            raise Unsupported(
                f"{self.card.name}, which reads as many queries as keys, with {n} of {m} tokens and a cache of the others",
                supported="whole sequences",
                nearest="use_cache=False",
            )
        if bias is not None and "bias" not in self.card.honours:
            raise Unsupported(
                f"{self.card.name} with a mask of pairs that is neither causality nor missing keys",
                supported="causality, and keys that are missing for all queries",
                nearest="softmax",
            )
        if pattern is not self.pattern and (
            mixing or (self.projection is not None and self.projection.for_one_pattern)
        ):
            raise Unsupported(
                f"{self.card.name}, whose learned parts are made for {self.pattern.value}, in a call that its mask makes "
                f"{pattern.value}",
                supported=f"calls in {self.pattern.value}",
                nearest="softmax" if pattern in self.needs_losses else f'regard.swap(..., pattern="{pattern.value}")',
            )
        options: dict[str, Any] = {"grid": context.grid, "roles": context.roles}
        if "dropout" in self.card.honours and dropout:
            options |= {"dropout": dropout, "training": True}
        if mixing:
            return self._with_mixing(heads, x, source, pattern, visible, scale, want, context, options)
        if self.projection is not None:
            heads, _ = self.projection(heads, LayerCall(x, source, context))
        keys = None if visible.keys is None else Mask(valid=visible.keys)
        together = not pattern.cross and n == m
        mask = keys if together else None
        if bias is not None:
            mask = Mask(valid=None if mask is None else mask.valid, bias=bias.expand(-1, -1, n, m))
        result = apply(
            self.card,
            heads,
            pattern=pattern,
            mask=mask,
            memory_mask=None if together else keys,
            scale=scale if self.card.default_scale == "rsqrt" else None,
            config=self.config,
            want=want,
            **options,
        )
        if self.merge is not None:
            result.output = self.merge(result.output, heads, LayerCall(x, source, context), result)
        return result

    def _with_mixing(
        self,
        heads: dict[str, Tensor],
        x: Tensor | None,
        source: Tensor | None,
        pattern: Pattern,
        visible: Visible,
        scale: float | None,
        want: frozenset[str],
        context: Context,
        options: dict[str, Any],
    ) -> Result:
        """Attend with a projection or a merge that mixes tokens, which are therefore gathered first (on a grid zeroed)."""
        batch, n, m = heads["q"].shape[0], heads["q"].shape[2], heads["k"].shape[2]
        if n != m and not pattern.cross:
            raise Unsupported(f"{self.card.name} with {n} queries and {m} keys of one sequence", supported="as many")
        mask, device = None if visible.keys is None else Mask(valid=visible.keys), heads["k"].device
        if context.grid is not None and self.card.keeps_places and pattern is Pattern.NONCAUSAL_SELF:
            keys = gathering_in_place(mask, batch, m, context.grid, device)
        else:
            keys = gathering(mask, batch, m, device)
        queries = gathering(None, batch, n, heads["q"].device) if pattern.cross else keys
        heads = {name: (queries if name == "q" else keys).gather(t, axis=2) for name, t in heads.items()}
        x, source = (None if t is None else layout.gather(t, axis=1) for t, layout in ((x, queries), (source, keys)))
        if mask is not None:
            context = context.replace(mask=mask)
        if context.roles is not None:
            options |= {"roles": keys.gather(context.roles, axis=1)}
        call = LayerCall(x, source, context, queries.lengths, keys.lengths)
        inputs = heads if self.projection is None else self.projection(heads, call)[0]
        result = apply(
            self.card,
            inputs,
            pattern=pattern,
            mask=inner_mask(queries),
            memory_mask=inner_mask(keys),
            scale=scale if self.card.default_scale == "rsqrt" else None,
            config=self.config,
            want=want,
            **options,
        )
        if self.merge is not None:
            result.output = self.merge(result.output, inputs, call, result)
        result.output = queries.scatter(result.output, axis=2)
        return result
