r"""Moving a weight, or the data, is moving the target: both shifts of arXiv 2304.13276, and how far they reach.

With b' = b - (f_1 - f_0), where f_0 and f_1 are the predictions before and after x or A has moved,

    |f_1 - b| = |f_0 - b'|

identically: b' need not be a probability vector, but sums to the same as b if f is one. Bounds on |b' - b| = |f_1 -
f_0|:

    loose (the paper)   n^1.5 exp(10 R^2) |x_1 - x_0|   and   n^1.5 exp(10 R^2) |A_1 - A_0|,   for |A|, |x| <= R
    tight (here)        |A| |x_1 - x_0| / 2             and   |x| |A_1 - A_0| / 2

in spectral norms. The tight ones follow from |diag(f) - f f^T| <= 1/2 for every probability vector f, with equality
where two entries are 1/2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import at_least
from regard.studies.softmax_regression.regression import Regression

if TYPE_CHECKING:
    from jaxtyping import Float


def shift_of_weight(problem: Regression, x0: Float[Tensor, "*b d"], x1: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
    """The shifted target b' for a weight that moves from x0 to x1."""
    return problem.b - (problem.predict(x1) - problem.predict(x0))


def shift_of_data(before: Regression, after: Regression, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
    """The shifted target b' for keys that move from one problem's to another's, as attention moves its tokens."""
    return before.b - (after.predict(x) - before.predict(x))


def log10_loose_factor(n: int, radius: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """log10 of the factor n^1.5 exp(10 R^2), which itself overflows float64 at R = 9."""
    return 1.5 * math.log10(n) + 10 * radius.square() / math.log(10)


def tight_bound_of_weight(a: Float[Tensor, "*b n d"], x0: Tensor, x1: Tensor) -> Float[Tensor, "*b"]:
    """The tight bound |A| |x1 - x0| / 2."""
    return torch.linalg.matrix_norm(a, 2) * (x1 - x0).norm(dim=-1) / 2


def tight_bound_of_data(a0: Float[Tensor, "*b n d"], a1: Float[Tensor, "*b n d"], x: Tensor) -> Float[Tensor, "*b"]:
    """The tight bound |x| |A1 - A0| / 2."""
    return x.norm(dim=-1) * torch.linalg.matrix_norm(a1 - a0, 2) / 2


def extreme(
    n: int,
    d: int,
    distance: float = 1e-2,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and shifts at which the tight bounds are reached in the limit of small shifts.

    Two keys are opposite along a direction v, with a probability of 1/2 each; all others are short, along a direction w
    orthogonal to v, and the weight is so long against w that their probabilities vanish.

    Args:
        n: number of keys, 2 or more; d: width, 2 or more.
        distance: length of the shift along v.

    Returns:
        A (n, d), x0 and x1 (d,), and A1 (n, d), the keys after the data's shift at x0.
    """
    at_least("n", n, 2)
    at_least("d", d, 2)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=dtype))[0]
    v, w = basis[:, 0], basis[:, 1]
    pair = torch.zeros(n, dtype=dtype)
    pair[0], pair[1] = 0.5**0.5, -(0.5**0.5)
    short = 0.5 / max(1, n - 2) ** 0.5  # together shorter than the pair, so that the pair's norm is that of A
    rest = torch.zeros(n, dtype=dtype)
    rest[2:] = -short
    a = torch.outer(pair, v) + torch.outer(rest, w)
    length = 40 / short
    x0, x1 = (length * w + side * distance / 2 * v for side in (-1, 1))
    middle = length * w
    return a, x0, x1, a + distance / length * torch.outer(pair, middle / length)
