"""All layers of a decoder in one native call, with their caches and their softmax attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from regard.backends.linear.product import FEW_ROWS
from regard.backends.operators import runs_plainly
from regard.engines.decoder_layer import DecoderLayer, DecoderLayers, few_tokens
from regard.integrations.transformers.attending import PREFIX
from regard.integrations.transformers.caches import CACHE, places
from regard.integrations.transformers.fused.layers import FusedLayer, unwatched
from regard.integrations.transformers.fused.snapshot import Snapshot, family_of, is_known, window_of

SOFTMAX = {"eager", "sdpa", f"{PREFIX}softmax"}
"""Attention of a model that the kernel computes too."""
TAKEN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", CACHE}


class FusedDecoder:
    """The `forward` of a model's decoder, whose layers have :class:`FusedLayer` for theirs."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder: Any = decoder
        self._seen: Snapshot | None = None
        self._indices: list[int] = []
        self._layers: DecoderLayers | None = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        found = None if arguments else self._decoded(options)
        return type(self.decoder).forward(self.decoder, *arguments, **options) if found is None else found

    def __getstate__(self) -> dict[str, Any]:
        # addresses are of this process, and of this copy
        return {"decoder": self.decoder, "_seen": None, "_indices": [], "_layers": None}

    def _decoded(self, options: dict[str, Any]) -> BaseModelOutputWithPast | None:
        """The decoder's answer; None, and nothing has changed, where the layers go their own ways."""
        decoder, cache = self.decoder, options.get(CACHE)
        ids, x = options.get("input_ids"), options.get("inputs_embeds")
        given = ids if x is None else x
        if cache is None or given is None or (ids is not None and x is not None):
            return None
        if not unwatched(decoder) or not self._asks_plainly(options, cache):
            return None
        rows, tokens = given.shape[:2]
        if not 0 < rows * tokens <= FEW_ROWS or not runs_plainly(given):
            return None
        layers = self._native()
        if layers is None:
            return None
        x = decoder.embed_tokens(ids) if x is None else x
        positions = options.get("position_ids")
        if positions is None:
            positions = torch.arange(tokens, device=x.device)[None] + cache.get_seq_length()
        cosine, sine = decoder.rotary_emb(x, position_ids=positions)
        fits = few_tokens(x, cosine, sine) and (x.shape[2], cosine.shape[2]) == (layers.width, layers.head_width)
        where = places(cache, self._indices, rows, tokens) if fits else None
        if where is None:
            return None
        return BaseModelOutputWithPast(last_hidden_state=layers(x, cosine, sine, where), **{CACHE: cache})

    def _asks_plainly(self, options: dict[str, Any], cache: Any) -> bool:
        """Whether all that is wanted is what the last layer gives, of rows without padding, by softmax."""
        config, mask, kept = self.decoder.config, options.get("attention_mask"), options.get("use_cache")
        if any(x is not None and x is not False for name, x in options.items() if name not in TAKEN):
            return False
        if config.output_hidden_states or config.output_attentions or not (config.use_cache if kept is None else kept):
            return False
        if not hasattr(cache, "places") and config._attn_implementation not in SOFTMAX:
            return False
        if not getattr(config, "is_causal", True):
            return False
        return mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and runs_plainly(mask) and bool(mask.all()))

    def _native(self) -> DecoderLayers | None:
        """All layers as the kernel takes them, as they are now; None where one of them is not for it."""
        layers: list[Any] = [*self.decoder.layers._modules.values()][: self.decoder.config.num_hidden_layers]
        if not all(map(_is_fused, layers)):
            return None
        if self._seen is None or not self._seen.is_current():
            self._seen, self._layers = None, None
            norm = self.decoder.norm
            if all(map(is_known, layers)) and family_of(norm, "RMSNorm"):
                self._seen = Snapshot(layers, around=[self.decoder.layers, norm])
                self._layers = self._read(layers, self._seen.natives)
        return None if self._seen is None or self._seen.is_seen() else self._layers

    def _read(self, layers: Sequence[Any], natives: Sequence[DecoderLayer]) -> DecoderLayers | None:
        weight = self.decoder.norm.weight
        if not natives or weight.dtype != torch.float32 or not (weight.is_cpu and weight.is_contiguous()):
            return None
        if len({(len(weight), natives[0].head_width), *((x.width, x.head_width) for x in natives)}) > 1:
            return None
        attentions = [layer.self_attn for layer in layers]
        self._indices = [x.layer_idx for x in attentions]
        windows = [window_of(x) for x in attentions]
        norm, before = self.decoder.norm, [None if w is None else w - 1 for w in windows]
        return DecoderLayers(natives, [x.scaling for x in attentions], before, (norm.weight, norm.variance_epsilon))


def _is_fused(layer: Any) -> bool:
    """Whether a layer's `forward` is ours, and nobody sees what goes in or comes out."""
    own = vars(layer).get("forward")
    return isinstance(own, FusedLayer) and own.layer is layer and not (layer._forward_hooks or layer._forward_pre_hooks)
