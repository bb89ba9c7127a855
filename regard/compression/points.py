"""Places of a model at which activations are rounded, also those that no module returns: the residual stream, and the
scores and weights of attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.apply import apply
from regard.compression.ranges import Grid, RunningRange, simulate
from regard.contract import Call, Mechanism, Pattern, Result, State, Unsupported, an_instance
from regard.core.precision import wide_dtype
from regard.core.visibility import Ranks, Visibility, masked_scores_bias, ranks
from regard.engines.cache import extend
from regard.layers.attention import AttentionLayer
from regard.layers.base import Layer
from regard.mechanisms.softmax import sink_weights
from regard.models.blocks import Block
from regard.models.stack import Stack

if TYPE_CHECKING:
    from jaxtyping import Float

SHOWN = ("softmax", "clipped_softmax", "gated_softmax")
"""Mechanisms whose scores and weights can be rounded."""

OTHER_SUMS = ("reversible", "checkpoint_layers", "stochastic_depth", "exits")
"""Options of a stack with which residual sums are not the blocks' own."""

NEAREST = 'points="linear"'


@dataclass
class Point:
    """A place in a model: it measures the numbers that pass through it until it has a grid, and then rounds them."""

    range: RunningRange
    grid: Grid | None = None

    def __call__(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if self.grid is None:
            self.range.update(x)
            return x
        return simulate(x, self.grid)

    def given(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook for a module's first argument."""
        return self(arguments[0]), *arguments[1:]

    def returned(self, module: nn.Module, arguments: tuple[Any, ...], result: Tensor) -> Tensor:
        """A forward hook for a module's output."""
        return self(result)


def add_inner_points(modules: Mapping[str, nn.Module], make: Callable[[str], Point]) -> None:
    """Let the blocks among `modules` pass their residual sums, scores and attention weights through points.

    The points are ``<block>.input`` (of the first block of a stack: the sum of embeddings), ``<block>.mixed`` and
    ``<block>.fed`` (x after the mixer's and the feed-forward network's sum), ``<mixer>.scores`` (scale q.k, before
    softcap, biases and masks) and ``<mixer>.weights`` (before gates).

    Args:
        modules: modules by name; other modules stay as they are.
        make: called with the name of each point.

    Raises:
        Unsupported: without a :class:`regard.models.blocks.Block`, for a layer that is not of a mechanism in
            :data:`SHOWN` or not a block's mixer, and for stacks with one of :data:`OTHER_SUMS`.
    """
    blocks = {name: module for name, module in modules.items() if isinstance(module, Block)}
    if not blocks:
        raise Unsupported(
            "rounding of residual sums in a model without regard's blocks",
            supported="LanguageModel, Encoder, EncoderDecoder and others of regard.models.blocks",
            nearest=NEAREST,
        )
    for name, module in modules.items():
        if isinstance(module, Layer):
            _check_layer(name, module, blocks)
        if isinstance(module, Stack):
            for option in OTHER_SUMS:
                if option in module.config.changed:
                    raise Unsupported(
                        f"rounding of residual sums with {option}={getattr(module.config, option)!r}",
                        supported="stacks that add each branch to one stream, in order",
                        nearest=NEAREST,
                    )
    started = set()
    for name, block in blocks.items():
        stack = name.rpartition(".")[0]
        if stack not in started:
            started.add(stack)
            block.register_forward_pre_hook(make(f"{name}.input").given)
        block.add_mixed = partial(_mixed, type(block).add_mixed, block, make(f"{name}.mixed"))  # type: ignore[method-assign]
        if block.feed_forward is not None:
            block.add_fed = partial(_fed, type(block).add_fed, block, make(f"{name}.fed"))  # type: ignore[method-assign]
    for name, module in modules.items():
        if isinstance(module, AttentionLayer):
            shown = Shown(make(f"{name}.scores"), make(f"{name}.weights")).card(module.card)
            module.mix = partial(_mix, shown)


def _check_layer(name: str, layer: Layer, blocks: Mapping[str, Block]) -> None:
    if not isinstance(layer, AttentionLayer) or layer.card.name not in SHOWN:
        named = layer.card.name if isinstance(layer, AttentionLayer) else an_instance(layer)
        raise Unsupported(f"rounding of the scores of {name} ({named})", supported=", ".join(SHOWN), nearest=NEAREST)
    if not any(block.mixer is layer for block in blocks.values()):
        raise Unsupported(
            f"rounding of the residual sum after {name}", supported="layers in regard's blocks", nearest=NEAREST
        )


def _mixed(add: Callable[..., Result], block: Block, point: Point, *given: Any, **named: Any) -> Result:
    result = add(block, *given, **named)
    result.output = point(result.output)
    return result


def _fed(add: Callable[..., Tensor], block: Block, point: Point, *given: Any, **named: Any) -> Tensor:
    return point(add(block, *given, **named))


def _mix(shown: Mechanism, card: Mechanism, heads: Mapping[str, Tensor | None], **call: Any) -> Result:
    return apply(shown, heads, **call)


@dataclass(frozen=True)
class Shown:
    """The forms of the mechanisms in :data:`SHOWN`, with all scores and weights as tensors that pass through points."""

    scores: Point
    weights: Point

    def card(self, card: Mechanism) -> Mechanism:
        """A mechanism's card with these forms, which have no dropout and no log-sum-exp."""
        forms: dict[str, Callable[..., Any]] = {
            "parallel": self.parallel,
            "chunked": self.chunked,
            "step": self.chunked,
            "absorb": card.forms["absorb"],
            "read": self.read,
        }
        return dataclasses.replace(card, forms=forms, honours=card.honours - {"dropout", "lse"})

    def parallel(self, call: Call, q: Tensor, k: Tensor, v: Tensor, **others: Tensor) -> Result:
        """Attention without a state."""
        return self._attend(call, q, k, v, ranks(call, q.shape[2], k.shape[2], q.device), None, **others)

    def chunked(self, call: Call, q: Tensor, k: Tensor, v: Tensor, **others: Tensor) -> Result:
        """Continue a cached sequence."""
        state, where = extend(call, k, v, q.shape[2])
        return self._attend(call, q, state.k, state.v, where, state, **others)

    def read(self, call: Call, q: Tensor, **others: Tensor) -> Result:
        """Attend from queries to absorbed memory."""
        where = ranks(call, q.shape[2], 0, q.device, call.state.ranks)
        return self._attend(call, q, call.state.k, call.state.v, where, call.state, **others)

    def _attend(
        self,
        call: Call,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g m d"],
        v: Float[Tensor, "b g m v"],
        where: Ranks,
        state: State | None,
        *,
        sink: Float[Tensor, " h"] | None = None,
        log_gate: Float[Tensor, "b h n"] | None = None,
    ) -> Result:
        config, dtype = call.config, wide_dtype(q)
        left, right = getattr(config, "window", None) or (None, None)
        visibility = Visibility(causal=call.pattern is Pattern.CAUSAL_SELF, left=left, right=right)
        visible, bias = masked_scores_bias(where, visibility, call.bias, call.position_bias, call.blocks, dtype)
        keys, values = (x.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = self.scores(call.scale * q.to(dtype) @ keys.mT)
        softcap = getattr(config, "softcap", None)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores if bias is None else scores + bias
        opened = visible | ~visible.any(-1, keepdim=True)  # a row of -inf only would have NaN gradients
        weights = sink_weights(sink, scores.masked_fill(~opened, -torch.inf))
        if hasattr(config, "stretch"):
            gamma, zeta = config.stretch(call.progress)
            weights = ((zeta - gamma) * weights + gamma).clip(0, 1)
        weights = self.weights(torch.where(visible, weights, 0))
        output = weights @ values
        gate = getattr(config, "gate_scale", 1.0) * (1.0 if log_gate is None else log_gate.to(dtype).exp()[..., None])
        extras = {"weights": (gate * weights).to(q.dtype)} if "weights" in call.want else {}
        return Result((gate * output).to(q.dtype), state, extras=extras)
