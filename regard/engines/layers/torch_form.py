"""Operations around the products of a layer, in PyTorch: short convolution, RMSNorm, rotary positions, gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import valid_from_lengths
from regard.core.angles import angles
from regard.core.precision import wide_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int

GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


def short_convolution(
    x: Float[Tensor, "b n c"],
    weight: Float[Tensor, "c w"],
    bias: Float[Tensor, " c"] | None,
    cache: Float[Tensor, "b w-1 c"] | None,
    lengths: Int[Tensor, " b"] | None,
    silu: bool,
    causal: bool,
) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b w-1 c"] | None]:
    """See :func:`regard.engines.layers.short_convolution`; everything has the dtype of x."""
    batch, n, channels = x.shape
    kept = weight.shape[1] - 1
    after = 0 if causal else kept // 2
    if lengths is not None:
        valid = valid_from_lengths(lengths, n)[..., None]
        x = torch.where(valid, x, x.new_zeros(()))
    before = x.new_zeros(batch, kept - after, channels) if cache is None else cache
    extended = torch.cat([before, x, x.new_zeros(batch, after, channels)], dim=1)
    # conv1d refuses inputs shorter than its filter, which is how a sequence without tokens looks to it.
    y = F.conv1d(extended.mT, weight[:, None], bias, groups=channels).mT if n else x
    if silu:
        y = F.silu(y)
    if lengths is not None:
        y = torch.where(valid, y, y.new_zeros(()))
    return y, _last_inputs(extended, lengths, kept) if causal else None


def _last_inputs(extended: Tensor, lengths: Tensor | None, kept: int) -> Tensor:
    """The last valid inputs of each row; they reach into the tokens before when the row is short."""
    if lengths is None:
        return extended[:, extended.shape[1] - kept :]
    index = lengths[:, None] + torch.arange(kept, device=lengths.device)
    return extended.gather(1, index[..., None].expand(-1, -1, extended.shape[2]))


def rms_norm(
    x: Float[Tensor, "... c"],
    weight: Float[Tensor, " c"] | None,
    z: Float[Tensor, "... c"] | None,
    groups: int,
    eps: float,
    norm_before_gate: bool,
) -> Float[Tensor, "... c"]:
    """See :func:`regard.engines.layers.rms_norm`."""
    dtype = wide_dtype(x)
    y, weight = x.to(dtype), None if weight is None else weight.to(dtype)
    gate = None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        y = y * gate
    if groups == 1:
        y = F.rms_norm(y, y.shape[-1:], weight, eps)
    else:
        parts = y.unflatten(-1, (groups, -1))
        y = F.rms_norm(parts, parts.shape[-1:], eps=eps).flatten(-2)
        y = y if weight is None else y * weight
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


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


def gated_product(x: Float[Tensor, "... c"], gate: Float[Tensor, "... c"], function: str) -> Float[Tensor, "... c"]:
    """See :func:`regard.engines.layers.gated_product`."""
    return x * GATES[function](gate)
