"""Softmax over the keys of chosen pixels: an estimated map, K pixels wide for any number of keys, chooses them.

For a query that sees the keys of ranks 0 to n - 1, with scores e for the pixels of its map (Lee et al., arXiv
2310.01777, section 3.3):

    pixel(j) = floor((j + 1/2) K / n - 10^-4), at least 0, for the key of rank j
    kept     = the pixels of highest softmax of e, round(k K / n) a head on average, at least 1
    P        = softmax over { j : pixel(j) in kept } of scale q . k_j,   0 if there are none
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from regard.backends import Engine, add_engine, execute
from regard.engines.pixel_attention import native_form, torch_form
from regard.engines.pixel_attention.problem import GROUPINGS, Mean, Mix, Problem
from regard.engines.pixel_attention.torch_form import by_rows, pixels_of_keys, read_regularly

if TYPE_CHECKING:
    from jaxtyping import Float


def pixel_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    problem: Problem,
    mix: Mix,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h n m"] | None]:
    """Output in at least the dtype of v and, if requested, P multiplied by its factor sigmoid(row_logit)."""
    return execute("pixel_attention", backend, q.device, q.dtype, q, k, v, problem, mix)


add_engine("pixel_attention", torch=Engine(torch_form.run), native=Engine(native_form.run, native_form.refuses))

__all__ = ["GROUPINGS", "Mean", "Mix", "Problem", "by_rows", "pixel_attention", "pixels_of_keys", "read_regularly"]
