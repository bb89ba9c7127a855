"""What is computed again for gradients rather than kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from regard.backends.operators import in_transform


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``, of which only the inputs are kept for gradients. It draws no random numbers.

    All is kept inside functions made by `torch.func`, which have no such thing, and in compiled programs, which decide
    themselves what they compute again.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
