"""Memory traffic of exact attention: numbers read from slow memory and written to it (FlashAttention, arXiv 2205.14135).

Slow memory is a GPU's HBM or a CPU's main memory; fast memory is its on-chip memory or cache, which holds S numbers.
The counts are for one head with N queries and M keys of width d; with B_c = ceil(S / 4d), B_r = min(B_c, d) and
T_c = ceil(M / B_c):

| numbers | standard attention | tiles, keys in the outer loop (algorithm 1) |
|---|---|---|
| forward, read | Nd + 2 Md + 2 NM | 2 Md + T_c (2 Nd + 2 N) |
| forward, written | Nd + 2 NM | T_c (Nd + 2 N) |
| backward, read | 3 Nd + 2 Md + 5 NM | 2 Nd + 2 Md + T_c (3 Nd + 2 N) |
| backward, written | Nd + 2 Md + 2 NM | N + 2 Md + T_c Nd |

Standard attention stores its scores and weights; tiled attention stores only the output and a maximum and a sum for
each query, and its backward pass reads the log-sum-exp and the products of the output with its gradient instead. Blocks
that a block mask hides are skipped. So tiled attention moves about N M d^2 / S numbers times the share of visible
blocks, which is less than standard attention if S is more than about 4 d^2. Initial zeros are not counted as written.

:func:`io_count` has the closed forms; :func:`counted_attention` and :func:`counted_gradients` run the algorithms on
memory that counts its accesses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Unsupported, at_least, one_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

ALGORITHMS = ("standard", "flash")


@dataclass(frozen=True)
class Traffic:
    """Counts of numbers read from and written to slow memory."""

    reads: int
    writes: int

    @property
    def total(self) -> int:
        """Numbers read plus numbers written."""
        return self.reads + self.writes


def block_sizes(dim: int, fast_memory: int) -> tuple[int, int]:
    """Return the number of queries and keys of a tile, B_r and B_c, for a fast memory of `fast_memory` numbers."""
    at_least("dim", dim, 1)
    at_least("fast_memory", fast_memory, 1)
    columns = math.ceil(fast_memory / (4 * dim))
    return min(columns, dim), columns


def io_count(
    algorithm: str,
    n: int,
    m: int,
    dim: int,
    fast_memory: int,
    *,
    visible: Bool[Tensor, "row_blocks column_blocks"] | None = None,
    backward: bool = False,
) -> Traffic:
    """Compute the memory traffic of one head of attention by the closed forms.

    Args:
        algorithm: ``standard`` or ``flash`` (tiles).
        n: number of queries, >= 0.
        m: number of keys, >= 0.
        dim: width of queries, keys and values, >= 1.
        fast_memory: numbers that fast memory holds, >= 1; standard attention streams and does not depend on it.
        visible: for block-sparse tiles, the visible blocks of B_r queries by B_c keys (:func:`block_sizes`); all when
            None.
        backward: count the gradients of q, k and v, once the output is known, instead of the output.

    Raises:
        Unsupported: for sizes that are too small, an unknown algorithm, or a block mask of another shape.
    """
    one_of("algorithm", algorithm, ALGORITHMS)
    at_least("n", n, 0)
    at_least("m", m, 0)
    if algorithm == "standard":
        block_sizes(dim, fast_memory)
        _without_blocks(visible)
        if backward:
            return Traffic(3 * n * dim + 2 * m * dim + 5 * n * m, n * dim + 2 * m * dim + 2 * n * m)
        return Traffic(n * dim + 2 * m * dim + 2 * n * m, n * dim + 2 * n * m)
    rows, columns = (_parts(length, size) for length, size in zip((n, m), block_sizes(dim, fast_memory), strict=True))
    visible = _checked(visible, len(rows), len(columns))
    queries = int((visible * torch.tensor(rows, dtype=torch.long)[:, None]).sum())  # in all visible blocks
    keys = int((visible.any(0) * torch.tensor(columns, dtype=torch.long)).sum())  # in blocks that any query sees
    if backward:
        return Traffic(2 * n * dim + 2 * keys * dim + queries * (3 * dim + 2), n + 2 * keys * dim + queries * dim)
    return Traffic(2 * keys * dim + queries * (2 * dim + 2), queries * (dim + 2))


class SlowMemory:
    """Counts the numbers loaded and stored. Loads return copies, so tiles can only access slow memory through it."""

    def __init__(self) -> None:
        self.reads = self.writes = 0

    def load(self, x: Tensor) -> Tensor:
        """Return a copy of `x`, counted as read."""
        self.reads += x.numel()
        return x.clone()

    def store(self, where: Tensor, x: Tensor) -> None:
        """Copy `x` into `where`, counted as written."""
        self.writes += x.numel()
        where.copy_(x)

    @property
    def traffic(self) -> Traffic:
        """The traffic so far."""
        return Traffic(self.reads, self.writes)


def counted_attention(
    algorithm: str,
    q: Float[Tensor, "n d"],
    k: Float[Tensor, "m d"],
    v: Float[Tensor, "m d"],
    fast_memory: int,
    *,
    visible: Bool[Tensor, "row_blocks column_blocks"] | None = None,
) -> tuple[Float[Tensor, "n d"], Traffic]:
    """Run softmax attention with scale d^-0.5 on counting memory; returns the output and the traffic.

    Queries that see no key have output 0. Arguments and errors as for :func:`io_count`.
    """
    output, _, traffic = _forward(algorithm, q, k, v, fast_memory, visible)
    return output, traffic


def counted_gradients(
    algorithm: str,
    q: Float[Tensor, "n d"],
    k: Float[Tensor, "m d"],
    v: Float[Tensor, "m d"],
    grad_output: Float[Tensor, "n d"],
    fast_memory: int,
    *,
    visible: Bool[Tensor, "row_blocks column_blocks"] | None = None,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"], Float[Tensor, "m d"], Traffic]:
    """Compute the gradients of q, k and v on counting memory, after a forward pass that is not counted."""
    output, kept, _ = _forward(algorithm, q, k, v, fast_memory, visible)
    memory, scale = SlowMemory(), q.shape[1] ** -0.5
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
    if algorithm == "standard":
        grad_scores = torch.zeros_like(kept)  # first the gradient of the weights, then that of the scores
        memory.store(grad_v, memory.load(kept).T @ memory.load(grad_output))
        memory.store(grad_scores, memory.load(grad_output) @ memory.load(v).T)
        weights, of_weights = memory.load(kept), memory.load(grad_scores)
        memory.store(grad_scores, weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)))
        memory.store(grad_q, scale * memory.load(grad_scores) @ memory.load(k))
        memory.store(grad_k, scale * memory.load(grad_scores).T @ memory.load(q))
        return grad_q, grad_k, grad_v, memory.traffic
    rows, columns = block_sizes(q.shape[1], fast_memory)
    products = torch.zeros_like(kept)
    for i in _slices(len(q), rows):
        memory.store(products[i], (memory.load(grad_output[i]) * memory.load(output[i])).sum(-1))
    seen = _checked(visible, math.ceil(len(q) / rows), math.ceil(len(k) / columns))
    for j, column in zip(_slices(len(k), columns), seen.T, strict=True):
        if not column.any():
            continue
        keys, values = memory.load(k[j]), memory.load(v[j])
        of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
        for i, shown in zip(_slices(len(q), rows), column, strict=True):
            if shown:
                queries, of_output = memory.load(q[i]), memory.load(grad_output[i])
                weights = (scale * queries @ keys.T - memory.load(kept[i])[:, None]).exp()
                of_scores = scale * weights * (of_output @ values.T - memory.load(products[i])[:, None])
                of_values += weights.T @ of_output
                of_keys += of_scores.T @ queries
                memory.store(grad_q[i], memory.load(grad_q[i]) + of_scores @ keys)
        memory.store(grad_k[j], of_keys)
        memory.store(grad_v[j], of_values)
    return grad_q, grad_k, grad_v, memory.traffic


def _forward(
    algorithm: str, q: Tensor, k: Tensor, v: Tensor, fast_memory: int, visible: Tensor | None
) -> tuple[Tensor, Tensor, Traffic]:
    """Return the output, the weights (standard attention) or log-sum-exp (tiled attention), and the traffic."""
    one_of("algorithm", algorithm, ALGORITHMS)
    memory, scale = SlowMemory(), q.shape[1] ** -0.5
    rows, columns = block_sizes(q.shape[1], fast_memory)
    output = torch.zeros_like(q)
    if algorithm == "standard":
        _without_blocks(visible)
        scores, weights = (q.new_zeros(len(q), len(k)) for _ in range(2))
        memory.store(scores, scale * memory.load(q) @ memory.load(k).T)
        memory.store(weights, memory.load(scores).softmax(-1))
        memory.store(output, memory.load(weights) @ memory.load(v))
        return output, weights, memory.traffic
    largest, total = q.new_full((len(q),), -torch.inf), q.new_zeros(len(q))
    seen = _checked(visible, math.ceil(len(q) / rows), math.ceil(len(k) / columns))
    for j, column in zip(_slices(len(k), columns), seen.T, strict=True):
        if not column.any():
            continue
        keys, values = memory.load(k[j]), memory.load(v[j])
        for i, shown in zip(_slices(len(q), rows), column, strict=True):
            if shown:
                scores = scale * memory.load(q[i]) @ keys.T
                before, sum_before, mean = memory.load(largest[i]), memory.load(total[i]), memory.load(output[i])
                now = torch.maximum(before, scores.amax(-1))
                weights = (scores - now[:, None]).exp()
                old = sum_before * (before - now).exp()
                new = old + weights.sum(-1)
                memory.store(output[i], (old[:, None] * mean + weights @ values) / new[:, None])
                memory.store(largest[i], now)
                memory.store(total[i], new)
    return output, largest + total.log(), memory.traffic


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _parts(length: int, size: int) -> list[int]:
    return [part.stop - part.start for part in _slices(length, size)]


def _checked(visible: Tensor | None, rows: int, columns: int) -> Tensor:
    """Return the block mask as booleans on the CPU."""
    if visible is None:
        return torch.ones(rows, columns, dtype=torch.bool)
    if visible.dtype != torch.bool or visible.shape != (rows, columns):
        raise Unsupported(
            f"visible blocks of dtype {visible.dtype} and shape {tuple(visible.shape)}",
            supported=f"booleans ({rows}, {columns}), one for each block of queries and block of keys",
        )
    return visible.cpu()


def _without_blocks(visible: Tensor | None) -> None:
    if visible is not None:
        raise Unsupported(
            "visible blocks with algorithm='standard', which stores all scores",
            supported="visible=None",
            nearest="algorithm='flash'",
        )
