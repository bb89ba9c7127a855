"""Replacements for operators that ONNX lacks give the same results, in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from support import close

from regard import Unsupported, create_layer
from regard.engines import scan
from regard.integrations.export import export_onnx, without_warnings
from regard.integrations.onnx_forms import (
    as_onnx,
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


def test_loops_with_weights_inside_run_in_onnx_runtime_for_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MOST_IN_A_ROW", 0)
    layer = create_layer("mamba", 8, 1).eval()
    with torch.no_grad(), without_warnings():
        program = torch.export.export(
            layer, (torch.randn(2, 5, 8),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
        )
    with without_warnings():
        converted = as_onnx(program, optimize=False)
    session = onnxruntime.InferenceSession(converted.model_proto.SerializeToString())
    x = torch.randn(3, 5, 8)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    close(torch.from_numpy(found), layer(x).output, 1e-5)


def test_convolutions_of_volumes_have_no_bias_of_their_own_in_onnx_runtime() -> None:
    module, x = torch.nn.Conv3d(48, 48, 3, padding=1, stride=2, bias=False).eval(), torch.randn(2, 48, 4, 4, 4)
    program = export_onnx(module, x, lengths=False, optimize=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    close(torch.from_numpy(found), module(x), 1e-5)
