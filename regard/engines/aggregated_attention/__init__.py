"""Softmax over a window around each place of a map and over the map pooled to fewer places.

A query is a place of the map. Its keys are the places of the window around it that are on the map, and all pooled
places; L is their number. With d(x) = x / |x| and B a bias for each place of the window, or for the offset of a pooled
place (Shi, arXiv 2311.17132, section 3.3):

    s_ij = slope log(L_i) (d(q_i) + moved) . d(k_j) + B_ij
    o_i  = sum_j softmax(s_i)_j v_j + sum over the window of (d(q_i) . t_p + b_p) v_j
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from regard.backends import Engine, add_engine, execute
from regard.engines.aggregated_attention import native_form, torch_form
from regard.engines.aggregated_attention.problem import Problem
from regard.engines.aggregated_attention.torch_form import biases_of_places

if TYPE_CHECKING:
    from jaxtyping import Float


def aggregated_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    far_k: Float[Tensor, "b h m d"],
    far_v: Float[Tensor, "b h m d"],
    problem: Problem,
    backend: str | None = None,
) -> Float[Tensor, "b h n d"]:
    """Output in the dtype of v, from queries, keys and values of all places, and keys and values of pooled ones."""
    return execute("aggregated_attention", backend, q.device, q.dtype, q, k, v, far_k, far_v, problem)


add_engine("aggregated_attention", torch=Engine(torch_form.run), native=Engine(native_form.run, native_form.refuses))

__all__ = ["Problem", "aggregated_attention", "biases_of_places"]
