"""Discrete Fourier transforms along a sequence: their sizes, and convolutions as long as the sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def fast_size(least: int) -> int:
    """The smallest size from `least` on that is a power of two, or that times 3, 5, 9 or 15."""
    found = []
    for size in (1, 3, 5, 9, 15):
        while size < least:
            size *= 2
        found.append(size)
    return min(found)


def long_convolution(
    x: Float[Tensor, "b c n"], forward: Float[Tensor, "c n"], backward: Float[Tensor, "c n"] | None = None
) -> Float[Tensor, "b c n"]:
    """y_i = sum_{j<=i} forward_{i-j} x_j + sum_{j>i} backward_{j-i-1} x_j, for each channel, in O(N log N).

    Args:
        x: float32 or float64, with n >= 1.
        forward: filters over the past and the token itself, lag 0 first.
        backward: filters over what follows, lag 1 first; nothing that follows is seen when None.
    """
    n = x.shape[-1]
    size = fast_size(2 * n - 1)
    filters = forward
    if backward is not None:  # on the circle, lag -s lies s places before the end
        filters = torch.cat(
            [forward, forward.new_zeros(len(forward), size - 2 * n + 1), backward[:, : n - 1].flip(1)], 1
        )
    return torch.fft.irfft(torch.fft.rfft(x, size) * torch.fft.rfft(filters, size), size)[..., :n]
