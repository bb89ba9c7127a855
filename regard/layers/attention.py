"""The shell of attention mechanisms: projections, heads, positions, padding, KV cache and the four patterns.

A mechanism adds its own parts through two optional modules on its card: a :class:`regard.contract.Projection` makes
further inputs (gates, agents, a learned query), a :class:`regard.contract.Merge` changes the head outputs before the
output projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from regard.apply import absorb, apply
from regard.contract import (
    Context,
    LayerCall,
    LayerSpec,
    Loss,
    Mask,
    Mechanism,
    Merge,
    Pattern,
    Projection,
    Result,
    State,
    Tensors,
    Unsupported,
    lengths_after,
    state_field,
    valid_from_lengths,
)
from regard.core.ragged import Gathering, gather_pairs, gathering, gathering_in_place, inner_mask
from regard.core.visibility import DistanceBias, surely
from regard.engines.cache import KeyValueState, WindowState
from regard.engines.layers import gated_product
from regard.layers.base import Layer
from regard.layers.checks import check_memory, check_memory_mask, check_state, check_tokens, given_context
from regard.layers.convolution import ShortConvolution
from regard.layers.feed_forward import check_dropout, dropout
from regard.layers.norms import RMSNorm, make_norm
from regard.layers.options import (
    GATES,
    ConvolutionOptions,
    GateOptions,
    HeadOptions,
    LinearOptions,
    NormOptions,
    PositionOptions,
)
from regard.positions import Positions, create_positions, why_refused

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class LayerState(State):
    """A layer's state for each sequence: the mechanism's state, the number of queries so far, convolution caches, and
    the projection's state if it keeps one."""

    mechanism: Any
    length: Int[Tensor, " b"] = state_field()
    convolutions: tuple[Tensor | None, ...] = ()
    projection: State | None = None


class Side(NamedTuple):
    """The tokens that queries, or keys and values, are projected from.

    Attributes:
        tokens: (B, N, C) in the dense layout.
        layout: how they were moved to that layout.
        positions: their positions, or vectors that a position scheme makes from them; None if nothing needs them.
        losses: auxiliary losses of the position scheme.
    """

    tokens: Tensor
    layout: Gathering
    positions: Tensor | None
    losses: dict[str, Loss]


class AttentionLayer(Layer):
    """An attention mechanism as a layer, (B, N, C) -> (B, N, C).

    Args:
        card: the mechanism.
        dim: width C of input and output.
        num_heads: number of query heads.
        pattern: one of the mechanism's patterns.
        memory_dim: width of the memory in cross patterns; `dim` when None.
        dropout: dropout probability, of the attention weights if the mechanism supports that, else of the output.
        heads, positions, norms, gate, convolution, projections: see :mod:`regard.layers.options`.
        config: the mechanism's options.
    """

    takes_convolutions: ClassVar[bool] = True
    mix: Callable[..., Result] = staticmethod(apply)
    """The function that mixes the heads; replaced temporarily where several ranks share a sequence."""

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        pattern: str | Pattern = Pattern.CAUSAL_SELF,
        memory_dim: int | None = None,
        dropout: float = 0.0,
        heads: HeadOptions = HeadOptions(),
        positions: PositionOptions = PositionOptions(),
        norms: NormOptions = NormOptions(),
        gate: GateOptions = GateOptions(),
        convolution: ConvolutionOptions = ConvolutionOptions(),
        projections: LinearOptions = LinearOptions(),
        config: Any = None,
    ) -> None:
        super().__init__()
        self.card, self.pattern = card, card.require_pattern(pattern)
        self.places_keys = card.places_keys(self.pattern)
        self.config = card.options() if config is None else config
        kv_heads, head_dim, value_dim = heads.sizes(dim, num_heads)
        check_dropout(dropout)
        if convolution.short_convolution and not self.takes_convolutions:
            raise Unsupported(
                f"short_convolution={convolution.short_convolution} with {card.name}",
                supported="keys and values of single tokens",
                nearest="short_convolution=0",
            )
        if memory_dim is not None and not self.pattern.cross:
            raise Unsupported(
                f"memory_dim in {self.pattern.value}", supported="cross patterns", nearest="memory_dim=None"
            )
        memory_dim = dim if memory_dim is None else memory_dim
        self.dim, self.num_heads, self.kv_heads = dim, num_heads, kv_heads
        self.head_dim, self.value_dim, self.dropout = head_dim, value_dim, dropout
        self.positions = self._position_scheme(positions)
        project = projections.make
        self.spec = LayerSpec(
            dim, memory_dim, num_heads, kv_heads, head_dim, value_dim, self.pattern, self.config, project
        )
        makes_queries = card.projection is not None and card.projection.makes_queries
        if makes_queries and (norms.query_key_norm or norms.value_norm):
            raise Unsupported(
                f"query_key_norm={norms.query_key_norm!r} and value_norm={norms.value_norm!r} with {card.name}",
                supported="neither, where a projection makes the heads",
                nearest="query_key_norm=None, value_norm=None",
            )
        has_queries = not makes_queries and "q" in card.axes and "n" in card.inputs["q"]
        widths = num_heads * head_dim, kv_heads * head_dim, kv_heads * value_dim
        self.query = project(dim, widths[0]) if has_queries else None
        self.key = project(memory_dim, widths[1]) if "k" in card.axes else None
        self.value = project(memory_dim, widths[2]) if "v" in card.axes else None
        for option, given, normalised in (
            ("query_key_norm", norms.query_key_norm, (self.query, self.key)),
            ("value_norm", norms.value_norm, (self.value,)),
        ):
            if given and not any(normalised):
                raise Unsupported(
                    f"{option}={given!r} with {card.name}, which has nothing to normalise",
                    supported="no such norm",
                    nearest=f"{option}=None",
                )
        causal = self.pattern.causal or self.pattern.cross
        self.convolutions = nn.ModuleList(
            ShortConvolution(
                width, convolution.short_convolution, activation=convolution.convolution_activation, causal=causal
            )
            for module, width in zip((self.query, self.key, self.value), widths, strict=True)
            if convolution.short_convolution and module is not None
        )

        def norm(kind: str | None, width: int, normalised: nn.Module | None) -> nn.Module | None:
            return make_norm(kind, width) if kind and normalised is not None else None

        self.query_norm = norm(norms.query_key_norm, head_dim, self.query)
        self.key_norm = norm(norms.query_key_norm, head_dim, self.key)
        self.value_norm = norm(norms.value_norm, value_dim, self.value)
        self.projection: Projection | None = None if card.projection is None else card.projection(self.spec)
        self.merge: Merge | None = None if card.merge is None else card.merge(self.spec)
        self.output_norm = make_norm(norms.output_norm, value_dim) if norms.output_norm else None
        self.gate: nn.Module | None = None
        if gate.output_gate_rank is not None:
            up = project(gate.output_gate_rank, num_heads * value_dim)
            self.gate = nn.Sequential(project(dim, gate.output_gate_rank), up)
        elif gate.output_gate:
            self.gate = project(dim, num_heads * value_dim)
        self.gate_activation = gate.output_gate
        self.output = projections.make_output(num_heads * value_dim, dim)

    def _position_scheme(self, options: PositionOptions) -> Positions:
        scheme = "none" if options.positions is None else options.positions
        if scheme not in self.card.accepts_positions:
            raise Unsupported(
                f"{scheme} positions with {self.card.name}{why_refused(self.card, scheme)}",
                supported=", ".join(self.card.accepts_positions),
                nearest="none",
            )
        made = create_positions(
            scheme,
            dim=self.dim,
            heads=self.num_heads,
            head_dim=self.head_dim,
            kv_heads=self.kv_heads,
            max_length=options.max_length,
            **(options.position_options or {}),
        )
        if self.card.maps_before_rotation and self.pattern.cross and made.rotate is not None:
            raise Unsupported(
                f"{scheme} positions with {self.card.name} in {self.pattern.value}",
                supported="self patterns, in which it rotates after its feature map",
                nearest="positions=None",
            )
        if made.axes > 1 and made.rotate is not None and self.places_keys:
            raise Unsupported(
                f"{scheme} positions of {made.axes} axes with {self.card.name} in {self.pattern.value}, which places its keys "
                "by their ranks",
                supported="axes=1",
                nearest="softmax",
            )
        return made

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c2"] | None = None,
        *,
        context: Context | None = None,
        state: LayerState | None = None,
    ) -> Result:
        """Mix a sequence.

        Args:
            x: input; in cross patterns, the sequence that queries come from.
            memory: the other sequence of cross patterns; None when `state` has absorbed it.
            context: masks, positions, grid, roles, generator, and the extras to return.
            state: state to continue from; the result then has the new state.
        """
        context = given_context(context)
        check_state(state, LayerState, self.card.name)
        check_memory(self.pattern, memory, context, state)
        check_tokens(x, self.dim)
        before = None if state is None else state.length
        own = self.side(x, context.mask, context.positions, context, before=before)
        x, layout = own.tokens, own.layout
        stateful = state is not None or "state" in context.want
        heads: dict[str, Tensor] = {}
        caches = self._no_caches() if state is None or not state.convolutions else list(state.convolutions)
        query = self.query
        if query is not None:
            q = self._heads(query, x, 0, self.num_heads, layout.lengths, caches)
            heads["q"] = self._norm(self.query_norm, q)
        other: Side | None = own
        if self.pattern.cross:
            other = None if memory is None else self.memory_side(memory, context)
        if other is not None:
            self._memory_heads(heads, other.tokens, other.layout.lengths, caches)
        keys = None if other is None else other.layout
        call = LayerCall(
            x,
            None if other is None else other.tokens,
            context,
            layout.lengths,
            layout.lengths if keys is None else keys.lengths,
            None if state is None else state.projection,
        )
        heads, projected, learned = self._project(heads, call, state)
        heads = self.place(heads, own.positions, None if other is None else other.positions)
        if self.merge is not None and "chosen" in self.card.axes and self.mix is apply:
            heads, call = self.merge.choose(heads, call)
        result = self.mix(
            self.card,
            heads,
            pattern=self.pattern,
            mask=self._inner_mask(context, layout, keys),
            memory_mask=None if memory is None or keys is None else inner_mask(keys),
            state=None if state is None else state.mechanism,
            return_state=stateful,
            config=self.config,
            **self._beside(context, keys),
            **self._position_functions(context, state),
        )
        result.losses |= learned
        y = result.output
        if self.merge is not None:
            y = self.merge(y, heads, call, result)
        y = self.output(self.gated(y.transpose(1, 2), x))
        if self.training and self.dropout and "dropout" not in self.card.honours:
            y = dropout(y, self.dropout, training=True, generator=context.generator)
        result.output = y if layout.whole else layout.scatter(y, axis=1)
        result.losses |= own.losses
        if stateful:
            length = lengths_after(before, layout.lengths, x.shape[0], x.shape[1], x.device)
            result.state = LayerState(result.state, length, tuple(caches), projected)
        return result

    def take_up(
        self, x: Float[Tensor, "b n c"], *, context: Context, state: LayerState | None = None
    ) -> LayerState | None:
        """The state after tokens whose output is not needed: stores their keys and values, but computes no queries,
        attention or output projection. None if the state needs more than keys and values; call :meth:`forward` then."""
        card, cross = self.card, self.pattern.cross
        by_query = {name for name, axes in card.axes.items() if "n" in axes and "m" not in axes}
        keeps_pairs = card.state in (KeyValueState, WindowState) and card.uneven and by_query - {"chosen"} == {"q"}
        usual = type(self).forward is AttentionLayer.forward and self.mix is apply and self.query is not None
        plain = context.mask is context.roles is None and context.want <= {"state"}
        if not (keeps_pairs and usual and plain) or self.training or self.convolutions or (cross and state is None):
            return None
        check_state(state, LayerState, card.name)
        before = None if state is None else state.length
        own = self.side(x, None, context.positions, context, before=before)
        heads = {"q": x.new_empty(x.shape[0], self.num_heads, 0, self.head_dim)}
        if not cross:
            self._memory_heads(heads, own.tokens, None, [])
        call = LayerCall(
            own.tokens, None if cross else own.tokens, context, None, None, None if state is None else state.projection
        )
        heads, projected, _ = self._project(heads, call, state)
        heads = self.place(heads, None if own.positions is None else own.positions[:, :0], own.positions)
        result = self.mix(
            card,
            heads,
            pattern=self.pattern,
            state=None if state is None else state.mechanism,
            return_state=True,
            config=self.config,
            **self._beside(context, None),
            **self._position_functions(context, state),
        )
        length = lengths_after(before, None, x.shape[0], x.shape[1], x.device)
        return LayerState(result.state, length, projection=projected)

    def encode_memory(
        self, memory: Float[Tensor, "b m c2"], *, context: Context | None = None, state: LayerState | None = None
    ) -> LayerState:
        """Absorb memory once, for decoding in a cross pattern; call again with `state` as more memory streams in."""
        if not self.pattern.cross:
            raise Unsupported(f"encode_memory in {self.pattern.value}", supported="cross patterns", nearest="layer(x)")
        if "absorb" not in self.card.forms:
            raise Unsupported(
                f"absorbing memory with {self.card.name}", supported="layer(x, memory)", nearest="softmax"
            )
        if self.convolutions and state is not None:
            raise Unsupported("memory in pieces with short convolutions", supported="the whole memory at once")
        context = given_context(context)
        check_state(state, LayerState, self.card.name)
        check_memory_mask(context)
        self._check_memory_positions(context)
        before = None if state is None or state.mechanism is None else state.mechanism.length
        memory, layout, positions, _ = self.memory_side(memory, context, before)
        heads: dict[str, Tensor] = {}
        self._memory_heads(heads, memory, layout.lengths, self._no_caches())
        call = LayerCall(None, memory, context, None, layout.lengths, None if state is None else state.projection)
        heads, projected, _ = self._project(heads, call, state)
        heads = self.place(heads, positions, positions)
        absorbed = absorb(
            self.card,
            heads,
            pattern=self.pattern,
            memory_mask=inner_mask(layout),
            state=None if state is None else state.mechanism,
            config=self.config,
            heads=self.num_heads,
            roles=None if context.roles is None else layout.gather(context.roles, axis=1),
        )
        none = torch.zeros(layout.batch, dtype=torch.long, device=memory.device)
        length = none if state is None else state.length
        return LayerState(absorbed, length, projection=projected)

    def side(
        self,
        tokens: Float[Tensor, "b n c"],
        mask: Mask | None,
        positions: Int[Tensor, "#b n"] | None,
        context: Context,
        *,
        before: Int[Tensor, " b"] | None = None,
    ) -> Side:
        """Prepare the tokens that queries come from: gather them into the dense layout and assign positions.

        Args:
            tokens: padded or packed, as the mask says.
            positions: their positions; None for ranks.
            before: number of earlier tokens in each row.
        """
        movable = positions is None and before is None and not self.pattern.cross
        found = self._side(tokens, mask, positions, context, before, movable=movable)
        if self.positions.embed is None:
            return found
        return found._replace(tokens=self.positions.embed(found.tokens, found.positions))

    def memory_side(
        self, memory: Float[Tensor, "b m c2"], context: Context, before: Int[Tensor, " b"] | None = None
    ) -> Side:
        """Prepare the memory of a cross pattern likewise. Position embeddings of the input apply to queries only."""
        check_tokens(memory, self.spec.memory_dim, "memory")
        return self._side(memory, context.memory_mask, context.memory_positions, context, before, movable=False)

    def _side(
        self,
        tokens: Tensor,
        mask: Mask | None,
        positions: Tensor | None,
        context: Context,
        before: Tensor | None,
        *,
        movable: bool,
    ) -> Side:
        batch, n, grid = tokens.shape[0], tokens.shape[1], context.grid
        if grid is not None and self.card.keeps_places and self.pattern is Pattern.NONCAUSAL_SELF:
            layout = gathering_in_place(mask, batch, n, grid, tokens.device)
        else:
            layout = gathering(mask, batch, n, tokens.device)
        padded = mask is not None and mask.cu_seqlens is None and layout.dense_index is not None
        if padded and positions is None and before is None and self.positions.axes > 1:
            positions = torch.arange(n, device=tokens.device).expand(batch, n)  # padding leaves tokens in their places
        tokens = tokens if layout.whole else layout.gather(tokens, axis=1)
        where = self._positions(positions, layout, tokens, before)
        return Side(tokens, layout, *self._prepare(where, layout, context, movable=movable))

    def _project(
        self, heads: Tensors, call: LayerCall, state: LayerState | None
    ) -> tuple[Tensors, State | None, dict[str, Loss]]:
        """The mechanism's inputs, the new state of a projection that keeps one, and losses added by subclasses."""
        projection = self.projection
        return (heads, None, {}) if projection is None else (*projection(heads, call), {})

    def gated(self, y: Float[Tensor, "b n h v"], x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n h*v"]:
        """Apply the output norm and the output gate."""
        norm, gated = self.output_norm, self.gate
        if gated is None or self.gate_activation is None:
            return (y if norm is None else norm(y)).flatten(2)
        gate = gated(x)
        if isinstance(norm, RMSNorm) and self.gate_activation == "swish":
            return norm(y, gate.view(y.shape)).flatten(2)
        y = y if norm is None else norm(y)
        return gated_product(y.flatten(2), gate, GATES[self.gate_activation])

    def _no_caches(self) -> list[Tensor | None]:
        return [None] * len(self.convolutions)

    def _heads(
        self,
        module: nn.Module,
        x: Tensor,
        index: int,
        heads: int,
        lengths: Tensor | None,
        caches: list[Tensor | None],
    ) -> Float[Tensor, "b h n d"]:
        """Project (index 0 query, 1 key, 2 value), convolve, and split into heads. Updates the convolution's cache."""
        y = module(x)
        if caches:
            # the index among the convolutions that exist: some of q, k and v may have none
            own = sum(projection is not None for projection in (self.query, self.key, self.value)[:index])
            y, caches[own] = self.convolutions[own](y, lengths, caches[own])
        return y.view(*y.shape[:-1], heads, y.shape[-1] // heads).transpose(1, 2)

    def _memory_heads(
        self, heads: dict[str, Tensor], source: Tensor, lengths: Tensor | None, caches: list[Tensor | None]
    ) -> None:
        key, value = self.key, self.value
        if key is not None:
            heads["k"] = self._norm(self.key_norm, self._heads(key, source, 1, self.kv_heads, lengths, caches))
        if value is not None:
            heads["v"] = self._norm(self.value_norm, self._heads(value, source, 2, self.kv_heads, lengths, caches))

    @staticmethod
    def _norm(norm: nn.Module | None, x: Tensor) -> Tensor:
        return x if norm is None else norm(x)

    def _positions(self, given: Tensor | None, layout: Gathering, x: Tensor, before: Tensor | None) -> Tensor | None:
        """Positions in the dense layout: ranks unless given; 0 in the padding. None if nothing needs them."""
        if given is not None:
            return layout.gather(given, axis=1)
        scheme = self.positions
        if scheme.embed is None and scheme.rotate is None:
            return None
        if before is None:
            rank = torch.arange(x.shape[1], device=x.device)[None]
        else:
            rank = before[:, None]
            rank = rank if surely(x.shape[1] == 1) else rank + torch.arange(x.shape[1], device=x.device)
        return rank if layout.lengths is None else torch.where(valid_from_lengths(layout.lengths, x.shape[1]), rank, 0)

    def _prepare(
        self, positions: Tensor | None, layout: Gathering, context: Context, *, movable: bool
    ) -> tuple[Tensor | None, dict[str, Loss]]:
        """Position vectors, if the scheme makes them, and the scheme's losses."""
        if positions is None or self.positions.prepare is None:
            return positions, {}
        vectors = context.position_vectors
        if self.positions.shared and vectors is not None:
            moved = layout.dense_index is not None
            return layout.gather(vectors.expand(layout.source_batch, -1, -1), axis=1) if moved else vectors, {}
        return self.positions.prepare(positions, context.grid, context.generator, movable=movable)

    def place(self, heads: dict[str, Tensor], queries: Tensor | None, keys: Tensor | None) -> dict[str, Tensor]:
        """Put positions, or what a scheme makes of them, in the queries and keys of `heads`."""
        scheme = self.positions
        if scheme.rotate is None or self.places_keys:
            return heads
        rotate_keys = scheme.rotate if scheme.rotate_keys is None else scheme.rotate_keys
        where = {"q": (scheme.rotate, queries), "k": (rotate_keys, keys)}
        return {n: where[n][0](t, where[n][1]) if n in where else t for n, t in heads.items()}

    def _position_functions(self, context: Context, state: LayerState | None) -> dict[str, Any]:
        functions: dict[str, Any] = {}
        self._check_memory_positions(context)
        scheme = self.positions
        if scheme.rotate is not None and self.places_keys:
            if context.positions is not None:
                raise Unsupported(
                    f"explicit positions with {self.card.name}, which places its cached keys itself", supported="ranks"
                )
            functions["rotate"] = scheme.rotate
        if scheme.bias is not None:
            if context.positions is not None:
                raise Unsupported(
                    f"explicit positions with {scheme.name}", supported="ranks", nearest="rotary positions"
                )
            causal, bias = self.pattern is Pattern.CAUSAL_SELF, scheme.bias
            if state is not None and self.pattern.cross:
                # the mechanism's state counts memory tokens, so the number of earlier queries is added here
                before = state.length[:, None]
                functions["position_bias"] = lambda i, j: bias(i + before, j, causal)
            elif scheme.by_distance is not None:
                functions["position_bias"] = DistanceBias(partial(scheme.by_distance, causal=causal))
            else:
                functions["position_bias"] = lambda i, j: bias(i, j, causal)
        return functions

    def _beside(self, context: Context, keys: Gathering | None) -> dict[str, Any]:
        """Keyword arguments besides the heads; only those that are set, since calls without any take a faster path."""
        names = ("generator", "grid", "progress", "teacher")
        beside = {name: x for name in names if (x := getattr(context, name)) is not None}
        if context.roles is not None and keys is not None:
            beside["roles"] = keys.gather(context.roles, axis=1)
        if self.training:
            beside["training"] = True
            beside["dropout"] = self.dropout if "dropout" in self.card.honours else 0.0
        want = context.want - {"state"}
        return {**beside, "want": want} if want else beside

    def _check_memory_positions(self, context: Context) -> None:
        if context.memory_positions is None:
            return
        if self.positions.bias is not None or self.positions.embed is not None:
            raise Unsupported(
                f"explicit positions of the memory with {self.positions.name}",
                supported="memory_positions=None",
                nearest="rotary positions",
            )

    def _inner_mask(self, context: Context, layout: Gathering, keys: Gathering | None) -> Mask | None:
        mask, bias = context.mask, None
        if mask is not None and mask.bias is not None:
            if keys is None:  # the memory was absorbed earlier, in the dense layout
                keys = gathering(None, layout.batch, mask.bias.shape[-1], mask.bias.device)
            bias = gather_pairs(mask.bias, layout, keys)
        return inner_mask(layout, bias=bias, blocks=None if mask is None else mask.blocks)
