"""The native selective scan against the float64 engine, and the rules of every native kernel."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from regard.backends.native import library
from regard.contract import Unsupported
from regard.engines.selective_scan import native_form as native
from regard.engines.selective_scan import torch_form as reference

NAMES = ("x", "dt", "a", "b", "c", "skip", "dt_bias", "z", "state")
FLOAT32 = 1e-5  # of the largest number; observed 1e-6, and 6e-6 where a gradient of a or of the state nearly cancels
BFLOAT16 = 8e-3  # rounding of the result itself; observed 3.9e-3


@pytest.fixture(autouse=True)
def _poison():
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    with library.poisoned_workspaces():
        yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make(shape, *, dtype=torch.float32, read=True, surrounded=True):
    """Inputs of run up to the state; surrounded: with skip, dt_bias, z and a state."""
    batch, n, channels, groups, states = shape
    x, dt, z = (torch.randn(batch, n, channels).to(dtype) for _ in range(3))
    b, c = (torch.randn(batch, n, groups, states).to(dtype) for _ in range(2))
    a = -8 * torch.rand(channels, states)
    if not surrounded:
        return [x, dt.abs(), a, b, c if read else None, None, None, None, None]
    parameters = torch.randn(channels), torch.randn(channels) - 1
    return [x, dt, a, b, c if read else None, *parameters, z, torch.randn(batch, channels, states)]


def error(found, expected):
    if expected.numel() == 0:
        return 0.0
    return float((found.double() - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-30))


def both(inputs, lengths=None, inclusive=True):
    """Outputs and gradients by name: of the native kernel and of the float64 engine."""
    results = []
    x, a = inputs[0], inputs[2]
    grad_y, grad_last = torch.randn(x.shape).to(x.dtype), torch.randn(x.shape[0], *a.shape)
    for run, dtype in ((native.run, None), (reference.run, torch.float64)):
        leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        y, last = run(*leaves, lengths, 64, inclusive)
        loss = (last * grad_last.to(last.dtype)).sum()
        if y is not None:
            loss = loss + (y * grad_y.to(y.dtype)).sum()
        if loss.requires_grad:
            loss.backward()
        found = {"y": y, "last": last}
        found |= {f"grad {name}": None if t is None else t.grad for name, t in zip(NAMES, leaves, strict=True)}
        results.append({name: t for name, t in found.items() if t is not None})
    for name in results[0].keys() - results[1].keys():  # not in the engine's graph, as without tokens
        results[1][name] = torch.zeros_like(results[0][name], dtype=torch.float64)
    return results


def assert_close(inputs, lengths=None, inclusive=True):
    found, expected = both(inputs, lengths, inclusive)
    assert found.keys() == expected.keys()
    for name, result in found.items():
        most = BFLOAT16 if result.dtype == torch.bfloat16 else FLOAT32
        assert error(result, expected[name]) <= most, name
    wide = ("last", "grad a", "grad skip", "grad dt_bias", "grad state")
    for name, result in found.items():
        assert result.dtype == (torch.float32 if name in wide else inputs[0].dtype)


SETS = library.instruction_sets() if library.why_missing() is None else []


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_states_and_gradients_equal_the_float64_engine(instruction_set, dtype):
    with library.using_instruction_set(instruction_set):
        for n, (channels, groups, states), surrounded in itertools.product(
            (1, 7, 63, 64, 65, 131), ((40, 1, 16), (33, 3, 5), (17, 1, 8), (12, 12, 12)), (True, False)
        ):
            lengths = torch.tensor([n, n // 3, 0]) if surrounded else None
            inputs = make((3, n, channels, groups, states), dtype=dtype, surrounded=surrounded)
            assert_close(inputs, lengths, inclusive=n % 2 == 1)


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("read", [True, False])
def test_every_option_alone_and_together(inclusive, read):
    for kept in (NAMES[5:], (), *((name,) for name in NAMES[5:])):
        inputs = make((2, 70, 24, 2, 6), read=read)
        inputs[1] = inputs[1].abs()
        for i, name in enumerate(NAMES[5:], 5):
            if name not in kept:
                inputs[i] = None
        assert_close(inputs, None, inclusive)


@pytest.mark.parametrize(
    "shape", [(2, 0, 8, 1, 4), (0, 9, 8, 1, 4), (2, 9, 0, 1, 4), (1, 9, 5, 1, 1), (1, 5, 8, 1, 40)]
)
def test_empty_and_narrow_shapes(shape):
    assert_close(make(shape))
    assert_close(make(shape, read=False, surrounded=False))


def test_a_long_sequence_keeps_its_precision():
    inputs = make((1, 10_000, 8, 1, 4))
    inputs[2] = inputs[2] * 1e-4
    found, expected = both(inputs)
    for name in ("y", "last", "grad x", "grad b", "grad c", "grad z", "grad state"):
        assert error(found[name], expected[name]) <= FLOAT32, name
    for name in ("grad a", "grad dt", "grad skip", "grad dt_bias"):
        assert error(found[name], expected[name]) <= 1e-4, name  # float32 sums over all tokens; torch's float32: 4e-5


def test_results_do_not_depend_on_the_number_of_rows_and_repeat_exactly(threads):
    inputs = make((3, 150, 200, 2, 16))
    for count in (1, 2, 3):
        threads(count)
        first, second = native.run(*inputs, None, 64, True), native.run(*inputs, None, 64, True)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        assert_close(inputs)
        leaves = [t.clone().requires_grad_() for t in inputs]
        once, again = (torch.autograd.grad(native.run(*leaves, None, 64, True)[0].sum(), leaves[:8]) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
    one = [t[1:2] if i in (0, 1, 3, 4, 7, 8) else t for i, t in enumerate(inputs)]
    assert torch.equal(native.run(*one, None, 64, True)[0], first[0][1:2])


def test_split_and_resumed_equals_whole_and_one_token_is_a_step():
    inputs = make((2, 80, 24, 1, 16))
    whole, last = native.run(*inputs, None, 64, True)
    state, outputs = inputs[8], []
    for begin, end in ((0, 33), (33, 34), (34, 35), (35, 80)):
        part = [t[:, begin:end] if i in (0, 1, 3, 4, 7) else t for i, t in enumerate(inputs[:8])]
        y, state = native.run(*part, state, None, 64, True)
        outputs.append(y)
    assert torch.equal(torch.cat(outputs, 1), whole)
    assert torch.equal(state, last)


def test_views_of_any_strides_are_read_in_place_or_copied():
    inputs = make((2, 40, 24, 2, 5))
    base = torch.randn(2, 40, 100)
    inputs[0], inputs[7] = base[..., :24], base[..., 30:54]
    inputs[1] = torch.randn(2, 24, 40).mT
    inputs[3] = base[..., 60:70].unflatten(-1, (2, 5))
    inputs[4] = torch.randn(2, 5).expand(2, 40, 2, 5)
    inputs[8] = torch.randn(5, 24, 2).permute(2, 1, 0)
    assert_close(inputs)
    inputs[1] = torch.tensor(0.3).expand(2, 40, 24)
    assert_close(inputs)


def test_padding_is_never_read_and_gets_zeros():
    lengths = torch.tensor([0, 70, 100])
    inputs = make((3, 100, 20, 1, 6))
    for i in (0, 1, 3, 4, 7):
        for row, length in enumerate(lengths.tolist()):
            inputs[i][row, length:] = math.nan
    leaves = [t.requires_grad_() for t in inputs]
    y, last = native.run(*leaves, lengths, 64, True)
    (y.sum() + last.square().sum()).backward()
    assert torch.equal(last[0], inputs[8][0])
    for t in (y, last, *(t.grad for t in leaves)):
        assert t.isfinite().all()
    for row, length in enumerate(lengths.tolist()):
        for t in (y, *(leaves[i].grad for i in (0, 1, 3, 4, 7))):
            assert (t[row, length:] == 0).all()


@pytest.mark.parametrize("instruction_set", SETS)
def test_extreme_steps_and_gates(instruction_set):
    with library.using_instruction_set(instruction_set):
        for value in (-1e4, -50.0, 0.0, 50.0, 1e4):
            inputs = make((1, 40, 18, 1, 8))
            inputs[1][:, 1::2] = value
            inputs[7][:, ::3] = value
            assert_close(inputs)
        inputs = make((1, 30, 18, 1, 8), surrounded=False)
        inputs[2][:, 3] = -1e30
        inputs[2][:, 4] = 0.0
        inputs[1][:, 5] = 0.0
        found, expected = both(inputs)
        for name in found.keys() - {"grad dt"}:  # rates of -1e30 make it as large
            assert error(found[name], expected[name]) <= FLOAT32, name
        inputs[1][:, 7] = math.inf
        assert native.run(*inputs, None, 64, True)[1].isnan().logical_not().any()


@pytest.mark.parametrize("position", range(5))
def test_nan_reaches_what_depends_on_it_and_nothing_else(position):
    inputs = make((1, 90, 24, 2, 6))
    y = native.run(*inputs, None, 64, True)[0]
    place = (0, 70, 3) if position < 2 else (3, 2) if position == 2 else (0, 70, 0, 2)
    inputs[position][place] = math.nan
    found = native.run(*inputs, None, 64, True)[0]
    expected = reference.run(*inputs, None, 64, True)[0]
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~found.isnan()], y[~found.isnan()])


def test_inputs_of_several_dtypes_are_computed_in_float32():
    inputs = make((2, 50, 24, 1, 6), dtype=torch.bfloat16)
    inputs[1] = inputs[1].float() + 1e-4
    found, expected = both(inputs)
    assert (found["y"].dtype, found["grad dt"].dtype) == (torch.bfloat16, torch.float32)
    for name, result in found.items():
        assert error(result, expected[name]) <= (BFLOAT16 if result.dtype == torch.bfloat16 else FLOAT32), name


def test_only_gradients_that_are_needed_are_computed():
    inputs = make((2, 70, 24, 1, 6))
    whole = both(inputs)[0]
    for chosen in ((0,), (2,), (3,), (4,), (7,), (8,), (1, 6)):
        leaves = [t.detach().clone().requires_grad_(i in chosen) for i, t in enumerate(inputs)]
        y, last = native.run(*leaves, None, 64, True)
        (y.sum() + last.sum()).backward()
        assert [t.grad is not None for t in leaves] == [i in chosen for i in range(9)]
        assert all(leaves[i].grad.isfinite().all() for i in chosen)
    assert all(t.isfinite().all() for t in whole.values())


def test_backward_keeps_the_inputs_and_few_states():
    leaves = [t.requires_grad_() for t in make((1, 256, 64, 1, 16))]
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        native.run(*leaves, None, 64, True)
    assert sum(kept.values()) == sum(4 * t.numel() for t in leaves) + 4 * 256 // native.EVERY * 64 * 16
    assert native._scan(*(t.detach() for t in leaves), None, True, False)[2].numel() == 0


def test_second_derivatives_and_bad_calls_are_refused():
    leaves = [t.requires_grad_() for t in make((1, 9, 8, 1, 4))]
    y, _ = native.run(*leaves, None, 64, True)
    (first,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
    with pytest.raises(Unsupported, match="second derivatives"):
        first.sum().backward()
    good = make((2, 9, 8, 2, 4))
    assert native.refuses(*good, torch.tensor([9, 1]), 64, True) is None
    for i, wrong in (
        (0, torch.randn(2, 9, 6)),
        (0, torch.randn(9, 8)),
        (1, torch.randn(2, 9, 1)),
        (2, torch.randn(8, 5)),
        (2, torch.randn(8, 4).double()),
        (3, torch.randn(2, 9, 3, 4)),
        (3, torch.randn(2, 9, 2, 4).half()),
        (4, torch.randn(2, 8, 2, 4)),
        (5, torch.randn(1)),
        (6, torch.randn(8, 1)),
        (7, torch.randn(2, 9, 7)),
        (8, torch.randn(1, 8, 4)),
        (9, torch.tensor([9])),
        (9, torch.tensor([9, 1], dtype=torch.int32)),
    ):
        call = [*good, None]
        call[i] = wrong
        assert native.refuses(*call, 64, True) is not None, i
        with pytest.raises(Unsupported):
            native._scan(*call, True, True)
    y, last, kept = native._scan(*good, None, True, True)
    for grads in ((y[:, :3], last, kept), (y, last[:1], kept), (y, last, kept[:, :0])):
        with pytest.raises(Unsupported):
            native._scan_backward(*grads[:2], *good, None, grads[2], True, [True] * 9)
    # lengths beyond the tensor are the engine's to refuse; the kernel stays inside whatever they are
    native.run(*good, torch.tensor([1 << 40, -5]), 64, True)


def test_operators_are_registered_properly():
    for inputs in (make((2, 20, 8, 2, 4)), make((1, 9, 8, 1, 4), read=False, surrounded=False)):
        for wanted in (False, True):
            leaves = [None if t is None else t.clone().requires_grad_(wanted) for t in inputs]
            torch.library.opcheck(native._scan.overload, (*leaves, None, True, True))


def test_compiled_with_gradients_equals_eager():
    leaves = [t.requires_grad_() for t in make((2, 20, 8, 2, 4))]
    lengths = torch.tensor([20, 7])

    def run(*x):
        return native.run(*x, lengths, 64, True)[0]

    torch.compiler.reset()
    y, found = run(*leaves), torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(found, y)
    for one, two in zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(y.sum(), leaves), strict=True):
        assert torch.equal(one, two)
