"""Mathematics that several mechanisms share. An engine is a package: its words, its form in PyTorch, its native form.

Importing this package lets the backends know all of them.
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
