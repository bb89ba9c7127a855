"""Discrete Fourier transforms along a sequence: sizes, convolutions of full length, and rows of unequal length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from jaxtyping import Complex, Float, Int
    from torch import Tensor


def fast_size(least: int) -> int:
    """The smallest size of at least `least` that is a power of two, or one times 3, 5, 9 or 15."""
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
        forward: filters for the past and the current token, lag 0 first.
        backward: filters for the future, lag 1 first; None to ignore the future.
    """
    n = x.shape[-1]
    size = fast_size(2 * n - 1)
    filters = forward
    if backward is not None:  # in circular order, lag -s is s places before the end
        filters = torch.cat(
            [forward, forward.new_zeros(len(forward), size - 2 * n + 1), backward[:, : n - 1].flip(1)], 1
        )
    return torch.fft.irfft(torch.fft.rfft(x, size) * torch.fft.rfft(filters, size), size)[..., :n]


def transform_rows(x: Complex[Tensor, "b c n"], lengths: Int[Tensor, " b"]) -> Complex[Tensor, "b c n"]:
    """sum_{t<L} exp(-2 pi i j t / L) x_t for j < L, the transform of each row at its own length L.

    By Bluestein's identity j t = (j^2 + t^2 - (j - t)^2) / 2 it is a convolution with a chirp, with the same size for
    all rows, so that nothing in the graph depends on a length. Results beyond L are meaningless.

    Args:
        x: zero beyond each row's length; n >= 1.
        lengths: 0 to n.
    """
    n = x.shape[-1]
    size = fast_size(2 * n - 1)
    row = lengths.clamp(min=1)[:, None]
    t = torch.arange(n, device=x.device)
    # the phase of a square is exact in integers, but not in floating point for large n
    angle = ((t * t) % (2 * row)).to(x.real.dtype) / row * math.pi
    chirp = torch.polar(torch.ones_like(angle), angle)[:, None]  # (b, 1, n)
    around = torch.cat([chirp, F.pad(chirp[..., 1:].flip(-1), (size - 2 * n + 1, 0))], -1)
    mixed = torch.fft.ifft(torch.fft.fft(x * chirp.conj(), size) * torch.fft.fft(around, size))
    return mixed[..., :n] * chirp.conj()
