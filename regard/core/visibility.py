"""Which keys a query may see: rules evaluated on ranks.

Ranks count the valid tokens of a row (or document) from 0; a query's rank includes the offset M - N of bottom-right
alignment and the tokens already cached. Since every rule is evaluated on ranks, padding, caches and chunks need no case
of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import BlockMask, Call
from regard.core.precision import wide_dtype

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def surely(condition: bool) -> bool:
    """Return whether a condition on sizes holds for all values that symbolic sizes can take. Unlike `bool`, it does not
    specialise symbols, so that compiled and exported graphs stay valid for every size."""
    if isinstance(condition, Tensor):  # torch.jit.trace
        return False
    if not torch.compiler.is_compiling() and isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy, which is large

    return statically_known_true(condition)


PositionBias = Callable[["Int[Tensor, 'b n']", "Int[Tensor, 'b m']"], "Float[Tensor, '#b #h n m']"]


@dataclass(frozen=True)
class DistanceBias:
    """A position bias that only depends on the distance, key rank minus query rank, so that a table can hold it.

    Attributes:
        by_distance: function from a tensor of distances (...) to biases (H, ...).
    """

    by_distance: Callable[[Int[Tensor, "..."]], Float[Tensor, "h ..."]]

    def __call__(self, queries: Int[Tensor, "b n"], keys: Int[Tensor, "b m"]) -> Float[Tensor, "b h n m"]:
        return self.by_distance(keys[:, None, :] - queries[:, :, None]).transpose(0, 1)

    def table(self, low: int, high: int, device: torch.device) -> Float[Tensor, "h distances"]:
        """Biases for the distances low ... high."""
        return self.by_distance(torch.arange(low, high + 1, device=device))

    def scaled(self, factor: float, dtype: torch.dtype) -> DistanceBias:
        """The same bias multiplied by `factor`, in `dtype`."""
        return DistanceBias(lambda distances: factor * self.by_distance(distances).to(dtype))


@dataclass(frozen=True)
class Visibility:
    """Which key ranks a query rank may attend to. All given limits hold at once.

    Attributes:
        causal: only keys at or before the query.
        left: at most this many ranks before the query.
        right: at most this many ranks after the query.
        block: ranks per block; keys in blocks more than `lookback` before or `lookahead` after the query's are hidden.
    """

    causal: bool = False
    left: int | None = None
    right: int | None = None
    block: int | None = None
    lookback: int = 0
    lookahead: int = 0

    @property
    def everything(self) -> bool:
        """True if nothing is hidden."""
        return not self.causal and self.left is None and self.right is None and self.block is None

    def mask(self, queries: Int[Tensor, "#b n"], keys: Int[Tensor, "#b m"]) -> Bool[Tensor, "b #n m"]:
        """True where the key of rank `keys` is visible; a key of negative rank does not exist.

        If the rule depends on keys alone, the query axis has size 1.
        """
        i, j = queries[:, :, None], keys[:, None, :]
        visible = j >= 0
        if self.causal:
            visible = visible & (j <= i)
        if self.left is not None:
            visible = visible & (i - j <= self.left)
        if self.right is not None:
            visible = visible & (j - i <= self.right)
        if self.block is not None:
            distance = block_numbers(i, self.block) - block_numbers(j, self.block)
            visible = visible & (distance <= self.lookback) & (distance >= -self.lookahead)
        return visible

    def count(self, queries: Int[Tensor, "#b n"], total: Int[Tensor, "#b 1"]) -> Int[Tensor, "b n"]:
        """Number of keys that each query can see in a row of `total` keys, ranks 0 to total - 1."""
        first, last = torch.zeros_like(queries), total - 1
        if self.causal:
            last = torch.minimum(last, queries)
        if self.left is not None:
            first = torch.maximum(first, queries - self.left)
        if self.right is not None:
            last = torch.minimum(last, queries + self.right)
        if self.block is not None:
            block = block_numbers(queries, self.block)
            first = torch.maximum(first, (block - self.lookback) * self.block)
            last = torch.minimum(last, (block + self.lookahead + 1) * self.block - 1)
        return (last - first + 1).clamp(min=0)

    def reach(self) -> tuple[int | None, int | None]:
        """How many ranks a query can look back and ahead at most; None for no limit."""
        back, ahead = [self.left], [self.right]
        if self.block is not None:
            back.append((self.lookback + 1) * self.block - 1)
            ahead.append((self.lookahead + 1) * self.block - 1)
        if self.causal:
            ahead.append(0)
        return _least(back), _least(ahead)

    def within(self, first: int, n: int, m: int) -> Visibility:
        """The same rule for query ranks first ... first + n - 1 and key ranks 0 ... m - 1, without the limits that
        cannot hide any of these pairs. Symbolic sizes in a graph keep their limits and are not specialised."""
        last = first + n - 1
        causal = self.causal and not surely(m - 1 <= first)
        left = None if self.left is not None and surely(self.left >= last) else self.left
        right = None if self.right is not None and surely(self.right >= m - 1 - first) else self.right
        inside = self.block is not None and surely(first >= 0) and surely(self.block > last) and surely(self.block >= m)
        block = None if inside else self.block
        if (causal, left, right, block) == (self.causal, self.left, self.right, self.block):
            return self
        return Visibility(causal, left, right, block, self.lookback, self.lookahead)


def _least(limits: list[int | None]) -> int | None:
    given = [limit for limit in limits if limit is not None]
    return min(given) if given else None


def block_numbers(ranks: Int[Tensor, "..."], size: int) -> Int[Tensor, "..."]:
    """The block of `size` tokens that each rank is in."""
    if torch.compiler.is_compiling() and ranks.is_cpu:
        # inductor (torch 2.13) computes the last entries of arange(17) // 16 wrongly; this is exact up to 2^53
        return (ranks.double() / size).floor().long()
    return ranks.div(size, rounding_mode="floor")


@dataclass(frozen=True)
class Ranks:
    """Ranks of the query and key slots of one call; negative for key slots without a token.

    Attributes:
        offset: rank of query slot 0 minus rank of key slot 0, if it is the same in all rows and ranks increase by one
            per slot (including negative ranks of empty leading slots); None otherwise.
        first: rank of query slot 0, if it is known and the same in all rows; None otherwise.
        plain: whether no key slot is empty, except after the last query of its row in causal-self.
    """

    queries: Int[Tensor, "#b n"]
    keys: Int[Tensor, "#b m"]
    offset: int | None
    first: int | None
    plain: bool


@dataclass(frozen=True, init=False)
class CountedRanks(Ranks):
    """Ranks of `n` queries counting from `first` and of `m` keys counting from 0; tensors are only made on access."""

    first: int
    n: int
    m: int
    device: torch.device

    def __init__(self, n: int, m: int, first: int, plain: bool, device: torch.device) -> None:
        for name, value in {"n": n, "m": m, "offset": first, "first": first, "plain": plain, "device": device}.items():
            object.__setattr__(self, name, value)

    @property  # type: ignore[misc]
    def queries(self) -> Int[Tensor, "1 n"]:
        """Ranks of the queries, made on access."""
        return torch.arange(self.n, device=self.device)[None] + self.first

    @property  # type: ignore[misc]
    def keys(self) -> Int[Tensor, "1 m"]:
        """Ranks of the keys, made on access."""
        return torch.arange(self.m, device=self.device)[None]


def ranks(
    call: Call,
    n: int,
    m: int,
    device: torch.device,
    cached: Int[Tensor, "b past"] | None = None,
    before: Int[Tensor, " b"] | None = None,
) -> Ranks:
    """The ranks of `n` new queries against `m` keys, or against `cached` keys followed by the m new ones.

    In self patterns the last query is aligned with the last key of its row. In cross patterns queries and keys are not
    aligned: both count from 0, and ranks only say which keys exist (and serve as input to a position bias).

    Args:
        cached: ranks of the cached key slots, negative for empty slots.
        before: number of tokens in each row before the new keys; one more than the largest cached rank when None.
    """
    together = call.lengths is call.memory_lengths
    plain = together and call.lengths is None and not call.pattern.cross
    if plain and cached is None:
        return CountedRanks(n, m, m - n, True, device)
    if plain and cached is not None and before is not None and n == m:
        new = torch.arange(n, device=device) + before[:, None]
        return Ranks(new, torch.cat([cached, new], -1), None, None, plain=False)
    slots = torch.arange(m, device=device)[None]
    keys = slots if call.memory_lengths is None else torch.where(slots < call.memory_lengths[:, None], slots, -1)
    queries = torch.arange(n, device=device)[None]
    if not call.pattern.cross:
        if together:
            # no padding, or equal lengths with n == m slots
            queries = queries + (m - n)
        else:
            valid_n = n if call.lengths is None else call.lengths[:, None]
            valid_m = m if call.memory_lengths is None else call.memory_lengths[:, None]
            queries = queries + (valid_m - valid_n)
    if cached is not None:
        if before is not None:
            past = before[:, None]
        elif cached.shape[-1]:
            past = cached.amax(-1, keepdim=True).clamp(min=-1) + 1
        else:
            past = cached.new_zeros((cached.shape[0], 1))
        keys = torch.where(keys < 0, keys, keys + past)
        keys = torch.cat([cached, keys.expand(cached.shape[0], -1)], -1)
        return Ranks(queries if call.pattern.cross else queries + past, keys, None, None, plain=False)
    if call.pattern.cross:
        return Ranks(queries, keys, None, None, plain=call.memory_lengths is None)
    if not together:
        return Ranks(queries, keys, None, None, plain=False)
    return Ranks(queries, keys, m - n, m - n, plain=call.pattern.causal)


def block_visibility(blocks: BlockMask, ranks: Ranks) -> Bool[Tensor, "b #h n m"]:
    """Look up the block mask for each pair of ranks; pairs outside the mask are hidden."""
    size, visible = blocks.block_size, blocks.visible
    rows, columns = visible.shape[-2:]
    if rows == 0 or columns == 0:
        return visible.new_zeros((1, 1, ranks.queries.shape[1], ranks.keys.shape[1]))
    i, j = block_numbers(ranks.queries, size), block_numbers(ranks.keys, size)
    inside = ((i >= 0) & (i < rows))[:, None, :, None] & ((j >= 0) & (j < columns))[:, None, None, :]
    i, j = i.clamp(0, rows - 1), j.clamp(0, columns - 1)
    batch = max(visible.shape[0], i.shape[0], j.shape[0])
    row = torch.arange(batch, device=visible.device)[:, None, None]
    table = visible.expand(batch, -1, -1, -1).permute(0, 2, 3, 1)
    picked = table[row, i.expand(batch, -1)[:, :, None], j.expand(batch, -1)[:, None, :]]
    return picked.permute(0, 3, 1, 2) & inside


def masked_scores_bias(
    ranks: Ranks,
    visibility: Visibility,
    bias: Tensor | None,
    position_bias: PositionBias | None,
    blocks: BlockMask | None,
    dtype: torch.dtype,
) -> tuple[Bool[Tensor, "#b #h #n m"], Float[Tensor, "#b #h #n #m"] | None]:
    """The visible pairs and the sum of the additive biases (None without any). A bias of -inf hides its pair.

    The sum is in `dtype`, or in float32 if that is wider: bfloat16 cannot tell large distances apart.
    """
    dtype = wide_dtype(dtype)
    visible = visibility.mask(ranks.queries, ranks.keys)[:, None]
    if blocks is not None:
        visible = visible & block_visibility(blocks, ranks)
    added = None if bias is None else bias.to(dtype)
    if position_bias is not None:
        by_rank = position_bias(ranks.queries, ranks.keys).to(dtype)
        added = by_rank if added is None else added + by_rank
    if added is not None:
        hidden = added == -torch.inf
        visible, added = visible & ~hidden, added.masked_fill(hidden, 0.0)
    return visible, added
