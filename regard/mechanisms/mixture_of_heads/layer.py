"""The modules of mixture_of_heads in its layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import (
    Call,
    Context,
    LayerSpec,
    Mechanism,
    Pattern,
    Result,
    Tensors,
    Unsupported,
)
from regard.core.precision import wide
from regard.layers.attention import AttentionLayer, LayerState
from regard.layers.base import Layer
from regard.layers.checks import given_context
from regard.layers.chosen_heads import attend_in_chosen_heads, check_choosable
from regard.layers.linear import make_linear
from regard.layers.parts import LayerCall, Merge
from regard.mechanisms.mixture_of_heads.definition import Config, _straight_through
from regard.mechanisms.mixture_of_heads.forms import gates_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class HeadRouter(Merge):
    """The routers, as the merge of the attention shell.

    Args:
        spec: of the layer, with the options of this mechanism.
        inner: the wrapped mechanism's own merge, which comes first.
    """

    def __init__(self, spec: LayerSpec, inner: Merge | None = None) -> None:
        super().__init__()
        config: Config = spec.config
        self.config, self.pattern, self.inner = config, spec.pattern, inner
        self.routed = config.order(spec.heads)[config.groups(spec.heads)[0] :]
        logits = config.routers(spec.heads)
        if config.router == "query_norm":
            logits = {}
        self.logits = nn.ModuleDict({name: make_linear(spec.dim, width) for name, width in logits.items()})

    def forward(
        self, output: Float[Tensor, "b h n v"], heads: Tensors, call: LayerCall, result: Result
    ) -> Float[Tensor, "b h n v"]:
        """Gate the head outputs; losses and wanted gates are added to `result`."""
        if self.inner is not None:
            output = self.inner(output, heads, call, result)
        assert call.x is not None  # outputs are those of tokens
        gates = self.gates(heads.get("q"), output.shape[1], call.x, call.context, call.lengths, result)
        return (output.to(gates.dtype) * gates.transpose(1, 2)[..., None]).to(output.dtype)

    def gates(
        self,
        q: Float[Tensor, "b h n d"] | None,
        heads: int,
        x: Float[Tensor, "b n c"],
        context: Context,
        lengths: Int[Tensor, " b"] | None,
        result: Result,
    ) -> Float[Tensor, "b n h"]:
        """See :func:`gates_of`; `q` is asked for by query norms alone."""
        logits: dict[str, Tensor | None] = {name: module(x) for name, module in self.logits.items()}
        if self.config.router == "query_norm" and self.routed:
            assert q is not None
            q = q[:, self.routed]
            q = wide(q)
            smallest = torch.finfo(q.dtype).tiny  # the norm of a zero query, in padding, has no gradient
            logits["routed"] = q.square().sum(-1).clamp(min=smallest).sqrt().transpose(1, 2)
        call = Call(
            self.pattern,
            self.config,
            lengths=lengths,
            generator=context.generator,
            training=self.training,
            want=context.want,
        )
        return gates_of(call, heads, logits, x, result)


class MixtureOfHeads(Layer):
    """An attention layer whose heads are routed, (B, N, C) -> (B, N, C).

    Args:
        card: the mechanism.
        dim: width C of the input and output.
        num_heads: H, query heads.
        pattern: one that the wrapped mechanism has too.
        create: makes a layer from the name of a mechanism.
        mechanism: name of the attention mechanism whose heads are routed.
        positions, position_options, head_dim, num_kv_heads, memory_dim, dropout: of the wrapped layer, see
            :mod:`regard.layers.options`; its own defaults when None.
        mechanism_options: any other options of the wrapped layer and mechanism.
        config: the mechanism's options.
    """

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        create: Callable[..., nn.Module],
        pattern: str | Pattern = Pattern.CAUSAL_SELF,
        mechanism: str = "softmax",
        positions: str | None = None,
        position_options: dict[str, Any] | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        memory_dim: int | None = None,
        dropout: float | None = None,
        mechanism_options: Mapping[str, Any] | None = None,
        config: Any = None,
    ) -> None:
        super().__init__()
        self.card, self.pattern = card, card.require_pattern(pattern)
        self.config: Config = card.options() if config is None else config
        named = {
            "positions": positions,
            "position_options": position_options,
            "head_dim": head_dim,
            "num_kv_heads": num_kv_heads,
            "memory_dim": memory_dim,
            "dropout": dropout,
        }
        options = {name: value for name, value in named.items() if value is not None} | dict(mechanism_options or {})
        attention = create(mechanism, dim, num_heads, pattern=self.pattern, **options)
        if not isinstance(attention, AttentionLayer):
            raise Unsupported(
                f"{card.name} of {mechanism}, which has no heads to route",
                supported="mechanisms of kind attention",
                nearest="softmax",
            )
        if self.config.router == "query_norm" and attention.query is None:
            raise Unsupported(
                f'router="query_norm" with {mechanism}, whose queries are not made of tokens',
                supported='router="input"',
                nearest='router="input"',
            )
        if self.config.compute == "gather":
            check_choosable(attention)
        attention.merge = HeadRouter(dataclasses.replace(attention.spec, config=self.config), attention.merge)
        self.attention = attention

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c2"] | None = None,
        *,
        context: Context | None = None,
        state: LayerState | None = None,
    ) -> Result:
        """As :meth:`regard.layers.attention.AttentionLayer.forward`; the result has the loss ``load_balance``."""
        context = given_context(context)
        gathers = self.config.compute == "gather" and state is None and context.want <= {"gates"}
        if _straight_through(self.config) and torch.is_grad_enabled():
            gathers = False  # the gradient of a score that was not chosen asks for its head's output
        if not gathers:
            return self.attention(x, memory, context=context, state=state)
        router: HeadRouter = self.attention.merge  # type: ignore[assignment]

        def gates_of(q: Tensor | None, x: Tensor, lengths: Tensor | None, result: Result) -> Tensor:
            return router.gates(q, self.attention.num_heads, x, context, lengths, result)

        by_query = self.config.router == "query_norm" and bool(router.routed)
        return attend_in_chosen_heads(self.attention, x, memory, context, gates_of, needs_queries=by_query)

    def step(
        self, x_t: Float[Tensor, "b c"], state: LayerState | None = None
    ) -> tuple[Float[Tensor, "b c"], LayerState]:
        """One token: the output and the state after it. Without a state it is the first of its sequence."""
        return self.attention.step(x_t, state)

    def encode_memory(
        self, memory: Float[Tensor, "b m c2"], *, context: Context | None = None, state: LayerState | None = None
    ) -> LayerState:
        """Absorb memory once, for decoding in a cross pattern."""
        return self.attention.encode_memory(memory, context=context, state=state)
