"""Attention to the cache blocks that queries retrieve by their landmarks (Mohtashami and Jaggi, arXiv 2305.16300,
section 3.3).

Each block ends with a landmark, whose score is the block's gate. For query i and its chosen blocks c, with S = scale Q
K^T:

    u_i^c = softmax of S_i over the tokens of block c
    o_i   = sum over c of softmax over the chosen blocks of S_i,landmark(c), times sum_j u_ij^c v_j

The `top_k` blocks whose landmarks score highest are chosen; among ties the newest. Scores are ties if they differ from
the lowest score that is high enough by no more than rounding may, see :func:`tolerance`: landmarks may have equal keys,
and rounding depends on the other rows and tokens that are computed with them.

With rotary positions, blocks are assigned to slots of `block` + 1 positions, with the landmark at the last one. For
scoring, the `top_k` newest blocks have the slots 1 to `top_k`, and older ones slot 0; for reading, the m-th chosen block
in order of time (from 0) has slot m, or m + 1 if it is one of the newest. As long as a row has no more than `top_k`
blocks, their numbers are their slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from regard.backends import Engine, add_engine, execute, prefers_native
from regard.engines.retrieved_attention import native_form, torch_form
from regard.engines.retrieved_attention.native_form import Step
from regard.engines.retrieved_attention.problem import Problem, tolerance
from regard.engines.retrieved_attention.torch_form import best, blocks_of, landmark_scores, margin_of

if TYPE_CHECKING:
    from jaxtyping import Float


def retrieved_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    problem: Problem,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h n"]]:
    """Output, and log-sum-exp of the chosen landmarks' scores, in at least float32; 0 and -inf without blocks.

    Args:
        q: queries, rotated by their positions.
        k, v: the cache, not rotated; on any device.
    """
    return execute("retrieved_attention", backend, q.device, k.dtype, q, k, v, problem)


def retrieving_step(
    q: Float[Tensor, "b h 1 d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], problem: Problem
) -> Step | None:
    """Attention of one query per row, whose token is the last in the cache, to the blocks that it retrieves and to the
    tokens after the last landmark. None for calls that need the general path, such as under a profiler or a mode.

    Args:
        q: queries, not rotated.
    """
    return native_form.step(q, k, v, problem) if prefers_native() else None


add_engine("retrieved_attention", torch=Engine(torch_form.run), native=Engine(native_form.run, native_form.refuses))

__all__ = [
    "Problem",
    "Step",
    "best",
    "blocks_of",
    "landmark_scores",
    "margin_of",
    "retrieved_attention",
    "retrieving_step",
    "tolerance",
]
