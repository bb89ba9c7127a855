"""Recomputation in the backward pass instead of storing intermediate results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from regard.backends.operators import in_transform


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``, storing only the inputs for the backward pass. The function must not draw random numbers.

    Under transforms of `torch.func`, which do not support this, intermediate results are stored; compiled programs
    decide for themselves what to recompute.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
