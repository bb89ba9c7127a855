"""Exact softmax attention to keys and values that do not fit into memory, one chunk at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regard.contract import Unsupported, at_least
from regard.core.visibility import CountedRanks, Visibility
from regard.distributed.schemes import Partial
from regard.engines.attention import attention

if TYPE_CHECKING:
    from jaxtyping import Float


@torch.no_grad()
def attend_million(
    q: Float[Tensor, "b h n d"],
    k: Any,
    v: Any,
    *,
    q_chunk: int = 1024,
    kv_chunk: int = 16_384,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Float[Tensor, "b h n v"]:
    """Outputs of the queries, without gradients. At most `kv_chunk` keys and values are in memory at a time::

        k = numpy.load("keys.npy", mmap_mode="r")  # (B, G, M, d)

    Args:
        q: queries, in memory.
        k, v: (B, G, M, d) and (B, G, M, e), as tensors or anything that numpy can slice: a memory map, an h5py or zarr
            array.
        q_chunk: queries at a time. Each chunk of queries reads all keys that it can see once.
        causal: the queries are the last N of the M tokens, and see keys up to their own position.
        scale: scale of the scores; 1 / sqrt(d) if None.

    Raises:
        Unsupported: for shapes that do not fit.
    """
    at_least("q_chunk", q_chunk, 1)
    at_least("kv_chunk", kv_chunk, 1)
    if q.ndim != 4 or len(k.shape) != 4 or len(v.shape) != 4:
        raise Unsupported("inputs without 4 axes", supported="q (B, H, N, d), k (B, G, M, d) and v (B, G, M, e)")
    batch, heads, n, width = q.shape
    _, groups, m, value_width = v.shape
    if tuple(k.shape) != (batch, groups, m, width) or v.shape[0] != batch or not groups or heads % groups:
        raise Unsupported(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            supported="q (B, H, N, d), k (B, G, M, d) and v (B, G, M, e), G a divisor of H",
        )
    if causal and n > m:
        raise Unsupported(f"{n} queries as the last of {m} tokens", supported="at most as many queries as keys")
    output = q.new_empty((batch, heads, n, value_width))
    for begin in range(0, n, q_chunk):
        block = q[:, :, begin : begin + q_chunk]
        first = m - n + begin  # rank of the first query
        found = Partial.empty(block, output)
        seen = min(m, first + block.shape[2]) if causal else m
        for start in range(0, seen, kv_chunk):
            keys, values = (_read(x, start, min(start + kv_chunk, seen), q) for x in (k, v))
            hidden = max(0, start - first) if causal else 0  # queries before all keys of this chunk
            rows = block[:, :, hidden:]
            rank = first + hidden - start if causal else 0
            where = CountedRanks(rows.shape[2], keys.shape[2], rank, True, q.device)
            out, _, lse = attention(
                rows,
                keys,
                values,
                where,
                visibility=Visibility(causal=causal),
                scale=width**-0.5 if scale is None else scale,
                want_lse=True,
                backend=backend,
            )
            assert lse is not None  # it was requested
            found.add(slice(hidden, None), out, lse)
        output[:, :, begin : begin + q_chunk] = found.out.to(q.dtype)
    return output


def _read(x: Any, start: int, stop: int, q: Tensor) -> Tensor:
    """Read some of the tokens, as a tensor with the dtype and device of the queries."""
    part = x[:, :, start:stop]
    return torch.as_tensor(part if isinstance(part, Tensor) else np.array(part)).to(q)
