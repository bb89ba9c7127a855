"""Random inputs of mechanisms, for tests and timings."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from regard.contract import Tensors


def attention_shapes(batch: int, n: int, m: int, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of q (B, H, N, D), k (B, G, M, D) and v (B, G, M, V).

    Args:
        widths: sizes by axis letter: h, g, d and v.
    """
    return {
        "q": (batch, widths["h"], n, widths["d"]),
        "k": (batch, widths["g"], m, widths["d"]),
        "v": (batch, widths["g"], m, widths["v"]),
    }


def normals(generator: torch.Generator, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Tensors:
    """Standard normal tensors, drawn in float64 in the order given, so that every dtype gets the same numbers."""
    drawn = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
    return {name: x.to(dtype) for name, x in drawn.items()}
