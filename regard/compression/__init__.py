"""Smaller models: :func:`compress` applies a recipe that removes parts or quantizes layers, and reports what is lost.

:mod:`regard.compression.recipes` defines the steps, :mod:`regard.compression.folders` saves and loads, and
:mod:`regard.compression.quantization` simulates 8-bit weights and activations as arXiv 2306.12929 does.
"""

from __future__ import annotations

from regard.compression.compress import Compressed, CompressionReport, compress
from regard.compression.folders import load_compressed, save_compressed
from regard.compression.layer_work import LayerReport
from regard.compression.quantization import Quantized, keeps_precision, quantize
from regard.compression.ranges import Grid, RunningRange, asymmetric_grid, simulate, symmetric_grid
from regard.compression.recipes import Recipe, read_recipe
from regard.compression.text import text_windows

__all__ = [
    "Compressed",
    "CompressionReport",
    "Grid",
    "LayerReport",
    "Quantized",
    "Recipe",
    "RunningRange",
    "asymmetric_grid",
    "compress",
    "keeps_precision",
    "load_compressed",
    "quantize",
    "read_recipe",
    "save_compressed",
    "simulate",
    "symmetric_grid",
    "text_windows",
]
