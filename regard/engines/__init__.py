"""Engines: computations that several mechanisms share, one package each, with a form in PyTorch and a native form.

Importing this package registers all engines with the backends.
"""

from regard.engines import (
    aggregated_attention,
    attention,
    conserved_flows,
    decoder_layer,
    gated_recurrence,
    generalized_delta,
    grouped_attention,
    layers,
    linear_attention,
    map_distance,
    pixel_attention,
    quantized_linear,
    quest_attention,
    retrieved_attention,
    selective_scan,
    softmax_scan,
)

__all__ = [
    "aggregated_attention",
    "attention",
    "conserved_flows",
    "decoder_layer",
    "gated_recurrence",
    "generalized_delta",
    "grouped_attention",
    "layers",
    "linear_attention",
    "map_distance",
    "pixel_attention",
    "quantized_linear",
    "quest_attention",
    "retrieved_attention",
    "selective_scan",
    "softmax_scan",
]
