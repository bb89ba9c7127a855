"""Caches for `generate`: keys and values that grow without copies, and the states of mechanisms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Never

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from regard.contract import Unsupported, an_instance
from regard.engines.cache import Memory, grows_in_place
from regard.engines.decoder_layer import Places
from regard.layers.attention import LayerState

CACHE = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"
"""The name of the argument for a decoder's cache in this version of transformers."""


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer in memory with spare room, so that a new token does not copy those before it."""

    def __init__(self) -> None:
        self._both: tuple[Tensor | None, Tensor | None] | None = None  # views of the used slots, once asked for
        self._memory: Memory | None = None  # for the keys; the values use as much of theirs
        self._slots: tuple[Any, Any] = (None, None)
        self._length = 0
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """Keys (B, H, tokens, D); None at the start."""
        return self._views()[0]

    @keys.setter
    def keys(self, x: Tensor | None) -> None:
        self._hold(x, self.values)

    @property
    def values(self) -> Tensor | None:
        """Values (B, H, tokens, D); None at the start."""
        return self._views()[1]

    @values.setter
    def values(self, x: Tensor | None) -> None:
        self._hold(self.keys, x)

    def get_seq_length(self) -> int:
        """Number of tokens so far."""
        return super().get_seq_length() if self._memory is None else self._length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns all so far, (B, H, past + N, D)."""
        length, new = self.get_seq_length(), (key_states, value_states)
        if length == 0:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = new
        elif not all(grows_in_place(old, x, 2) for old, x in zip(self._views(), new, strict=True)):
            self.keys, self.values = (torch.cat(x, 2) for x in zip(self._views(), new, strict=True))
        else:
            for slots, x in zip(self.room(key_states.shape[2]), new, strict=True):
                # `.data`: tensors saved for a backward pass are in other slots, and must not count as changed
                slots.data.narrow(2, length, x.shape[2]).copy_(x)
        return self._views()

    def room(self, count: int) -> tuple[Tensor, Tensor]:
        """Reserve the next `count` tokens and return the memory of keys and values, (B, H, slots, D). The caller writes
        the new tokens; the layer counts them from now on. The tuple is the same object as before unless the memory had
        to move."""
        end = self.get_seq_length() + count
        if self._memory is None or not self._memory.take(self._length, end, 2):
            keys, values = self._views()
            self._memory = Memory.of(keys, end, 2)
            self._slots = self._memory.slots, Memory.of(values, end, 2).slots
        self._length, self._both = end, None
        return self._slots

    def held(self, rows: int, tokens: int) -> int | None:
        """The number of tokens in each of `rows` rows; None for other rows, and if it is not float32 on the CPU."""
        x: Any = self.keys if self._memory is None else self._slots[0]
        fits = x is not None and x.shape[0] == rows and x.is_cpu and x.dtype == torch.float32
        return self.get_seq_length() if fits else None

    def replaced(self) -> int:
        """The slot of a token that the next one replaces; -1, since none is replaced."""
        return -1

    def _hold(self, keys: Tensor | None, values: Tensor | None) -> None:
        self._both, self._memory, self._slots = (keys, values), None, (None, None)

    def _views(self) -> tuple[Any, Any]:
        if self._both is None and self._memory is not None:
            keys, values = self._slots
            self._both = keys.narrow(2, 0, self._length), values.narrow(2, 0, self._length)
        return self._both or (None, None)

    @classmethod
    def of(cls, layer: Any) -> Any:
        """A layer that continues from one of transformers; other kinds are returned unchanged."""
        if type(layer) is not DynamicLayer:
            return layer
        made = cls()
        for name, x in vars(layer).items():
            setattr(made, name, x)
        return made


class GrowingCache(DynamicCache):
    """transformers' dynamic cache, without copying all keys and values at each token::

        model.generate(ids, cache=GrowingCache(model.config))

    Args:
        config: the model's config; layers that keep a window or another kind of state stay as in the dynamic cache.
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
        """A cache that continues from transformers' dynamic cache, which must not be used any more; others are
        unchanged."""
        if type(cache) is not DynamicCache:
            return cache
        made = cls()
        made.layers = [*map(GrowingLayer.of, cache.layers)]
        return made


class StateLayer(CacheLayerMixin):
    """The state of a swapped module, in place of its keys and values in a cache.

    Attributes:
        state: state after the tokens so far; None where a training pass did not keep it.
        tokens: number of tokens so far, padding included.
        shift: offset of the model's positions from the tokens' ranks, for each row; None where it is not needed.
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
        self._slots: tuple[Any, Any] = (None, None)

    def room(self, count: int) -> tuple[Tensor, Tensor]:
        """As :meth:`GrowingLayer.room`, for a state with keys and values; a single token may replace another one."""
        assert self.state is not None
        held = self.state.mechanism.extended(count)
        self.take(replace(self.state, mechanism=held, length=self.state.length + count), count, self.shift)
        if self._slots[0] is not held.k:
            self._slots = held.k, held.v
        return self._slots

    def held(self, rows: int, tokens: int) -> int | None:
        """The number of tokens of which the state holds keys and values beside the next `tokens`; None for other rows,
        and for states of other kinds."""
        even = None if self.state is None else getattr(self.state.mechanism, "even", None)
        return None if even is None or self.state is None or len(self.state.length) != rows else even(tokens)

    def replaced(self) -> int:
        """The slot of a token that the next one replaces; -1 if none is replaced."""
        assert self.state is not None
        slot: int = self.state.mechanism.replaced()
        return slot

    def take(self, state: LayerState | None, tokens: int, shift: Tensor | None) -> None:
        """Store the state after `tokens` more tokens."""
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


def places(cache: Any, layers: Sequence[int], rows: int, tokens: int) -> Places | None:
    """The keys and values of these layers in a cache, with room for `tokens` more in each row, which count as present
    from now on. None where the cache lacks the keys of a layer, or has them in another form (kind of cache, length,
    dtype or device); nothing is changed then. A state of a sparse method (:mod:`regard.compression.sparse`) counts as
    keys and values if it holds as many in all rows and heads.

    A cache of another kind may have its own method `places(layers, rows, tokens)`.
    """
    own = getattr(cache, "places", None)
    if own is not None:
        found: Places | None = own(layers, rows, tokens)
        return found
    if type(cache) not in (DynamicCache, GrowingCache) or len(cache.layers) <= max(layers):
        return None
    if any(type(cache.layers[i]) not in (DynamicLayer, GrowingLayer, StateLayer) for i in layers):
        return None
    for i in layers:
        cache.layers[i] = GrowingLayer.of(cache.layers[i])
    held = [cache.layers[i].held(rows, tokens) for i in layers]
    if not all(held):
        return None
    most, replaced = max(held), [cache.layers[i].replaced() for i in layers]
    return Places(
        [cache.layers[i].room(tokens) for i in layers],
        [most] * rows,
        fewer=None if min(held) == most else [most - x for x in held],
        replaced=None if max(replaced) < 0 else replaced,
    )


def keeps_every_key(config: PreTrainedConfig, index: int) -> bool:
    """Return whether a model's cache keeps the keys of all tokens in a layer, so that a state can take their place."""
    layers = DynamicCache(config=config).layers
    return index < len(layers) and type(layers[index]) is DynamicLayer


def state_layer(cache: Any, index: int, mechanism: str) -> StateLayer:
    """The slot for a layer's state in a cache, created if there is none; other layers, which keep keys and values, then
    grow without copies.

    Raises:
        Unsupported: for another kind of cache, and for one that was filled by another attention.
    """
    cache = getattr(cache, "self_attention_cache", cache)  # for an encoder-decoder
    layers = cache.layers
    while len(layers) <= index and cache.layer_class_to_replicate is not None:
        layers.append(cache.layer_class_to_replicate())
    found = layers[index]
    if isinstance(found, StateLayer):
        return found
    if type(found) not in (DynamicLayer, GrowingLayer):
        raise Unsupported(
            f"a cache with {an_instance(found)} for the state of {mechanism}",
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
