"""Softmax attention of few queries to a paged cache in C++ (`native/src/attention_decode.cpp`), without gradients.

The same kernel serves few queries on keys in one tensor, by :mod:`regard.engines.attention.native_form`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import MOST
from regard.backends.operators import operator
from regard.contract import Unsupported
from regard.engines.attention.native_form import Attention, AttentionDecode, VisibilityArguments
from regard.engines.heads import heads_arguments


@operator("attention_decode")
def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    lengths: Tensor,
    query_ranks: Tensor,
    limits: Sequence[int],
    scale: float,
    softcap: float,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; q (B, H, n, D), pages of keys (P, G, page size, D) and values (P, G, page size, V).

    Args:
        pages: (B, most pages) int64: the pages of each row in order, each with `page size` keys. Entries beyond the
            last key of a row are ignored.
        lengths: (B,) int64: number of keys in each row, with the ranks 0, 1, ...
        query_ranks: (B or 1, n) int64.
        limits: causal (0 or 1), left, right (-1 for no limit), block (0 for no limit), lookback, lookahead, as in
            :class:`regard.core.visibility.Visibility`.
        softcap: 0 for none.
        sink: (H,) float32.

    Raises:
        Unsupported: for tensors that do not fit, and for pages that do not exist.
    """
    _check(q, k, v, pages, lengths, query_ranks, limits, sink)
    out, lse = _empty_results(q, v)
    if out.numel() == 0:
        return out, lse
    q, k, v, pages, query_ranks = map(library.rows_contiguous, (q, k, v, pages, query_ranks))
    lengths = lengths.contiguous()
    sink = None if sink is None else sink.contiguous()
    page_size = k.shape[2]
    visibility = VisibilityArguments(library.pointer(query_ranks), None, query_ranks.stride(0), 0, *limits)
    if query_ranks.shape[0] == 1:
        visibility.query_ranks_stride = 0
    arguments = Attention(
        **heads_arguments(q, k, v, out, lse) | {"m": page_size * pages.shape[1]},
        scale=scale,
        softcap=softcap,
        sink=library.pointer(sink),
        visibility=visibility,
    )
    library.call(
        AttentionDecode(
            forward=ctypes.addressof(arguments),
            pages=library.pointer(pages),
            pages_stride=pages.stride(0),
            page_size=page_size,
            lengths=library.pointer(lengths),
        )
    )
    return out, lse


@attention_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v)


attention_decode.refuse_gradient(
    "the gradient of attention to a paged cache",
    supported="calls without gradients",
    nearest="regard.functional.softmax_attention on keys and values in one tensor",
)


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    lengths: Tensor,
    query_ranks: Tensor,
    limits: Sequence[int],
    sink: Tensor | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.dtype != q.dtype or x.dtype not in library.DTYPES:
            raise Unsupported(
                f"{name} with {x.ndim} axes in {str(x.dtype)[6:]}",
                supported="4 axes, all in float32 or all in bfloat16",
            )
    batch, heads, n, width = q.shape
    held, kv_heads, page_size = v.shape[:3]
    if k.shape != (held, kv_heads, page_size, width) or min(kv_heads, page_size, width) < 1 or heads % kv_heads:
        raise Unsupported(
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)}",
            supported="(B, H, n, D), (P, G, page size, D) and (P, G, page size, V), H a multiple of G",
        )
    for name, x, shapes in (
        ("pages", pages, [(batch, pages.shape[-1] if pages.ndim else 0)]),
        ("lengths", lengths, [(batch,)]),
        ("query_ranks", query_ranks, [(1, n), (batch, n)]),
    ):
        if tuple(x.shape) not in shapes or x.dtype != torch.int64:
            raise Unsupported(f"{name} {tuple(x.shape)} {str(x.dtype)[6:]}", supported=f"{shapes[-1]} int64")
    if sink is not None and (sink.shape != (heads,) or sink.dtype != torch.float32):
        raise Unsupported(f"sink {tuple(sink.shape)} {str(sink.dtype)[6:]}", supported=f"({heads},) float32")
    if any(x is not None and x.device.type != "cpu" for x in (q, k, v, pages, lengths, query_ranks, sink)):
        raise Unsupported("decoding attention on another device", supported="cpu")
    if len(limits) != 6 or not library.within_range(*limits, least=-1):
        raise Unsupported(f"limits {list(limits)}", supported=f"six up to {library.MOST}")
    slots = page_size * pages.shape[1]
    if not library.within_range(query_ranks, n, slots, width, v.shape[3]):
        raise Unsupported(f"{slots} slots of pages, or query ranks of any size", supported=f"up to {library.MOST}")
    if batch == 0:
        return
    if not 0 <= int(lengths.min()) <= int(lengths.max()) <= page_size * pages.shape[1]:
        raise Unsupported(f"lengths {lengths.tolist()}", supported=f"0 to {page_size * pages.shape[1]}")
    check_pages(pages, lengths, page_size, held)


def check_pages(pages: Tensor, lengths: Tensor, page_size: int, held: int) -> None:
    """Raise Unsupported if one of the pages (B, most) that rows of these lengths read is not among the `held` ones;
    entries past a row's last token are ignored."""
    firsts = torch.arange(pages.shape[1], device=lengths.device) * page_size
    used = pages[firsts < lengths[:, None]]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < held:
        raise Unsupported("pages that do not exist", supported=f"0 to {held - 1}")


__all__ = ["MOST", "attention_decode"]
