"""A layer of a Llama-like decoder for few tokens in two native calls: at that size the way from one operation to the next
takes longer than most operations.

There is no form in PyTorch: what else computes such a layer is the model it is in.
"""

from regard.engines.decoder_layer.native_form import DecoderLayer, Weight, few_tokens

__all__ = ["DecoderLayer", "Weight", "few_tokens"]
