"""The state of part of a unit: in PyTorch, and by the native kernel for decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.backends import NATIVE
from regard.backends.operators import TRANSFORMS, transformed
from regard.contract import Unsupported
from regard.core.precision import wide
from regard.engines.attention.native_form import DECODED_LONG
from regard.engines.attention.paged import attention_decode
from regard.engines.lean_attention.schedule import Part, Units

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

TOGETHER = 8
"""Number of tiles of a part to compute at a time."""


@dataclass(frozen=True)
class Cache:
    """Keys and values of requests of unequal lengths, in one tensor or in pages.

    Attributes:
        k, v: (B, G, M, D), or a pool (pages, G, page size, D).
        lengths: number of keys in each request.
        pages: pages of each request, for a pool; on the CPU.
        mask: mask of the visible keys.
    """

    k: Tensor
    v: Tensor
    lengths: list[int]
    pages: Int[Tensor, "b most"] | None
    mask: Bool[Tensor, "b m"] | None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int] | Tensor | None,
        pages: Tensor | None,
        mask: Tensor | None,
    ) -> Cache:
        """Check the arguments and build a cache."""
        if not q.ndim == k.ndim == v.ndim == 4:
            raise Unsupported("q, k or v without four axes", supported="(B, H, N, D), (B, G, M, D), (B, G, M, V)")
        batch, slots = q.shape[0], k.shape[2] if pages is None else k.shape[2] * pages.shape[-1]
        rows = k.shape[0] if pages is None else pages.shape[0]
        if (
            rows != batch
            or v.shape[:3] != k.shape[:3]
            or q.shape[3] != k.shape[3]
            or k.shape[1] < 1
            or q.shape[1] % k.shape[1]
        ):
            raise Unsupported(
                f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)}",
                supported="the same rows, widths and tokens, and heads of queries a multiple of those of keys",
            )
        found = [slots] * batch if lengths is None else [int(length) for length in lengths]
        if len(found) != batch or (found and not 0 <= min(found) <= max(found) <= slots):
            raise Unsupported(f"lengths {found}", supported=f"{batch} from 0 to {slots}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, slots)):
            raise Unsupported(f"mask of shape {tuple(mask.shape)}", supported=f"booleans ({batch}, {slots})")
        return cls(k, v, found, None if pages is None else pages.cpu(), mask)

    def read(self, request: int, head: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [first, end) of one head of keys in a request."""
        if self.pages is None:
            return self.k[request, head, first:end], self.v[request, head, first:end]
        size = self.k.shape[2]
        at = self.pages[request, first // size : -(-end // size)].to(self.k.device)
        cut = slice(first - first // size * size, end - first // size * size)
        return self.k[at, head].flatten(0, 1)[cut], self.v[at, head].flatten(0, 1)[cut]


@dataclass(frozen=True)
class Work:
    """The arguments of a call.

    Attributes:
        q: (B, G, heads per group, N, D).
    """

    q: Float[Tensor, "b g r n d"]
    cache: Cache
    units: Units
    scale: float

    def queries(self, unit: int) -> tuple[int, int, slice, Float[Tensor, "r i d"]]:
        """Request, head of keys, query indices and queries of a unit."""
        request, head, block = self.units.at(unit)
        at = slice(block * self.units.rows, min((block + 1) * self.units.rows, self.units.queries))
        return request, head, at, self.q[request, head, :, at]

    def nothing(self, unit: int) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp for queries that see no key."""
        q = self.queries(unit)[3]
        none = wide(q).new_full(q.shape[:2], -torch.inf)
        return wide(q).new_zeros((*q.shape[:2], self.cache.v.shape[3])), none

    def assembled(self, by_unit: list[Tensor]) -> Tensor:
        """Join the results of all units, (r, i, ...) each, to (B, H, N, ...)."""
        batch, kv_heads = self.q.shape[:2]
        blocks = self.units.blocks
        lines = [torch.cat(by_unit[i : i + blocks], 1) for i in range(0, len(by_unit), blocks)]
        found = torch.stack(lines).unflatten(0, (batch, kv_heads)).flatten(1, 2)
        return found.to(self.q.dtype) if found.ndim == 4 else found

    def check_native(self) -> None:
        """Raise Unsupported for a call that the kernel does not support."""
        k, v, q, tile = self.cache.k, self.cache.v, self.q, self.units.tile
        reason = NATIVE.missing
        size = k.shape[2]
        if reason is not None:
            pass
        elif q.device.type != "cpu" or not q.dtype == k.dtype == v.dtype or q.dtype not in NATIVE.dtypes:
            reason = "it computes on the CPU, all in float32 or all in bfloat16"
        elif self.cache.mask is not None:
            reason = "it takes no mask of keys"
        elif self.units.rows > DECODED_LONG:
            reason = f"it takes at most {DECODED_LONG} queries of a unit"
        elif (
            tile % size
            if self.cache.pages is not None
            else size % tile or not (k.is_contiguous() and v.is_contiguous())
        ):
            reason = "tiles are whole pages, or divide the keys of a contiguous tensor"
        elif transformed():
            reason = f"it has no {TRANSFORMS}"
        elif torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            reason = "it has no gradient"
        if reason is not None:
            raise Unsupported(f"lean attention by the native kernel: {reason}", supported="threads", nearest="loop")


def torch_part(work: Work, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """The state (m, l, o) of a unit's queries on some of its tiles: (r, i), (r, i), (r, i, V), at least float32."""
    request, head, at, q = work.queries(part.unit)
    units, cache = work.units, work.cache
    length, tile = cache.lengths[request], units.tile
    q = wide(q) * work.scale
    m = q.new_full(q.shape[:2], -torch.inf)
    total, o = torch.zeros_like(m), q.new_zeros((*q.shape[:2], cache.v.shape[3]))
    places = torch.arange(at.start, at.stop, device=q.device) + length - units.queries
    for first in range(part.first * tile, part.end * tile, TOGETHER * tile):
        end = min(first + TOGETHER * tile, part.end * tile, length)
        k, v = cache.read(request, head, first, end)
        scores = q @ wide(k).mT
        keys = torch.arange(first, end, device=q.device)
        hidden = None
        if units.causal and end - 1 > int(places[0]):
            hidden = keys > places[:, None]
        if cache.mask is not None:
            unseen = ~cache.mask[request, first:end].expand(len(places), -1)
            hidden = unseen if hidden is None else hidden | unseen
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        largest = torch.maximum(m, scores.detach().amax(-1))
        base = torch.where(largest == -torch.inf, 0, largest)
        weights = (scores - base[..., None]).exp()
        factor = (m - base).exp()
        total = factor * total + weights.sum(-1)
        o = factor[..., None] * o + weights @ wide(v)
        m = largest
    return m, total, o


def native_part(work: Work, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`torch_part` by the kernel for decoding. Its outputs are normalised: m is the log-sum-exp, and l is 1."""
    request, head, at, q = work.queries(part.unit)
    units, cache = work.units, work.cache
    length, tile = cache.lengths[request], units.tile
    kv_heads, size = cache.k.shape[1:3]
    first, end = part.first * tile, min(part.end * tile, length)
    if cache.pages is None:
        pages = (request * kv_heads + head) * (size // tile) + torch.arange(part.first, -(-end // tile), device="cpu")
        page_size = tile
    else:
        pages = cache.pages[request, first // size : -(-end // size)] * kv_heads + head
        page_size = size
    k, v = (x.view(-1, 1, page_size, x.shape[3]) for x in (cache.k, cache.v))
    places = torch.arange(at.start, at.stop, device="cpu")[None] + (length - units.queries - first)
    output, lse = attention_decode(
        q[None],
        k,
        v,
        pages[None],
        torch.tensor([end - first], dtype=torch.int64, device="cpu"),
        places.clamp(min=-1),
        [int(units.causal), -1, -1, 0, 0, 0],
        work.scale,
        0.0,
        None,
    )
    seen = (lse[0] > -torch.inf).to(lse.dtype)
    return lse[0], seen, wide(output[0])
