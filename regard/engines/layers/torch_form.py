"""The operations around a layer's matrix products in PyTorch: short convolution, RMSNorm, rotary positions, gates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import valid_from_lengths
from regard.core.angles import angles
from regard.core.precision import wide_dtype
from regard.engines.layers.problem import GATE_FUNCTIONS, GatedProduct, RMSNorm, ShortConvolution

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def short_convolution(problem: ShortConvolution) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b w-1 c"] | None]:
    """See :func:`regard.engines.layers.short_convolution`."""
    x, weight, cache, lengths, after = problem.x, problem.weight, problem.cache, problem.lengths, problem.after
    batch, n, channels = x.shape
    kept = weight.shape[1] - 1
    if lengths is not None:
        valid = valid_from_lengths(lengths, n)[..., None]
        x = torch.where(valid, x, x.new_zeros(()))
    before = x.new_zeros(batch, kept - after, channels) if cache is None else cache
    extended = torch.cat([before, x, x.new_zeros(batch, after, channels)], dim=1)
    # conv1d rejects inputs shorter than its filter, such as a sequence without tokens.
    y = F.conv1d(extended.mT, weight[:, None], problem.bias, groups=channels).mT if n else x
    if problem.silu:
        y = F.silu(y)
    if lengths is not None:
        y = torch.where(valid, y, y.new_zeros(()))
    return y, _last_inputs(extended, lengths, kept) if after == 0 else None


def _last_inputs(extended: Tensor, lengths: Tensor | None, kept: int) -> Tensor:
    """The last valid inputs of each row, which include earlier tokens if the row is short."""
    if lengths is None:
        return extended[:, extended.shape[1] - kept :]
    index = lengths[:, None] + torch.arange(kept, device=lengths.device)
    return extended.gather(1, index[..., None].expand(-1, -1, extended.shape[2]))


def rms_norm(problem: RMSNorm) -> Float[Tensor, "... c"]:
    """See :func:`regard.engines.layers.rms_norm`."""
    p, dtype = problem, wide_dtype(problem.x)
    y = p.x.to(dtype)
    gate = None if p.z is None else F.silu(p.z.to(dtype))
    if gate is not None and not p.norm_before_gate:
        y = y * gate
    if p.groups == 1:
        y = F.rms_norm(y, y.shape[-1:], p.weight, p.eps)
    else:
        parts = y.unflatten(-1, (p.groups, -1))
        y = F.rms_norm(parts, parts.shape[-1:], eps=p.eps).flatten(-2)
        y = y if p.weight is None else y * p.weight
    if gate is not None and p.norm_before_gate:
        y = y * gate
    return y.to(p.x.dtype)


def rotary(
    x: Float[Tensor, "b h n d"], positions: Int[Tensor, "#b n"], rotated: int, base: float, stretch: float
) -> Float[Tensor, "b h n d"]:
    """See :func:`regard.engines.layers.rotary`."""
    dtype = wide_dtype(x)
    turn = angles(positions, rotated, base=base, stretch=stretch, dtype=dtype)[:, None]
    cos, sin = turn.cos(), turn.sin()
    turning, still = x.split([rotated, x.shape[-1] - rotated], dim=-1)
    first, second = turning.to(dtype).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)
    return torch.cat([turned, still], dim=-1) if rotated < x.shape[-1] else turned


def gated_product(problem: GatedProduct) -> Float[Tensor, "... c"]:
    """See :func:`regard.engines.layers.gated_product`."""
    silu = GATE_FUNCTIONS[problem.function] == "silu"
    return problem.x * (F.silu(problem.gate) if silu else problem.gate.sigmoid())
