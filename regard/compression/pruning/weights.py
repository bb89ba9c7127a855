r"""Which weights of a linear layer are set to 0, and how the others are adjusted.

| name | weights set to 0 | the others |
|---|---|---|
| ``magnitude`` | the smallest of the layer | stay |
| ``wanda`` | in each row, those with the smallest \|w_ij\| \|\|x_j\|\| (Sun et al., arXiv 2306.11695) | stay |
| ``sparsegpt`` | in each block of columns, those with the smallest w_ij^2 / [H^-1]_jj | compensate, as in GPTQ (Frantar and Alistarh, arXiv 2301.00774) |

with the inputs x_j of column j over the calibration data, and H = X^T X + d I. In a pattern N:M, N of each M
consecutive columns are kept.

Zeros make nothing faster or smaller here: dense products multiply them like other numbers, and files store them. They
are for machines with sparse kernels, and to see what a model can do without.

Deviations: SparseGPT's scores for the free pattern are compared within blocks of 128 columns over all rows, as in the
authors' code; columns of H without any data get the mean of its diagonal, where the code sets their weights to 0. Shares
are rounded to the nearest number of weights; the code of SparseGPT's free pattern and of magnitudes removes one more than
the share, that of Wanda rounds down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.compression.weights.gptq import BLOCK, inverse_factor, sweep
from regard.contract import Unsupported

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

FREE = "free"


def read_pattern(pattern: str) -> tuple[int, int] | None:
    """Parse a pattern such as ``2:4`` to (N, M); None for ``free``.

    Raises:
        Unsupported: for other texts.
    """
    if pattern == FREE:
        return None
    kept, _, of = str(pattern).partition(":")
    if kept.isdigit() and of.isdigit() and 0 < int(kept) < int(of):
        return int(kept), int(of)
    raise Unsupported(
        f"pattern={pattern!r}", supported='free, or N:M with N < M (in YAML with quotes: "2:4")', nearest="pattern=2:4"
    )


def magnitude(weight: Float[Tensor, "n k"], ratio: float, pattern: str = FREE) -> Bool[Tensor, "n k"]:
    """Mask of the weights to keep: the largest ones."""
    return _kept(weight.abs()[None], ratio, pattern)[0]


def wanda(
    weight: Float[Tensor, "n k"], squares: Float[Tensor, " k"], ratio: float, pattern: str = FREE
) -> Bool[Tensor, "n k"]:
    """Mask of the weights to keep, given the sums of squared inputs; every row loses the same number."""
    scores = weight.abs() * squares.sqrt().to(weight)
    return _kept(scores[:, None], ratio, pattern)[:, 0]


def sparsegpt(
    weight: Float[Tensor, "n k"],
    second: Float[Tensor, "k k"],
    ratio: float,
    pattern: str = FREE,
    *,
    damping: float = 0.01,
    block: int = BLOCK,
) -> tuple[Float[Tensor, "n k"], Bool[Tensor, "n k"]]:
    """Return the weight with zeros, and the mask of the weights that were kept.

    Args:
        weight: in any floating dtype; computed in float64.
        second: X^T X.
        damping: added to the diagonal of H, as a multiple of its mean.
        block: columns of a block.

    Raises:
        Unsupported: for second moments that are not finite, or whose matrix cannot be inverted.
    """
    work = weight.detach().double().clone()
    columns = work.shape[1]
    factor, _ = inverse_factor(second.double(), columns, damping, None)
    group = read_pattern(pattern)
    mask = torch.ones_like(work, dtype=torch.bool)
    found = torch.zeros_like(work)
    if group is not None:
        block = max(1, block // group[1]) * group[1]

    def enter(start: int, end: int) -> None:
        if group is None:
            scores = (work[:, start:end] / factor.diagonal()[start:end]).abs()
            mask[:, start:end] = _kept(scores[None], ratio, FREE)[0]

    def settle(j: int) -> Tensor:
        if group is not None and j % group[1] == 0:
            end = j + group[1]
            scores = (work[:, j:end] / factor.diagonal()[j:end]).abs()
            mask[:, j:end] = _kept(scores[:, None], ratio, pattern)[:, 0]
        found[:, j] = work[:, j] * mask[:, j]
        return found[:, j]

    sweep(work, factor, block, settle, enter)
    return found.to(weight.dtype), mask


def _kept(scores: Float[Tensor, "s n k"], ratio: float, pattern: str) -> Bool[Tensor, "s n k"]:
    """Mask of the largest scores of each set, all but a share `ratio`, or N of every M consecutive ones."""
    group = read_pattern(pattern)
    if group is not None:
        kept, of = group
        if scores.shape[-1] % of:
            raise Unsupported(
                f"pattern {pattern} in {scores.shape[-1]} columns", supported=f"a multiple of {of} columns"
            )
        sets = scores.unflatten(-1, (-1, of))
        chosen = sets.topk(kept, dim=-1).indices
        return torch.zeros_like(sets, dtype=torch.bool).scatter(-1, chosen, True).flatten(-2)
    flat = scores.flatten(1)
    gone = flat.argsort(dim=1, stable=True)[:, : round(ratio * flat.shape[1])]
    return torch.ones_like(flat, dtype=torch.bool).scatter(1, gone, False).view(scores.shape)
