"""GPTQ: columns are rounded one after another, and those that follow make up for the error (arXiv 2210.17323).

With the inputs X (T, K) of a layer, H = X^T X + d I (the paper's factor of 2 cancels), and U the upper Cholesky factor of
H^-1 = U^T U, for each column j in order

    q_j = the nearest number to w_j on its grid
    e_j = (w_j - q_j) / U_jj
    w_i -= e_j U_ji        for i > j

which keeps ||X W^T - X Q^T|| small, where rounding to nearest keeps ||W - Q|| small. Columns go in blocks: what a block does to
the columns behind it is one product at its end.

Deviations: the grids of a group are made when its first column is reached, from the weights as they are then, in the order of
the columns; in the order of activations they are made beforehand, of the weights as they were. d is `damping` times the mean of
H's diagonal. A column whose input is always 0 is rounded to nearest, where the public code sets it to 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.compression.weights.grids import Grids, in_groups, make_grids
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
    calibrate: str = "minmax",
    damping: float = 0.01,
    order: str = "columns",
    block: int = BLOCK,
    mask: Bool[Tensor, "n k"] | None = None,
) -> Codes:
    """Codes of a weight for inputs with the second moments X^T X.

    Args:
        weight: in any floating dtype; computed in float64.
        second: the sum of the outer products of the inputs.
        format, calibrate: of the grids.
        damping: what is added to the diagonal of H, in means of it.
        order: ``columns``, or ``activations``: the columns with the largest inputs first.
        block: columns of a block.
        mask: of the weights that are not 0 and stay so, for symmetric grids; all may change when None.

    Raises:
        Unsupported: for second moments that are not finite, or no matrix that has an inverse.
    """
    columns = weight.shape[1]
    whole = format.columns(columns)
    work = padded(weight.detach().double(), whole).clone()
    factor, permutation = inverse_factor(second.double(), whole, damping, order)
    fixed: Grids | None = None
    group = format.group
    if group is None or order == "activations":
        grouped, _ = in_groups(weight.detach().double(), format)
        fixed = make_grids(grouped, format, calibrate)
    work = work[:, permutation]
    groups = 1 if group is None else whole // group
    scale = work.new_zeros((len(work), groups), dtype=torch.bfloat16)
    offset = None if format.symmetric else torch.zeros_like(scale)
    if fixed is not None:
        scale = fixed.scale.reshape(-1, groups).clone()
        offset = None if fixed.offset is None else fixed.offset.reshape(-1, groups).clone()
    values = torch.zeros_like(work, dtype=torch.int8)
    low, high = format.codes
    block = block if group is None else max(1, block // group) * group
    mask = None if mask is None else padded(mask.to(values), whole)[:, permutation]

    def settle(j: int) -> Tensor:
        own = 0 if group is None else int(permutation[j]) // group
        if fixed is None and group is not None and j % group == 0:
            made = make_grids(work[:, j : j + group], format, calibrate)
            scale[:, own] = made.scale
            if offset is not None and made.offset is not None:
                offset[:, own] = made.offset
        grid = Grids(scale[:, own], None if offset is None else offset[:, own], low, high)
        codes = grid.codes(work[:, j : j + 1])
        if mask is not None:
            codes = codes * mask[:, j : j + 1]
        values[:, j] = codes[:, 0]
        return grid.numbers(codes, work.dtype)[:, 0]

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
    """Settle the columns of a weight one after another; those that follow make up for what each loses.

    Args:
        work: the weight, which is changed.
        factor: U, see the module.
        block: columns of a block.
        settle: called with the number of a column, whose final numbers (N,) it returns.
        enter: called with the borders of each block before its first column.
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


def inverse_factor(second: Tensor, whole: int, damping: float, order: str) -> tuple[Tensor, Tensor]:
    """The upper factor U of the inverse of H, with `whole` columns, and the order of the columns."""
    if not bool(torch.isfinite(second).all()):
        raise Unsupported("inputs of a layer that are not finite", supported="calibration data that the model can read")
    size = second.shape[0]
    h = torch.zeros(whole, whole, dtype=second.dtype, device=second.device)
    h[:size, :size] = second
    diagonal = h.diagonal()
    mean = diagonal[:size].mean()
    empty = diagonal == 0
    diagonal[empty] = mean if mean > 0 else 1.0
    permutation = torch.arange(whole, device=h.device)
    if order == "activations":
        permutation = torch.argsort(torch.where(empty, 0.0, diagonal), descending=True, stable=True)
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
