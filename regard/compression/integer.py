"""Transformer functions in integer arithmetic alone: I-BERT (arXiv 2101.01321) and FQ-ViT (arXiv 2111.13824).

A *scaled integer* is integers q (int64) and one number S; it represents the numbers q S. Only integer additions,
products, shifts and divisions touch q; S and anything derived from it are constants known before a model runs. Every
function returns a scaled integer, or plain integers where it says so.

    q, S = quantized(x, bits=8)
    y = integer_gelu(q, S)          # y.values * y.scale is near gelu(x)

They are reference definitions to compute with and test against: no model of regard runs on them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from regard.contract import Unsupported, at_least

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ERF = (-0.2888, -1.769, 1.0)
"""a, b, c of ``a (x + b)^2 + c``, which is near erf on [0, -b] (I-BERT, Equation 8)."""
EXP = (0.3585, 1.353, 0.344)
"""The same for exp on (-ln 2, 0] (I-BERT, Equation 13)."""
EXP_SHIFT = 30
"""Exponentials below 2^-30 are 0."""
MEAN_BITS, DEVIATION_BITS = 6, 4
"""Fractional bits of a mean, and the additional ones of a standard deviation."""
MOST_NORM = 1 << 17
"""The largest integer that :func:`integer_layer_norm` takes; squares and their sums stay within 64 bits."""
MOST_FACTOR = 3
"""The largest exponent of a channel's power of two (FQ-ViT, Section 3.2)."""


class Scaled(NamedTuple):
    """Integers and their common scale factor."""

    values: Int[Tensor, "..."]
    scale: float

    @property
    def number(self) -> Float[Tensor, "..."]:
        """The represented numbers, in float64."""
        return self.values.double() * self.scale


def quantized(x: Float[Tensor, "..."], bits: int = 8) -> Scaled:
    """The nearest scaled integer of `bits` bits, symmetric about 0."""
    at_least("bits", bits, 2)
    most = 2 ** (bits - 1) - 1
    scale = max(float(x.abs().max()) if x.numel() else 0.0, 1e-12) / most
    return Scaled((x.double() / scale).round().clamp(-most, most).to(torch.int64), scale)


def _polynomial(q: Tensor, scale: float, a: float, b: float, c: float) -> Scaled:
    """``a (x + b)^2 + c`` of x = q S (I-BERT, Algorithm 1); the scale is negative if a is."""
    square = a * scale * scale
    return Scaled((q + math.floor(b / scale)) ** 2 + math.floor(c / square), square)


def integer_erf(q: Int[Tensor, "..."], scale: float) -> Scaled:
    """erf (I-BERT, Algorithm 2), to within 0.1; the error is largest near 0. The scale is negative."""
    a, b, c = ERF
    found = _polynomial(q.abs().clamp(max=math.floor(-b / scale)), scale, a, b, c)
    return Scaled(q.sign() * found.values, found.scale)


def integer_gelu(q: Int[Tensor, "..."], scale: float) -> Scaled:
    """gelu(x) = x (1 + erf(x / sqrt 2)) / 2 (I-BERT, Algorithm 2), to within 0.02."""
    erf = integer_erf(q, scale / math.sqrt(2))
    return Scaled(q * (erf.values + math.floor(1 / erf.scale)), scale * erf.scale / 2)


def integer_exp(q: Int[Tensor, "..."], scale: float) -> Scaled:
    """exp of numbers that are at most 0 (I-BERT, Algorithm 3): exp(x) = 2^-z exp(p), x = p - z ln 2, p in (-ln 2, 0]."""
    if bool((q > 0).any()):
        raise Unsupported("the integer exponential of numbers above 0", supported="numbers less their largest")
    unit = math.floor(math.log(2) / scale)
    if unit < 1:
        raise Unsupported(f"an integer exponential at scale {scale:.3g}", supported="a scale of ln 2 or less")
    power = torch.div(-q, unit, rounding_mode="floor")
    found = _polynomial(q + power * unit, scale, *EXP)
    small = power.clamp(max=EXP_SHIFT)
    return Scaled(torch.where(power > EXP_SHIFT, 0, found.values >> small), found.scale)


def integer_softmax(q: Int[Tensor, "... n"], scale: float, bits: int = 8) -> Scaled:
    """Softmax over the last axis, in units of 2^-bits (I-BERT, Section 3.5): rows sum to at least 1 less n units."""
    exponentials = integer_exp(q - q.amax(-1, keepdim=True), scale).values
    return Scaled(
        torch.div(exponentials << bits, exponentials.sum(-1, keepdim=True), rounding_mode="floor"), 2.0**-bits
    )


def integer_sqrt(q: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The largest integers whose squares are at most `q` >= 0, by Newton's method (I-BERT, Algorithm 4)."""
    if bool((q < 0).any()):
        raise Unsupported("the integer square root of numbers below 0", supported="numbers that are 0 or more")
    root = torch.ones_like(q)
    while bool((growing := (root * root < q) & (root < 1 << 31)).any()):
        root = torch.where(growing, root * 2, root)
    while True:
        better = (root + torch.div(q, root.clamp(min=1), rounding_mode="floor")) >> 1
        smaller = better < root
        if not bool(smaller.any()):
            return torch.where(q == 0, 0, root)
        root = torch.where(smaller, better, root)


def integer_layer_norm(q: Int[Tensor, "... n"], bits: int = 16) -> Scaled:
    """(x - mean) / standard deviation over the last axis (I-BERT, Section 3.6), in units of 2^-bits.

    The scale of the input cancels, and nothing is added to the variance: a row of equal numbers gives 0.

    Args:
        q: at most 2^17 in absolute value.
        bits: fractional bits of the result, 1 to 24.
    """
    if q.numel() and int(q.abs().max()) > MOST_NORM:
        raise Unsupported(
            f"an integer layer norm of numbers above {MOST_NORM}", supported="integers of 18 bits or fewer"
        )
    if not 1 <= bits <= 24:
        raise Unsupported(f"bits={bits} of an integer layer norm", supported="1 to 24", nearest="bits=16")
    count = q.shape[-1]
    total = q.sum(-1, keepdim=True) << MEAN_BITS
    mean = torch.div(2 * total + count, 2 * count, rounding_mode="floor")  # rounded to nearest
    centred = (q << MEAN_BITS) - mean
    variance = torch.div((centred * centred).sum(-1, keepdim=True), count, rounding_mode="floor")
    deviation = integer_sqrt(variance << (2 * DEVIATION_BITS))
    shifted = centred << (bits + DEVIATION_BITS)
    return Scaled(
        torch.where(deviation == 0, 0, torch.div(shifted, deviation.clamp(min=1), rounding_mode="floor")), 2.0**-bits
    )


def integer_log2(q: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """log2 of integers above 0, rounded to an integer as in FQ-ViT: up from 1.5 times a power of two."""
    if bool((q < 1).any()):
        raise Unsupported("the integer logarithm of numbers below 1", supported="integers above 0")
    power = torch.zeros_like(q)
    while bool((more := (q >> (power + 1)) > 0).any()):
        power = power + more
    half = torch.where(power > 0, 1 << (power - 1).clamp(min=0), 1)
    return power + ((power > 0) & (q - (1 << power) >= half))


def log_softmax_codes(q: Int[Tensor, "... n"], scale: float, bits: int = 4) -> Int[Tensor, "... n"]:
    """-log2 of the softmax over the last axis, as integers of `bits` bits (FQ-ViT, Section 3.3, Log-Int-Softmax).

    A weight is 2^-code; all weights below the smallest representable one get the largest code. See :func:`shifted_sum`.
    """
    exponentials = integer_exp(q - q.amax(-1, keepdim=True), scale).values.clamp(min=0)
    least = 2**bits - 1
    own = exponentials.clamp(min=1)
    ratio = torch.div(2 * exponentials.sum(-1, keepdim=True) + own, 2 * own, rounding_mode="floor").clamp(min=1)
    return torch.where(exponentials == 0, least, integer_log2(ratio).clamp(max=least))


def log2_codes(weights: Float[Tensor, "..."], bits: int = 4) -> Int[Tensor, "..."]:
    """clip(round(-log2 w), 0, 2^bits - 1) of weights in [0, 1] (FQ-ViT, Equation 14)."""
    least = 2**bits - 1
    return (-torch.log2(weights.double().clamp(min=2.0**-60))).round().clamp(0, least).to(torch.int64)


def shifted_sum(codes: Int[Tensor, "... m n"], values: Int[Tensor, "... n d"], bits: int = 4) -> Scaled:
    """Sum of values with weights 2^-code, by shifts alone (FQ-ViT, Equation 16), in units of 2^-(2^bits - 1)."""
    least = 2**bits - 1
    return Scaled((values[..., None, :, :] << (least - codes)[..., None]).sum(-2), 2.0**-least)


class ChannelFactors(NamedTuple):
    """Numbers on one grid with a power-of-two factor per channel: ``(q - zero) 2^factor S`` (FQ-ViT, Section 3.2).

    Attributes:
        values: 0 to 2^bits - 1.
        factors: (C,) 0 to 3.
    """

    values: Int[Tensor, "... c"]
    factors: Int[Tensor, " c"]
    zero: int
    scale: float

    @property
    def number(self) -> Float[Tensor, "... c"]:
        """The represented numbers, in float64."""
        return self.integers.double() * self.scale

    @property
    def integers(self) -> Int[Tensor, "... c"]:
        """``(q - zero) 2^factor``, by a shift: what :func:`integer_layer_norm` reads."""
        return (self.values - self.zero) << self.factors


def channel_factors(x: Float[Tensor, "... c"], bits: int = 8) -> ChannelFactors:
    """Put inputs of a layer norm, whose channels differ much in size, on one grid with a power of two for each channel.

    The factor of a channel is the one with the least squared error (FQ-ViT, Equation 11).
    """
    at_least("bits", bits, 2)
    x = x.double()
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 1e-8)
    most = 2**bits - 1
    scale = (high - low) / most / 2**MOST_FACTOR
    zero = round(-low / (scale * 2**MOST_FACTOR))
    found, errors = [], []
    for factor in range(MOST_FACTOR + 1):
        codes = ((x / (scale * 2**factor)).round() + zero).clamp(0, most)
        found.append(codes.to(torch.int64))
        errors.append(((codes - zero) * (scale * 2**factor) - x).square().flatten(0, -2).sum(0))
    factors = torch.stack(errors).argmin(0)
    values = torch.stack(found).gather(0, factors.expand(1, *x.shape))[0]
    return ChannelFactors(values, factors, zero, scale)
