"""What the kernels were told of a decoder's layers, and whether it still holds."""

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
"""Whose layers are alike: RMS norms, three projections, rotary positions, a gated feed-forward network."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


class Snapshot:
    """Layers as they were read: their parts, where their tensors lie, and what the kernels make of them.

    Looking whether all is as it was is done at each token, with the processor's caches full of weights: so it is few passes
    over flat lists.

    Args:
        layers: that :func:`is_known` knows.
        around: modules that hold them or come after them, whose parts and hooks count too.

    Attributes:
        natives: of each layer; none where a layer's weights are not for the kernels.
        recurrences: of each layer beside it, None where its mechanism is none that the kernels have.
    """

    def __init__(self, layers: Sequence[Any], around: Sequence[nn.Module] = ()) -> None:
        self._homes = [x._modules for layer in layers for x in (layer, layer.self_attn, layer.mlp)]
        self._homes += [x._modules for x in around]
        known = [recurrence_of(x.self_attn) for x in layers]
        placed = [x.self_attn.regard for x, recurrence in zip(layers, known, strict=True) if recurrence is not None]
        recurring = [part for x in placed for part in x.modules()]
        self._homes += [x._modules for x in recurring]
        self._parts = self._found_parts()
        swapped = [x.self_attn for x in layers if is_swapped(x.self_attn)]
        beside = {id(x) for attention in swapped for x in attention.regard.modules()}  # they are called as ever
        inside = [x for layer in layers for x in layer.modules() if x is not layer and id(x) not in beside]
        self._hooks = [x for part in (*inside, *around) for x in (part._forward_hooks, part._forward_pre_hooks)]
        self._ours = len(swapped)  # hooks through which swapped attention is told of its call
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
        """Whether the layers have the parts that they had, and their tensors lie where they were."""
        return self._found_parts() == self._parts and self._found_places() == self._places

    def is_seen(self) -> bool:
        """Whether somebody sees what goes through the parts, or computes it in another way."""
        hooked = sum(map(len, self._hooks)) > self._ours
        return hooked or any(map(operator.contains, self._attributes, itertools.repeat("forward")))

    def is_overheard(self) -> bool:
        """Likewise of the mechanisms of `recurrences`, which are called then."""
        return any(self._heard) or any(map(operator.contains, self._recurring, itertools.repeat("forward")))

    def _found_parts(self) -> list[nn.Module | None]:
        return [*itertools.chain.from_iterable(map(dict.values, self._homes))]

    def _found_places(self) -> list[int]:
        """Where the tensors lie; those of `natives` are kept, so that no others come to lie there."""
        return [x.data_ptr() for holder in self._holders for x in holder.values() if x is not None]


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


def _norms(layer: Any) -> list[Any]:
    return [layer.input_layernorm, layer.post_attention_layernorm]


def _linears(layer: Any) -> list[Any]:
    attention, feed_forward = layer.self_attn, layer.mlp
    return [*map(attention.get_submodule, PROJECTIONS), *map(feed_forward.get_submodule, FEED_FORWARD)]


def _is_plain(linear: nn.Module) -> bool:
    """Whether a layer is no more than its weight, as the kernels have it."""
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
