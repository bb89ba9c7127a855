"""Products with 8-bit and 4-bit weights on every instruction set and thread count, and the operator's refusals."""

from __future__ import annotations

import pytest
import torch
from support import refused
from torch import Tensor

from regard.engines.quantized_linear import dequantize, native_form, pack, quantized_linear
from regard.engines.quantized_linear.problem import Problem


def problem(bits: int, rows: int, n: int, k: int, group: int = 32, *, offset: bool = False) -> Problem:
    """A random problem with a bias."""
    x, bias = torch.randn(rows, k), torch.randn(n)
    if bits == 8:
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        return Problem(x, codes, (0.01 + torch.rand(n, 1)).bfloat16(), None, bias)
    groups = -(-k // group)
    codes = pack(torch.randint(0, 16, (n, groups * group), dtype=torch.uint8))
    offsets = torch.randn(n, groups).bfloat16() if offset else None
    return Problem(x, codes, (0.01 + torch.rand(n, groups)).bfloat16(), offsets, bias)


def error(found: Tensor, p: Problem) -> float:
    """Error relative to the largest sum of magnitudes, so that cancellation does not count."""
    weight = dequantize(p.codes, p.scale, p.offset, torch.float64)[:, : p.x.shape[-1]]
    assert p.bias is not None
    expected = p.x.double() @ weight.T + p.bias.double()
    return float((found - expected).abs().max() / (p.x.double().abs() @ weight.abs().T).max())


def test_products_are_those_of_float64(instruction_set):
    torch.set_num_threads(1)
    for rows in (1, 2, 3, 4, 7, 16):
        for n, k in ((1, 5), (33, 64), (70, 131)):
            assert error(native_form.quantized_linear(given := problem(8, rows, n, k)), given) < 1e-6
            for group, offset in ((32, False), (32, True), (64, True), (128, False)):
                given = problem(4, rows, n, k, group, offset=offset)
                assert error(native_form.quantized_linear(given), given) < 1e-6, (rows, n, k, group, offset)


def test_threads_share_the_rows_of_a_large_weight(threads):
    for given in (problem(8, 3, 600, 700), problem(4, 3, 600, 700, offset=True)):
        assert error(native_form.quantized_linear(given), given) < 1e-6


def test_the_short_way_gives_what_the_operator_gives():
    for given in (problem(8, 1, 40, 64), problem(4, 3, 40, 70, offset=True)):
        fields = given.x, given.codes, given.scale, given.offset, given.bias
        found = native_form.plain(*fields)
        assert found is not None and torch.equal(found, native_form.quantized_linear(given))
        with torch.autograd.profiler.profile():  # an observer is active
            assert native_form.plain(*fields) is None
            assert torch.equal(quantized_linear(*fields), found)


@pytest.mark.parametrize("bits", [8, 4])
def test_tensors_that_do_not_fit_are_refused(bits):
    good = problem(bits, 2, 12, 64)
    x, codes, scale, offset, bias = good.x, good.codes, good.scale, good.offset, good.bias
    for wrong in (
        (x.double(), codes, scale, offset, bias),
        (x[:, :-1].contiguous() if bits == 8 else torch.randn(2, 65), codes, scale, offset, bias),
        (torch.randn(17, 64), codes, scale, offset, bias),
        (x, codes.T.contiguous().T, scale, offset, bias),
        (x, codes.to(torch.int16), scale, offset, bias),
        (x, codes, scale.float(), offset, bias),
        (x, codes, scale[:-1].contiguous(), offset, bias),
        (x, codes, torch.cat([scale] * 3, 1), offset, bias),
        (x, codes, scale, scale[:-1].contiguous(), bias),
        (x, codes, scale, offset, torch.randn(11)),
        (x, codes, scale, offset, torch.randn(12).double()),
    ):
        refused("native product", native_form.quantized_linear, Problem(*wrong))
        assert native_form.plain(*wrong) is None


def test_operators_are_as_torch_wants_them():
    given = problem(4, 2, 12, 64, offset=True)
    arguments = given.x, given.codes, given.scale, given.offset, given.bias
    torch.library.opcheck(
        torch.ops.regard.quantized_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
