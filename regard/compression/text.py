"""Text as batches for calibration and scoring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Unsupported, at_least

if TYPE_CHECKING:
    from jaxtyping import Int


def text_windows(ids: Int[Tensor, " n"], length: int, count: int) -> list[Int[Tensor, "1 length"]]:
    """Windows of a text, spread evenly over it, without a token in common; fewer where the text has not so many.

    Args:
        ids: its tokens.
        length: of a window.
        count: the most windows.

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
