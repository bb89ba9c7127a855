"""The precision of sums, which is at least float32 whatever the dtype of a call, and mixed precision in training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Shaped


PRECISIONS = ("float32", "bfloat16", "float16")
"""Precisions of training: the parameters' own dtype, and mixed precision with a narrower one."""
WIDE = frozenset({torch.float32, torch.float64, torch.complex64, torch.complex128})
"""Dtypes that are their own wide dtype."""


def wide_dtype(x: Tensor | torch.dtype) -> torch.dtype:
    """The dtype in which to accumulate numbers like `x` (a tensor or a dtype): its own, or float32 if that is wider."""
    dtype = x if isinstance(x, torch.dtype) else x.dtype
    return dtype if dtype in WIDE else torch.promote_types(dtype, torch.float32)


def wide(x: Shaped[Tensor, ...]) -> Shaped[Tensor, ...]:
    """`x` in at least float32."""
    return x if x.dtype in WIDE else x.to(wide_dtype(x))


def mixed(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Compute matrix products in one of :data:`PRECISIONS` under torch's autocast; ``float32`` changes nothing."""
    narrow = torch.float16 if precision == "float16" else torch.bfloat16
    return torch.autocast(device.type, narrow, enabled=precision != "float32")


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Keep products in the dtype of their tensors: a state rounded to bfloat16 at every token would drift."""
    active = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if active else nullcontext()
