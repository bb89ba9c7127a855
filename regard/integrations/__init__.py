"""regard inside other libraries: PyTorch's and timm's attention modules, Hugging Face transformers.

`transformers` is imported by :mod:`regard.integrations.transformers` alone, and only when a user asks for it.
"""

from __future__ import annotations

from regard.integrations.collecting import Collected, collect_losses
from regard.integrations.swap import SwapReport, change_options, swap, unswap

__all__ = ["Collected", "SwapReport", "change_options", "collect_losses", "swap", "unswap"]
