"""A mechanism that works between the projections of another library's attention module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from regard.apply import apply
from regard.contract import (
    Context,
    LayerCall,
    LayerSpec,
    Mask,
    Merge,
    Pattern,
    Projection,
    Result,
    Tensors,
    Unsupported,
    lengths_after,
)
from regard.core.ragged import Gathering, gather_pairs, gathering, gathering_in_place, inner_mask
from regard.integrations.chosen import Chosen
from regard.integrations.collecting import is_collecting
from regard.integrations.masks import Visible
from regard.layers.attention import LayerState
from regard.layers.feed_forward import dropout as drop
from regard.layers.linear import make_linear

if TYPE_CHECKING:
    from jaxtyping import Float, Int

HARD_KEYS = "regard_hard_keys"
"""Attribute of a transformers attention module that :mod:`regard.compression.pruning.hard` has changed: the number of
keys that its queries read."""


@dataclass(frozen=True)
class Rotation:
    """The rotary positions of a model, for queries and keys that are not rotated yet.

    Attributes:
        turn: rotates (B, H, N, D) by cosines and sines (B or 1, N, R), as the model does.
        cos, sin: cosines and sines of the tokens of the call.
        by_rank: cosines and sines of ranks (B or 1, N); None where the model's positions are not ranks, with the reason
            in `refusal`.
    """

    turn: Callable[[Tensor, Tensor, Tensor], Tensor]
    cos: Float[Tensor, "#b n r"]
    sin: Float[Tensor, "#b n r"]
    by_rank: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    refusal: str = ""

    def heads(self, heads: Tensors, keys: Gathering) -> Tensors:
        """Rotate queries and keys in the dense layout."""
        cos, sin = (
            keys.gather(x.expand(keys.source_batch, -1, -1), axis=1) if keys.lengths is not None else x
            for x in (self.cos, self.sin)
        )
        return {name: self.turn(x, cos, sin) if name in ("q", "k") else x for name, x in heads.items()}

    def at(self, x: Float[Tensor, "b h n d"], ranks: Int[Tensor, "#b n"]) -> Float[Tensor, "b h n d"]:
        """Rotate by ranks, for mechanisms that position keys themselves."""
        if self.by_rank is None:
            raise Unsupported(self.refusal, supported="positions that count tokens", nearest="softmax")
        return self.turn(x, *self.by_rank(x, ranks))


class HeadAttention(nn.Module):
    """Queries, keys and values of heads -> output of heads, by a mechanism, with the parameters that it adds.

    Args:
        chosen: the mechanism.
        dim, memory_dim: widths of the tokens from which gates and the like are computed.
        heads, kv_heads, head_dim, value_dim: sizes of the tensors it is called with.
        pattern: pattern of its calls, as far as its learned parts depend on it.

    Attributes:
        learns: whether it has parameters of its own.
        placement: what the surrounding module leaves to it; set when it is placed in the module, never by a call.
    """

    def __init__(
        self,
        chosen: Chosen,
        *,
        dim: int,
        memory_dim: int | None = None,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int,
        value_dim: int | None = None,
        pattern: Pattern = Pattern.NONCAUSAL_SELF,
    ) -> None:
        super().__init__()
        self.chosen, self.card, self.config = chosen, chosen.card, chosen.config
        self.pattern = chosen.require_pattern(pattern)
        self.spec = spec = LayerSpec(
            dim,
            dim if memory_dim is None else memory_dim,
            heads,
            heads if kv_heads is None else kv_heads,
            head_dim,
            head_dim if value_dim is None else value_dim,
            self.pattern,
            self.config,
            make_linear,
        )
        self.projection: Projection | None = None if self.card.projection is None else self.card.projection(spec)
        self.merge: Merge | None = None if self.card.merge is None else self.card.merge(spec)
        if chosen.wrapper is not None:
            around: Any = chosen.wrapper.merge
            self.merge = around(dataclasses.replace(spec, config=chosen.wrapper_config), self.merge)
        self.learns = next(self.parameters(), None) is not None
        self.placement: Any = None
        # mechanisms that read keys before their rotation rotate them themselves; all others get them rotated
        self.places_keys = self.card.places_keys(self.pattern) and self.misreads_rotated is not None

    def with_options(self, **options: Any) -> HeadAttention:
        """A copy with these options and the same parameters.

        Raises:
            Unsupported: for options that the mechanism does not have, or with which it would have other parameters.
        """
        if self.chosen.wrapper is not None:
            raise Unsupported(f"other options of {self.chosen.name}", supported="mechanisms that wrap no other")
        own = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config)}
        spec = self.spec
        made = HeadAttention(
            Chosen(self.card, self.card.options(**{**own, **options})),
            dim=spec.dim,
            memory_dim=spec.memory_dim,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            value_dim=spec.value_dim,
            pattern=self.pattern,
        )
        shapes, needed = ({name: x.shape for name, x in one.state_dict().items()} for one in (self, made))
        if shapes != needed:
            raise Unsupported(
                f"{', '.join(options)} of {self.card.name}, which learns other parameters then",
                supported="options of the same parameters",
            )
        made.load_state_dict(self.state_dict(), assign=True)
        made.placement = self.placement
        return made.train(self.training)

    @property
    def adds(self) -> bool:
        """Whether it adds to its mechanism of queries, keys and values: by parameters, random draws that are kept, or a
        merge of the heads."""
        return self.learns or self.merge is not None or next(self.buffers(), None) is not None

    @property
    def keeps_state(self) -> bool:
        """Whether it can continue sequences from a state of its own."""
        return self.pattern is Pattern.CAUSAL_SELF and self.card.state is not None and "chunked" in self.card.forms

    @property
    def needs_whole_sequences(self) -> bool:
        """Whether it cannot continue from a key-value cache: it reads past tokens, or is defined only for N = M."""
        return not self.card.uneven or (self.projection is not None and self.learns)

    @property
    def counts_queries(self) -> bool:
        """Whether a query that reads another sequence depends on the queries before it: on their number, which the state
        then holds in `queries`, or on what the projection keeps of them."""
        counted = self.card.state is not None and "queries" in self.card.state.__dataclass_fields__
        kept = self.projection is not None and type(self.projection).forward is not Projection.forward
        return self.pattern.cross and (counted or kept)

    @property
    def learns_from_losses(self) -> bool:
        """Whether some of its parameters learn only from losses that the surrounding model does not add up."""
        return self.projection is not None and self.pattern in self.projection.learns_from_losses

    @property
    def mixes_tokens(self) -> bool:
        """Whether its projection or its merge reads neighbouring tokens."""
        merges = self.merge is not None and not self.merge.each_token_alone
        return merges or (self.projection is not None and self.projection.mixes_tokens)

    @property
    def misreads_rotated(self) -> tuple[str, str] | None:
        """Why the mechanism would misread queries and keys that the model has rotated, and the option that would avoid
        it; None where it takes rotated ones."""
        if "rotary" not in self.card.accepts_positions:
            return self.card.refused_positions or "takes no rotary positions", ""
        if self.card.maps_before_rotation:
            return "it maps queries and keys before their rotation", ""
        if self.projection is not None and (told := self.projection.reads_unrotated):
            return f"it reads {told[0]} before their rotation", told[1]
        return None

    def check_rotated(self) -> None:
        """Raise Unsupported where the mechanism would misread queries and keys that the model has rotated."""
        if (why := self.misreads_rotated) is not None:
            raise self._misread(*why)

    def check_unrotated(self) -> None:
        """Raise Unsupported where the model's rotary positions can be neither used nor left out."""
        if "rotary" not in self.card.accepts_positions and not self.card.knows_positions:
            raise self._misread(self.card.refused_positions or "takes no rotary positions")

    def _misread(self, reason: str, nearest: str = "") -> Unsupported:
        return Unsupported(
            f"{self.chosen.name} where the model rotates queries and keys ({reason})",
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
        context: Context | None = None,
        rotation: Rotation | None = None,
        state: LayerState | None = None,
        return_state: bool = False,
        training: bool | None = None,
        **inputs: Tensor,
    ) -> Result:
        """Attend.

        Args:
            x, source: the tokens of queries and of keys, which learned gates read.
            pattern: pattern of the call. In self patterns `visible` decides whether it is causal; noncausal-self with
                different numbers of queries and keys is noncausal-cross.
            visible: the result of :func:`regard.integrations.masks.read_mask`.
            dropout: applied to the weights where the mechanism has them, otherwise to the outputs of the heads.
            context: grid and roles of the tokens, and whatever else belongs to the call, except masks.
            rotation: rotation of queries and keys that are not rotated yet.
            state: state after the earlier tokens; q, k and v are then those of the new tokens alone.
            training: whether the model is training, where this module is not part of it.
            inputs: other inputs of the mechanism.

        Raises:
            Unsupported: for a mask that the mechanism cannot honour.
        """
        heads: Tensors = {"q": q, "k": k, "v": v, **inputs}
        context = Context() if context is None else context
        batch, n, m = q.shape[0], q.shape[2], k.shape[2]
        pattern = self._pattern_of(pattern, visible, n, m)
        stateful = return_state or state is not None
        training = self.training if training is None else training
        self._check(pattern, visible, source, n, m, stateful)
        mask = None if visible.keys is None else Mask(valid=visible.keys)
        if context.grid is not None and self.card.keeps_places and pattern is Pattern.NONCAUSAL_SELF:
            keys = gathering_in_place(mask, batch, m, context.grid, k.device)
        else:
            keys = gathering(mask, batch, m, k.device)
        together = not pattern.cross and n == m
        queries = keys if together else gathering(None, batch, n, q.device)
        if not keys.whole:
            heads = {name: self._gather(name, x, queries, keys) for name, x in heads.items()}
            x = None if x is None else queries.gather(x, axis=1)
            # with a cache it holds only the new tokens
            source = None if source is None or source.shape[1] != m else keys.gather(source, axis=1)
            context = context.replace(mask=mask) if together else context
        before = None if state is None else state.projection
        call = LayerCall(
            x, source, context, queries.lengths, keys.lengths, before, keeps_losses=training or is_collecting()
        )
        projected = None
        if self.projection is not None:
            heads, projected = self.projection(heads, call)
        beside = self._beside(context, keys, dropout, training)
        if rotation is not None and "rotary" in self.card.accepts_positions:
            if self.places_keys:
                beside["rotate"] = rotation.at
            else:
                heads = rotation.heads(heads, keys)
        if self.merge is not None and "chosen" in self.card.axes:
            heads, call = self.merge.choose(heads, call)
        bias = None if visible.bias is None else visible.bias.expand(-1, -1, n, visible.bias.shape[-1])
        if bias is not None and visible.keys is not None:
            bias = gather_pairs(bias, queries, keys)
        result = apply(
            self.card,
            heads,
            pattern=pattern,
            mask=inner_mask(queries, bias=bias),
            memory_mask=None if together else inner_mask(keys),
            scale=scale if self.card.default_scale == "rsqrt" and scale != q.shape[3] ** -0.5 else None,
            config=self.config,
            state=None if state is None else state.mechanism,
            return_state=stateful,
            **beside,
        )
        if self.merge is not None:
            result.output = self.merge(result.output, heads, call, result)
        if "weights" in result.extras:
            result.extras["output"] = result.output
        if dropout and "dropout" not in self.card.honours:
            result.output = drop(result.output, dropout, training=training, generator=context.generator)
        result.output = result.output if queries.whole else queries.scatter(result.output, axis=2)
        if stateful:
            so_far = None if state is None else state.length
            length = lengths_after(so_far, queries.lengths, batch, n, q.device)
            result.state = LayerState(result.state, length, (), projected)
        return result

    def _pattern_of(self, pattern: Pattern, visible: Visible, n: int, m: int) -> Pattern:
        """The pattern of a call, according to what it sees."""
        if pattern.cross and visible.causal:
            raise Unsupported(
                f"{self.chosen.name} with a causal mask across sequences",
                supported="a mask of keys",
                nearest="no mask",
            )
        if not pattern.cross and pattern.causal != visible.causal and n > 1:
            pattern = self.chosen.require_pattern(Pattern.CAUSAL_SELF if visible.causal else Pattern.NONCAUSAL_SELF)
        if pattern is Pattern.NONCAUSAL_SELF and n != m:
            pattern = self.chosen.require_pattern(Pattern.NONCAUSAL_CROSS)
        return pattern

    def _check(self, pattern: Pattern, visible: Visible, source: Tensor | None, n: int, m: int, stateful: bool) -> None:
        name = self.chosen.name
        if self.projection is not None and self.learns and (source is None or source.shape[1] != m):
            raise Unsupported(
                f"{name}, whose gates are learned from the tokens, with a cache of keys and values",
                supported="whole sequences",
                nearest="use_cache=False",
            )
        if pattern is Pattern.CAUSAL_SELF and n != m and not self.card.uneven:
            raise Unsupported(
                f"{name}, which reads as many queries as keys, with {n} of {m} tokens and a cache of the others",
                supported="whole sequences",
                nearest="use_cache=False",
            )
        if visible.bias is not None and "bias" not in self.card.honours:
            raise Unsupported(
                f"{name} with a mask of pairs that is neither causality nor missing keys",
                supported="causality, and keys that are missing for all queries",
                nearest="softmax",
            )
        if pattern is not self.pattern and (
            self.mixes_tokens or (self.projection is not None and self.projection.for_one_pattern)
        ):
            raise Unsupported(
                f"{name}, whose learned parts are made for {self.pattern.value}, in a call that its mask makes "
                f"{pattern.value}",
                supported=f"calls in {self.pattern.value}",
                nearest=f'regard.swap(..., pattern="{pattern.value}")',
            )
        if n != m and not pattern.cross and self.mixes_tokens:
            raise Unsupported(
                f"{name} with {n} queries and {m} keys of one sequence", supported="equal numbers of queries and keys"
            )
        if stateful and pattern is not Pattern.CAUSAL_SELF:
            raise Unsupported(
                f"{name} in {pattern.value} with a cache", supported="causal calls", nearest="use_cache=False"
            )

    @staticmethod
    def _gather(name: str, x: Tensor, queries: Gathering, keys: Gathering) -> Tensor:
        if name in ("k", "v"):
            return keys.gather(x, axis=2)
        return queries.gather(x, axis=2) if name == "q" else x

    def _beside(self, context: Context, keys: Gathering, dropout: float, training: bool) -> dict[str, Any]:
        """Arguments that accompany the heads, only where they exist: a call without them takes a shorter path."""
        names = ("generator", "grid", "progress", "teacher")
        beside = {name: x for name in names if (x := getattr(context, name)) is not None}
        if context.roles is not None:
            beside["roles"] = keys.gather(context.roles, axis=1)
        if training:
            beside["training"] = True
        if dropout and "dropout" in self.card.honours:
            beside["dropout"] = dropout
        want = context.want if self.card.weights == "exact" and "weights" in self.card.honours else frozenset()
        return {**beside, "want": want} if want else beside
