"""Modules of mixture_of_heads' layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import (
    Call,
    Context,
    LayerCall,
    LayerSpec,
    Mechanism,
    Merge,
    Pattern,
    Result,
    Tensors,
    Unsupported,
    valid_from_lengths,
)
from regard.core.precision import wide
from regard.core.ragged import values_known
from regard.layers.attention import AttentionLayer, LayerState
from regard.layers.base import Layer
from regard.layers.linear import make_linear
from regard.mechanisms.mixture_of_heads.definition import Config, _straight_through
from regard.mechanisms.mixture_of_heads.forms import gates_of

if TYPE_CHECKING:
    from jaxtyping import Float


def cannot_gather(mechanism: str) -> Unsupported:
    """The error for ``gather`` with a mechanism whose heads cannot be computed for a subset of tokens."""
    return Unsupported(
        f'compute="gather" with {mechanism}',
        supported="mechanisms with a `chosen` input, such as softmax",
        nearest='compute="auto", which computes all heads there',
    )


class HeadRouter(Merge):
    """The routers, as the merge of the attention shell.

    Args:
        spec: the layer's specification, with the options of this mechanism.
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

    def choose(self, heads: Tensors, call: LayerCall) -> tuple[Tensors, LayerCall]:
        """Compute the gates before the heads where that allows skipping heads whose gates are 0."""
        q = heads["q"]
        keys = heads["k"].shape[2] if "k" in heads else q.shape[2]
        whole = q.shape[2] > 1 and call.context.want <= {"gates", "state"} and self.inner is None
        if not whole or not self.config.gathers(q.shape[1], min(q.shape[2], keys), q.device.type):
            return heads, call
        # gradients of unchosen scores need those heads' outputs, and a graph cannot depend on counts
        if (_straight_through(self.config) and torch.is_grad_enabled()) or not values_known(q):
            return heads, call
        told = Result(q)
        gates = self.gates(heads, call, told)
        chosen = gates.transpose(1, 2) != 0
        if call.lengths is not None:
            chosen = chosen & valid_from_lengths(call.lengths, q.shape[2])[:, None]
        return heads | {"chosen": chosen}, dataclasses.replace(call, settled=(gates, told))

    def forward(
        self, output: Float[Tensor, "b h n v"], heads: Tensors, call: LayerCall, result: Result
    ) -> Float[Tensor, "b h n v"]:
        """Gate the head outputs; losses and requested gates are added to `result`."""
        if self.inner is not None:
            output = self.inner(output, heads, call, result)
        if call.settled is None:
            gates = self.gates(heads, call, result, output.shape[1])
        else:
            gates, told = call.settled
            result.losses |= told.losses
            result.extras |= told.extras
            if not self.config.weighted:  # gates are 1 where heads were computed
                return output
        return (output.to(gates.dtype) * gates.transpose(1, 2)[..., None]).to(output.dtype)

    def gates(
        self, heads: Tensors, call: LayerCall, result: Result, count: int | None = None
    ) -> Float[Tensor, "b n h"]:
        """Compute the gates, see :func:`gates_of`.

        Args:
            count: number of heads; that of the queries when None (query norms need queries anyway).
        """
        x = call.x
        assert x is not None  # every output belongs to a token
        logits: dict[str, Tensor | None] = {name: module(x) for name, module in self.logits.items()}
        if self.config.router == "query_norm" and self.routed:
            first, last = self.routed[0], self.routed[-1] + 1
            together = last - first == len(self.routed)
            q = wide(heads["q"][:, first:last] if together else heads["q"][:, self.routed])
            smallest = torch.finfo(q.dtype).tiny  # the norm of a zero query, in padding, has no gradient
            logits["routed"] = q.square().sum(-1).clamp(min=smallest).sqrt().transpose(1, 2)
        own = Call(
            self.pattern,
            self.config,
            lengths=call.lengths,
            generator=call.context.generator,
            training=self.training,
            want=call.context.want,
        )
        count = heads["q"].shape[1] if count is None else count
        return gates_of(own, count, logits, x, result, keeps_losses=call.keeps_losses)


class MixtureOfHeads(Layer):
    """An attention layer with routed heads, (B, N, C) -> (B, N, C).

    Args:
        card: the mechanism.
        dim: width C of the input and output.
        num_heads: H, query heads.
        pattern: a pattern that the wrapped mechanism supports too.
        create: creates a layer from the name of a mechanism.
        mechanism: name of the attention mechanism whose heads are routed.
        positions, position_options, head_dim, num_kv_heads, memory_dim, dropout: options of the wrapped layer, see
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
                f'router="query_norm" with {mechanism}, whose queries are not computed from tokens',
                supported='router="input"',
                nearest='router="input"',
            )
        if self.config.compute == "gather" and "chosen" not in attention.card.axes:
            raise cannot_gather(mechanism)
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
        """Like :meth:`regard.layers.attention.AttentionLayer.forward`, with the loss ``load_balance``."""
        return self.attention(x, memory, context=context, state=state)

    def step(
        self, x_t: Float[Tensor, "b c"], state: LayerState | None = None
    ) -> tuple[Float[Tensor, "b c"], LayerState]:
        """Process one token: return the output and the new state. Without a state, the token starts a sequence."""
        return self.attention.step(x_t, state)

    def encode_memory(
        self, memory: Float[Tensor, "b m c2"], *, context: Context | None = None, state: LayerState | None = None
    ) -> LayerState:
        """Absorb memory once, for decoding in a cross pattern."""
        return self.attention.encode_memory(memory, context=context, state=state)
