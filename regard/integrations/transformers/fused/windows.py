"""Consecutive layers of local attention in one native call, with the windows of their states for a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.backends.operators import runs_plainly
from regard.engines.cache import WindowState, newest, with_room
from regard.engines.decoder_layer import DecoderLayer, DecoderLayers, Places
from regard.integrations.collecting import is_collecting
from regard.integrations.transformers.caches import StateLayer
from regard.layers.attention import LayerState


class Windows:
    """Consecutive layers that attend by softmax to the last tokens of each row.

    Args:
        natives: each layer in the form of the kernels.
        attentions: the layers' attention modules, with local attention placed in them.
        slots: tokens that a query sees before its own; a state keeps just as many.
    """

    def __init__(self, natives: Sequence[DecoderLayer], attentions: Sequence[Any], slots: int) -> None:
        scales, windows = [x.scaling for x in attentions], [slots] * len(attentions)
        self._layers = DecoderLayers(natives, scales, windows)
        self._placed, self._slots = [x.regard for x in attentions], slots

    def __call__(self, x: Tensor, cosine: Tensor, sine: Tensor, cache: Any) -> Tensor | None:
        """Output of the layers for a few tokens. None, with nothing changed, where a window is not full yet or where
        losses or hooks need to see what the mechanism does."""
        (rows, tokens, _), slots = x.shape, self._slots
        if is_collecting() or any(x._forward_hooks or x._forward_pre_hooks for x in self._placed):
            return None
        there = getattr(cache, "layers", ())
        held = [there[x.placement.layer] for x in self._placed if x.placement.layer < len(there)]
        states: list[Any] = [layer.state for layer in held if isinstance(layer, StateLayer)]
        if len(states) < len(self._placed) or not all(_fits(state, rows, slots) for state in states):
            return None
        lengths = {id(state.length): state.length for state in states}
        if any(int(length.min()) < slots for length in lengths.values()):
            return None
        after = {key: length + tokens for key, length in lengths.items()}
        caches = [(with_room(s.mechanism.k, tokens, 2), with_room(s.mechanism.v, tokens, 2)) for s in states]
        y = self._layers(x, cosine, sine, Places(caches, [slots] * rows))
        for layer, state, (keys, values) in zip(held, states, caches, strict=True):
            length = after[id(state.length)]
            window = WindowState(newest(keys, 2, slots), newest(values, 2, slots), length)
            layer.take(LayerState(window, length), tokens, None)
        return y


def slots_of(attention: Any) -> int | None:
    """Tokens that local attention in a module keeps as its state; None for another mechanism."""
    placed = attention.regard
    local = placed.chosen.wrapper is None and placed.card.name == "local" and placed.config.form == "window"
    if not local or placed.placement.layer is None or placed.placement.rotary is not None:
        return None
    slots: int = placed.config.cached
    return slots or None


def _fits(state: Any, rows: int, slots: int) -> bool:
    window = None if state is None else state.mechanism
    if not isinstance(window, WindowState) or not runs_plainly(window.k, window.v):
        return False
    sizes = {x.shape[0::2] for x in (window.k, window.v)}
    return sizes == {(rows, slots)} and window.k.dtype == window.v.dtype == torch.float32
