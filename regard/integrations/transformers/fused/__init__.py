"""Decoding with Llama-like models in few native calls: one for all layers that follow each other and attend by softmax or are
gated recurrences, two for each layer around any other attention."""

from __future__ import annotations

from torch import nn

from regard.integrations.transformers.fused.decoders import FusedDecoder
from regard.integrations.transformers.fused.layers import FusedLayer
from regard.integrations.transformers.fused.snapshot import family_of, is_known

__all__ = ["fuse_layers", "unfuse_layers"]


def fuse_layers(model: nn.Module) -> int:
    """Let a model compute few tokens (16, over all rows of a batch) in few native calls, as decoding asks it to.

    Layers that follow each other and attend by softmax to all that their rows have in a cache of keys and values
    (`DynamicCache`, :class:`regard.integrations.transformers.GrowingCache`, the pages of `regard serve`) take one call together,
    caches and attention inside it. In a model that :func:`regard.swap` changed, layers of `linear`, `lolcats` (its window too),
    `gated_linear` and `delta_rule` are in the same call, with their states, after the first token; not `gated_linear` with gates
    on values, and not `delta_rule` whose rate is 1 or one for each value, or whose norm is a sum. Layers of local attention
    (`form="window"`) that follow each other take one of their own once their windows are full. A layer with another mechanism
    takes two, around the mechanism's own step, and so does one whose mechanism has hooks or is asked for losses. Elsewhere
    (padding, other caches) each layer takes two, and attention and cache are the model's own. Longer texts, training, other
    dtypes than float32, layers with hooks (transformers leaves some in models that were asked for hidden states or attentions)
    and layers whose parts were replaced go their usual way. Results are the same but for float32's rounding.

    Args:
        model: of transformers; Llama (SmolLM2 and others have its architecture), Mistral or Qwen2. In others nothing happens.

    Returns:
        How many layers now do so. :func:`unfuse_layers` undoes it.
    """
    layers = [x for x in model.modules() if is_known(x) and "forward" not in vars(x)]
    decoders = [x for x in model.modules() if family_of(x, "Model") and "forward" not in vars(x)]
    for layer in layers:
        layer.forward = FusedLayer(layer)
    for decoder in decoders:
        decoder.forward = FusedDecoder(decoder)
    return len(layers)


def unfuse_layers(model: nn.Module) -> None:
    """Undo :func:`fuse_layers`."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), FusedLayer | FusedDecoder):
            del module.forward
