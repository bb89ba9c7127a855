"""What stands for operators that ONNX lacks gives what they give, in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import onnxruntime
import pytest
import torch

from regard import Unsupported
from regard.integrations.export import export_onnx
from regard.integrations.onnx_forms import running_maximum, search_sorted, solve_triangular, sort_stable

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # PyTorch's own code


@pytest.mark.parametrize("size", [1, 2, 7, 64, 100])
def test_products_solve_triangular_systems(size):
    matrix = torch.randn(2, 3, size, size, dtype=torch.float64) / size**0.5
    right = torch.randn(2, 3, size, 4, dtype=torch.float64)
    expected = torch.linalg.solve_triangular(matrix, right, upper=False, unitriangular=True)
    torch.testing.assert_close(solve_triangular(matrix, right, upper=False, unitriangular=True), expected)


@pytest.mark.parametrize("other", [{"upper": True}, {"left": False}, {"unitriangular": False}])
def test_other_triangular_systems_are_refused(other):
    with pytest.raises(Unsupported, match="triangular system"):
        solve_triangular(torch.eye(3), torch.eye(3), **{"upper": False, "unitriangular": True} | other)


@pytest.mark.parametrize("right", [False, True])
def test_comparisons_find_places(right):
    ordered = torch.randint(9, (3, 20)).sort(-1).values
    values = torch.randint(-2, 11, (3, 7))
    torch.testing.assert_close(
        search_sorted(ordered, values, right=right), torch.searchsorted(ordered, values, right=right)
    )
    torch.testing.assert_close(
        search_sorted(ordered[0], values, right=right), torch.searchsorted(ordered[0], values, right=right)
    )


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("make", [lambda *n: torch.randint(-5, 5, n), lambda *n: torch.randn(n).round()])
def test_the_largest_so_far_and_where_it_was_last(dim, make):
    x = make(2, 9, 8)
    for found, expected in zip(running_maximum(x, dim), x.cummax(dim), strict=True):
        torch.testing.assert_close(found, expected)


class Sorts(torch.nn.Module):
    """All operators at once, one of them on truth values."""

    def forward(self, x):
        up, places = torch.sort(x, stable=True)
        down = torch.argsort(x, descending=True, stable=True)
        false_first = torch.argsort(x > 1, stable=True)
        return places, down, false_first, torch.searchsorted(up, x), torch.cummax(x, -1).values


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
