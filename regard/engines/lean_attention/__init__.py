r"""LeanAttention: softmax attention of ragged batches in equal spans of work (Sanovar et al., arXiv 2405.10480).

Decoding has one query per request, so that one worker per head leaves most of a machine idle, or waits for the longest
request. Here the key tiles of all requests and heads form one line, each worker gets an equal span of it, and outputs
that were cut are merged from their states:

    m = max tau q.k,   l = sum exp(tau q.k - m),   o = sum exp(tau q.k - m) v;    O = o / l,   LSE = m + ln l

Merging states is associative, and exact for parts of any length (:func:`regard.engines.merging.merge_states`). The
result is that of softmax attention, however the work is divided::

    output = lean_attention(q, k, v, lengths, workers=4)                           # (B, H, N, V)
    output = lean_attention(q, k, v, lengths, workers=4, scheme="per_head")        # as FlashAttention-2 divides the work
    makespans(lengths, kv_heads=8, workers=108)                                    # tiles of the busiest worker, by scheme

The native kernel for decoding (:mod:`regard.engines.attention.paged`), which `regard serve` uses, divides its own work
in this way among the threads of one call.

| paper | here |
|---|---|
| LeanTile, T_n | a tile of `tile` keys |
| T_m | `rows` queries, of all heads that share a head of keys |
| G, grid size | `workers` |
| host block | the worker with the first tile of a unit; here units that were cut are merged when all workers are done |

Deviations: there are two phases, since waiting for flags would deadlock if workers run one after another; a worker
computes several tiles of one unit at a time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import one_of
from regard.core.precision import wide
from regard.engines.lean_attention.forms import Cache, Work, native_part, torch_part
from regard.engines.lean_attention.schedule import SCHEMES, Part, Schedule, Units, make_schedule, worker_count
from regard.engines.merging import finish, merge_states

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

BACKENDS = ("loop", "threads", "native")
ROWS = 64
"""Queries times heads of a unit in prefill, as in the authors' code."""


def lean_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"] | Float[Tensor, "pages g page_size d"],
    v: Float[Tensor, "b g m v"] | Float[Tensor, "pages g page_size v"],
    lengths: Sequence[int] | Int[Tensor, " b"] | None = None,
    *,
    scheme: str = "lean",
    workers: int | None = None,
    splits: int | None = None,
    tile: int | None = None,
    rows: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Bool[Tensor, "b m"] | None = None,
    pages: Int[Tensor, "b most"] | None = None,
    backend: str = "threads",
    want_lse: bool = False,
) -> Float[Tensor, "b h n v"] | tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h n"]]:
    """Softmax attention of n queries in each request to the first `lengths` of its keys.

    Args:
        lengths: number of keys in each request; None for all m.
        scheme: how to divide the work: ``lean``, ``per_head`` or ``fixed_split``.
        workers: number of workers; that of the machine's processors when None.
        splits: number of splits for ``fixed_split``; by FlashDecoding's heuristic when None.
        tile: keys per tile; when None, 256 for heads up to 64 wide, 128 for up to 128, else 64.
        rows: queries per unit; when None, all in decoding, and 64 heads and queries together in prefill.
        causal: align the last query with the last key of its request, and hide the keys after each query.
        scale: factor on the scores; D^-0.5 when None.
        mask: mask of the visible keys, in addition to `lengths`.
        pages: the pages of each request in order, if k and v are pools.
        backend: ``loop`` runs one worker after another, ``threads`` runs each in a thread with one thread of torch,
            ``native`` does the same with the kernel for decoding, without gradients.
        want_lse: whether to return also the log-sum-exp of the scores, in at least float32; -inf for a query that sees
            no key.

    Raises:
        Unsupported: for shapes that do not fit, and calls that the native kernel does not support.
    """
    one_of("backend", backend, BACKENDS)
    cache = Cache.of(q, k, v, lengths, pages, mask)
    heads, n, width = q.shape[1:]
    kv_heads = k.shape[1]
    tile = tile or (256 if width <= 64 else 128 if width <= 128 else 64)
    groups = heads // kv_heads
    rows = rows or max(1, n if n * groups <= ROWS else ROWS // groups)
    units = Units(tuple(cache.lengths), kv_heads, n, tile, rows, causal)
    if workers is None:
        workers = os.cpu_count() or 1
    plan = make_schedule(units.counts, workers, scheme=scheme, splits=splits)
    work = Work(q.unflatten(1, (kv_heads, groups)), cache, units, width**-0.5 if scale is None else scale)
    if not plan.counts:
        output = q.new_zeros((*q.shape[:3], v.shape[3]))
        return (output, wide(output[..., 0])) if want_lse else output
    output, lse = _gathered(plan, work, _run(plan, work, backend))
    return (output, lse) if want_lse else output


State = tuple[Tensor, Tensor, Tensor]


def _run(plan: Schedule, work: Work, backend: str) -> dict[Part, State]:
    """Compute the state of each part."""
    compute = native_part if backend == "native" else torch_part
    if backend == "native":
        work.check_native()

    def worker(parts: Sequence[Part]) -> list[tuple[Part, State]]:
        return [(part, compute(work, part)) for part in parts]

    if backend == "loop":
        return {part: state for parts in plan.workers for part, state in worker(parts)}
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()

    def alone(parts: Sequence[Part]) -> list[tuple[Part, State]]:
        with torch.set_grad_enabled(grad):  # threads do not inherit this mode
            return worker(parts)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(len(plan.workers)) as pool:
            return {part: state for found in pool.map(alone, plan.workers) for part, state in found}
    finally:
        torch.set_num_threads(threads)


def _gathered(plan: Schedule, work: Work, states: dict[Part, State]) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps from the states of parts; merges those of units that were cut."""
    parts: dict[int, list[State]] = {}
    for part, state in states.items():
        parts.setdefault(part.unit, []).append(state)
    outputs: list[Tensor] = []
    lses: list[Tensor] = []
    for unit in range(len(plan.counts)):
        found = parts.get(unit)
        if found is None:
            output, lse = work.nothing(unit)
        elif len(found) == 1:
            output, lse = finish(*found[0])
        else:
            output, lse = finish(*merge_states(*(torch.stack(x) for x in zip(*found, strict=True))))
        outputs.append(output)
        lses.append(lse)
    return work.assembled(outputs), work.assembled(lses)


def makespans(
    lengths: Sequence[int],
    *,
    kv_heads: int,
    workers: int,
    tile: int = 256,
    queries: int = 1,
    rows: int | None = None,
    causal: bool = False,
    splits: int | None = None,
) -> dict[str, int]:
    """The number of tiles of the busiest worker under each scheme, to which run times should be proportional.

    Args:
        workers: number of simultaneous workers (thread blocks of a GPU, threads of a CPU).
        splits: number of splits for ``fixed_split``; by FlashDecoding's heuristic when None.
        others: as in :func:`lean_attention`.
    """
    units = Units(tuple(lengths), kv_heads, queries, tile, rows or max(1, queries), causal)
    given = {"fixed_split": splits}
    return {
        scheme: make_schedule(units.counts, workers, scheme=scheme, splits=given.get(scheme)).makespan
        for scheme in SCHEMES
    }


__all__ = ["SCHEMES", "Schedule", "Units", "lean_attention", "make_schedule", "makespans", "worker_count"]
