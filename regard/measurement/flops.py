"""Counting the FLOPs of matrix products and convolutions, including those inside fused attention on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _backward(gradient: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, q, k, v)


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""FLOP formulas for operators that torch's counter ignores: without them softmax attention would appear to be free."""


def flop_counter() -> FlopCounterMode:
    """Return a mode that counts the FLOPs of torch's own operators inside its block; read ``get_total_flops()``.

    For causal attention all pairs are counted.
    """
    return FlopCounterMode(display=False, custom_mapping=ATTENTION)
