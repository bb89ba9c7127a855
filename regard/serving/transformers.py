"""Causal language models of Hugging Face transformers for the scheduler, either unchanged or with other mechanisms put
in by :func:`regard.swap`.

An unchanged model runs softmax attention on pages. A model with swapped mechanisms reads each sequence alone, with a
cache for that sequence; if a mechanism keeps no state, it runs on the whole sequence again for each token. With a sparse
method each prompt is read in one call.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from regard.compression.sparse import is_sparse
from regard.contract import Call, Pattern, Unsupported, an_instance
from regard.core.visibility import Visibility
from regard.engines import attention_forms
from regard.engines.decoder_layer import Places
from regard.engines.linear import FrozenWeights
from regard.integrations.transformers import CACHE, GrowingCache, check_interface, is_swapped, needing_whole_sequences
from regard.layers.linear import accelerate
from regard.serving.engine import Row
from regard.serving.pools import PAGE_SIZE, Pools, padded

SERVED = "regard:served"
"""Name of the attention implementation for serving. It has no mask function, so transformers builds no masks."""
_CALL = threading.local()


class TransformersReader:
    """A causal language model of transformers as :class:`regard.serving.engine.Reader`.

    Args:
        model: the model, in evaluation mode. Its attention and its linear layers are replaced by faster ones, in place.
        rows: maximum sequences in the batch.
        context: maximum tokens of a sequence; the config's `max_position_embeddings` when None.
        cache_tokens, page_size: as for :class:`regard.serving.pools.Pools`, if the model has pages.

    Raises:
        Unsupported: for models whose layers cache anything but keys and values, or share them between layers; and for a
            context beyond the model's positions.
    """

    holds, held_bytes = False, 0

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int = 16,
        context: int | None = None,
        cache_tokens: int | None = None,
        page_size: int = PAGE_SIZE,
    ) -> None:
        config = model.config.get_text_config()
        reach = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        if context is not None and reach is not None and context > reach:
            raise Unsupported(f"context={context} of a model with {reach} positions", nearest=f"{reach}")
        self.model, self.page_size = model, page_size
        self.vocab_size, self.context = config.vocab_size, context or reach or 2048
        self.device = model.device
        self._weights = FrozenWeights()
        self._caches: dict[int, GrowingCache] = {}  # by row, for models that read sequences alone
        self._texts: dict[int, list[int]] = {}  # tokens by row, for models that run on whole sequences
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        accelerate(model)
        self.alone, self.pages = any(map(is_swapped, model.modules())), 0
        self.whole = bool(needing_whole_sequences(model))
        self.at_once = self.whole or is_sparse(model)
        self.page_bytes = 0
        if self.alone:
            return
        _check_cache(model)
        check_interface(model)
        model.set_attn_implementation(SERVED)
        seen = _Seen()
        with torch.no_grad():
            self._forward(torch.zeros((1, 1), dtype=torch.int64, device=self.device), 0, seen)
        self._pools = Pools(
            seen.layers_seen, rows=rows, context=self.context, cache_tokens=cache_tokens, page_size=page_size
        )
        self.pages, self.page_bytes = self._pools.pages, self._pools.token_bytes * page_size

    @torch.no_grad()
    def read(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> Tensor:
        with self._weights:
            if self.alone:
                return torch.cat([self._read_alone(row, new) for row, new in zip(rows, tokens, strict=True)])
            ids, lengths = padded(tokens, self.device)
            places = torch.tensor([row.length for row in rows], device=self.device)[:, None]
            cache = _Batch(self._pools, rows, None if int(lengths.min()) == ids.shape[1] else lengths)
            return self._forward(ids, places, cache, lengths - 1)

    def _read_alone(self, row: Row, new: Sequence[int]) -> Tensor:
        """Return the logits (1, vocab) after the new tokens of a sequence."""
        options: dict[str, Any] = {"logits_to_keep": 1} if self._keeps else {}
        if self.whole:
            text = self._texts.setdefault(row.number, [])
            text.extend(new)
            options["use_cache"] = False
        else:
            text = list(new)
            cache = self._caches.setdefault(row.number, GrowingCache(self.model.config))
            options |= {"use_cache": True, CACHE: cache}
        return self.model(torch.tensor([text], device=self.device), **options).logits[:, -1]

    def _forward(self, ids: Tensor, before: Tensor | int, cache: _Batch | _Seen, last: Tensor | None = None) -> Tensor:
        """Return the logits (B, vocab) at index `last` of each row, whose `ids` follow `before` earlier tokens."""
        positions = torch.arange(ids.shape[1], device=ids.device) + before
        last = torch.zeros(ids.shape[0], dtype=torch.int64, device=ids.device) if last is None else last
        kept, at = last.unique(return_inverse=True) if self._keeps else (last, last)
        options: dict[str, Any] = {"logits_to_keep": kept} if self._keeps else {}
        _CALL.cache = cache
        try:
            logits = self.model(
                input_ids=ids,
                position_ids=positions.expand(ids.shape),
                use_cache=True,
                **{CACHE: cache},
                **options,
            ).logits
        finally:
            _CALL.cache = None
        return logits[torch.arange(len(last), device=last.device), at]

    def save(self, row: Row) -> tuple[Any, int]:
        return None, 0

    def restore(self, row: Row, saved: Any) -> None:
        """Everything is in pages."""

    def forget(self, row: Row) -> None:
        self._caches.pop(row.number, None)
        self._texts.pop(row.number, None)


class _Batch(Cache):
    """The pages of the rows of a call; :func:`attend` itself writes keys and values into them.

    Attributes:
        states: paged state of the rows, by layer.
        lengths: number of valid new tokens of each row; None if no row is padded.
    """

    def __init__(self, pools: Pools, rows: Sequence[Row], lengths: Tensor | None) -> None:
        super().__init__(layers=[])
        self.states, self.lengths, self._pools = pools.states(rows), lengths, pools

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(next(iter(self.states.values())).rows.counts.max())

    def places(self, layers: Sequence[int], rows: int, tokens: int) -> Places | None:
        """Return where the layers' caches have these rows; None if rows are padded or caches not float32 on the CPU."""
        caches = [self._pools.layers[i] for i in layers]
        if self.lengths is not None or any(x.dtype != torch.float32 or not x.is_cpu for x in caches[0]):
            return None
        held = self.states[layers[0]].rows
        return Places(caches, held.counts.tolist(), held.table)


class _Seen(Cache):
    """A cache that records the keys and values of one token in each layer, as samples for the pools."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.layers_seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.layers_seen[layer_idx] = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def _check_cache(model: PreTrainedModel) -> None:
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise Unsupported(
                f"serving {an_instance(model)}, whose layers keep {an_instance(layer)}",
                supported="models whose layers keep keys and values",
                nearest="regard.models.from_transformers, for mamba and mamba2",
            )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers: queries (B, H, N, D), and keys and values of the new tokens -> (B, N, H, V)."""
    cache, layer = _CALL.cache, getattr(module, "layer_idx", None)
    window = None if sliding_window is None else sliding_window - 1
    visibility = Visibility(causal=True, left=window)
    call = Call(Pattern.CAUSAL_SELF, scale=query.shape[3] ** -0.5 if scaling is None else scaling)
    if isinstance(cache, _Seen):
        if layer not in cache.layers_seen:
            raise Unsupported(
                f"serving a model whose {type(module).__name__} reads keys of another layer",
                supported="layers with keys and values of their own",
            )
        result = attention_forms.parallel(call, query, key, value, visibility=visibility, softcap=softcap, sink=s_aux)
        return result.output.transpose(1, 2), None
    state = cache.states[layer]
    call = call.replace(lengths=cache.lengths, memory_lengths=cache.lengths, state=state)
    result = attention_forms.chunked(call, query, key, value, visibility=visibility, softcap=softcap, sink=s_aux)
    return result.output.transpose(1, 2), None


AttentionInterface.register(SERVED, attend)
