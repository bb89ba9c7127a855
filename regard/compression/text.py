"""Text as batches for calibration and scoring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Unsupported, at_least

if TYPE_CHECKING:
    from jaxtyping import Int


def text_windows(ids: Int[Tensor, " n"], length: int, count: int) -> list[Int[Tensor, "1 length"]]:
    """Cut a text into windows without overlap, spread evenly over it; fewer than `count` if the text is too short.

    Args:
        ids: tokens of the text.
        length: tokens per window.
        count: the most windows to return.

    Raises:
        Unsupported: for a text shorter than a window.
    """
    at_least("length", length, 2)
    at_least("count", count, 1)
    windows = len(ids) // length
    if not windows:
        raise Unsupported(
            f"a text of {len(ids)} tokens for windows of {length}",
            supported=f"{length} tokens or more",
            nearest=f"length={len(ids)}" if len(ids) >= 2 else "more text",
        )
    kept = min(windows, count)
    starts = torch.arange(kept) * windows // kept * length
    return [ids[start : start + length].to(torch.int64)[None] for start in starts.tolist()]
