r"""LeanAttention: softmax attention of ragged batches whose work is cut into equal spans (Sanovar et al., arXiv 2405.10480).

In decoding there is one query a request, and a worker for each head leaves most of a machine idle, or waits for the longest
request. Here all tiles of keys of all requests and heads lie in one line, each worker has an equal span, and outputs that
were cut are put together from their states:

    m = max tau q.k,   l = sum exp(tau q.k - m),   o = sum exp(tau q.k - m) v;    O = o / l,   LSE = m + ln l

Merging states is associative, and exact for parts of any lengths (:func:`regard.engines.merging.merge_states`). The result
is that of softmax attention, whoever computes what::

    output = lean_attention(q, k, v, lengths, workers=4)                           # (B, H, N, V)
    output = lean_attention(q, k, v, lengths, workers=4, scheme="per_head")        # as FlashAttention-2 divides the work
    makespans(lengths, kv_heads=8, workers=108)                                    # tiles of the busiest worker, by scheme

The native kernel for decoding (:mod:`regard.engines.attention.paged`), which `regard serve` runs, divides its own work like
that, among the threads of one call.

| paper | here |
|---|---|
| LeanTile, T_n | a tile of `tile` keys |
| T_m | `rows` queries, of all heads that share a head of keys |
| G, grid size | `workers` |
| host block | the worker with the first tile of a unit; here units that were cut are merged when all workers are done |

Deviations: two phases instead of waiting for flags, which would never come where workers run one after another; a worker's
tiles of one unit are computed several at a time.
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
    """Softmax attention of n queries of each request to the first `lengths` of its keys.

    Args:
        lengths: keys of each request; all of m when None.
        scheme: how the work is divided: ``lean``, ``per_head`` or ``fixed_split``.
        workers: among how many; the machine's processors when None.
        splits: of ``fixed_split``; by FlashDecoding's heuristic when None.
        tile: keys of a tile; 256 for heads up to 64 wide, 128 up to 128, 64 beyond when None.
        rows: queries of a unit; all in decoding, 64 heads and queries together in prefill, when None.
        causal: the last query is aligned with the last key of its request, and sees none after its own place.
        scale: multiplies the scores; D^-0.5 when None.
        mask: keys that may be seen, beside `lengths`.
        pages: where k and v are pools, the pages of each request in order.
        backend: ``loop`` runs one worker after another, ``threads`` each in a thread with one thread of torch, ``native``
            likewise with the kernel for decoding, without gradients.
        want_lse: also return the log-sum-exp of the scores, in at least float32; -inf for a query that sees no key.

    Raises:
        Unsupported: for shapes that do not fit, and calls that the native kernel does not take.
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
    """The state of each part."""
    compute = native_part if backend == "native" else torch_part
    if backend == "native":
        work.check_native()

    def worker(parts: Sequence[Part]) -> list[tuple[Part, State]]:
        return [(part, compute(work, part)) for part in parts]

    if backend == "loop":
        return {part: state for parts in plan.workers for part, state in worker(parts)}
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()

    def alone(parts: Sequence[Part]) -> list[tuple[Part, State]]:
        with torch.set_grad_enabled(grad):  # which a thread does not inherit
            return worker(parts)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(len(plan.workers)) as pool:
            return {part: state for found in pool.map(alone, plan.workers) for part, state in found}
    finally:
        torch.set_num_threads(threads)


def _gathered(plan: Schedule, work: Work, states: dict[Part, State]) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps from the states of parts; those of units that were cut are merged."""
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
    """Tiles of the busiest worker by each scheme: what times should be proportional to.

    Args:
        workers: processors at one time (thread blocks of a GPU, threads of a CPU).
        splits: of ``fixed_split``; by FlashDecoding's heuristic when None.
        others: as of :func:`lean_attention`.
    """
    units = Units(tuple(lengths), kv_heads, queries, tile, rows or max(1, queries), causal)
    given = {"fixed_split": splits}
    return {
        scheme: make_schedule(units.counts, workers, scheme=scheme, splits=given.get(scheme)).makespan
        for scheme in SCHEMES
    }


__all__ = ["SCHEMES", "Schedule", "Units", "lean_attention", "make_schedule", "makespans", "worker_count"]
