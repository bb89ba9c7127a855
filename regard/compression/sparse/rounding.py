"""A cache of 8-bit integers: keys by channel, values by token, the newest tokens unrounded (KIVI, arXiv 2402.02750).

Keys have channels that are large in all tokens, values do not: so a block of keys has a step for each channel, and each
value vector has a step of its own. With largest absolute value m, a step is m / 127 and a code the nearest integer.

    score of key j = sum_c (q_c step_c) code_jc          output = sum_j (p_j step_j) code_j

so both products read only codes, a quarter of the bytes of float32. On a CPU the native product of a few rows with
8-bit codes reads them directly; elsewhere each call makes a copy in the queries' dtype.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from regard.compression.sparse.cache import HeadCache, MethodCache
from regard.compression.sparse.method import Method, Place
from regard.contract import State, at_least
from regard.engines.quantized_linear import quantized_linear

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Int8

MOST = 127
TINY = 1e-12


@dataclass(frozen=True)
class Block(State):
    """A block of tokens in a cache.

    Attributes:
        k: (B, G, T, D) codes; k_step: (B, G, D).
        v: (B, G, E, T) codes, by channel; v_step: (B, G, T).
    """

    k: Int8[Tensor, "b g t d"]
    k_step: Float[Tensor, "b g d"]
    v: Int8[Tensor, "b g e t"]
    v_step: Float[Tensor, "b g t"]

    @classmethod
    def of(cls, k: Float[Tensor, "b g t d"], v: Float[Tensor, "b g t e"]) -> Block:
        """Round keys and values to the nearest codes."""
        k_step = (k.abs().amax(2) / MOST).clamp(min=TINY)
        v_step = (v.abs().amax(3) / MOST).clamp(min=TINY)
        keys, values = (k / k_step[:, :, None]).round(), (v / v_step[..., None]).round()
        return cls(keys.to(torch.int8).contiguous(), k_step, values.to(torch.int8).mT.contiguous(), v_step)

    @property
    def bytes(self) -> int:
        """Bytes per row."""
        return sum(x[0].numel() * x.element_size() for x in (self.k, self.k_step, self.v, self.v_step))


@dataclass(frozen=True)
class RoundedCache(MethodCache):
    """Blocks of codes, followed by the newest tokens.

    Attributes:
        blocks: in token order.
        recent: the newest tokens in floating point; written in place, like
            :class:`regard.compression.sparse.cache.HeadCache`.
        length: (B,) tokens so far.
    """

    blocks: tuple[Block, ...]
    recent: HeadCache
    length: Int[Tensor, " b"]

    def appended(self, k: Float[Tensor, "b g 1 d"], v: Float[Tensor, "b g 1 e"]) -> Self:
        return dataclasses.replace(self, recent=self.recent.appended(k, v), length=self.length + 1)


@dataclass(frozen=True)
class RoundedKeys(Method):
    """Keys and values in 8 bits, except for the newest.

    Attributes:
        block: tokens with one step for each channel of their keys; while decoding, this many newer tokens accumulate
            first.
        window: the newest tokens of a prompt, which stay unrounded, and the number that stays whenever a block is made.
    """

    phases: ClassVar = ("decode",)
    summary: ClassVar = "The cache keeps keys and values in 8 bits, the newest as they are."
    block: int = 512
    window: int = 64

    def __post_init__(self) -> None:
        at_least("block", self.block, 1)
        at_least("window", self.window, 1)

    def compress(  # type: ignore[override]  # another cache, which the method reads itself
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n e"], place: Place
    ) -> RoundedCache:
        n = k.shape[2]
        old = max(n - self.window, 0)
        ends = [*range(0, old, self.block), old]
        blocks = tuple(Block.of(k[:, :, a:b], v[:, :, a:b]) for a, b in itertools.pairwise(ends))
        recent = HeadCache.of(k[:, :, old:], v[:, :, old:])
        whole = (k[:1].numel() + v[:1].numel()) * k.element_size()
        left = (k[:1, :, old:].numel() + v[:1, :, old:].numel()) * k.element_size()
        place.meter.cache.append((sum(block.bytes for block in blocks) + left) / max(whole, 1))
        length = torch.full((k.shape[0],), n, dtype=torch.int64, device=k.device)
        return RoundedCache(blocks, recent, length)

    def decode(  # type: ignore[override]
        self, q: Float[Tensor, "b h 1 d"], cache: RoundedCache, place: Place
    ) -> tuple[Float[Tensor, "b h 1 e"], RoundedCache]:
        cache = self._rounded(cache)
        batch, heads = q.shape[:2]
        recent = cache.recent
        groups, used = recent.k.shape[1], int(recent.counts[0, 0]) if recent.counts.numel() else 0
        k, v = recent.k[:, :, :used], recent.v[:, :, :used]
        wide = torch.promote_types(q.dtype, torch.float32)
        query = place.scale * q.to(wide).reshape(batch, groups, heads // groups, -1)
        scores = [_by_codes(query * block.k_step[:, :, None].to(wide), block.k) for block in cache.blocks]
        weights = torch.cat([*scores, query @ k.to(wide).mT], -1).softmax(-1)
        output = weights[..., weights.shape[-1] - used :] @ v.to(wide)
        at = 0
        for block in cache.blocks:
            here = weights[..., at : at + block.k.shape[2]]
            at += block.k.shape[2]
            output = output + _by_codes(here * block.v_step[:, :, None].to(wide), block.v)
        place.meter.count("decode", float(batch * heads * (at + used)), float(batch * heads * (at + used)))
        place.meter.read += (
            batch * groups * (at / 4 + used) * (k.shape[-1] + v.shape[-1])
        )  # a code is a quarter of a number
        return output.reshape(batch, heads, 1, -1).to(q.dtype), cache

    def _rounded(self, cache: RoundedCache) -> RoundedCache:
        """Round the oldest of the recent tokens to a block, if there are enough."""
        recent = cache.recent
        used = int(recent.counts[0, 0]) if recent.counts.numel() else 0
        if used < self.block + self.window:
            return cache
        old, rest = slice(0, self.block), slice(self.block, used)
        made = Block.of(recent.k[:, :, old], recent.v[:, :, old])
        left = HeadCache.of(recent.k[:, :, rest], recent.v[:, :, rest])
        return dataclasses.replace(cache, blocks=(*cache.blocks, made), recent=left)


def _by_codes(x: Float[Tensor, "b g m k"], codes: Int8[Tensor, "b g n k"]) -> Float[Tensor, "b g m n"]:
    """x codes^T for each row and head."""
    one = torch.ones(codes.shape[2], 1, dtype=torch.bfloat16, device=codes.device)
    pairs = zip(x.flatten(0, 1), codes.flatten(0, 1), strict=True)
    found = [quantized_linear(rows, own, one) for rows, own in pairs]
    return torch.stack(found).view(*x.shape[:3], -1) if found else x.new_zeros(*x.shape[:3], codes.shape[2])
