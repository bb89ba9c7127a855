"""Decoding with Llama-like models in a few native calls: one for each run of layers with softmax attention or a gated
recurrence, and two for each layer with any other attention."""

from __future__ import annotations

from torch import nn

from regard.integrations.transformers.fused.decoders import FusedDecoder
from regard.integrations.transformers.fused.layers import FusedLayer
from regard.integrations.transformers.fused.snapshot import family_of, is_known

__all__ = ["fuse_layers", "unfuse_layers"]


def fuse_layers(model: nn.Module) -> int:
    """Let a model process a few tokens (up to 16 over all rows of a batch), as in decoding, in few native calls.

    Consecutive layers with softmax attention to all tokens in a cache of keys and values (`DynamicCache`,
    :class:`regard.integrations.transformers.GrowingCache`, the pages of `regard serve`) share one call, caches and
    attention included; so do those of :func:`regard.compression.sparse.sparsify` with a method that keeps equally many
    tokens in all heads of a layer (`snapkv`, `pyramidkv`, `streaming`, `tova`, `h2o`, `quest`, `int8`, and methods for
    prompts alone). In a model that :func:`regard.swap` changed, layers of
    `linear`, `lolcats` (with its window), `gated_linear` and `delta_rule` join the same call, with their states, after
    the first token; exceptions are `gated_linear` with gates on values, and `delta_rule` whose rate is 1 or per value,
    or whose norm is a sum. Consecutive layers of local attention (`form="window"`) share a call of their own once their
    windows are full. A layer with another mechanism takes two calls, around the mechanism's own step, and so does one
    whose mechanism has hooks or is asked for losses. In all other cases (padding, other caches) each layer takes two
    calls, with the model's own attention and cache. Longer inputs, training, dtypes other than float32, layers with
    hooks (transformers leaves some in models that were asked for hidden states or attentions) and layers whose parts
    were replaced run as before. Results differ only by float32 rounding.

    Args:
        model: a transformers model: Llama (also SmolLM2 and others of its architecture), Mistral or Qwen2. Other models
            are left unchanged.

    Returns:
        The number of layers that are now fused. :func:`unfuse_layers` undoes it.
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
