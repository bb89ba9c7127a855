"""Layers of a Llama-like decoder for few tokens: each in two native calls around an attention of any kind, or all in one where
they attend by softmax or are gated recurrences. At that size the way from one operation to the next takes longer than most
operations.

There is no form in PyTorch: what else computes such a layer is the model it is in.
"""

from regard.engines.decoder_layer.native_form import DecoderLayer, Weight, few_tokens
from regard.engines.decoder_layer.recurrence import State, room_after, unfit
from regard.engines.decoder_layer.stack import DecoderLayers, Places

__all__ = [
    "DecoderLayer",
    "DecoderLayers",
    "Places",
    "State",
    "Weight",
    "few_tokens",
    "room_after",
    "unfit",
]
