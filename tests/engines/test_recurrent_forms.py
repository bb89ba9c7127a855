"""What mechanisms pass to the gated recurrence, in narrow dtypes and at any scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard import functional
from regard.engines.gated_recurrence.torch_form import solve_unit, solve_unit_by_products
from regard.engines.recurrent_forms import readable, scaled

CALLS = {
    "gated_linear": (functional.gated_linear_attention, {}),
    "delta_rule": (functional.delta_rule_attention, {"normalize_queries": False, "normalize_keys": False}),
    "delta_rule, normalized": (functional.delta_rule_attention, {}),
    "mamba2": (functional.mamba2, {}),
}


def inputs(name: str, width: int) -> list[Tensor]:
    """Inputs in bfloat16, with gates and rates in float32."""
    q, k, v = torch.randn(3, 2, 3, 33, width).bfloat16()
    if name == "gated_linear":
        return [q, k, v, -torch.rand(2, 3, 33, width)]
    if name == "mamba2":
        return [q, k / width**0.5, v, torch.rand(2, 3, 33), -torch.rand(3)]
    return [q, k / (2 * width**0.5), v, torch.rand(2, 3, 33)]


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self", "noncausal-cross"])
@pytest.mark.parametrize("width", [8, 16])  # the scale is a power of two only for 16
@pytest.mark.parametrize("name", CALLS)
def test_bfloat16_inputs_lose_the_rounding_of_the_output_alone(name, width, pattern, backend):
    function, options = CALLS[name]
    options = options | {"pattern": pattern, "backend": backend}
    narrow = inputs(name, width)
    found = function(*narrow, **options)
    expected = function(*(x.double() for x in narrow), **options | {"backend": "torch"})
    assert found.dtype == torch.bfloat16
    assert ((found - expected).abs() <= 2**-8 * expected.abs() + 1e-5 * expected.abs().max()).all()


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_bfloat16_inputs_are_those_of_the_same_numbers(name):
    function, options = CALLS[name]
    narrow = [x.requires_grad_() for x in inputs(name, 8)]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    found = torch.autograd.grad(function(*narrow, **options).float().square().sum(), narrow)
    expected = torch.autograd.grad(function(*wide, **options).square().sum(), wide)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 2**-6 * b.abs().max()  # the output is rounded before squaring


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 0.125, 8**-0.5])
def test_a_scale_rounds_nothing_that_float32_does_not(dtype, scale):
    q = (1e-4 * torch.randn(50)).to(dtype)
    # one rounding of the scale and one of the product
    torch.testing.assert_close(scaled(q, scale).double(), scale * q.double(), rtol=2 * 2**-24, atol=0)


def test_only_what_engines_widen_themselves_stays_narrow():
    assert {dtype: readable(torch.zeros(1, dtype=dtype)).dtype for dtype in (torch.float16, torch.bfloat16)} == {
        torch.float16: torch.float32,
        torch.bfloat16: torch.bfloat16,
    }
    wide = torch.zeros(1, dtype=torch.float64)
    assert readable(wide) is wide


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 21])
def test_products_solve_a_triangular_system_as_substitution_does(size):
    lower, right = (
        torch.randn(2, size, size, dtype=torch.float64).tril(-1),
        torch.randn(2, size, 3, dtype=torch.float64),
    )
    torch.testing.assert_close(solve_unit_by_products(lower, right), solve_unit(lower, right), rtol=1e-10, atol=1e-10)
