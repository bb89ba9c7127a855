"""GPTQ: columns are rounded one after another, and later columns compensate for the error (arXiv 2210.17323).

With the inputs X (T, K) of a layer, H = X^T X + d I (the paper's factor of 2 cancels), and U the upper Cholesky factor of
H^-1 = U^T U, for each column j in order

    q_j = the nearest number to w_j on its grid
    e_j = (w_j - q_j) / U_jj
    w_i -= e_j U_ji        for i > j

which keeps ||X W^T - X Q^T|| small, where rounding to nearest keeps ||W - Q|| small. Columns are processed in blocks:
the effect of a block on later columns is applied as one product at its end.

The grids of a group are made when its first column is reached, from the weights at that point. The cost of rounding
column j, after all later columns have compensated, is (w_j - q_j)^2 / U_jj^2; this weights the errors in the search for
grids.

Deviations: in the order of activations, groups stay whole: groups with the largest inputs come first, and likewise the
columns within each group; so grids fit the weights at that point, and a layer reads its groups in storage order. d is
`damping` times the mean of H's diagonal. A column whose input is always 0 is rounded to nearest, where the public code
sets it to 0. The public code makes the grids of a group inside a block from weights that earlier columns of the block have
not yet changed; with blocks as wide as groups both are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.compression.weights.grids import Grids, make_grids
from regard.contract import Unsupported
from regard.engines.quantized_linear import padded
from regard.layers.quantized import Codes, Format

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

BLOCK = 128


def gptq(
    weight: Float[Tensor, "n k"],
    second: Float[Tensor, "k k"],
    format: Format,
    *,
    calibrate: str = "mse",
    damping: float = 0.05,
    order: str = "activations",
    block: int = BLOCK,
    mask: Bool[Tensor, "n k"] | None = None,
) -> Codes:
    """Quantize a weight to codes, for inputs with the second moments X^T X.

    Args:
        weight: in any floating dtype; computed in that dtype, at least float32, with a factor U computed in float64.
        second: the sum of the outer products of the inputs.
        format, calibrate: format and calibrator of the grids.
        damping: added to the diagonal of H, as a multiple of its mean. The paper adds 0.01; estimates from a few
            thousand tokens are poor for that many columns, and more damping loses less on other text.
        order: ``columns``, or ``activations``: groups, and the columns within a group, with the largest inputs first.
        block: columns of a block.
        mask: False for weights that must stay 0, for symmetric grids; all may change when None.

    Raises:
        Unsupported: for second moments that are not finite, or whose matrix cannot be inverted.
    """
    whole = format.columns(weight.shape[1])
    group = format.group or max(whole, 1)
    factor, permutation = inverse_factor(second.double(), whole, damping, group if order == "activations" else None)
    work = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    work, factor = padded(work, whole)[:, permutation], factor.to(work.dtype)
    groups = max(whole // group, 1)
    scale = work.new_zeros((len(work), groups), dtype=torch.bfloat16)
    offset = None if format.symmetric else torch.zeros_like(scale)
    values = torch.zeros_like(work, dtype=torch.int8)
    importance = factor.diagonal().square().reciprocal()
    block = block if format.group is None else max(1, block // group) * group
    mask = None if mask is None else padded(mask.to(values), whole)[:, permutation]
    grids: Grids | None = None

    def settle(j: int) -> Tensor:
        nonlocal grids
        if grids is None or j % group == 0:
            ahead = slice(j, j + group)
            grids = make_grids(work[:, ahead], format, calibrate, importance=importance[ahead])
            own = int(permutation[j]) // group
            scale[:, own] = grids.scale
            if offset is not None and grids.offset is not None:
                offset[:, own] = grids.offset
        codes = grids.codes(work[:, j : j + 1])
        if mask is not None:
            codes = codes * mask[:, j : j + 1]
        values[:, j] = codes[:, 0]
        return grids.numbers(codes, work.dtype)[:, 0]

    sweep(work, factor, block, settle)
    back = torch.argsort(permutation)
    return Codes(values[:, back], scale, offset)


def sweep(
    work: Float[Tensor, "n k"],
    factor: Float[Tensor, "k k"],
    block: int,
    settle: Callable[[int], Tensor],
    enter: Callable[[int, int], None] = lambda start, end: None,
) -> None:
    """Settle the columns of a weight one after another; later columns compensate for the error of each.

    Args:
        work: the weight, modified in place.
        factor: U, see the module.
        block: columns of a block.
        settle: called with the number of a column; returns the column's final values (N,).
        enter: called with the bounds of each block before its first column.
    """
    for start in range(0, work.shape[1], block):
        end = min(start + block, work.shape[1])
        enter(start, end)
        errors = work.new_zeros((len(work), end - start))
        for j in range(start, end):
            error = (work[:, j] - settle(j)) / factor[j, j]
            work[:, j + 1 : end] -= error[:, None] * factor[j, j + 1 : end]
            errors[:, j - start] = error
        work[:, end:] -= errors @ factor[start:end, end:]


def inverse_factor(second: Tensor, whole: int, damping: float, group: int | None) -> tuple[Tensor, Tensor]:
    """The upper factor U of the inverse of H, with `whole` columns, and the order of the columns.

    Args:
        group: columns of a group, to order by the largest inputs; None for the original order.
    """
    if not bool(torch.isfinite(second).all()):
        raise Unsupported("inputs of a layer that are not finite", supported="calibration data that the model can read")
    size = second.shape[0]
    h = torch.zeros(whole, whole, dtype=second.dtype, device=second.device)
    h[:size, :size] = second
    diagonal = h.diagonal()
    mean = diagonal[:size].mean()
    permutation = torch.arange(whole, device=h.device) if group is None else _largest_first(diagonal, group)
    empty = diagonal == 0
    diagonal[empty] = mean if mean > 0 else 1.0
    h = h[permutation][:, permutation]
    h.diagonal().add_(damping * float(mean))
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        return torch.linalg.cholesky(inverse, upper=True), permutation
    except torch.linalg.LinAlgError as error:
        raise Unsupported(
            f"second moments of inputs without an inverse ({error})",
            supported="more calibration text, or a larger damping",
            nearest="damping=0.1",
        ) from None


def _largest_first(sizes: Tensor, group: int) -> Tensor:
    """Order groups by their sums, and the columns in each by their own size."""
    columns = torch.arange(len(sizes), device=sizes.device).view(-1, group)
    inside = sizes.view(-1, group).argsort(dim=1, descending=True, stable=True)
    return columns.gather(1, inside)[sizes.view(-1, group).sum(1).argsort(descending=True, stable=True)].flatten()
