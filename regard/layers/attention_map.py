"""Estimates of an attention map: from features of the queries to scores of pixels, as in SEA (arXiv 2310.01777).

A map has one row per query and head, with a fixed number of pixels, each of which covers a part of the keys. The random
features of the linear attention that the estimate starts from (arXiv 2009.14794) are here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import valid_from_lengths
from regard.core.precision import wide_dtype
from regard.layers.linear import Linear

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class CausalRows(nn.Conv2d):
    """3 x 3 convolution with dilation 2 over the rows t, t - 2 and t - 4; zeros before the first row."""

    PAST = 4

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=(0, 2), dilation=2)

    def advance(
        self, x: Float[Tensor, "b n w c"], past: Float[Tensor, "b c 4 w"], lengths: Int[Tensor, " b"] | None
    ) -> tuple[Float[Tensor, "b n w c"], Float[Tensor, "b c 4 w"]]:
        """Convolve the rows after `past`, all valid if `lengths` is None; also return the rows for the next call.

        Channels come last, which halves the time of PyTorch's kernel for so few channels.
        """
        n = x.shape[1]
        x = torch.cat([past.to(x.dtype).permute(0, 2, 3, 1), x], 1).permute(0, 3, 1, 2)
        y = self(x).permute(0, 2, 3, 1)
        if lengths is None:
            return y, x[:, :, n:].contiguous()
        last = lengths[:, None] + torch.arange(self.PAST, device=x.device)
        return y, x.gather(2, last[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class CausalMap(nn.Module):
    """Maps features of the queries to scores of pixels; row t depends on the queries t - 8, t - 6, ... t."""

    CHANNELS, SHRINK = 2, 4

    def __init__(self, features: int, heads: int, pixels: int) -> None:
        super().__init__()
        width, channels = pixels // self.SHRINK, self.CHANNELS * heads
        self.expand = Linear(features, self.CHANNELS * width)
        self.first_norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(pixels)
        self.convolutions = nn.ModuleList(CausalRows(channels) for _ in range(2))
        self.merge = nn.Conv2d(channels, heads, 1)
        self.pixels = pixels

    def start(self, like: Float[Tensor, "b ..."]) -> tuple[Tensor, ...]:
        """The rows before the first query: zeros."""
        shape = like.shape[0], self.merge.in_channels, CausalRows.PAST, self.pixels // self.SHRINK
        return (like.new_zeros(shape),) * len(self.convolutions)

    def forward(
        self, z: Float[Tensor, "b h n z"], lengths: Int[Tensor, " b"] | None, past: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "b h n c"], tuple[Tensor, ...]]:
        """The scores, and the rows that the next queries need."""
        x = self.first_norm(self.expand(z).unflatten(-1, (self.CHANNELS, -1)))  # (b, h, n, 2, w)
        x, rows = x.permute(0, 2, 4, 1, 3).flatten(3), []  # (b, n, w, 2 h)
        for i, convolution in enumerate(self.convolutions):
            x, kept = convolution.advance(x, past[i], lengths)  # type: ignore[operator]
            x = x.relu()
            rows.append(kept)
        # the bias is added after averaging, which leaves a constant as it is, so that it also reaches the zeros at the
        # edges
        assert self.merge.bias is not None
        x = F.linear(x, self.merge.weight.flatten(1)).permute(0, 3, 1, 2)  # (b, h, n, w)
        return self.last_norm(x @ self._stretched(x) + self.merge.bias[:, None, None]), tuple(rows)

    def _stretched(self, x: Float[Tensor, "b h n w"]) -> Float[Tensor, "w c"]:
        """Weights of each pixel of the small map in the pixels of the large one: pixels are repeated, padded with a
        zero on either side, and averaged with their neighbours."""
        repeated = torch.eye(x.shape[-1], dtype=wide_dtype(x), device=x.device).repeat_interleave(self.SHRINK, -1)
        return F.interpolate(F.pad(repeated, (1, 1))[None], size=self.pixels, mode="area")[0].to(x.dtype)


class NoncausalMap(nn.Module):
    """Maps features of the queries to scores of pixels, through a map with half the queries and half the pixels."""

    CHANNELS, SHRINK = 4, 2

    def __init__(self, features: int, heads: int, pixels: int) -> None:
        super().__init__()
        channels = self.CHANNELS * heads
        self.expand = Linear(features, self.CHANNELS * pixels // self.SHRINK)
        self.shrink = nn.Conv2d(channels, channels, 3, padding=1, stride=(2, 1))
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)
        self.merge = nn.Conv2d(channels, heads, 3, padding=1)
        self.pixels = pixels

    def start(self, like: Float[Tensor, "b ..."]) -> tuple[Tensor, ...]:
        """An empty tuple: no query sees rows of another call."""
        return ()

    def forward(
        self, z: Float[Tensor, "b h n z"], lengths: Int[Tensor, " b"] | None, past: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "b h n c"], tuple[Tensor, ...]]:
        """The scores. For the convolutions, rows past the end of a sequence are zeros, as at the map's edge."""
        n = z.shape[2]
        halves = None if lengths is None else (lengths + 1).div(2, rounding_mode="floor")
        x = self.expand(z).unflatten(-1, (self.CHANNELS, -1)).transpose(2, 3).flatten(1, 2)
        x = _only(self.shrink(_only(x, lengths)).relu(), halves)
        x = self.mix(x).relu().repeat_interleave(2, 2)
        x = self.merge(_only(x, None if halves is None else 2 * halves))
        x = F.interpolate(x, size=(x.shape[2], self.pixels), mode="bilinear")
        return self._stretch(x, n, lengths), ()

    @staticmethod
    def _stretch(x: Float[Tensor, "b h n1 c"], n: int, lengths: Int[Tensor, " b"] | None) -> Float[Tensor, "b h n c"]:
        """Resize the first 2 ceil(length / 2) rows to `length` rows by bilinear interpolation."""
        count = torch.full((1,), n, device=x.device) if lengths is None else lengths
        count = count.clamp(min=1)[:, None]
        source = count + count % 2
        at = (torch.arange(n, dtype=torch.float64, device=x.device) + 0.5) * source / count - 0.5
        at = torch.minimum(at.clamp(min=0), source - 1)
        low = at.floor().long()
        high = torch.minimum(low + 1, source - 1)
        rows = [
            x.gather(2, index[:, None, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3])) for index in (low, high)
        ]
        share = (at - low).to(x.dtype)[:, None, :, None]
        return rows[0] + share * (rows[1] - rows[0])


def _only(x: Float[Tensor, "b c n w"], lengths: Int[Tensor, " b"] | None) -> Float[Tensor, "b c n w"]:
    """Set the rows that are not valid to zero."""
    return x if lengths is None else torch.where(valid_from_lengths(lengths, x.shape[2])[:, None, :, None], x, 0)


class CodebookMap(nn.Module):
    """Maps features of the queries to scores of pixels; each patch of pixels is a mixture of learned patches."""

    BOOK, PATCH = 8, 16

    def __init__(self, features: int, heads: int, pixels: int) -> None:
        super().__init__()
        self.choose = Linear(features, self.BOOK * pixels // self.PATCH)
        self.patches = nn.Parameter(torch.randn(self.BOOK, self.PATCH))

    def start(self, like: Float[Tensor, "b ..."]) -> tuple[Tensor, ...]:
        """An empty tuple: no query sees rows of another call."""
        return ()

    def forward(
        self, z: Float[Tensor, "b h n z"], lengths: Int[Tensor, " b"] | None, past: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "b h n c"], tuple[Tensor, ...]]:
        shares = self.choose(z).unflatten(-1, (-1, self.BOOK)).softmax(-1)
        return (shares @ self.patches).flatten(-2), ()


def orthogonal_features(
    number: int, width: int, generator: torch.Generator | None = None
) -> Float[Tensor, "number width"]:
    """Rows of random directions, orthogonal in blocks of `width`, with the norms of normal vectors (arXiv 2009.14794)."""

    dtype = wide_dtype(torch.get_default_dtype())  # bfloat16 has no QR

    def normal(rows: int) -> Tensor:
        device = None if generator is None else generator.device
        return torch.randn(rows, width, generator=generator, device=device, dtype=dtype)

    def directions() -> Tensor:
        q, r = torch.linalg.qr(normal(width))
        return (q * r.diagonal().sign()).mT  # a uniform distribution, whatever signs QR chooses

    blocks = [directions() for _ in range(-(-number // width))]
    rows = normal(number).norm(dim=1, keepdim=True) * torch.cat(blocks)[:number]
    return rows.to(torch.get_default_dtype())


def softmax_features(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], w: Float[Tensor, "r d"], valid: Bool[Tensor, "#b 1 n 1"]
) -> tuple[Float[Tensor, "b h n r"], Float[Tensor, "b h n r"]]:
    """Positive features with expected product exp(q . k d^-1/2), up to factors that cancel in the normaliser."""
    scaled = [x.shape[-1] ** -0.25 * x for x in (q, k)]
    products = [x @ w.mT for x in scaled]
    norms = [x.square().sum(-1, keepdim=True) / 2 for x in scaled]
    lowest = torch.finfo(q.dtype).min
    tops = (
        products[0].detach().amax(-1, keepdim=True),
        products[1].detach().masked_fill(~valid, lowest).amax((-1, -2), keepdim=True),
    )
    phi_q, phi_k = (
        torch.where(valid, x - norm - top, 0).exp() + 1e-4 for x, norm, top in zip(products, norms, tops, strict=True)
    )
    return phi_q, phi_k
