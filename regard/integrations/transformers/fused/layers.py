"""A decoder layer's norms, products, positions and gates in two native calls, around whatever attention it has."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from regard.engines.decoder_layer import DecoderLayer, Weight, few_tokens
from regard.integrations.transformers.caches import CACHE
from regard.layers.linear import Linear
from regard.layers.quantized import QuantizedLinear

FAMILIES = ("Llama", "Mistral", "Qwen2")
"""Whose layers are alike: RMS norms, three projections, rotary positions, a gated feed-forward network."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


class FusedLayer:
    """The `forward` of a decoder layer of transformers, by two native calls where that can be."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._seen: _Snapshot | None = None

    def __call__(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        layer, positions = self.layer, options.get("position_embeddings")
        if not arguments and positions is not None and unwatched(layer) and few_tokens(hidden_states, *positions):
            native = self.native()
            if native is not None and native.fits(hidden_states, positions[0]):
                return self._decode(native, hidden_states, positions, options)
        return type(layer).forward(layer, hidden_states, *arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "_seen": None}  # addresses are of this process, and of this copy

    def _decode(
        self, native: DecoderLayer, x: Tensor, positions: tuple[Tensor, Tensor], options: dict[str, Any]
    ) -> Tensor:
        attention: Any = self.layer.self_attn
        q, k, v = native.inputs(x, *positions)
        cache, mask = options.pop(CACHE, None), options.pop("attention_mask", None)
        del options["position_embeddings"]
        if cache is not None:
            k, v = cache.update(k, v, attention.layer_idx)
        if not isinstance(attention, LlamaAttention):
            options["sliding_window"] = window_of(attention)
        eager = sys.modules[type(attention).__module__].eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
        read, _ = attend(attention, q, k, v, mask, dropout=0.0, scaling=attention.scaling, **options)
        return native.outputs(x, read.reshape(*x.shape[:2], -1))

    def native(self) -> DecoderLayer | None:
        """The layer as the kernels take it; None where somebody is to see its parts, or they are others."""
        if self._seen is None or not self._seen.is_current():
            self._seen = _Snapshot(self.layer) if is_known(self.layer) else None
        if self._seen is None or any(self._seen.hooks) or self._seen.is_replaced():
            return None
        return self._seen.native


class _Snapshot:
    """A layer as it was read: its parts, where their tensors lie, and what the kernels make of it."""

    def __init__(self, layer: nn.Module) -> None:
        attention, feed_forward = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        self._homes = [x._modules for x in (layer, attention, feed_forward)]
        self._parts = self._found_parts()
        modules = [x for x in self._parts if x is not None]
        self.hooks = [x for part in modules for x in (part._forward_hooks, part._forward_pre_hooks)]
        self._attributes = [part.__dict__ for part in modules]
        norms: list[Any] = [layer.input_layernorm, layer.post_attention_layernorm]
        linears = [attention.get_submodule(name) for name in PROJECTIONS]
        linears += [feed_forward.get_submodule(name) for name in FEED_FORWARD]
        self._holders = [x for part in (*norms, *linears) for x in (part._parameters, part._buffers)]
        self._places = self._found_places()
        self.native: DecoderLayer | None = None
        if all(map(_is_plain, linears)):
            head_width: Any = getattr(attention, "head_dim", 0)
            self.native = DecoderLayer(
                [norm.weight for norm in norms],
                [norm.variance_epsilon for norm in norms],
                head_width,
                [*map(_weight, linears)],
            )

    def is_current(self) -> bool:
        """Whether the layer has the parts that it had, and their tensors lie where they were."""
        return self._found_parts() == self._parts and self._found_places() == self._places

    def is_replaced(self) -> bool:
        """Whether the `forward` of a part is not its class's."""
        return any("forward" in attributes for attributes in self._attributes)

    def _found_parts(self) -> list[nn.Module | None]:
        return [part for home in self._homes for part in home.values()]

    def _found_places(self) -> list[int]:
        """Where the tensors lie; those of `native` are kept, so that no others come to lie there."""
        return [x.data_ptr() for holder in self._holders for x in holder.values() if x is not None]


def unwatched(module: nn.Module) -> bool:
    """Whether a module is asked for its answer and nothing else: no gradients, and no hooks of all modules."""
    return not (module.training or torch.is_grad_enabled() or _has_any_global_hook())


def window_of(attention: Any) -> int | None:
    """Tokens that a query sees, its own too; None for all."""
    if isinstance(attention, LlamaAttention):
        return None
    found: int | None = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    return found


def family_of(module: nn.Module, part: str) -> str | None:
    """Of which of `FAMILIES` a module is the part of this name."""
    family = type(module).__name__.removesuffix(part)
    known = family in FAMILIES and family + part == type(module).__name__
    return family if known and type(module).__module__.startswith("transformers.") else None


def is_known(layer: nn.Module) -> bool:
    """Whether a module is a decoder layer of one of `FAMILIES`, all of its parts theirs."""
    family = family_of(layer, "DecoderLayer")
    if family is None:
        return False
    parts = {
        "self_attn": f"{family}Attention",
        "mlp": f"{family}MLP",
        "input_layernorm": f"{family}RMSNorm",
        "post_attention_layernorm": f"{family}RMSNorm",
    }
    if any(type(layer._modules.get(name)).__name__ != kind for name, kind in parts.items()):
        return False
    return getattr(getattr(layer.self_attn, "config", None), "hidden_act", "") == "silu"


def _is_plain(linear: nn.Module) -> bool:
    """Whether a layer is no more than its weight, as the kernels have it."""
    if not isinstance(linear, QuantizedLinear):
        return type(linear) in (nn.Linear, Linear)
    whole = linear.format.group is None or linear.in_features % linear.format.group == 0
    return whole and not linear.float_columns


def _weight(linear: Any) -> Weight:
    if isinstance(linear, QuantizedLinear):
        return Weight(linear.codes, linear.scale, linear.offset, linear.bias, linear.input_scale, linear.format.dynamic)
    return Weight(linear.weight, bias=linear.bias)
