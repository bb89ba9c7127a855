"""KV cache of many sequences in pages of one pool, as in PagedAttention (arXiv 2309.06180), and attention to it.

A sequence holds pages only for the tokens that it has, whatever the lengths of other sequences, and returns them when
it ends. Unlike a :class:`regard.contract.State`, which is immutable data, a pool is written in place; a server owns one
per layer::

    cache = PagedCache(rows=8, kv_heads=8, width=64, pages=512)
    cache.append(k, v, lengths)             # prompts, right-padded
    y = paged_attention(q, cache)           # q (rows, heads, n, width): the last n tokens of each row
    cache.reset(finished)                   # rows whose sequence has ended
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from regard.backends import NATIVE
from regard.backends.operators import TRANSFORMS, transformed
from regard.contract import Call, Unsupported, at_least, one_of
from regard.core.visibility import CountedRanks, Ranks, Visibility
from regard.engines.attention import attention
from regard.engines.attention.native_form import DECODED_LONG
from regard.engines.attention.paged import MOST, attention_decode
from regard.engines.cache import KeyValueState

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class PagedCache:
    """Pages of keys and values, and the pages that each row has.

    Args:
        rows: number of simultaneous sequences.
        kv_heads: number of key/value heads.
        width: number of key features.
        value_width: number of value features; that of a key when None.
        pages: number of pages in the pool, for all rows together.
        page_size: tokens per page.

    Attributes:
        k, v: the pool, (pages, kv_heads, page_size, width) and (..., value_width).
        table: (rows, most pages a row has had) int64, on the CPU: the pages of each row in order; -1 for no page.
        lengths: (rows,) int64, on the CPU: number of tokens in each row.
        free: pages that no row uses.

    Raises:
        Unsupported: for sizes below 1.
    """

    k: Float[Tensor, "pages g page_size d"]
    v: Float[Tensor, "pages g page_size v"]
    table: Int[Tensor, "rows most"]
    lengths: Int[Tensor, " rows"]
    free: list[int]

    def __init__(
        self,
        rows: int,
        kv_heads: int,
        width: int,
        value_width: int | None = None,
        *,
        pages: int,
        page_size: int = 64,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        value_width = width if value_width is None else value_width
        sizes = {"rows": rows, "kv_heads": kv_heads, "width": width, "value_width": value_width, "pages": pages}
        for name, size in (sizes | {"page_size": page_size}).items():
            at_least(name, size, 1)
        self.k = torch.zeros(pages, kv_heads, page_size, width, dtype=dtype, device=device)
        self.v = torch.zeros(pages, kv_heads, page_size, value_width, dtype=dtype, device=device)
        self.table = torch.full((rows, 0), -1, dtype=torch.int64, device="cpu")
        self.lengths = torch.zeros(rows, dtype=torch.int64, device="cpu")
        self.free = list(range(pages - 1, -1, -1))

    @property
    def page_size(self) -> int:
        """Number of tokens per page."""
        return self.k.shape[2]

    def append(
        self,
        k: Float[Tensor, "rows g n d"],
        v: Float[Tensor, "rows g n v"],
        lengths: Int[Tensor, " rows"] | None = None,
    ) -> None:
        """Append new tokens to each row: the first `lengths` of the n given (None for all n; 0 leaves a row unchanged).

        Raises:
            Unsupported: for tensors that do not fit the pool, or if too few pages are free; no row has changed then.
        """
        rows, n = self.lengths.shape[0], k.shape[2] if k.ndim == 4 else 0
        for name, x, pool in (("k", k, self.k), ("v", v, self.v)):
            wanted = (rows, pool.shape[1], n, pool.shape[3])
            if tuple(x.shape) != wanted or x.device != pool.device:
                raise Unsupported(
                    f"{name} of shape {tuple(x.shape)} on {x.device}", supported=f"{wanted} on {pool.device}"
                )
        added = (
            torch.full((rows,), n, dtype=torch.int64, device="cpu")
            if lengths is None
            else lengths.to("cpu", torch.int64)
        )
        if added.shape != (rows,) or bool(((added < 0) | (added > n)).any()):
            raise Unsupported(f"lengths {added.tolist()} for {rows} rows", supported=f"0 to {n} for each")
        total = self.lengths + added
        self._take_pages(total)
        places = Rows(self.table, self.lengths).add(n, added, self.page_size, self.k.device)
        places.write(self.k, k)
        places.write(self.v, v)
        self.lengths = total

    def reset(self, rows: Bool[Tensor, " rows"]) -> None:
        """Empty the marked rows and free their pages."""
        if rows.shape != self.lengths.shape or rows.dtype != torch.bool:
            raise Unsupported(
                f"rows of shape {tuple(rows.shape)}", supported=f"a boolean for each of {len(self.lengths)}"
            )
        rows = rows.cpu()
        pages = self.table[rows]
        self.free.extend(pages[pages >= 0].tolist())
        # not in place: earlier calls may still hold the old tables
        self.table = self.table.masked_fill(rows[:, None], -1)
        self.lengths = self.lengths.masked_fill(rows, 0)

    def gather(self) -> tuple[Float[Tensor, "rows g m d"], Float[Tensor, "rows g m v"], Int[Tensor, "rows m"]]:
        """Keys and values of all rows, right-padded with zeros to the longest, and their ranks, -1 in the padding."""
        ranks = _slots(self.lengths)
        k, v = (gather(x, self.table, ranks) for x in (self.k, self.v))
        return k, v, ranks.to(self.k.device)

    def _take_pages(self, lengths: Tensor) -> None:
        """Give each row enough pages for `lengths` tokens."""
        size = self.page_size
        had, needed = -(-self.lengths // size), -(-lengths // size)
        missing = int((needed - had).sum())
        if missing > len(self.free):
            raise Unsupported(
                f"{missing} more pages where {len(self.free)} are free",
                supported=f"{self.k.shape[0]} pages for all rows together",
                nearest="reset of finished rows, or a larger pool",
            )
        table = self.table
        if int(needed.max()) > table.shape[1]:
            # with spare room, so that the table is not copied for each new page
            table = torch.nn.functional.pad(table, (0, 2 * int(needed.max()) - table.shape[1]), value=-1)
        table = table.clone() if missing and table is self.table else table
        for row in (needed > had).nonzero()[:, 0].tolist():
            for index in range(int(had[row]), int(needed[row])):
                table[row, index] = self.free.pop()
        self.table = table


def paged_attention(
    q: Float[Tensor, "rows h n d"],
    cache: PagedCache,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, " h"] | None = None,
    want_lse: bool = False,
    backend: str | None = None,
) -> Float[Tensor, "rows h n v"] | tuple[Float[Tensor, "rows h n v"], Float[Tensor, "rows h n"]]:
    """Softmax attention of the last n tokens of each row, whose keys are already in the cache, to the row's tokens.

    The native kernel reads pages in place. On other devices, with gradients, or with many queries (a prompt), pages are
    first gathered into one tensor.

    Args:
        causal: whether a query only sees the tokens up to its own; otherwise it sees all of the row.
        window: how many tokens before its own a query sees; None for no limit.
        scale: factor on the scores; D^-0.5 when None.
        softcap, sink: as in :func:`regard.engines.attention.attention`.
        want_lse: whether to return also the log-sum-exp of the scores, in at least float32, without the sink.
        backend: ``native`` or ``torch``; None for the fastest that supports the call.

    In rows with fewer than n tokens, the outputs of the queries before the first token are 0.

    Raises:
        Unsupported: for queries that do not fit the cache, or a backend that cannot run the call.
    """
    pool = cache.k
    rows, width = cache.lengths.shape[0], pool.shape[3]
    if q.ndim != 4 or q.shape[0] != rows or q.shape[3] != width or q.shape[1] % pool.shape[1]:
        raise Unsupported(
            f"queries of shape {tuple(q.shape)}",
            supported=f"({rows}, a multiple of {pool.shape[1]}, n, {width})",
        )
    if q.device != pool.device:
        raise Unsupported(f"queries on {q.device}", supported=str(pool.device))
    if softcap is not None and not softcap > 0:
        raise Unsupported(f"softcap={softcap}", supported="softcap > 0", nearest="softcap=None")
    if window is not None:
        at_least("window", window, 0)
    if backend is not None:
        one_of("backend", backend, ("native", "torch"))
    n = q.shape[2]
    queries = cache.lengths[:, None] - n + torch.arange(n, device="cpu")
    output, lse = attend(
        q,
        (pool, cache.v, cache.table, cache.lengths),
        queries,
        visibility=Visibility(causal=causal, left=window),
        scale=width**-0.5 if scale is None else scale,
        softcap=softcap,
        sink=sink,
        want_lse=want_lse,
        backend=backend,
    )
    if not causal and bool((queries < 0).any()):
        absent = (queries < 0)[:, None].to(q.device)  # without a causal mask they would see all of the row
        output, lse = output.masked_fill(absent[..., None], 0), lse.masked_fill(absent, -torch.inf)
    return (output, lse) if want_lse else output


Pool = tuple[Tensor, Tensor, Tensor, Tensor]
"""Pages of keys and of values, each row's pages, and each row's number of tokens; the last two on the CPU."""


def attend(
    q: Float[Tensor, "rows h n d"],
    pool: Pool,
    queries: Int[Tensor, "rows n"],
    *,
    visibility: Visibility,
    scale: float,
    softcap: float | None = None,
    sink: Float[Tensor, " h"] | None = None,
    want_lse: bool = False,
    backend: str | None = None,
) -> tuple[Float[Tensor, "rows h n v"], Float[Tensor, "rows h n"]]:
    """Output and log-sum-exp of queries, with ranks on the CPU, on the rows of a pool; see :func:`paged_attention`."""
    k, v, table, lengths = pool
    reason = "asked for torch" if backend == "torch" else _refusal(q, pool, visibility, sink)
    if reason is None:
        left = -1 if visibility.left is None else min(visibility.left, MOST)
        sink = None if sink is None else sink.float()
        limits = [int(visibility.causal), left, -1, 0, 0, 0]
        return attention_decode(q, k, v, table, lengths, queries, limits, scale, softcap or 0.0, sink)
    if backend == "native":
        raise Unsupported(f"native attention to a paged cache: {reason}", supported="torch", nearest="backend='torch'")
    ranks = _slots(lengths)
    found_k, found_v = gather(k, table, ranks), gather(v, table, ranks)
    output, _, lse = attention(
        q,
        found_k,
        found_v,
        Ranks(queries.to(q.device), ranks.to(q.device), None, None, plain=False),
        visibility=visibility,
        scale=scale,
        softcap=softcap,
        sink=sink,
        want_lse=want_lse,
        backend=backend,
    )
    return output, output[..., 0] if lse is None else lse


@dataclass(eq=False)
class Rows:
    """The pages of rows in several pools of the same layout, such as those of a model's layers.

    Attributes:
        table: (rows, most) pages of each row, enough for its current and its new tokens; on the CPU.
        counts: (rows,) number of tokens in each row; on the CPU.
    """

    table: Int[Tensor, "rows most"]
    counts: Int[Tensor, " rows"]
    _added: tuple[Any, ...] = ()

    def add(self, n: int, lengths: Int[Tensor, " rows"] | None, page_size: int, device: torch.device) -> Added:
        """Find places for the first `lengths` (None: all) of n new tokens in each row; cached for the next layer."""
        if self._added[:4] == (n, id(lengths), page_size, device):
            return self._added[4]
        slots, new, counts = torch.arange(n, device="cpu"), None, torch.full_like(self.counts, n)
        at = self.counts[:, None] + slots
        row = torch.arange(len(counts), device="cpu")[:, None].expand(-1, n)
        if lengths is not None:
            counts = lengths.to("cpu", torch.int64)
            new = slots < counts[:, None]
            at, row = at[new], row[new]
        page, slot = (x.to(device) for x in (self.table[row, at // page_size], at % page_size))
        found = Added(
            Rows(self.table, self.counts + counts), page, slot, None if new is None else new.to(device), lengths
        )
        self._added = (n, id(lengths), page_size, device, found)
        return found


class Added(NamedTuple):
    """Rows after new tokens, with the page and slot of each valid new token, and which are valid (None for all)."""

    rows: Rows
    page: Tensor
    slot: Tensor
    valid: Tensor | None
    lengths: Tensor | None

    def write(self, pool: Float[Tensor, "pages g page_size d"], x: Float[Tensor, "rows g n d"]) -> None:
        """Write the new tokens into a pool."""
        tokens = x.transpose(1, 2)
        with torch.no_grad():
            pool[self.page, :, self.slot] = (tokens if self.valid is None else tokens[self.valid]).to(pool.dtype)


def gather(
    pool: Float[Tensor, "pages g page_size d"], table: Int[Tensor, "rows most"], ranks: Int[Tensor, "rows m"]
) -> Float[Tensor, "rows g m d"]:
    """Tokens of all rows, right-padded with zeros, where ranks are -1."""
    pages = table[:, : -(-ranks.shape[1] // pool.shape[2])].clamp(min=0).to(pool.device)
    found = pool[pages].transpose(1, 2).flatten(2, 3)[:, :, : ranks.shape[1]]
    if bool((ranks[:, -1:] >= 0).all()):
        return found
    return found.masked_fill((ranks < 0).to(pool.device)[:, None, :, None], 0)


def _slots(lengths: Int[Tensor, " rows"]) -> Int[Tensor, "rows m"]:
    """Ranks of the tokens in each row, padded with -1 to the longest row."""
    slots = torch.arange(int(lengths.max()) if lengths.numel() else 0, device="cpu")
    return torch.where(slots < lengths[:, None], slots, -1)


@dataclass(frozen=True)
class PagedState(KeyValueState):
    """Sequences whose keys and values are in a pool. The owner of the state assigns the pages, and the pool is written
    in place: unlike other states, this one is not immutable, and must not be continued more than once.

    It replaces a :class:`regard.engines.cache.KeyValueState` in a call. Softmax attention reads the pages in place
    (:func:`regard.engines.attention_forms.chunked`); for other mechanisms they are gathered.

    Attributes:
        k, v: the pool.
        ranks: empty (b, 0), since ranks in a row count up.
        length: number of tokens in each row.
        rows: the rows' pages.
    """

    rows: Rows = field(kw_only=True)

    @classmethod
    def of(cls, k: Tensor, v: Tensor, rows: Rows) -> PagedState:
        """The state for rows in a pool."""
        length = rows.counts.to(k.device)
        return cls(k, v, length.new_zeros((len(length), 0)), length, rows=rows)

    def appended(self, call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]) -> PagedState:
        """Write the new tokens of a call into their pages; return the state after them."""
        places = self.rows.add(k.shape[2], call.memory_lengths, self.k.shape[2], self.k.device)
        places.write(self.k, k)
        places.write(self.v, v)
        return PagedState.of(self.k, self.v, places.rows)

    @property
    def pool(self) -> Pool:
        """Keys and values of all pages, the pages of each row, and the number of tokens in each row."""
        return self.k, self.v, self.rows.table, self.rows.counts

    def extended(
        self, call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], n: int
    ) -> tuple[KeyValueState, Ranks]:
        after = self.appended(call, k, v)
        ranks, device = _slots(after.rows.counts), k.device
        past, total = self.rows.counts, ranks.shape[1]
        where: Ranks = CountedRanks(n, total, total - n, True, device)
        if len(past) > 1 or call.memory_lengths is not None:
            queries = past[:, None] + k.shape[2] - n + torch.arange(n, device="cpu")
            where = Ranks(queries.to(device), ranks.to(device), None, None, plain=False)
        keys, values = (gather(x, after.rows.table, ranks).to(k.dtype) for x in (self.k, self.v))
        return KeyValueState(keys, values, where.keys.expand(len(past), -1), after.length), where

    def attended(
        self,
        call: Call,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g m d"],
        v: Float[Tensor, "b g m v"],
        visibility: Visibility,
        softcap: float | None = None,
        sink: Float[Tensor, " h"] | None = None,
    ) -> tuple[Float[Tensor, "b h n v"], PagedState] | None:
        """Softmax attention of a call's queries, one per new key or none, if they are few enough to read pages in
        place; otherwise None, and nothing is written."""
        if q.shape[2] == 0:
            return q.new_empty(*q.shape[:3], v.shape[3]), self.appended(call, k, v)
        few = 0 < q.shape[2] == k.shape[2] <= DECODED_LONG
        if not few or _refusal(q, self.pool, visibility, sink) is not None:
            return None
        after = self.appended(call, k, v)
        queries = self.rows.counts[:, None] + torch.arange(q.shape[2], device="cpu")
        output, _ = attend(q, after.pool, queries, visibility=visibility, scale=call.scale, softcap=softcap, sink=sink)
        return output, after


def _refusal(q: Tensor, pool: Pool, visibility: Visibility, sink: Tensor | None) -> str | None:
    """The reason why the native kernel cannot answer these queries; None if it can."""
    missing = NATIVE.missing
    if missing is not None:
        return missing
    if q.device.type != "cpu":
        return f"it runs on cpu, and q is on {q.device.type}"
    if not q.dtype == pool[0].dtype == pool[1].dtype or q.dtype not in NATIVE.dtypes:
        return "it computes where all is float32, or all is bfloat16"
    if transformed():
        return f"it has no {TRANSFORMS}"
    if torch.is_grad_enabled() and (q.requires_grad or (sink is not None and sink.requires_grad)):
        return "it has no gradient"
    if (visibility.right is not None and not visibility.causal) or visibility.block is not None:
        return "it has no limits after a query and no blocks"
    if q.shape[2] > DECODED_LONG:
        return f"it answers at most {DECODED_LONG} queries a row"
    return None
