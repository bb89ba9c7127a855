"""Caches for `generate`: keys and values that grow without copies, and the states of mechanisms."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Never

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from regard.contract import Unsupported
from regard.engines.cache import append
from regard.layers.attention import LayerState

CACHE = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"
"""The name of a decoder's state in this version of transformers."""


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer in memory with room behind them, so that a token costs no copy of those before it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values so far with the new ones, (B, H, past + N, D)."""
        if self.get_seq_length() == 0:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        else:
            self.keys, self.values = append(self.keys, key_states, 2), append(self.values, value_states, 2)
        return self.keys, self.values

    @classmethod
    def of(cls, layer: Any) -> Any:
        """A layer that goes on from one of transformers; other kinds stay as they are."""
        if type(layer) is not DynamicLayer:
            return layer
        made = cls()
        made.__dict__.update(layer.__dict__)
        return made


class GrowingCache(DynamicCache):
    """transformers' dynamic cache without the copy of all keys and values at each token::

        model.generate(ids, cache=GrowingCache(model.config))

    Args:
        config: the model's; layers that keep a window or a state of another kind stay as they are there.
    """

    layers: list[Any]
    layer_class_to_replicate: type[Any] | None

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        super().__init__(config=config)
        self.layers = [*map(GrowingLayer.of, self.layers)]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = GrowingLayer

    @classmethod
    def of(cls, cache: Any) -> Any:
        """A cache that goes on from transformers' dynamic one, which is not to be used any more; others stay as they are."""
        if type(cache) is not DynamicCache:
            return cache
        made = cls()
        made.layers = [*map(GrowingLayer.of, cache.layers)]
        return made


class StateLayer(CacheLayerMixin):
    """The state of a swapped module in the place of its keys and values in a cache.

    Attributes:
        state: after the tokens so far; None where a training pass did not keep it.
        tokens: how many those are, padding too.
        shift: of each row, by how much the model's positions are greater than the tokens' ranks; None where nobody asks.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: LayerState | None = None
        self.tokens = 0
        self.shift: Tensor | None = None

    def take(self, state: LayerState | None, tokens: int, shift: Tensor | None) -> None:
        """The state after so many more tokens."""
        self.state, self.shift = state, shift
        self.tokens += tokens

    def before(self, mechanism: str) -> LayerState | None:
        """The state to continue from; None at the start."""
        if self.tokens and self.state is None:
            raise Unsupported(
                f"going on from a cache of a training pass, which keeps no state of {mechanism}",
                supported="caches of passes without gradients",
                nearest="model.eval()",
            )
        return self.state

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> Never:
        raise self._other()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Never:
        raise self._other()

    @staticmethod
    def _other() -> Unsupported:
        return Unsupported(
            "keys and values for a cache that holds the states of mechanisms",
            supported="the model that filled the cache",
            nearest="a new cache",
        )

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.tokens, self.shift = None, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(indices.to(self.state.length.device))
        if self.shift is not None:
            self.shift = self.shift[indices.to(self.shift.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = self.state.length.shape[0]
            self.batch_select_indices(torch.arange(rows, device=self.state.length.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise Unsupported(
                f"taking {abs(tokens_to_remove)} tokens out of the state of a mechanism, as assisted generation does",
                supported="generation token by token, and caches of keys and values",
                nearest="a copy of the cache, made before the tokens",
            )


def keeps_every_key(config: PreTrainedConfig, index: int) -> bool:
    """Whether the cache of a model keeps the keys of all tokens in a layer, so that a state may be in their place."""
    layers = DynamicCache(config=config).layers
    return index < len(layers) and type(layers[index]) is DynamicLayer


def state_layer(cache: Any, index: int, mechanism: str) -> StateLayer:
    """The place of a layer's state in a cache, which is made where there is none yet; layers beside it that keep keys and values
    then grow without copies.

    Raises:
        Unsupported: for a cache of another kind, and for one that was filled by another attention.
    """
    cache = getattr(cache, "self_attention_cache", cache)  # of an encoder-decoder
    layers = cache.layers
    while len(layers) <= index and cache.layer_class_to_replicate is not None:
        layers.append(cache.layer_class_to_replicate())
    found = layers[index]
    if isinstance(found, StateLayer):
        return found
    if type(found) not in (DynamicLayer, GrowingLayer):
        raise Unsupported(
            f"a cache with a {type(found).__name__} for the state of {mechanism}",
            supported="DynamicCache, GrowingCache",
            nearest="DynamicCache(config=model.config)",
        )
    if found.get_seq_length():
        raise Unsupported(
            f"{mechanism} going on from a cache that another attention filled",
            supported="a cache that the swapped model filled",
            nearest="a new cache",
        )
    made = StateLayer()
    layers[:] = [made if i == index else GrowingLayer.of(layer) for i, layer in enumerate(layers)]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return made
