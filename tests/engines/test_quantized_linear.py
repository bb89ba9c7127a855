"""Products with weights in 8 and 4 bits equal those of the weights that the codes stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.engines.quantized_linear import (
    FEW_ROWS,
    dequantize_4bit,
    dequantize_8bit,
    dynamic_linear,
    linear_4bit,
    linear_8bit,
    pack,
    torch_form,
    unpack,
)

BF16 = 4e-3
"""Of the largest output, where activations and results are bfloat16."""


def weight_8bit(n: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-128, 128, (n, k), dtype=torch.int8), (0.01 + torch.rand(n)).bfloat16()


def weight_4bit(n: int, k: int, group: int, *, offset: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale = (0.01 + torch.rand(n, k // group)).bfloat16()
    return codes, scale, torch.randn(n, k // group).bfloat16() if offset else None


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS, FEW_ROWS + 1])
def test_a_product_with_8_bit_codes_is_that_of_their_weight(rows):
    for n, k in ((21, 48), (21, 37), (1, 16), (64, 1)):  # what torch's operator takes, and what it does not
        codes, scale = weight_8bit(n, k)
        weight, bias = codes.double() * scale.double()[:, None], torch.randn(n, dtype=torch.float64)
        assert torch.equal(dequantize_8bit(codes, scale, torch.float64), weight)
        x = torch.randn(rows, k, dtype=torch.float64)
        expected = x @ weight.T + bias
        assert difference(linear_8bit(x, codes, scale, bias), expected) < 1e-14
        assert difference(linear_8bit(x.float(), codes, scale, bias.float()), expected) < BF16


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("offset", [False, True])
def test_a_product_with_4_bit_codes_is_that_of_their_weight(group, offset):
    for n in (48, 21):  # what torch's operator takes, and what it does not
        codes, scale, offsets = weight_4bit(n, 256, group, offset=offset)
        weight = (codes.double() - 8) * scale.double().repeat_interleave(group, 1)
        if offsets is not None:
            weight = weight + offsets.double().repeat_interleave(group, 1)
        packed, own = pack(codes), torch_form.pack_for_torch(codes, scale, offsets)
        assert (own is None) == (n % 16 != 0)
        assert torch.equal(dequantize_4bit(packed, scale, offsets, torch.float64), weight)
        for rows in (1, 5, FEW_ROWS + 1):
            x = torch.randn(rows, 250, dtype=torch.float64)  # the last columns pad a group
            expected = x @ weight[:, :250].T
            assert difference(linear_4bit(x, packed, scale, offsets, None), expected) < 1e-14
            assert difference(linear_4bit(x.float(), packed, scale, offsets, None, own), expected) < BF16


def test_packing_and_unpacking_4_bit_codes_gives_them_back():
    codes = torch.randint(0, 16, (7, 64), dtype=torch.uint8)
    assert pack(codes).shape == (7, 32)
    assert torch.equal(unpack(pack(codes)), codes)


def test_a_dynamic_product_is_that_of_the_rounded_operands_and_sums_integers_exactly():
    codes, scale = weight_8bit(19, 700)
    x = torch.randn(2, 4, 700) * torch.logspace(-3, 3, 8).view(2, 4, 1)
    x[0, 1] = 0
    step = x.abs().amax(-1, keepdim=True).clamp(min=torch_form.TINY) / 127
    expected = ((x / step).round().double() @ codes.double().T) * step.double() * scale.double()
    assert difference(dynamic_linear(x, codes, scale, None), expected) < 1e-6
    exact = x.double() @ (codes.double() * scale.double()[:, None]).T
    error = (dynamic_linear(x, codes, scale, None) - exact).abs().amax(-1) / exact.abs().amax(-1).clamp(min=1e-30)
    assert float(error.max()) < 0.02 and not bool(dynamic_linear(x, codes, scale, None)[0, 1].any())


def test_gradients_of_weight_only_products_reach_the_inputs():
    codes, scale = weight_8bit(5, 6)
    x = torch.randn(2, 6, requires_grad=True)
    linear_8bit(x, codes, scale, None).sum().backward()
    assert x.grad is not None
    assert difference(x.grad, dequantize_8bit(codes, scale, torch.float64).sum(0).expand(2, 6)) < 1e-6


def test_no_rows_give_no_rows():
    codes, scale = weight_8bit(5, 64)
    low, scales, _ = weight_4bit(5, 64, 32, offset=False)
    for found in (
        linear_8bit(torch.zeros(0, 64), codes, scale, None),
        linear_4bit(torch.zeros(0, 64), pack(low), scales, None, None),
        dynamic_linear(torch.zeros(0, 64), codes, scale, None),
    ):
        assert found.shape == (0, 5)
