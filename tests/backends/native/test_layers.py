"""The native convolution, norm, rotation and gate against float64: sizes, instruction sets, gradients, extremes."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from regard.backends import NATIVE, watch_backends
from regard.contract import Unsupported
from regard.engines import layers as engines
from regard.engines.layers.native_form import rotation
from regard.engines.layers.native_form.common import SMALLEST
from regard.layers.convolution import ShortConvolution
from regard.layers.feed_forward import SwiGLU
from regard.layers.norms import RMSNorm
from regard.layers.state_space import GatedRMSNorm
from regard.positions.rotary import Rotary

from .kernels import CONVOLUTION, NORM, PRODUCT, ROTARY, convolved


@pytest.mark.parametrize(
    ("n", "channels", "width"), [(1, 1, 1), (3, 5, 7), (7, 16, 4), (130, 37, 4), (67, 33, 8), (20, 9, 16), (9, 50, 2)]
)
def test_convolution_equals_float64(instruction_set, n, channels, width):
    for causal, silu, some in itertools.product((True, False), repeat=3):
        x = convolved(n, 3, channels, width) | {"lengths": torch.tensor([n, 0, n // 2])}
        x |= {} if some else dict.fromkeys(("bias", "cache", "lengths"))
        CONVOLUTION.check(x if causal else x | {"cache": None}, silu=silu, causal=causal)


@pytest.mark.parametrize(
    ("lead", "d", "groups"),
    [((3,), 5, 1), ((2, 7), 64, 1), ((2, 3, 5), 33, 3), ((2, 130), 96, 2), ((1, 2, 2, 3), 100, 4), ((300,), 130, 1)],
)
def test_norm_and_its_gate_equal_float64(instruction_set, lead, d, groups):
    for gate, after, weight in itertools.product((True, False), repeat=3):
        x = {"x": torch.randn(*lead, d), "weight": torch.randn(d) if weight else None}
        NORM.check(x | {"z": torch.randn(*lead, d) if gate else None}, groups=groups, after=after)


@pytest.mark.parametrize(("h", "n", "d", "rotated"), [(1, 1, 2, 2), (3, 7, 64, 64), (2, 5, 33, 20), (2, 70, 96, 96)])
def test_rotation_equals_float64_up_to_a_million_positions(instruction_set, h, n, d, rotated):
    ROTARY.check({"x": torch.randn(2, h, n, d), "positions": torch.randint(0, 1_000_000, (2, n))}, rotated=rotated)
    by_token = torch.randn(2, n, h, d).transpose(1, 2)
    ROTARY.check({"x": by_token, "positions": torch.randint(0, 1_000_000, (1, n))}, rotated=rotated)


@pytest.mark.parametrize("function", engines.GATE_FUNCTIONS)
def test_gated_product_equals_float64(instruction_set, function):
    for shape in ((1,), (3, 7, 33), (2, 3, 64), (2, 0, 5)):
        PRODUCT.check({"x": 3 * torch.randn(shape), "gate": 3 * torch.randn(shape)}, function=function)


def test_extreme_gates_are_those_of_torch():
    gate = torch.tensor([-1e4, -90.0, -50.0, 0.0, 50.0, 1e4]).repeat(4)
    for function in engines.GATE_FUNCTIONS:
        PRODUCT.check({"x": torch.randn(24), "gate": gate}, function=function)
    NORM.check({"x": torch.randn(24), "weight": torch.randn(24), "z": gate}, after=True)


def test_bfloat16_is_computed_in_float32():
    x, bias = torch.randn(2, 70, 96).bfloat16(), torch.randn(96)
    CONVOLUTION.check({"x": x, "weight": torch.randn(96, 4), "bias": bias, "lengths": torch.tensor([70, 31])})
    CONVOLUTION.check({"x": x, "weight": torch.randn(96, 3), "cache": torch.randn(2, 2, 96).bfloat16()})
    NORM.check({"x": x, "weight": bias})
    NORM.check({"x": x, "weight": bias, "z": torch.randn(2, 70, 96).bfloat16()}, groups=3)
    ROTARY.check({"x": x.view(2, 70, 3, 32).transpose(1, 2), "positions": torch.arange(70)[None]}, rotated=32)
    PRODUCT.check({"x": x, "gate": torch.randn(2, 70, 96).bfloat16()})


def test_what_lies_past_a_row_is_not_read_and_its_outputs_are_zero():
    x, weight = torch.randn(2, 40, 300), torch.randn(300, 4)
    expected = CONVOLUTION.run({"x": x[1:, :13], "weight": weight})
    x[1, 13:] = torch.nan
    given, weights = {"x": x, "weight": weight, "lengths": torch.tensor([40, 13])}, {"y": torch.randn_like(x)}
    weights["y"][1, 13:] = torch.nan
    found = CONVOLUTION.gradients(given, weights)
    assert (found["y"][1, 13:] == 0).all() and (found["grad x"][1, 13:] == 0).all()
    assert torch.equal(found["y"][1:, :13], expected["y"]) and torch.equal(found["last"][1:], expected["last"])
    assert torch.isfinite(found["grad x"]).all()


def test_the_inverse_of_a_rotation_is_its_gradient_and_may_be_differentiated_again():
    x = torch.randn(1, 2, 9, 16, requires_grad=True)
    y = rotation.rotary(x, torch.randint(0, 1_000_000, (1, 9)), 16, 1e4, 1.0)
    (grad,) = torch.autograd.grad(y, x, y, create_graph=True)
    torch.testing.assert_close(grad, x)
    (again,) = torch.autograd.grad(grad.square().sum(), x)
    torch.testing.assert_close(again, 2 * x)


X, WEIGHT, POSITIONS = torch.zeros(2, 9, 8), torch.zeros(8, 4), torch.zeros(1, 9, dtype=torch.int64)


@pytest.mark.parametrize(
    "call",
    [
        partial(torch.ops.regard.short_convolution, X, WEIGHT.repeat(1, 5), None, None, None, 0, True),
        partial(torch.ops.regard.short_convolution, X, WEIGHT, None, torch.zeros(2, 3, 8), None, 1, True),
        partial(torch.ops.regard.short_convolution, X, WEIGHT, None, None, None, 4, True),
        partial(torch.ops.regard.rms_norm, X, None, None, 3, 1e-6, False),
        partial(torch.ops.regard.rms_norm, X, None, None, 0, 1e-6, False),
        partial(torch.ops.regard.rotary, X[:, None], POSITIONS, 10, 1e4, 1.0, False),
        partial(torch.ops.regard.rotary, X[:, None], POSITIONS, 7, 1e4, 1.0, False),
        partial(torch.ops.regard.gated_product, X, X, 2),
    ],
)
def test_options_that_do_not_fit_are_refused(call):
    with pytest.raises(Unsupported, match="native"):
        call()


def test_small_inputs_and_other_dtypes_are_left_to_torch():
    smallest = SMALLEST["rms_norm"]
    for size, dtype in ((smallest // 8 - 1, torch.float32), (smallest, torch.float64)):
        x = torch.randn(1, size, 8, dtype=dtype)
        with pytest.raises(Unsupported, match="native"):
            engines.rms_norm(x, backend="native")
    assert {"gated_product", "rms_norm", "rotary", "short_convolution"} <= NATIVE.engines.keys()


def test_modules_run_on_it_and_equal_their_float64_selves():
    n, width = 200, 1536
    modules = {
        ShortConvolution(width): (torch.randn(1, n, width),),
        RMSNorm(width): (torch.randn(1, n, width), torch.randn(1, n, width)),
        GatedRMSNorm(width, 3): (torch.randn(1, n, width), torch.randn(1, n, width)),
        Rotary(head_dim=64).rotate: (torch.randn(1, 4, n, 64), torch.arange(n)[None]),
        SwiGLU(64, width): (torch.randn(1, n, 64),),
    }
    for module, inputs in modules.items():
        with watch_backends() as ran:
            found = module(*inputs)
        assert ran.backends == {"native"}, module
        owner = module if isinstance(module, torch.nn.Module) else module.__self__
        owner.double()
        expected = module(*(x.double() if x.is_floating_point() else x for x in inputs))
        found, expected = (y[0] if isinstance(y, tuple) else y for y in (found, expected))
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
