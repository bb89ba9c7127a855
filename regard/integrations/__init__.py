"""regard inside other libraries: the attention modules of PyTorch and timm, and Hugging Face transformers.

`transformers` is imported only by :mod:`regard.integrations.transformers`, and only when a user asks for it.
"""

from __future__ import annotations

from regard.integrations.collecting import Collected, collect_losses
from regard.integrations.swap import SwapReport, change_options, swap, unswap

__all__ = ["Collected", "SwapReport", "change_options", "collect_losses", "swap", "unswap"]
