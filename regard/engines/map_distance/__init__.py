"""The distance of an estimated attention map from exact attention, SEA's training loss (Lee et al., arXiv 2310.01777).

For a query with scores e for the pixels of its map, weights p of the keys that it sees, and pixels as in
:mod:`regard.engines.pixel_attention`:

    r_j     = exp(e_pixel(j)) / sum over visible i of exp(e_pixel(i))
    kl      = KL(p, r),   squares = sum_j (p_j - r_j)^2

With a teacher, p are the teacher's weights, and w, the softmax of scale q . k, is trained too: kl + KL(p, w), squares +
sum_j (p_j - w_j)^2. Without a teacher, p is w itself, without a gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from regard.backends import Engine, add_engine, execute
from regard.core.precision import without_autocast
from regard.engines.map_distance import native_form, torch_form
from regard.engines.map_distance.problem import Problem

if TYPE_CHECKING:
    from jaxtyping import Float


def map_distance(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    estimate: Float[Tensor, "b h n c"],
    problem: Problem,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b h n"], Float[Tensor, "b h n"]]:
    """kl and squares for each query in at least float32; 0 if it sees no key."""
    with without_autocast(q.device):
        return execute("map_distance", backend, q.device, q.dtype, q, k, estimate, problem)


add_engine("map_distance", torch=Engine(torch_form.run), native=Engine(native_form.run, native_form.refuses))

__all__ = ["Problem", "map_distance"]
