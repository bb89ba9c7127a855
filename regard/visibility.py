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

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

PositionBias = Callable[["Int[Tensor, 'b n']", "Int[Tensor, 'b m']"], "Float[Tensor, '#b h n m']"]


@dataclass(frozen=True)
class Visibility:
    """Which key ranks a query rank may attend to.

    Attributes:
        causal: keys at or before the query.
        left: at most this many ranks before the query.
        right: at most this many ranks after the query.
        block: with `lookback` (and `lookahead`), keys whose block of this many ranks is near the query's block.
    """

    causal: bool = False
    left: int | None = None
    right: int | None = None
    block: int | None = None
    lookback: int = 0
    lookahead: int = 0

    @property
    def everything(self) -> bool:
        return not self.causal and self.left is None and self.right is None and self.block is None

    def mask(self, queries: Int[Tensor, "b n"], keys: Int[Tensor, "b m"]) -> Bool[Tensor, "b n m"]:
        """True where the key of rank `keys` is visible; a key of negative rank does not exist."""
        i, j = queries[:, :, None], keys[:, None, :]
        visible = (j >= 0).expand(-1, i.shape[1], -1)
        if self.causal:
            visible = visible & (j <= i)
        if self.left is not None:
            visible = visible & (i - j <= self.left)
        if self.right is not None:
            visible = visible & (j - i <= self.right)
        if self.block is not None:
            distance = i.div(self.block, rounding_mode="floor") - j.div(self.block, rounding_mode="floor")
            visible = visible & (distance <= self.lookback) & (distance >= -self.lookahead)
        return visible

    def reach(self) -> tuple[int | None, int | None]:
        """Most ranks a query looks back and ahead; None for no limit."""
        back, ahead = self.left, self.right
        if self.block is not None:
            back = (self.lookback + 1) * self.block - 1
            ahead = (self.lookahead + 1) * self.block - 1
        if self.causal:
            ahead = 0
        return back, ahead


@dataclass(frozen=True)
class Ranks:
    """Ranks of the query and key slots of one call; -1 for a key slot that holds no token.

    Attributes:
        offset: rank of query slot 0 minus rank of key slot 0, where it is the same for all rows; None otherwise.
        plain: no key slot is empty, except after the last query of its row in self patterns.
    """

    queries: Int[Tensor, "#b n"]
    keys: Int[Tensor, "#b m"]
    offset: int | None
    plain: bool


def ranks(call: Call, n: int, m: int, device: torch.device, cached: Int[Tensor, "b past"] | None = None) -> Ranks:
    """The ranks of `n` new queries against `m` keys, or against `cached` keys followed by the m new ones.

    In cross patterns queries and keys are not aligned; ranks then only tell which keys exist.
    """
    slots = torch.arange(m, device=device)[None]
    keys = slots if call.memory_lengths is None else torch.where(slots < call.memory_lengths[:, None], slots, -1)
    queries = torch.arange(n, device=device)[None]
    if cached is not None:
        before = (
            cached.amax(-1, keepdim=True) + 1 if cached.shape[-1] else torch.zeros_like(cached.sum(-1, keepdim=True))
        )
        keys = torch.where(keys < 0, keys, keys + before)
        keys = torch.cat([cached, keys.expand(cached.shape[0], -1)], -1)
        return Ranks(queries + before, keys, None, plain=False)
    if call.pattern.cross:
        return Ranks(queries, keys, 0, plain=call.memory_lengths is None)
    if n == m and call.lengths is call.memory_lengths:
        return Ranks(queries, keys, 0, plain=call.lengths is None or call.pattern.causal)
    if call.lengths is None and call.memory_lengths is None:
        return Ranks(queries + (m - n), keys, m - n, plain=True)
    valid_n = torch.full((1,), n, device=device) if call.lengths is None else call.lengths
    valid_m = torch.full((1,), m, device=device) if call.memory_lengths is None else call.memory_lengths
    return Ranks(queries + (valid_m - valid_n)[:, None], keys, None, plain=False)


def block_visibility(blocks: BlockMask, ranks: Ranks) -> Bool[Tensor, "b #h n m"]:
    """The block mask looked up at each pair of ranks; pairs beyond its last block are hidden."""
    size, visible = blocks.block_size, blocks.visible
    rows, columns = visible.shape[-2:]
    i = ranks.queries.div(size, rounding_mode="floor")
    j = ranks.keys.div(size, rounding_mode="floor")
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
) -> tuple[Bool[Tensor, "b #h n m"], Float[Tensor, "#b #h n m"] | None]:
    """Visible pairs, and the sum of the additive biases (None without any). A bias of -inf hides its pair."""
    visible = visibility.mask(ranks.queries, ranks.keys)[:, None]
    if blocks is not None:
        visible = visible & block_visibility(blocks, ranks)
    added = None if bias is None else bias.to(dtype)
    if position_bias is not None:
        by_rank = position_bias(ranks.queries, ranks.keys).to(dtype)
        added = by_rank if added is None else added + by_rank
    if added is not None:
        visible = visible & (added > -torch.inf)
        added = added.masked_fill(~(added > -torch.inf), 0.0)
    return visible, added
