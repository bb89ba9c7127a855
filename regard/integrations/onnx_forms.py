"""Operators that ONNX lacks or that are translated to it wrongly, written in other operators.

They are substituted before a program is converted to ONNX, so that mechanisms need not know about ONNX. Searches and
running maxima compare all pairs of elements: their memory grows with the square of the length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.engines.gated_recurrence.torch_form import solve_unit_by_products


def sort_stable(x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """``torch.sort(x, stable=True)``: ONNX's TopK, unlike PyTorch's, returns equal values in order of index."""
    whole = x if x.is_floating_point() or x.dtype in (torch.int32, torch.int64) else x.to(torch.int32)
    values, order = torch.topk(whole, x.shape[dim], dim, largest=descending, sorted=True)
    return values.to(x.dtype), order


def argsort_stable(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    """``torch.argsort(x, stable=True)``."""
    return sort_stable(x, stable=stable, dim=dim, descending=descending)[1]


def search_sorted(
    ordered: Tensor,
    values: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """``torch.searchsorted``: the number of elements of `ordered` that come before each value."""
    if sorter is not None:
        ordered = ordered.gather(-1, sorter)
    of_each, value = ordered.unsqueeze(-2), values.unsqueeze(-1)
    after = of_each > value if right or side == "right" else of_each >= value
    places = (~after).sum(-1, dtype=torch.int32 if out_int32 else torch.int64)  # NaN comes after everything
    return places.view(values.shape)


def running_maximum(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``torch.cummax``: the largest element so far, and its last index."""
    return _running(x, dim, -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min, torch.amax)


def running_minimum(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``torch.cummin``: the smallest element so far, and its last index."""
    return _running(x, dim, torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).max, torch.amin)


def _running(x: Tensor, dim: int, unseen: float, most: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    of_each = x.movedim(dim, -1).unsqueeze(-2)
    place = torch.arange(of_each.shape[-1], device=x.device)
    seen = place <= place[:, None]
    values = most(torch.where(seen, of_each, unseen), -1)
    so_far = values.unsqueeze(-1)
    has_it = (of_each == so_far) | ((of_each != of_each) & (so_far != so_far))
    places = torch.where(seen & has_it, place, 0).amax(-1)
    return values.movedim(-1, dim), places.movedim(-1, dim)


def solve_triangular(
    matrix: Tensor, right: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """``torch.linalg.solve_triangular`` for lower unit triangular matrices; others keep PyTorch's own form."""
    if upper or not left or not unitriangular:
        return NotImplemented
    return solve_unit_by_products(matrix, right)


def convolve_3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Tensor:
    """``torch.conv3d``: without a bias, its own translation to ONNX adds one of a wrong shape."""
    return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0, 0, 0], groups)


FORMS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.sort.stable: sort_stable,
    torch.ops.aten.argsort.stable: argsort_stable,
    torch.ops.aten.searchsorted.Tensor: search_sorted,
    torch.ops.aten.cummax.default: running_maximum,
    torch.ops.aten.cummin.default: running_minimum,
    torch.ops.aten.linalg_solve_triangular.default: solve_triangular,
    torch.ops.aten.conv3d.default: convolve_3d,
}
"""The forms by the operator that each replaces, as ``ExportedProgram.run_decompositions`` takes them."""


def as_onnx(program: torch.export.ExportedProgram, **options: Any) -> Any:
    """Convert a program to a `torch.onnx.ONNXProgram` by the forms above; options are those of `torch.onnx.export`."""
    with torch.no_grad():  # gradients would make sizes results of the loops, which the conversion does not take
        return torch.onnx.export(program.run_decompositions(dict(FORMS)), **{"verbose": False, **options})
