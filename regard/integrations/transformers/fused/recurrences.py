"""The states of layers whose mechanism is a gated recurrence, updated by the native call for a decoder's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.backends.operators import runs_plainly
from regard.contract import Recurrence
from regard.engines.cache import newest, with_room
from regard.engines.decoder_layer import State, Weight, room_after
from regard.integrations.transformers.caches import StateLayer
from regard.integrations.transformers.placing import is_swapped
from regard.layers.attention import LayerState


class Recurrences:
    """The layers with a recurrence, in the order of their states.

    Args:
        attentions: their attention modules, with a mechanism that :func:`recurrence_of` supports.
        recurrences: the recurrence of each.
    """

    def __init__(self, attentions: Sequence[Any], recurrences: Sequence[Recurrence[Weight]]) -> None:
        placed = [x.regard for x in attentions]
        self._places = [x.placement.layer for x in placed]
        self._kinds = [x.card.state for x in placed]
        self._windows = [x.window for x in recurrences]
        shapes = zip(recurrences, placed, strict=True)
        self._shapes = [recurrence.state_shape(x.spec.heads, x.spec.head_dim) for recurrence, x in shapes]

    def states(self, cache: Any, rows: int, tokens: int) -> list[State] | None:
        """Each layer's state in a cache, with room for the state after `tokens` more tokens in each row; None where a
        state is missing or of another kind."""
        layers = getattr(cache, "layers", ())
        if len(layers) <= max(self._places):
            return None
        found = []
        for place, kind, window, shape in zip(self._places, self._kinds, self._windows, self._shapes, strict=True):
            state = layers[place].state if isinstance(layers[place], StateLayer) else None
            if state is None or not isinstance(state.mechanism, kind):
                return None
            held = state.mechanism
            seen = (held.memory, held.k, held.v) if window else (held.memory,)
            if held.memory.shape != (rows, *shape) or any(x.dtype != torch.float32 for x in seen):
                return None
            found.append((state.length, seen))
        if not runs_plainly(*(x for _, seen in found for x in seen)):
            return None
        if not all(memory.is_contiguous() for _, (memory, *_) in found):
            return None
        return [_with_room(length, tokens, *seen) for length, seen in found]

    def take(self, cache: Any, states: Sequence[State], tokens: int) -> None:
        """Store the next states in the cache, after `tokens` more tokens in each row."""
        after: dict[int, Tensor] = {}
        counted: list[tuple[Tensor, Tensor]] = []
        for place, size, state in zip(self._places, self._windows, states, strict=True):
            layer = cache.layers[place]
            length = layer.state.length
            if id(length) not in after:  # layers of equal length share one tensor from now on
                same = next((new for old, new in counted if torch.equal(old, length)), None)
                after[id(length)] = length + tokens if same is None else same
                counted.append((length, after[id(length)]))
            held: dict[str, Tensor] = {"memory": state.after, "length": after[id(length)]}
            if state.window is not None:
                held["k"], held["v"] = (newest(x, 2, size) for x in state.window)
            layer.take(LayerState(replace(layer.state.mechanism, **held), held["length"]), tokens, None)


def _with_room(length: Tensor, tokens: int, memory: Tensor, *window: Tensor) -> State:
    keys, values = (with_room(x, tokens, 2) for x in window) if window else (None, None)
    around = None if keys is None or values is None else (keys, values)
    return State(memory, room_after(memory), around, length)


def recurrence_of(attention: Any) -> Recurrence[nn.Module] | None:
    """The recurrence placed in a module, if a cache keeps its state; None for any other mechanism."""
    if not is_swapped(attention):
        return None
    placed, placement = attention.regard, attention.regard.placement
    if placed.card.recurrence is None or placed.merge is not None:
        return None
    if placement.layer is None or placement.rotary is not None:
        return None
    found: Recurrence[nn.Module] | None = placed.card.recurrence(placed.config, placed.projection)
    return found
