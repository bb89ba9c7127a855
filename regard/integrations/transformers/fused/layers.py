"""A decoder layer's norms, projections, positions and gates in two native calls, around whatever attention it has."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from regard.engines.decoder_layer import DecoderLayer, few_tokens
from regard.integrations.transformers.attending import tell
from regard.integrations.transformers.caches import CACHE
from regard.integrations.transformers.fused.snapshot import Snapshot, is_known, window_of
from regard.integrations.transformers.placing import is_swapped
from regard.integrations.transformers.rotary import ANGLES


class FusedLayer:
    """The `forward` of a transformers decoder layer, in two native calls where possible."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._seen: Snapshot | None = None

    def __call__(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        layer, positions = self.layer, options.get(ANGLES)
        if not arguments and positions is not None and unwatched(layer) and few_tokens(hidden_states, *positions):
            native = self._native()
            if native is not None and native.fits(hidden_states, positions[0]):
                return self.decode(native, hidden_states, options)
        return type(layer).forward(layer, hidden_states, *arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "_seen": None}  # addresses are valid only in this process, for this copy

    def decode(self, native: DecoderLayer, x: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Output of the layer for few tokens, with its own attention and cache.

        Args:
            native: the layer's present weights in the form of the kernels.
            options: keyword arguments of the layer's call.
        """
        attention: Any = self.layer.self_attn
        given, normed = dict(options), None
        if is_swapped(attention):
            normed = torch.empty_like(x)
            _, given = tell(attention, (), {**options, "hidden_states": normed})
            del given["hidden_states"]
        cosine, sine = given.pop(ANGLES)
        q, k, v = native.inputs(x, cosine, sine, normed)
        cache, mask = given.pop(CACHE, None), given.pop("attention_mask", None)
        if cache is not None:
            k, v = cache.update(k, v, attention.layer_idx)
        if not isinstance(attention, LlamaAttention):
            given["sliding_window"] = window_of(attention)
        eager = sys.modules[type(attention).__module__].eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
        read, _ = attend(attention, q, k, v, mask, dropout=0.0, scaling=attention.scaling, **given)
        return native.outputs(x, read.reshape(*x.shape[:2], -1))

    def _native(self) -> DecoderLayer | None:
        """The layer in the form of the kernels; None where its parts have hooks or were replaced."""
        if self._seen is None or not self._seen.is_current():
            self._seen = Snapshot([self.layer]) if is_known(self.layer) else None
        if self._seen is None or self._seen.is_seen() or not self._seen.natives:
            return None
        return self._seen.natives[0]


def unwatched(module: nn.Module) -> bool:
    """Return whether only the output of a module matters: no training, no gradients, no global module hooks."""
    return not (module.training or torch.is_grad_enabled() or _has_any_global_hook())
