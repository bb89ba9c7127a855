"""Counting the FLOPs of matrix products and convolutions, including those inside fused attention on a CPU, and of the
recurrences of selective scans."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from regard.backends import Record, watch_backends


def _forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _backward(gradient: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, q, k, v)


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""FLOP formulas for operators that torch's counter ignores: without them softmax attention would appear to be free."""


class FlopCounter(FlopCounterMode):
    """torch's counter, which also counts what engines tell of their recurrences (:class:`regard.backends.Engine`).

    Attributes:
        record: the engines that ran.
    """

    def __init__(self, record: Record) -> None:
        super().__init__(display=False, custom_mapping=ATTENTION)
        self.record = record

    def get_total_flops(self) -> int:
        """All FLOPs so far; a multiply-add counts as two."""
        return super().get_total_flops() + round(self.record.flops)


@contextlib.contextmanager
def flop_counter() -> Iterator[FlopCounter]:
    """A block in which the FLOPs of torch's own operators and of selective scans are counted; read
    ``get_total_flops()``.

    For causal attention all pairs are counted. A scan takes seven operations for each state and token, and three times
    as many in the backward pass, which computes the states again.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention as one operator would appear to be free
    try:
        with watch_backends() as record, FlopCounter(record) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
