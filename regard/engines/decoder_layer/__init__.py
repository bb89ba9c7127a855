"""Layers of a Llama-like decoder for few tokens: two native calls around any attention, or a single one for all layers
if they use softmax attention or gated recurrences. At that size, dispatching operations takes longer than most of them.

There is no form in PyTorch: otherwise the model itself computes the layer.
"""

from regard.engines.decoder_layer.native_form import DecoderLayer, Weight, few_tokens
from regard.engines.decoder_layer.recurrence import State, room_after, unfit
from regard.engines.decoder_layer.stack import Codes, DecoderLayers, Eviction, Places, Reading, SlotRotation

__all__ = [
    "Codes",
    "DecoderLayer",
    "DecoderLayers",
    "Eviction",
    "Places",
    "Reading",
    "SlotRotation",
    "State",
    "Weight",
    "few_tokens",
    "room_after",
    "unfit",
]
