"""Smaller models: what they lose when their numbers get fewer bits."""

from __future__ import annotations

from regard.compression.quantization import (
    Grid,
    Quantized,
    RunningRange,
    asymmetric_grid,
    keeps_precision,
    quantize,
    simulate,
    symmetric_grid,
)

__all__ = [
    "Grid",
    "Quantized",
    "RunningRange",
    "asymmetric_grid",
    "keeps_precision",
    "quantize",
    "simulate",
    "symmetric_grid",
]
