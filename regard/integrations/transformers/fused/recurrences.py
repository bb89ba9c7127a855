"""The states of layers whose mechanism is a gated recurrence, on which the kernel of a decoder's layers goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.backends.operators import runs_plainly
from regard.engines.decoder_layer import Recurrence, room_after
from regard.engines.recurrent_forms import MatrixState
from regard.integrations.transformers.caches import StateLayer
from regard.integrations.transformers.placing import is_swapped
from regard.layers.attention import LayerState


class Recurrences:
    """Layers in the order of their states.

    Args:
        attentions: their modules, into which a mechanism was put that :func:`recurrence_of` knows.
    """

    def __init__(self, attentions: Sequence[Any]) -> None:
        specs = [x.regard.spec for x in attentions]
        self._places = [x.regard.placement.layer for x in attentions]
        self._shapes = [(spec.heads, spec.head_dim, spec.value_dim) for spec in specs]

    def states(self, cache: Any, rows: int) -> list[tuple[Tensor, Tensor]] | None:
        """Of each layer, its state in a cache and room for the next one; None where one is not there or of another kind."""
        layers = getattr(cache, "layers", ())
        if len(layers) <= max(self._places):
            return None
        found = []
        for place, shape in zip(self._places, self._shapes, strict=True):
            layer = layers[place]
            memory = layer.state.mechanism.memory if _is_matrix(layer) else None
            if memory is None or memory.shape != (rows, *shape) or memory.dtype != torch.float32:
                return None
            found.append(memory)
        if not runs_plainly(*found) or not all(memory.is_contiguous() for memory in found):
            return None
        return [(memory, room_after(memory)) for memory in found]

    def take(self, cache: Any, states: Sequence[tuple[Tensor, Tensor]], tokens: int) -> None:
        """Let the cache have the next states, after so many tokens of each row."""
        after: dict[int, Tensor] = {}
        counted: list[tuple[Tensor, Tensor]] = []
        for place, (_, memory) in zip(self._places, states, strict=True):
            layer = cache.layers[place]
            length = layer.state.length
            if id(length) not in after:  # equal ones are one from now on
                same = next((new for old, new in counted if torch.equal(old, length)), None)
                after[id(length)] = length + tokens if same is None else same
                counted.append((length, after[id(length)]))
            length = after[id(length)]
            layer.take(LayerState(MatrixState(memory, length), length), tokens, None)


def recurrence_of(attention: Any) -> Recurrence[nn.Module] | None:
    """The recurrence that is put into a module and whose state a cache keeps; None where there is another mechanism."""
    if not is_swapped(attention):
        return None
    placed, placement = attention.regard, attention.regard.placement
    if placed.projection is None or placed.merge is not None or placement.layer is None or placement.rotary is not None:
        return None
    if placed.card.state is not MatrixState or placed.card.default_scale != "rsqrt":
        return None
    found: Recurrence[nn.Module] | None = placed.projection.recurrence()
    return found


def _is_matrix(layer: Any) -> bool:
    return isinstance(layer, StateLayer) and layer.state is not None and isinstance(layer.state.mechanism, MatrixState)
