"""The native convolution, norm, rotation and gate against float64: sizes, instruction sets, threads, gradients, extremes."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from regard.backends import NATIVE, recording
from regard.backends.native import library
from regard.contract import Unsupported
from regard.engines import layers as engines
from regard.engines.layers import native_form as native
from regard.engines.layers import torch_form as torch_backend
from regard.layers.convolution import ShortConvolution
from regard.layers.feed_forward import SwiGLU
from regard.layers.norms import RMSNorm
from regard.layers.state_space import GatedRMSNorm
from regard.positions.rotary import Rotary

ISAS = library.instruction_sets() if library.why_missing() is None else []


@pytest.fixture(autouse=True)
def poisoned():
    """Outputs and workspaces full of NaN, so that a number that is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with library.poisoned_workspaces():
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(before)


def run(function, inputs, cotangents=None, dtype=None):
    """Outputs, then the gradients of all inputs that are floats; and the cotangents."""
    leaves = []
    for x in inputs:
        if x is not None and x.is_floating_point():
            x = x.detach().to(dtype or x.dtype).requires_grad_()
        leaves.append(x)
    outputs = function(*leaves)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
    if cotangents is None:
        cotangents = [torch.randn(y.shape).to(y.dtype) for y in outputs]
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)])
    return [*outputs, *grads], cotangents


def assert_equal(function, definition, inputs, tolerance=2e-6):
    found, cotangents = run(function, inputs)
    expected, _ = run(definition, inputs, cotangents, torch.float64)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        if x.numel():
            assert (x - y).abs().max() <= tolerance * max(y.abs().max(), 0.1), i


def both(name, *options):
    """The native function and its definition, called with tensors alone."""

    def bound(function):
        return lambda *tensors: function(*tensors, *options)

    return [bound(getattr(module, name)) for module in (native, torch_backend)]


def positions_of(batch, n):
    return torch.randint(0, 1_000_000, (batch, n))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("n", "c", "w"), [(1, 1, 1), (3, 5, 7), (7, 16, 4), (130, 37, 4), (67, 33, 8), (20, 9, 16), (9, 50, 2)]
)
def test_convolution_equals_float64(isa, n, c, w):
    with library.using_instruction_set(isa):
        for causal, silu, some in itertools.product((True, False), repeat=3):
            inputs = [
                torch.randn(3, n, c),
                torch.randn(c, w),
                torch.randn(c) if some else None,
                torch.randn(3, w - 1, c) if some and causal else None,
                torch.tensor([n, 0, n // 2]) if some else None,
            ]
            assert_equal(*both("short_convolution", silu, causal), inputs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("lead", "d", "groups"),
    [((3,), 5, 1), ((2, 7), 64, 1), ((2, 3, 5), 33, 3), ((2, 130), 96, 2), ((1, 2, 2, 3), 100, 4), ((300,), 130, 1)],
)
def test_norm_and_its_gate_equal_float64(isa, lead, d, groups):
    with library.using_instruction_set(isa):
        for gate, after, weight in itertools.product((True, False), repeat=3):
            inputs = [
                torch.randn(*lead, d),
                torch.randn(d) if weight else None,
                torch.randn(*lead, d) if gate else None,
            ]
            assert_equal(*both("rms_norm", groups, 1e-5, after), inputs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("h", "n", "d", "rotated"), [(1, 1, 2, 2), (3, 7, 64, 64), (2, 5, 33, 20), (2, 70, 96, 96)])
def test_rotation_equals_float64_up_to_a_million_positions(isa, h, n, d, rotated):
    with library.using_instruction_set(isa):
        functions = both("rotary", rotated, 10_000.0, 1.5)
        assert_equal(*functions, [torch.randn(2, h, n, d), positions_of(2, n)])
        turned = [lambda x, p, f=f: f(x.transpose(1, 2), p) for f in functions]
        assert_equal(*turned, [torch.randn(2, n, h, d), positions_of(1, n)])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("function", native.FUNCTIONS)
def test_gated_product_equals_float64(isa, function):
    with library.using_instruction_set(isa):
        for shape in ((1,), (3, 7, 33), (2, 3, 64), (2, 0, 5)):
            assert_equal(*both("gated_product", function), [3 * torch.randn(shape), 3 * torch.randn(shape)])


def test_sums_over_many_tokens_stay_accurate():
    inputs = [torch.randn(1, 10_000, 24), torch.randn(24, 4), torch.randn(24), None, None]
    assert_equal(*both("short_convolution", True, True), inputs)
    assert_equal(*both("rms_norm", 1, 1e-6, False), [inputs[0], torch.randn(24), None])


CASES = {
    "convolution": (
        partial(engines.short_convolution, lengths=torch.tensor([70, 31])),
        lambda: [torch.randn(2, 70, 96), torch.randn(96, 4), torch.randn(96)],
    ),
    "continued convolution": (
        lambda x, w, c, **options: engines.short_convolution(x, w, cache=c, **options),
        lambda: [torch.randn(2, 70, 96), torch.randn(96, 3), torch.randn(2, 2, 96)],
    ),
    "norm": (engines.rms_norm, lambda: [torch.randn(2, 70, 96), torch.randn(96)]),
    "gated norm": (
        lambda x, w, z, **options: engines.rms_norm(x, w, z=z, groups=3, **options),
        lambda: [torch.randn(2, 70, 96), torch.randn(96), torch.randn(2, 70, 96)],
    ),
    "rotary": (
        lambda x, **options: engines.rotary(x, torch.arange(70)[None], rotated=32, base=1e4, **options),
        lambda: [torch.randn(2, 3, 70, 32)],
    ),
    "gated product": (engines.gated_product, lambda: [torch.randn(2, 70, 96), torch.randn(2, 70, 96)]),
}


@pytest.fixture
def no_threshold(monkeypatch):
    """Small inputs too."""
    monkeypatch.setattr(native, "SMALLEST", dict.fromkeys(native.SMALLEST, 0))


cases = pytest.mark.parametrize(("function", "make"), CASES.values(), ids=CASES)


@cases
@pytest.mark.usefixtures("no_threshold")
def test_engines_run_on_it_in_both_dtypes(function, make):
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        inputs = [x.to(dtype) for x in make()]
        found, cotangents = run(partial(function, backend="native"), inputs)
        expected, _ = run(partial(function, backend="torch"), inputs, cotangents, torch.float64)
        for x, y in zip(found, expected, strict=True):
            assert x.dtype == dtype
            assert (x - y).abs().max() <= tolerance * y.abs().max()


@cases
@pytest.mark.usefixtures("no_threshold")
def test_threads_change_sums_by_rounding_only_and_the_same_threads_nothing(function, make):
    inputs = make()
    one, cotangents = run(partial(function, backend="native"), inputs)
    torch.set_num_threads(3)
    three, _ = run(partial(function, backend="native"), inputs, cotangents)
    again, _ = run(partial(function, backend="native"), inputs, cotangents)
    for x, y, z in zip(one, three, again, strict=True):
        assert torch.equal(y, z)
        assert (x - y).abs().max() <= 2e-6 * x.abs().max()


@cases
@pytest.mark.usefixtures("no_threshold")
def test_any_strides_are_read(function, make):
    inputs = make()
    expected, cotangents = run(partial(function, backend="native"), inputs)
    padded = [torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]] for x in inputs]
    interleaved = [torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in inputs]
    for views in (padded, interleaved):
        outputs = function(*(x.requires_grad_() for x in views), backend="native")
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
        strided = [torch.stack([c, c], -1)[..., 0] for c in cotangents]
        found = [*outputs, *torch.autograd.grad(outputs, views, strided)]
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


@cases
@pytest.mark.usefixtures("no_threshold")
def test_gradients_that_are_not_needed_are_left_out(function, make):
    inputs = make()
    expected, cotangents = run(partial(function, backend="native"), inputs)
    grads = expected[len(cotangents) :]
    for i in range(len(inputs)):
        leaves = [x.clone().requires_grad_(j == i) for j, x in enumerate(inputs)]
        outputs = function(*leaves, backend="native")
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
        (found,) = torch.autograd.grad(outputs, [leaves[i]], cotangents[: len(outputs)])
        # the last inputs depend on no weight
        assert torch.equal(found, grads[i])


@cases
@pytest.mark.usefixtures("no_threshold")
def test_nan_spreads_to_its_own_row_and_nowhere_else(function, make):
    inputs = make()
    expected, _ = run(partial(function, backend="native"), inputs)
    inputs[0][1, 0] = torch.nan
    found, _ = run(partial(function, backend="native"), inputs)
    assert found[0][1].isnan().any()
    assert torch.equal(found[0][0], expected[0][0])


@cases
@pytest.mark.usefixtures("no_threshold")
def test_compiles_whole_with_gradients(function, make):
    torch.use_deterministic_algorithms(False)
    inputs = make()

    def total(*tensors):
        outputs = function(*tensors, backend="native")
        return (outputs[0] if isinstance(outputs, tuple) else outputs).square().sum()

    results = []
    for f in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        results.append(torch.autograd.grad(f(*leaves), leaves))
    torch.testing.assert_close(results[1], results[0])


def test_what_lies_past_a_row_is_not_read_and_its_outputs_are_zero():
    x, weight = torch.randn(2, 40, 300), torch.randn(300, 4)
    lengths = torch.tensor([40, 13])
    expected = native.short_convolution(x[1:, :13], weight, None, None, None, True, True)
    x[1, 13:] = torch.nan
    x.requires_grad_()
    y, last = native.short_convolution(x, weight, None, None, lengths, True, True)
    assert (y[1, 13:] == 0).all()
    assert torch.equal(y[1:, :13], expected[0])
    assert torch.equal(last[1:], expected[1])
    grad = torch.randn_like(y)
    grad[1, 13:] = torch.nan
    (found,) = torch.autograd.grad(y, x, grad)
    assert (found[1, 13:] == 0).all()
    assert torch.isfinite(found).all()


def test_split_and_resume_equals_whole():
    x, weight = torch.randn(2, 50, 33), torch.randn(33, 5)
    whole, last = native.short_convolution(x, weight, None, None, None, True, True)
    parts, cache = [], None
    for part in x.split([1, 2, 0, 30, 17], 1):
        y, cache = native.short_convolution(part, weight, None, cache, None, True, True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert torch.equal(cache, last)


def test_extreme_gates_are_those_of_torch():
    gate = torch.tensor([-1e4, -90.0, -50.0, 0.0, 50.0, 1e4]).repeat(4)
    for function in native.FUNCTIONS:
        assert_equal(*both("gated_product", function), [torch.randn(24), gate])
    assert_equal(*both("rms_norm", 1, 1e-6, True), [torch.randn(24), torch.randn(24), gate])


def test_a_row_of_zeros_stays_zero_with_finite_gradients():
    x = torch.zeros(4, 32, requires_grad=True)
    y = native.rms_norm(x, None, None, 1, 1e-6, False)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (y == 0).all()
    assert torch.isfinite(grad).all()


def test_no_tokens_and_no_rows():
    for batch, n in ((2, 0), (0, 5)):
        x, cache = torch.randn(batch, n, 8), torch.randn(batch, 3, 8, requires_grad=True)
        weight = torch.randn(8, 4, requires_grad=True)
        y, last = native.short_convolution(x, weight, None, cache, None, True, True)
        assert y.shape == x.shape
        assert torch.equal(last, cache)
        grads = torch.autograd.grad((y.sum(), last.sum()), (weight, cache))
        assert (grads[0] == 0).all()
        assert (grads[1] == 1).all()
        weight = torch.ones(8, requires_grad=True)
        (grad,) = torch.autograd.grad(native.rms_norm(x, weight, None, 1, 1e-6, False).sum(), weight)
        assert (grad == 0).all()
        positions = torch.zeros(batch, n, dtype=torch.int64)
        assert native.rotary(x[:, None], positions, 8, 1e4, 1.0).shape == (batch, 1, n, 8)


def test_the_inverse_of_a_rotation_is_its_gradient_and_may_be_differentiated_again():
    x = torch.randn(1, 2, 9, 16, requires_grad=True)
    positions = positions_of(1, 9)
    y = native.rotary(x, positions, 16, 1e4, 1.0)
    (grad,) = torch.autograd.grad(y, x, y, create_graph=True)
    torch.testing.assert_close(grad, x)
    (again,) = torch.autograd.grad(grad.square().sum(), x)
    torch.testing.assert_close(again, 2 * x)


@pytest.mark.parametrize("name", ["convolution", "norm", "gated product"])
@pytest.mark.usefixtures("no_threshold")
def test_second_derivatives_are_refused(name):
    function, make = CASES[name]
    leaves = [x.requires_grad_() for x in make()]
    output = function(*leaves, backend="native")
    output = output[0] if isinstance(output, tuple) else output
    (grad,) = torch.autograd.grad(output.sum(), leaves[0], create_graph=True)
    with pytest.raises(Unsupported, match="second derivatives"):
        torch.autograd.grad(grad.sum(), leaves[0])


def test_bad_calls_are_refused_before_a_pointer_is_passed():
    x, ops = torch.randn(2, 9, 8), torch.ops.regard
    weight, cache, lengths = torch.randn(8, 4), torch.randn(2, 3, 8), torch.tensor([9, 9])
    positions = torch.zeros(1, 9, dtype=torch.int64)
    for op, arguments in (
        (ops.short_convolution, (x[0], weight, None, None, None, 0, True)),
        (ops.short_convolution, (x.double(), weight, None, None, None, 0, True)),
        (ops.short_convolution, (x, weight.double(), None, None, None, 0, True)),
        (ops.short_convolution, (x, weight[:7], None, None, None, 0, True)),
        (ops.short_convolution, (x, weight.repeat(1, 5), None, None, None, 0, True)),
        (ops.short_convolution, (x, weight, weight[:, 0].bfloat16(), None, None, 0, True)),
        (ops.short_convolution, (x, weight, None, cache[:1], None, 0, True)),
        (ops.short_convolution, (x, weight, None, cache, lengths.int(), 0, True)),
        (ops.short_convolution, (x, weight, None, cache, lengths[:1], 0, True)),
        (ops.short_convolution, (x, weight, None, cache, None, 1, True)),
        (ops.short_convolution, (x, weight, None, None, None, 4, True)),
        (ops.rms_norm, (x, weight[:, 0].double(), None, 1, 1e-6, False)),
        (ops.rms_norm, (x, torch.ones(7), None, 1, 1e-6, False)),
        (ops.rms_norm, (x, None, x[:1], 1, 1e-6, False)),
        (ops.rms_norm, (x, None, x.bfloat16(), 1, 1e-6, False)),
        (ops.rms_norm, (x, None, None, 3, 1e-6, False)),
        (ops.rms_norm, (x, None, None, 0, 1e-6, False)),
        (ops.rotary, (x, positions, 8, 1e4, 1.0, False)),
        (ops.rotary, (x[:, None], positions.int(), 8, 1e4, 1.0, False)),
        (ops.rotary, (x[:, None], positions[:, :8], 8, 1e4, 1.0, False)),
        (ops.rotary, (x[:, None], positions, 10, 1e4, 1.0, False)),
        (ops.rotary, (x[:, None], positions, 7, 1e4, 1.0, False)),
        (ops.gated_product, (x, x[:1], 0)),
        (ops.gated_product, (x, x, 2)),
        (ops.gated_product, (x, x.double(), 0)),
    ):
        with pytest.raises(Unsupported, match="native"):
            op(*arguments)


def test_small_inputs_and_other_dtypes_are_left_to_torch():
    smallest = native.SMALLEST["rms_norm"]
    for size, dtype in ((smallest // 8 - 1, torch.float32), (smallest, torch.float64)):
        x = torch.randn(1, size, 8, dtype=dtype)
        with pytest.raises(Unsupported, match="native"):
            engines.rms_norm(x, backend="native")
    assert {"gated_product", "rms_norm", "rotary", "short_convolution"} <= NATIVE.engines.keys()


def test_custom_ops_are_well_formed():
    x, weight, bias, z = (torch.randn(shape, requires_grad=True) for shape in ((2, 9, 8), (8, 4), (8,), (2, 9, 8)))
    cache, lengths = torch.randn(2, 3, 8, requires_grad=True), torch.tensor([9, 4])
    heads, positions = torch.randn(2, 9, 3, 8).transpose(1, 2).requires_grad_(), positions_of(1, 9)
    ops, check = torch.ops.regard, torch.library.opcheck
    check(ops.short_convolution, (x, weight, None, cache, lengths, 0, True))
    check(ops.short_convolution, (x, weight, bias, None, None, 1, False))
    check(ops.rms_norm, (x, bias, z, 2, 1e-6, False))
    check(ops.rotary, (heads, positions, 8, 1e4, 1.0, False))
    check(ops.rotary, (heads, positions, 8, 1e4, 1.0, True))
    check(ops.gated_product, (x, z, 0))


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
        with recording() as used:
            found = module(*inputs)
        assert used == {"native"}, module
        owner = module if isinstance(module, torch.nn.Module) else module.__self__
        owner.double()
        expected = module(*(x.double() if x.is_floating_point() else x for x in inputs))
        found, expected = (y[0] if isinstance(y, tuple) else y for y in (found, expected))
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_exports_with_any_number_of_tokens():
    torch.use_deterministic_algorithms(False)
    module = torch.nn.Sequential(RMSNorm(8), SwiGLU(8, 16), RMSNorm(8))
    n = torch.export.Dim("n", min=2, max=4096)
    program = torch.export.export(module, (torch.randn(2, 9, 8),), dynamic_shapes=({1: n},))
    x = torch.randn(2, 30, 8)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-6)
