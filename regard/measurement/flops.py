"""Counting the FLOPs of matrix products and convolutions, including those inside fused attention on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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


@contextlib.contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """A block in which the FLOPs of torch's own operators are counted; read ``get_total_flops()``.

    For causal attention all pairs are counted.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention as one operator would appear to be free
    try:
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
