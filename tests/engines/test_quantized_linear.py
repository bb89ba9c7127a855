"""Products with 8-bit and 4-bit weights equal those with the weights that the codes stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.backends import prefers_native, watch_backends
from regard.backends.linear.product import FEW_ROWS
from regard.contract import Unsupported
from regard.engines.quantized_linear import dequantize, dynamic_linear, pack, quantized_linear, torch_form, unpack

BF16 = 4e-3
"""Largest error relative to the largest output, where activations and results are bfloat16."""

BACKENDS = {"torch": BF16, "native": 2e-6} if prefers_native() else {"torch": BF16}


def weight_8bit(n: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-128, 128, (n, k), dtype=torch.int8), (0.01 + torch.rand(n, 1)).bfloat16()


def weight_4bit(n: int, k: int, group: int, *, offset: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale = (0.01 + torch.rand(n, k // group)).bfloat16()
    return codes, scale, torch.randn(n, k // group).bfloat16() if offset else None


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def check(x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None) -> None:
    """Check a product in float64, on every backend for few rows, by the default route, and with gaps between rows."""
    bias = torch.randn(len(weight), dtype=torch.float64)
    expected, size = x @ weight.T + bias, float((x.abs() @ weight.abs().T).max())  # cancellation does not count

    def error(found: Tensor) -> float:
        return float((found.double() - expected).abs().max()) / size

    found = quantized_linear(x, codes, scale, offset, bias)
    assert error(found) < 1e-14
    assert torch.equal(quantized_linear(x[None, :, None], codes, scale, offset, bias)[0, :, 0], found)
    single = x.float(), codes, scale, offset, bias.float()
    for backend, tolerance in BACKENDS.items():
        if len(x) <= FEW_ROWS or backend == "torch":
            assert error(quantized_linear(*single, backend=backend)) < tolerance
    found = quantized_linear(*single)
    assert error(found) < (2e-6 if "native" in BACKENDS else BF16)
    apart = torch.cat([x.float(), x.float()], 1)[:, : x.shape[1]]
    assert error(quantized_linear(apart, *single[1:])) < (2e-6 if "native" in BACKENDS else BF16)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, FEW_ROWS, FEW_ROWS + 1])
def test_a_product_with_8_bit_codes_is_that_of_their_weight(rows):
    for n, k in ((21, 48), (21, 37), (1, 16), (64, 1)):  # sizes that torch's operator accepts, and others
        codes, scale = weight_8bit(n, k)
        weight = codes.double() * scale.double()
        assert torch.equal(dequantize(codes, scale, None, torch.float64), weight)
        x = torch.randn(rows, k, dtype=torch.float64)
        check(x, weight, codes, scale, None)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("offset", [False, True])
def test_a_product_with_4_bit_codes_is_that_of_their_weight(group, offset):
    for n in (48, 21):  # sizes that torch's operator accepts, and others
        codes, scale, offsets = weight_4bit(n, 256, group, offset=offset)
        weight = (codes.double() - 8) * scale.double().repeat_interleave(group, 1)
        if offsets is not None:
            weight = weight + offsets.double().repeat_interleave(group, 1)
        packed = pack(codes)
        assert torch.equal(dequantize(packed, scale, offsets, torch.float64), weight)
        for rows in (1, 5, FEW_ROWS + 1):
            x = torch.randn(rows, 250, dtype=torch.float64)  # the last columns of a group are padding
            check(x, weight[:, :250], packed, scale, offsets)


def test_a_weight_that_was_changed_is_read_anew():
    codes, scale, _ = weight_4bit(32, 64, 32, offset=False)
    packed, x = pack(codes), torch.randn(2, 64)
    for backend in BACKENDS:
        before = quantized_linear(x, packed, scale, backend=backend)
        packed.copy_(pack(15 - codes))
        changed = dequantize(packed, scale, None, torch.float64)
        assert difference(quantized_linear(x, packed, scale, backend=backend), x.double() @ changed.T) < BF16
        packed.copy_(pack(codes))
        assert torch.equal(quantized_linear(x, packed, scale, backend=backend), before)


@pytest.mark.skipif("native" not in BACKENDS, reason="no native kernels here")
def test_few_rows_in_float32_go_to_the_kernel_and_other_calls_do_not():
    codes, scale = weight_8bit(8, 32)
    x = torch.randn(2, 32)
    for given, name in (
        (x, "native"),
        (x.double(), "torch"),
        (torch.randn(17, 32), "torch"),
        (x.clone().requires_grad_(), "torch"),
    ):
        with watch_backends() as ran:
            quantized_linear(given, codes, scale)
        assert {one.backend for one in ran if one.engine == "quantized_linear"} == {name}
    with pytest.raises(Unsupported, match="shapes that do not belong"):
        quantized_linear(torch.randn(2, 31), codes, scale, backend="native")
    program = torch.compile(lambda x: quantized_linear(x, codes, scale), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert difference(program(x), quantized_linear(x, codes, scale).double()) < BF16


def test_packing_and_unpacking_4_bit_codes_gives_them_back():
    codes = torch.randint(0, 16, (7, 64), dtype=torch.uint8)
    assert pack(codes).shape == (7, 32)
    assert torch.equal(unpack(pack(codes)), codes)


@pytest.mark.parametrize("rows", [4, 12], ids=["few rows", "integers"])
def test_a_dynamic_product_is_that_of_the_rounded_operands(rows):
    codes, scale = weight_8bit(19, 700)
    x = torch.randn(2, rows, 700) * torch.logspace(-3, 3, 2 * rows).view(2, rows, 1)
    x[0, 1] = 0
    step = x.abs().amax(-1, keepdim=True).clamp(min=torch_form.TINY) / 127
    expected = ((x / step).round().double() @ codes.double().T) * step.double() * scale.double().T
    assert difference(dynamic_linear(x, codes, scale), expected) < 1e-6
    exact = x.double() @ (codes.double() * scale.double()).T
    error = (dynamic_linear(x, codes, scale) - exact).abs().amax(-1) / exact.abs().amax(-1).clamp(min=1e-30)
    assert float(error.max()) < 0.02 and not bool(dynamic_linear(x, codes, scale)[0, 1].any())


def test_gradients_of_weight_only_products_reach_the_inputs():
    codes, scale = weight_8bit(5, 6)
    x = torch.randn(2, 6, requires_grad=True)
    quantized_linear(x, codes, scale).sum().backward()
    assert x.grad is not None
    assert difference(x.grad, dequantize(codes, scale, None, torch.float64).sum(0).expand(2, 6)) < 1e-6


def test_no_rows_give_no_rows():
    codes, scale = weight_8bit(5, 64)
    low, scales, _ = weight_4bit(5, 64, 32, offset=False)
    for found in (
        quantized_linear(torch.zeros(0, 64), codes, scale),
        quantized_linear(torch.zeros(0, 64), pack(low), scales),
        dynamic_linear(torch.zeros(0, 64), codes, scale),
    ):
        assert found.shape == (0, 5)
