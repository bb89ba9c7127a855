"""Random numbers for calls, which compiled programs of any size can draw too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def uniform(
    shape: Sequence[int], generator: torch.Generator | None, *, device: torch.device, dtype: torch.dtype | None = None
) -> Float[Tensor, ...]:
    """Draw numbers between 0 and 1; without a generator, from PyTorch's default one."""
    return torch.rand(shape, device=device, dtype=dtype, **_given(generator))


def normal(
    shape: Sequence[int], generator: torch.Generator | None, *, device: torch.device, dtype: torch.dtype | None = None
) -> Float[Tensor, ...]:
    """Draw standard normal numbers; without a generator, from PyTorch's default one."""
    return torch.randn(shape, device=device, dtype=dtype, **_given(generator))


def _given(generator: torch.Generator | None) -> dict[str, Any]:
    """The argument `generator`; none for None, since PyTorch's operators with this argument, even if it is None, take no
    sizes that are only known when a program runs."""
    return {} if generator is None else {"generator": generator}
