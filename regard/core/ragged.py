"""Sequences of unequal length: moves valid tokens to the dense, right-padded layout that mechanisms see, and back.

Inside a mechanism, token i of a row has rank i, the first `lengths[row]` tokens are valid and the rest are zero. Any
other layout of the caller's (padding on the left or inside, documents packed into one row) is described by a
:class:`regard.contract.Mask` and converted here. Tokens are *selected*, never multiplied by a mask: padding may hold
NaN, and its gradient is exactly zero.

Values of masks are checked except while compiling; sizes are Python integers, so that a whole graph can be compiled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from regard.contract import BlockMask, Mask, Unsupported, valid_from_lengths

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, Shaped


def lengths_from_valid(valid: Bool[Tensor, "b n"]) -> Int[Tensor, " b"]:
    """Number of valid tokens in each row."""
    return valid.sum(-1)


def values_known(x: Tensor) -> bool:
    """Return whether the values of `x` can be read: not in a graph, nor for tensors that only have shapes."""
    return not (torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor))


def check_lengths(lengths: Int[Tensor, " b"], batch: int, n: int) -> None:
    """Raise Unsupported unless there are `batch` lengths from 0 to `n`. Values are only checked if known."""
    if not values_known(lengths):
        return
    if lengths.shape != (batch,):
        raise Unsupported(f"lengths of shape {tuple(lengths.shape)} for {batch} rows", supported=f"({batch},)")
    if batch:
        least, most = torch.stack(lengths.aminmax()).tolist()  # a single device synchronisation
        if not 0 <= least <= most <= n:
            raise Unsupported(f"lengths from {least} to {most} for rows of {n} tokens", supported=f"0 to {n}")


def _where(valid: Bool[Tensor, "b n"], x: Tensor, axis: int, batch_axis: int) -> Tensor:
    """`x` where valid and zero elsewhere."""
    shape = [1] * x.ndim
    shape[batch_axis], shape[axis] = valid.shape
    by_row = valid if batch_axis % x.ndim < axis % x.ndim else valid.mT
    return torch.where(by_row.reshape(shape), x, x.new_zeros(()))


def _take(
    x: Tensor, index: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"] | None, axis: int, batch_axis: int
) -> Tensor:
    """Select tokens of `x` by their number ``row * n + column`` in (batch, axis) order; zeros where not valid."""
    tokens = x.movedim((batch_axis, axis), (0, 1)).flatten(0, 1)
    if tokens.shape[0] == 0:
        # There is no token to take: add a zero for the clamped indices of invalid places to point at.
        tokens = F.pad(tokens, (0, 0) * (tokens.ndim - 1) + (0, 1))
    taken = tokens.index_select(0, index.flatten()).unflatten(0, index.shape)
    if valid is not None:
        taken = _where(valid, taken, 1, 0)
    return taken.movedim((0, 1), (batch_axis, axis))


@dataclass(frozen=True, eq=False)
class Gathering:
    """How the valid tokens of a sequence axis move to the dense layout and back. Built by :func:`gathering`.

    Attributes:
        source_batch, source_length: number of rows, and of tokens per row, in the caller's layout.
        batch, length: the same in the dense layout, where each sequence or document is a row.
        lengths: number of valid tokens in each dense row (int64); None if every token is valid and the layouts are the
            same, and on a grid, where tokens stay in their places.
        dense_index: for each dense place, the number (row * source_length + column) of the token that moves there, or
            some number in range past the end of a sequence; None if the layouts are the same.
        valid: valid tokens in the caller's layout; None when all are valid.
        index: for each token, its place in the dense layout (row * length + rank), in range for invalid tokens too;
            None if the layouts are the same.
        device: device of the tensors.
    """

    source_batch: int
    source_length: int
    batch: int
    length: int
    device: torch.device | str | None
    lengths: Int[Tensor, " batch"] | None = None
    valid: Bool[Tensor, "source_batch source_length"] | None = None
    dense_index: Int[Tensor, "batch length"] | None = None
    index: Int[Tensor, "source_batch source_length"] | None = None

    @property
    def whole(self) -> bool:
        """True if the layouts are the same and every token is valid, so that tensors need no change."""
        return self.lengths is None and self.valid is None

    @property
    def ranks(self) -> Int[Tensor, "source_batch source_length"]:
        """Rank of each token among the valid tokens of its sequence; 0 for invalid tokens, except on a grid."""
        if self.index is not None:
            return self.index % max(self.length, 1)
        ranks = torch.arange(self.source_length, device=self.device).expand(self.source_batch, -1)
        return ranks if self.lengths is None else ranks.where(valid_from_lengths(self.lengths, self.length), 0)

    def gather(self, x: Shaped[Tensor, ...], axis: int = -2, batch_axis: int = 0) -> Shaped[Tensor, ...]:
        """Move tokens to the dense layout: one sequence per row, with zeros in the padding."""
        self._check(x, axis, batch_axis, (self.source_batch, self.source_length), "gather")
        if self.dense_index is None or self.lengths is None:
            return x if self.valid is None else _where(self.valid, x, axis, batch_axis)
        return _take(x, self.dense_index, valid_from_lengths(self.lengths, self.length), axis, batch_axis)

    def scatter(self, y: Shaped[Tensor, ...], axis: int = -2, batch_axis: int = 0) -> Shaped[Tensor, ...]:
        """Move tokens back to the caller's layout, with zeros where there is no valid token."""
        self._check(y, axis, batch_axis, (self.batch, self.length), "scatter")
        if self.index is not None:
            return _take(y, self.index, self.valid, axis, batch_axis)
        return y if self.valid is None else _where(self.valid, y, axis, batch_axis)

    @property
    def dense(self) -> Gathering:
        """The layout of tokens that are in the dense layout already."""
        if self.dense_index is None:
            return self
        assert self.lengths is not None  # only tokens with lengths are moved
        valid = valid_from_lengths(self.lengths, self.length)
        return Gathering(self.batch, self.length, self.batch, self.length, self.device, self.lengths, valid)

    def token_numbers(self) -> Int[Tensor, "batch length"]:
        """`dense_index`, or its equivalent if the layouts are the same."""
        if self.dense_index is not None:
            return self.dense_index
        return torch.arange(self.batch * self.length, device=self.device).view(self.batch, self.length)

    def _check(self, x: Tensor, axis: int, batch_axis: int, expected: tuple[int, int], verb: str) -> None:
        if not torch.compiler.is_compiling() and (x.shape[batch_axis], x.shape[axis]) != expected:
            raise Unsupported(
                f"{verb} of a tensor {tuple(x.shape)} with batch axis {batch_axis} and token axis {axis}",
                supported=f"{expected[0]} rows of {expected[1]} tokens",
            )


def gathering(mask: Mask | None, batch: int, n: int, device: torch.device | str | None = None) -> Gathering:
    """The :class:`Gathering` for a sequence axis of `n` tokens in `batch` rows.

    Args:
        mask: its `valid`, `lengths` or `cu_seqlens` is used; `bias` and `blocks` are ignored.
        batch: number of rows in the caller's layout; 1 for packed documents.
        n: number of tokens per row in the caller's layout.
        device: device of the tensors.

    A mask from :func:`inner_mask` has its layout already: only the outermost model, layer or function computes it.

    Raises:
        Unsupported: for a mask that does not fit, except while compiling.
    """
    if mask is not None and mask.layout is not None:
        return mask.layout
    if mask is None or not mask.ragged:
        return Gathering(batch, n, batch, n, device)
    if mask.cu_seqlens is not None:
        return _gathering_of_documents(mask.cu_seqlens.to(device, torch.int64), mask.max_length, batch, n)
    if mask.lengths is not None:
        lengths = mask.lengths.to(device, torch.int64)
        check_lengths(lengths, batch, n)
        return Gathering(batch, n, batch, n, device, lengths, valid_from_lengths(lengths, n))
    assert mask.valid is not None  # `ragged` means that one of the three is given
    valid = mask.valid.to(device)
    if not torch.compiler.is_compiling() and valid.shape != (batch, n):
        raise Unsupported(f"mask.valid of shape {tuple(valid.shape)}", supported=f"({batch}, {n})")
    first = torch.arange(batch, device=device)[:, None] * n
    ranks = (valid.cumsum(-1) - 1).where(valid, 0)
    return Gathering(
        source_batch=batch,
        source_length=n,
        batch=batch,
        length=n,
        device=device,
        lengths=lengths_from_valid(valid),
        valid=valid,
        dense_index=first + torch.argsort(~valid, dim=-1, stable=True),
        index=first + ranks,
    )


def right_padded(lengths: Int[Tensor, " b"], n: int) -> Mask:
    """The mask of right-padded rows of `n` tokens, for the inside of a model or layer."""
    valid, rows = valid_from_lengths(lengths, n), lengths.shape[0]
    return Mask(lengths=lengths, layout=Gathering(rows, n, rows, n, lengths.device, lengths, valid))


def packed(lengths: Int[Tensor, " documents"], n: int, longest: int) -> Mask:
    """The mask of documents of these lengths, `n` tokens in all, packed into one row, for the inside of a model."""
    borders = F.pad(lengths.cumsum(0), (1, 0))
    layout = _gathering_of_documents(borders, longest, 1, n)
    return Mask(cu_seqlens=borders, max_length=longest, layout=layout)


def inner_mask(layout: Gathering, *, bias: Tensor | None = None, blocks: BlockMask | None = None) -> Mask | None:
    """The mask of tokens moved by `layout`, for the inside of a model or layer; None if there is nothing to mask.

    Args:
        bias, blocks: bias and visible blocks of pairs in the dense layout.
    """
    if layout.whole and bias is None and blocks is None:
        return None
    return Mask(lengths=layout.lengths, bias=bias, blocks=blocks, layout=layout.dense)


def gathering_in_place(
    mask: Mask | None, batch: int, n: int, grid: tuple[int, ...], device: torch.device | str | None = None
) -> Gathering:
    """The :class:`Gathering` that leaves tokens in their places on a grid, with zeros at invalid ones.

    Args:
        mask: its `valid` or `lengths` is used.
        grid: sides of the grid that the `n` tokens fill row by row.

    Raises:
        Unsupported: for a grid of another size, or packed documents.
    """
    if math.prod(grid) != n:
        raise Unsupported(f"a grid {tuple(grid)} of {n} tokens", supported=f"sides whose product is {n}")
    if mask is not None and mask.cu_seqlens is not None:
        raise Unsupported("cu_seqlens on a grid", supported="Mask(valid=...) or Mask(lengths=...)")
    layout = gathering(mask, batch, n, device)
    return Gathering(batch, n, batch, n, device, valid=layout.valid)


def _gathering_of_documents(cu_seqlens: Int[Tensor, " borders"], longest: int | None, batch: int, n: int) -> Gathering:
    """Documents packed into one row become separate rows."""
    lengths = cu_seqlens.diff()
    documents = lengths.shape[0]
    if not torch.compiler.is_compiling():
        _check_documents(cu_seqlens, lengths, longest, batch, n)
    if longest is None:
        longest = int(lengths.max()) if documents else 0
    elif not torch.compiler.is_compiling():
        longest = min(longest, n)  # no document is longer than all of them together, so nothing larger is allocated
    token = torch.arange(n, device=cu_seqlens.device)
    # Empty documents start where the next one does; counting the ends passed skips them.
    document = torch.searchsorted(cu_seqlens[1:], token, right=True)
    ranks = token - cu_seqlens[document]
    place = torch.arange(longest, device=cu_seqlens.device)
    return Gathering(
        source_batch=1,
        source_length=n,
        batch=documents,
        length=longest,
        device=cu_seqlens.device,
        lengths=lengths,
        dense_index=(cu_seqlens[:-1, None] + place).clamp(max=max(n - 1, 0)),
        index=(document * longest + ranks)[None],
    )


def _check_documents(
    cu_seqlens: Int[Tensor, " borders"], lengths: Int[Tensor, " documents"], longest: int | None, batch: int, n: int
) -> None:
    if batch != 1:
        raise Unsupported(
            f"cu_seqlens with a batch of {batch}",
            supported="documents packed into one row (batch 1)",
            nearest="Mask(lengths=...) or Mask(valid=...)",
        )
    borders = cu_seqlens.tolist()
    if not borders or borders[0] != 0 or borders[-1] != n:
        raise Unsupported(
            f"cu_seqlens from {borders[:1]} to {borders[-1:]} for {n} tokens", supported=f"borders from 0 to {n}"
        )
    if lengths.numel() and int(lengths.min()) < 0:
        raise Unsupported("cu_seqlens that decrease", supported="0, end of document 1, end of document 2, ...")
    if longest is not None and lengths.numel() and longest < int(lengths.max()):
        raise Unsupported(
            f"max_length={longest} with a document of {int(lengths.max())} tokens",
            supported=f"at least {int(lengths.max())}",
            nearest="max_length=None",
        )


def check_pairs(bias: Shaped[Tensor, "b h n m"], *sizes: int | None) -> None:
    """Raise Unsupported unless each axis of `bias` has the given size (None: any size) or 1. Not checked in a graph,
    where equal sizes may be different symbols."""
    if torch.compiler.is_compiling():
        return
    if any(given not in (1, size) for given, size in zip(bias.shape, sizes, strict=True) if size is not None):
        expected = ", ".join("any" if size is None else f"{size} or 1" for size in sizes)
        raise Unsupported(f"bias of shape {tuple(bias.shape)}", supported=f"({expected}); cached keys come first")


def gather_pairs(
    bias: Shaped[Tensor, "#b #h #n #m"], queries: Gathering, keys: Gathering
) -> Shaped[Tensor, "#batch #h #length #key_length"]:
    """Move values for pairs of tokens, such as a bias on scores, to dense ranks; zeros where a token is not valid."""
    if queries.lengths is None and keys.lengths is None:
        return bias
    if bias.shape[-2] not in (1, queries.source_length) or bias.shape[-1] not in (1, keys.source_length):
        raise Unsupported(
            f"pairs of shape {tuple(bias.shape)} together with padding or packing",
            supported=f"(B or 1, H or 1, {queries.source_length} or 1, {keys.source_length} or 1)",
        )
    if not torch.compiler.is_compiling() and queries.batch != keys.batch:
        raise Unsupported(
            f"pairs of {queries.batch} query sequences and {keys.batch} key sequences", supported="equal numbers"
        )
    if queries.dense_index is not None or keys.dense_index is not None:
        n, m = queries.source_length, keys.source_length
        if n == 0 or m == 0:
            return bias.new_zeros(queries.batch, bias.shape[1], queries.length, keys.length)
        q, k = queries.token_numbers()[:, :, None], keys.token_numbers()[:, None, :]
        bias = bias.expand(queries.source_batch, -1, n, m)[q // n, :, q % n, k % m].permute(0, 3, 1, 2)
    for layout, axis in ((queries, -2), (keys, -1)):
        if layout.lengths is not None:
            bias = _where(valid_from_lengths(layout.lengths, layout.length), bias, axis, 0)
    return bias


def _row_starts(x: Tensor, axis: int) -> Int[Tensor, "b 1"]:
    return torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[axis]


def flip_rows(x: Shaped[Tensor, "b ..."], lengths: Int[Tensor, " b"] | None, axis: int = -2) -> Shaped[Tensor, "b ..."]:
    """Reverse the valid part of each row, leaving its padding in place. Its own inverse.

    Args:
        x: batch first, right-padded.
        lengths: number of valid tokens in each row; None when all are valid.
        axis: the token axis.
    """
    if lengths is None:
        return x.flip(axis)
    n = x.shape[axis]
    column = torch.arange(n, device=x.device)
    end = lengths[:, None]
    return _take(x, _row_starts(x, axis) + torch.where(column < end, end - 1 - column, column), None, axis, 0)


def place_queries(
    q: Shaped[Tensor, "b ..."],
    m: int,
    query_lengths: Int[Tensor, " b"] | None = None,
    key_lengths: Int[Tensor, " b"] | None = None,
    axis: int = -2,
) -> Shaped[Tensor, "b ..."]:
    """Bottom-right alignment: move query i of a row to key rank i + L_k - L_q of `m` places; zeros elsewhere.

    Queries with a negative rank precede every key and are dropped. :func:`take_queries` is the way back.

    Args:
        q: batch first, with n query slots along `axis`, right-padded.
        m: number of key slots.
        query_lengths: L_q of each row; None for n.
        key_lengths: L_k of each row; None for m.
        axis: the token axis.
    """
    return _shift(q, m, query_lengths, key_lengths, axis)


def take_queries(
    y: Shaped[Tensor, "b ..."],
    n: int,
    query_lengths: Int[Tensor, " b"] | None = None,
    key_lengths: Int[Tensor, " b"] | None = None,
    axis: int = -2,
) -> Shaped[Tensor, "b ..."]:
    """Take `n` query slots from the ranks where :func:`place_queries` put them; zero for dropped queries and padding.

    Args:
        y: batch first, with m key slots along `axis`.
        n: number of query slots.
        query_lengths: L_q of each row; None for n.
        key_lengths: L_k of each row; None for m.
        axis: the token axis.
    """
    return _shift(y, n, key_lengths, query_lengths, axis)


def _shift(x: Tensor, size: int, lengths: Tensor | None, new_lengths: Tensor | None, axis: int) -> Tensor:
    """Move the valid part of each row so that it ends at `new_lengths` on an axis of `size`; zeros elsewhere."""
    old_size = x.shape[axis]
    if lengths is None and new_lengths is None:
        return F.pad(x.movedim(axis, 0), (0, 0) * (x.ndim - 1) + (size - old_size, 0)).movedim(0, axis)
    end = old_size if lengths is None else lengths[:, None]
    new_end = size if new_lengths is None else new_lengths[:, None]
    column = torch.arange(size, device=x.device) + (end - new_end)
    valid = (column >= 0) & (column < end)
    return _take(x, _row_starts(x, axis) + column.clamp(0, max(old_size - 1, 0)), valid, axis, 0)


def take_tokens(x: Shaped[Tensor, "b h n d"], index: Int[Tensor, "b h slots"]) -> Shaped[Tensor, "b h slots d"]:
    """Take the tokens at the given indices, for each head. Copies whole rows at once, unlike `gather`."""
    batch, heads, n, width = x.shape
    start = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * n
    taken = x.reshape(-1, width).index_select(0, (index + start).flatten())
    return taken.view(batch, heads, index.shape[2], width)


@dataclass(frozen=True)
class QueryBlocks:
    """Queries sorted into blocks, each of one group.

    Attributes:
        table: indices of the queries in each block; query 0 fills up short blocks.
        first: index of one query in each block, to look up its group.
        place: for each query, its place in the flattened table.
    """

    table: Int[Tensor, "b h blocks size"]
    first: Int[Tensor, "b h blocks"]
    place: Int[Tensor, "b h n"]


def group_queries(group: Int[Tensor, "b h n"], most: int, size: int) -> QueryBlocks:
    """Sort queries into blocks of `size` by their group number, of which there are at most `most` different ones."""
    n = group.shape[2]
    count = min(n, n // size + most)
    ordered, order = group.sort(dim=-1, stable=True)
    within = torch.arange(n, device=group.device) - torch.searchsorted(ordered, ordered)
    block = (within % size == 0).cumsum(-1) - 1
    at = block * size + within % size
    table = order.new_zeros(*order.shape[:2], count * size).scatter(-1, at, order)
    table = table.unflatten(2, (count, size))
    return QueryBlocks(table, table[..., 0], torch.zeros_like(at).scatter_(-1, order, at))
