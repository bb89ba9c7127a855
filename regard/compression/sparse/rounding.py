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
        block, window: options of :class:`RoundedKeys`.
    """

    blocks: tuple[Block, ...]
    recent: HeadCache
    length: Int[Tensor, " b"]
    block: int
    window: int

    @property
    def k(self) -> Float[Tensor, "b g s d"]:
        """Keys of the newest tokens."""
        return self.recent.k

    @property
    def v(self) -> Float[Tensor, "b g s e"]:
        """Values of the newest tokens."""
        return self.recent.v

    @property
    def used(self) -> int:
        """Number of tokens in floating point."""
        return int(self.recent.counts[0, 0]) if self.recent.counts.numel() else 0

    def appended(self, k: Float[Tensor, "b g 1 d"], v: Float[Tensor, "b g 1 e"]) -> Self:
        return self._with(self.recent.appended(k, v))._rounded(0)

    def even(self, tokens: int) -> int | None:
        """As in :class:`~regard.compression.sparse.cache.HeadCache`, for a single token and codes with a kernel."""
        steps = all(x.k_step.dtype == torch.float32 for x in self.blocks)
        held = self.recent.even(1) if tokens == 1 and steps else None
        return held if held is None else held - self.block * self._full(1)

    def replaced(self) -> int:
        """-1: a new token goes behind all others."""
        return -1

    def extended(self, tokens: int) -> Self:
        """As in :class:`~regard.compression.sparse.cache.HeadCache`."""
        made = self._rounded(tokens)
        return made._with(made.recent.extended(tokens), tokens)

    def _with(self, recent: HeadCache, tokens: int = 1) -> Self:
        return dataclasses.replace(self, recent=recent, length=self.length + tokens)

    def _full(self, more: int) -> bool:
        """Whether there are enough tokens for a block, with `more` new ones."""
        return self.used + more >= self.block + self.window

    def _rounded(self, more: int) -> Self:
        """The cache with its oldest unrounded tokens rounded to a block, if there are enough with `more` new ones."""
        if not self._full(more):
            return self
        old, rest = slice(0, self.block), slice(self.block, self.used)
        made = Block.of(self.k[:, :, old], self.v[:, :, old])
        left = HeadCache.of(self.k[:, :, rest], self.v[:, :, rest])
        return dataclasses.replace(self, blocks=(*self.blocks, made), recent=left)


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
        place.meter.count_prompt((sum(block.bytes for block in blocks) + left) / max(whole, 1))
        length = torch.full((k.shape[0],), n, dtype=torch.int64, device=k.device)
        return RoundedCache(blocks, recent, length, self.block, self.window)

    def decode(  # type: ignore[override]
        self, q: Float[Tensor, "b h 1 d"], cache: RoundedCache, place: Place
    ) -> tuple[Float[Tensor, "b h 1 e"], RoundedCache]:
        batch, heads = q.shape[:2]
        groups, used = cache.k.shape[1], cache.used
        k, v = cache.k[:, :, :used], cache.v[:, :, :used]
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
        self.decoded(cache, place, heads, 1)
        return output.reshape(batch, heads, 1, -1).to(q.dtype), cache

    @property
    def in_kernel(self) -> bool:
        return True

    def rounded(self, cache: RoundedCache) -> tuple[Block, ...]:
        return cache.blocks

    def decoded(self, cache: RoundedCache, place: Place, heads: int, tokens: int) -> None:
        (batch, groups), used = cache.k.shape[:2], cache.used
        at = int(cache.length[0]) - used if batch else 0
        place.meter.count("decode", float(batch * heads * (at + used)), float(batch * heads * (at + used)))
        width, size = cache.k.shape[-1] + cache.v.shape[-1], cache.k.element_size()
        steps = at + len(cache.blocks) * cache.k.shape[-1]
        place.meter.read += batch * groups * (at * width + (used * width + steps) * size)


def _by_codes(x: Float[Tensor, "b g m k"], codes: Int8[Tensor, "b g n k"]) -> Float[Tensor, "b g m n"]:
    """x codes^T for each row and head."""
    one = torch.ones(codes.shape[2], 1, dtype=torch.bfloat16, device=codes.device)
    pairs = zip(x.flatten(0, 1), codes.flatten(0, 1), strict=True)
    found = [quantized_linear(rows, own, one) for rows, own in pairs]
    return torch.stack(found).view(*x.shape[:3], -1) if found else x.new_zeros(*x.shape[:3], codes.shape[2])
