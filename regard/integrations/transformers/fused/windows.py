"""Consecutive layers of windowed attention in one native call, with the windows of their states for a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.backends.operators import runs_plainly
from regard.engines.cache import WindowState, append, newest, with_room
from regard.engines.decoder_layer import DecoderLayer, DecoderLayers, Places
from regard.integrations.collecting import is_collecting
from regard.integrations.transformers.caches import StateLayer
from regard.layers.attention import LayerState


class Reach(NamedTuple):
    """What a query with a window sees besides its own token.

    Attributes:
        slots: the tokens right before its own; a state keeps just as many. 0: all tokens, without a window.
        first: the first tokens of its row, which a state keeps, too.
    """

    slots: int
    first: int = 0


class Windows:
    """Consecutive layers that attend by softmax to the last tokens of each row, and to its first ones.

    Args:
        natives: each layer in the form of the kernels.
        attentions: the layers' attention modules, with a windowed mechanism placed in them.
        reach: what a query of each layer sees.
    """

    def __init__(self, natives: Sequence[DecoderLayer], attentions: Sequence[Any], reach: Reach) -> None:
        scales = [x.scaling for x in attentions]
        self._layers = DecoderLayers(natives, scales, [sum(reach)] * len(attentions))
        self._placed, self._reach = [x.regard for x in attentions], reach

    def __call__(self, x: Tensor, cosine: Tensor, sine: Tensor, cache: Any) -> Tensor | None:
        """Output of the layers for a few tokens. None, with nothing changed, where a window is not full yet, where a
        second token would see other keys behind the first ones, or where losses or hooks need to see what the mechanism
        does."""
        (rows, tokens, _), (slots, first) = x.shape, self._reach
        if is_collecting() or any(x._forward_hooks or x._forward_pre_hooks for x in self._placed):
            return None
        there = getattr(cache, "layers", ())
        held = [there[x.placement.layer] for x in self._placed if x.placement.layer < len(there)]
        states: list[Any] = [layer.state for layer in held if isinstance(layer, StateLayer)]
        if len(states) < len(self._placed) or not all(_fits(state, rows, slots) for state in states):
            return None
        lengths = {id(state.length): state.length for state in states}
        if (first and tokens > 1) or any(int(length.min()) < slots + first for length in lengths.values()):
            return None
        after = {key: length + tokens for key, length in lengths.items()}
        caches = [_cache(state.mechanism, tokens, first) for state in states]
        y = self._layers(x, cosine, sine, Places(caches, [slots + first] * rows))
        for layer, state, (keys, values) in zip(held, states, caches, strict=True):
            length, past = after[id(state.length)], state.mechanism
            if first:  # the kernel's keys are a copy, since no window stays behind the first tokens
                keys, values = append(past.k, keys[:, :, -1:], 2), append(past.v, values[:, :, -1:], 2)
            window = replace(past, k=newest(keys, 2, slots), v=newest(values, 2, slots), length=length)
            layer.take(LayerState(window, length), tokens, None)
        return y


def reach_of(attention: Any) -> Reach | None:
    """What a query sees where the mechanism placed in a module is softmax over a window; None for another mechanism."""
    placed = attention.regard
    if placed.chosen.wrapper is not None or placed.placement.layer is None or placed.placement.rotary is not None:
        return None
    config, name = placed.config, placed.card.name
    if name == "local" and config.form == "window" and config.cached:
        return Reach(config.cached)
    if name == "longformer" and config.dilations == (1,):
        return Reach(config.cached, config.global_tokens)
    return None


def _cache(past: Any, tokens: int, first: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a window with room for new tokens, behind the row's first tokens if there are any."""
    if first:
        k, v = past.k, past.v
        return torch.cat([past.first_k, k, k[:, :, -1:]], 2), torch.cat([past.first_v, v, v[:, :, -1:]], 2)
    return with_room(past.k, tokens, 2), with_room(past.v, tokens, 2)


def _fits(state: Any, rows: int, slots: int) -> bool:
    window = None if state is None else state.mechanism
    if not isinstance(window, WindowState) or not runs_plainly(window.k, window.v):
        return False
    sizes = {x.shape[0::2] for x in (window.k, window.v)}
    return sizes == {(rows, slots)} and window.k.dtype == window.v.dtype == torch.float32
