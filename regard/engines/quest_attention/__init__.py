"""Attention of one token to the cache pages that may hold its largest scores (Quest, Tang et al., arXiv 2406.10774).

The smallest and the largest entries of a page's keys bound all scores in it:

    q . k <= sum_d max(q_d low_d, q_d high_d)        for low_d <= k_d <= high_d

Of the pages before the newest key's, those with the largest bounds are read, together with the newest key's page:
softmax of scale q . k over their keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from regard.backends import Engine, add_engine, execute, prefers_native
from regard.engines.quest_attention import native_form, torch_form
from regard.engines.quest_attention.problem import Problem
from regard.engines.quest_attention.torch_form import page_bounds

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def quest_attention(
    q: Float[Tensor, "b h 1 d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    low: Float[Tensor, "b g p d"],
    high: Float[Tensor, "b g p d"],
    counts: Int[Tensor, "b g"],
    *,
    page: int,
    chosen: int,
    shared: bool = True,
    scale: float,
    backend: str | None = None,
) -> Float[Tensor, "b h 1 e"]:
    """Softmax attention of one token to some pages of each key/value head.

    On a CPU, in float32 and bfloat16, a single kernel call scores the pages, chooses some and reads their keys in
    place; it has no gradients. On other devices the keys of the chosen pages are gathered.

    Args:
        k, v: cache slots, the first `counts` of which hold keys and values.
        low, high: the smallest and the largest entries of the keys in each page of `page` slots, p = s / page. Only
            those of full pages are used.
        counts: number of keys, int64, on the CPU; the output of a head without keys is 0.
        chosen: number of pages to read besides that of the newest key; all if there are no more.
        shared: whether the query heads of a key/value head read the same pages, those with the largest sums of bounds.
        scale: factor on the scores.
        backend: see :func:`regard.which_backend`.

    Raises:
        Unsupported: for tensors that do not fit together.
    """
    problem = Problem(q, k, v, low, high, counts, page, chosen, shared, scale)
    if backend is None and prefers_native():
        found = native_form.plain(problem)
        if found is not None:
            return found
    problem.check()
    return execute("quest_attention", backend, q.device, q.dtype, problem)


add_engine("quest_attention", torch=Engine(torch_form.run), native=Engine(native_form.run, native_form.refuses))

__all__ = ["Problem", "page_bounds", "quest_attention"]
