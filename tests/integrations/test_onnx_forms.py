"""Replacements for operators that ONNX lacks give the same results, in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import onnxruntime
import pytest
import torch

from regard import Unsupported
from regard.integrations.export import export_onnx
from regard.integrations.onnx_forms import (
    running_maximum,
    running_minimum,
    search_sorted,
    solve_triangular,
    sort_stable,
)

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # from torch itself


@pytest.mark.parametrize("size", [1, 2, 7, 64, 100])
def test_products_solve_triangular_systems(size):
    matrix = torch.randn(2, 3, size, size, dtype=torch.float64) / size**0.5
    right = torch.randn(2, 3, size, 4, dtype=torch.float64)
    expected = torch.linalg.solve_triangular(matrix, right, upper=False, unitriangular=True)
    torch.testing.assert_close(solve_triangular(matrix, right, upper=False, unitriangular=True), expected)


class SolvesUpper(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.solve_triangular(x, x, upper=True)


def test_other_triangular_systems_are_refused_in_one_sentence():
    with pytest.raises(Unsupported, match=r"ONNX program of a SolvesUpper .*solve_triangular") as caught:
        export_onnx(SolvesUpper().eval(), torch.eye(3)[None], lengths=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"right": True}, {"side": "right"}, {"out_int32": True}])
@pytest.mark.parametrize("make", [lambda *n: torch.randint(9, n), lambda *n: torch.randn(n).round()])
def test_comparisons_find_places(options, make):
    ordered, values = make(3, 20).sort(-1).values, make(3, 7)
    if values.is_floating_point():
        values[0, 0] = torch.nan
    for rows, of in ((ordered, values), (ordered[0], values), (ordered[0], values[1, 1])):
        torch.testing.assert_close(search_sorted(rows, of, **options), torch.searchsorted(rows, of, **options))
    rows = make(3, 20)
    order = rows.argsort(-1)
    found = search_sorted(rows, values, sorter=order, **options)
    torch.testing.assert_close(found, torch.searchsorted(rows, values, sorter=order, **options))


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8])
@pytest.mark.parametrize(("form", "name"), [(running_maximum, "cummax"), (running_minimum, "cummin")])
def test_the_extreme_so_far_and_where_it_was_last(form, name, dtype, dim):
    x = torch.randint(6, (2, 9, 8)).to(dtype)
    if dtype is torch.float64:
        x[0, 4, 3] = torch.nan
    for found, expected in zip(form(x, dim), getattr(x, name)(dim), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


class Sorts(torch.nn.Module):
    """All operators at once, one of them on booleans."""

    def forward(self, x):
        up, places = torch.sort(x, stable=True)
        down = torch.argsort(x, descending=True, stable=True)
        false_first = torch.argsort(x > 1, stable=True)
        return (
            places,
            down,
            false_first,
            torch.searchsorted(up, x),
            torch.cummax(x, -1).values,
            torch.cummin(x, -1).indices,
        )


def test_equal_values_keep_their_order_in_onnx_runtime_at_any_length():
    program = export_onnx(Sorts().eval(), torch.randint(3, (2, 9)).float(), optimize=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (given,) = session.get_inputs()
    for n in (5, 40):
        x = torch.randint(3, (2, n)).float()
        for found, expected in zip(session.run(None, {given.name: x.numpy()}), Sorts()(x), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected)
    with torch.no_grad():
        assert sort_stable(x > 1, stable=True)[0].dtype is torch.bool
