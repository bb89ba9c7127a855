"""A snapshot of a decoder's layers as the kernels have read them, to find out whether it still holds."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from regard.contract import Recurrence
from regard.engines.decoder_layer import DecoderLayer, Weight, unfit
from regard.integrations.transformers.fused.recurrences import recurrence_of
from regard.integrations.transformers.placing import is_swapped
from regard.layers.linear import Linear
from regard.layers.quantized import QuantizedLinear

FAMILIES = ("Llama", "Mistral", "Qwen2")
"""Families of models with the same layers: RMS norms, three projections, rotary positions, gated feed-forward
network."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


class Snapshot:
    """Layers as they were read: their modules, the addresses of their tensors, and their form for the kernels.

    The snapshot is compared at each token, while the processor's caches are full of weights; so the comparison is a few
    passes over flat lists.

    Args:
        layers: decoder layers for which :func:`is_known` holds.
        around: modules that contain the layers or follow them, whose parts and hooks count too.

    Attributes:
        natives: each layer in the form of the kernels; empty where they cannot take a layer's weights.
        recurrences: the recurrence of each layer; None where the kernels do not have its mechanism.
    """

    def __init__(self, layers: Sequence[Any], around: Sequence[nn.Module] = ()) -> None:
        self._homes = [x._modules for layer in layers for x in (layer, layer.self_attn, layer.mlp)]
        self._homes += [x._modules for x in around]
        self._attending = [x.self_attn.__dict__ for x in layers]
        self._configs = [x["config"] for x in self._attending]  # a hard layer has one of its own
        known = [recurrence_of(x.self_attn) for x in layers]
        placed = [x.self_attn.regard for x, recurrence in zip(layers, known, strict=True) if recurrence is not None]
        recurring = [part for x in placed for part in x.modules()]
        self._homes += [x._modules for x in recurring]
        self._parts = self._found_parts()
        swapped = [x.self_attn for x in layers if is_swapped(x.self_attn)]
        beside = {id(x) for attention in swapped for x in attention.regard.modules()}  # they are called as usual
        inside = [x for layer in layers for x in layer.modules() if x is not layer and id(x) not in beside]
        self._hooks = [x for part in (*inside, *around) for x in (part._forward_hooks, part._forward_pre_hooks)]
        self._ours = len(swapped)  # the pre-hooks by which swapped attention learns of its call
        self._attributes = [part.__dict__ for part in (*inside, *around)]
        self._heard = [x for part in recurring for x in (part._forward_hooks, part._forward_pre_hooks)]
        self._recurring = [part.__dict__ for part in recurring]
        read = [part for layer in layers for part in (*_norms(layer), *_linears(layer))]
        self._holders = [x for part in (*read, *around, *recurring) for x in (part._parameters, part._buffers) if x]
        self._places = self._found_places()
        plain = all(_is_plain(x) for layer in layers for x in _linears(layer))
        natives = [*map(_native, layers)] if plain else []
        self.natives = [] if any(x.reason for x in natives) else natives
        self.recurrences = [*map(_recurrence, known, self.natives)]

    def is_current(self) -> bool:
        """Return whether the layers still have the same parts and configs, with their tensors at the same addresses."""
        if not all(map(operator.is_, self._configs, (x["config"] for x in self._attending))):
            return False
        return self._found_parts() == self._parts and self._found_places() == self._places

    def is_seen(self) -> bool:
        """Return whether a part has hooks or a replaced `forward`, so that it must be called."""
        hooked = sum(map(len, self._hooks)) > self._ours
        return hooked or any(map(operator.contains, self._attributes, itertools.repeat("forward")))

    def is_overheard(self) -> bool:
        """Like :meth:`is_seen`, for the mechanisms of `recurrences`; they are then called."""
        return any(self._heard) or any(map(operator.contains, self._recurring, itertools.repeat("forward")))

    def _found_parts(self) -> list[nn.Module | None]:
        return [*itertools.chain.from_iterable(map(dict.values, self._homes))]

    def _found_places(self) -> list[int]:
        """Addresses of the tensors; `natives` keeps its tensors alive, so that no other tensor can take an address."""
        return [x.data_ptr() for holder in self._holders for x in holder.values() if x is not None]


def window_of(attention: Any) -> int | None:
    """Number of tokens that a query sees, its own included; None for all."""
    if isinstance(attention, LlamaAttention):
        return None
    found: int | None = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    return found


def family_of(module: nn.Module, part: str) -> str | None:
    """The family of `FAMILIES` whose class named `part` a module is; None if there is none."""
    family = type(module).__name__.removesuffix(part)
    known = family in FAMILIES and family + part == type(module).__name__
    return family if known and type(module).__module__.startswith("transformers.") else None


def is_known(layer: nn.Module) -> bool:
    """Return whether a module is a decoder layer of one of `FAMILIES` with all of its original parts."""
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


def _norms(layer: Any) -> list[Any]:
    return [layer.input_layernorm, layer.post_attention_layernorm]


def _linears(layer: Any) -> list[Any]:
    attention, feed_forward = layer.self_attn, layer.mlp
    return [*map(attention.get_submodule, PROJECTIONS), *map(feed_forward.get_submodule, FEED_FORWARD)]


def _is_plain(linear: nn.Module) -> bool:
    """Return whether a linear layer is nothing but its weight, as the kernels require."""
    if not isinstance(linear, QuantizedLinear):
        return type(linear) in (nn.Linear, Linear)
    whole = linear.format.group is None or linear.in_features % linear.format.group == 0
    return whole and not linear.float_columns


def _native(layer: Any) -> DecoderLayer:
    norms, head_width = _norms(layer), getattr(layer.self_attn, "head_dim", 0)
    weights, eps = [norm.weight for norm in norms], [norm.variance_epsilon for norm in norms]
    return DecoderLayer(weights, eps, head_width, [*map(_weight, _linears(layer))])


def _weight(linear: Any) -> Weight:
    if isinstance(linear, QuantizedLinear):
        return Weight(linear.codes, linear.scale, linear.offset, linear.bias, linear.input_scale, linear.format.dynamic)
    return Weight(linear.weight, bias=linear.bias)


def _recurrence(known: Recurrence[Any] | None, native: DecoderLayer) -> Recurrence[Weight] | None:
    if known is None or not all(map(_is_plain, known.linears)):
        return None
    found = known.map(_weight)
    return None if unfit(found, native) else found
