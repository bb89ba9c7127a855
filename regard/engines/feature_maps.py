"""Feature maps phi of linear attention and related mechanisms, by name. They act elementwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: torch.where(x > 0, x + 1, x.clamp(max=0).exp()),  # elu(x) + 1 without cancellation
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "silu": F.silu,
    "identity": lambda x: x,
}

NONNEGATIVE = ("elu", "relu", "relu_squared", "sigmoid", "exp")
"""Feature maps whose normaliser cannot vanish by cancellation."""
