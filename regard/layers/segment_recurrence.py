"""The shell of mechanisms whose memory holds layer inputs of earlier segments, detached in training.

Keys and values of the memory are projections of those inputs. Their gradient reaches the projections and stops there,
within a call as well as across calls. A state holds keys and values, for fast decoding; in training it holds layer
inputs too, so that the next call can project them with its current weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract import Context, LayerCall, Loss, Result, State, Tensors, Unsupported, lengths_after, state_field
from regard.engines.cache import last_slots
from regard.layers.attention import AttentionLayer, LayerState
from regard.layers.checks import check_state

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class InputState(State):
    """The last layer inputs of each row, right-aligned."""

    inputs: Float[Tensor, "b width c"] = state_field()
    length: Int[Tensor, " b"] = state_field()


def last_inputs(old: Any, x: Float[Tensor, "b n c"], lengths: Int[Tensor, " b"] | None, width: int) -> InputState:
    """The last `width` inputs once `x` is appended to `old`, which holds at least as many if given."""
    total = lengths_after(None if old is None else old.length, lengths, x.shape[0], x.shape[1], x.device)
    if old is not None:
        x = torch.cat([old.inputs[:, old.inputs.shape[1] - width :], x.to(old.inputs.dtype)], 1)
    return InputState(last_slots(x[:, None], lengths, width, old is not None)[:, 0], total)


class SegmentLayer(AttentionLayer):
    """An attention layer with a memory of its inputs; `cached` in its config is the number that the next token may see.

    Gradients do not flow through states. In training mode a state also holds inputs, and states begun in evaluation
    mode are rejected. In evaluation mode, gradients within a call are those of its outputs, with nothing detached.
    """

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c2"] | None = None,
        *,
        context: Context | None = None,
        state: LayerState | None = None,
    ) -> Result:
        check_state(state, LayerState, self.card.name)
        if state is not None and self.training:
            state = self._projected_again(state)
        result = super().forward(x, memory, context=context, state=state)
        if isinstance(result.state, LayerState):
            result.state = result.state.detach()
        return result

    def _project(
        self, heads: Tensors, call: LayerCall, state: LayerState | None
    ) -> tuple[Tensors, State | None, dict[str, Loss]]:
        heads, _, losses = super()._project(heads, call, state)
        if not self.training or call.x is None:
            return heads, None, losses
        stopped = call.x.detach()
        if torch.is_grad_enabled():
            caches = self._no_caches() if state is None or not state.convolutions else list(state.convolutions)
            past: dict[str, Tensor] = {}
            self._memory_heads(past, stopped, call.lengths, caches)
            heads = heads | {f"{name}_past": tensor for name, tensor in past.items()}
        old = None if state is None else state.projection
        return heads, last_inputs(old, stopped, call.lengths, self.config.cached), losses

    def _projected_again(self, state: LayerState) -> LayerState:
        """The state with its keys and values recomputed from its inputs, with the current weights."""
        if not isinstance(state.projection, InputState):
            raise Unsupported(
                f"{self.card.name} in training with a state that was begun in evaluation mode",
                supported="a state whose calls were all in training mode, which holds layer inputs",
                nearest="layer.eval()",
            )
        if self.convolutions:
            raise Unsupported(
                f"{self.card.name} in training with a state and short convolutions",
                supported="whole sequences",
                nearest="short_convolution=0",
            )
        past: dict[str, Tensor] = {}
        self._memory_heads(past, state.projection.inputs, None, [])
        return dataclasses.replace(state, mechanism=dataclasses.replace(state.mechanism, **past))
