"""The native delta rule against the float64 reference, and the rules of every native kernel."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from regard.backends.native import library
from regard.contract import Unsupported
from regard.engines.gated_recurrence import delta_rule
from regard.engines.gated_recurrence import torch_form as reference

NAMES = ("q", "k", "v", "log_decay", "beta", "state")
FLOAT32 = 5e-6  # of the largest number; observed 1e-6, and 4e-6 for the gradient of a state that is nearly forgotten
BFLOAT16 = 8e-3  # rounding of the output itself; observed 3.6e-3


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


def make(shape, gates=0, *, dtype=torch.float32, read=True, state=True):
    """Inputs of run up to the state; gates: features of the log decay."""
    b, h, n, width, values = shape
    q, k, v = torch.randn(b, h, n, width) / width**0.5, torch.randn(b, h, n, width), torch.randn(b, h, n, values)
    log_decay = -F.softplus(2 * torch.randn(b, h, n, gates) - 1) if gates else None
    tensors = [q.to(dtype) if read else None, F.normalize(k, dim=-1).to(dtype), v.to(dtype), log_decay]
    return [*tensors, torch.sigmoid(torch.randn(b, h, n)), torch.randn(b, h, width, values) if state else None]


def error(found, expected, scale=1e-30):
    """Relative to the largest number expected, or to `scale` where that is larger."""
    if expected.numel() == 0:
        return 0.0
    return float(((found.double() - expected).abs().max() / expected.abs().max().clamp(min=scale)).detach())


def both(inputs, inclusive=True, run=delta_rule.run):
    """Outputs and gradients by name: of the native kernel and of the float64 reference."""
    results = []
    shape = (*inputs[2].shape,), (*inputs[1].shape[:2], inputs[1].shape[-1], inputs[2].shape[-1])
    weights = [torch.randn(s) for s in shape]
    for call, dtype in ((run, None), (reference.run, torch.float64)):
        x = [None if t is None else t.to(dtype or t.dtype, copy=True).requires_grad_() for t in inputs]
        out, state = call(*x, 64, 16, inclusive)
        loss = (state * weights[1].to(state.dtype)).sum()
        if out is not None:
            loss = loss + (out * weights[0].to(inputs[2].dtype).to(out.dtype)).sum()
        loss.backward()
        found = {"out": out, "final state": state}
        found |= {f"grad {name}": None if t is None else t.grad for name, t in zip(NAMES, x, strict=True)}
        results.append({name: t for name, t in found.items() if t is not None})
    for name in results[0].keys() - results[1].keys():  # not in the reference's graph, as without tokens
        results[1][name] = torch.zeros_like(results[0][name], dtype=torch.float64)
    return results


def assert_close(inputs, inclusive=True):
    found, expected = both(inputs, inclusive)
    half = inputs[2].dtype == torch.bfloat16
    assert found.keys() == expected.keys()
    for name, result in found.items():
        assert result.dtype == (inputs[2].dtype if name in ("out", "grad q", "grad k", "grad v") else torch.float32)
        most = BFLOAT16 if half and result.dtype == torch.bfloat16 else FLOAT32
        # what comes back to the first state is left of gradients of size 1, which the rule may shrink to nothing
        assert error(result, expected[name], 1.0 if name == "grad state" else 1e-30) <= most, name


@pytest.mark.parametrize("instruction_set", library.instruction_sets() if library.why_missing() is None else [])
@pytest.mark.parametrize("gates", ["none", "scalar", "vector"])
def test_outputs_states_and_gradients_equal_the_reference(instruction_set, gates):
    with library.using_instruction_set(instruction_set):
        for n, (width, values) in itertools.product(
            (1, 7, 16, 31, 32, 33, 64, 101), ((64, 64), (8, 8), (13, 19), (33, 1), (1, 40))
        ):
            assert_close(make((1, 2, n, width, values), {"none": 0, "scalar": 1, "vector": width}[gates]))


@pytest.mark.parametrize("gates", [0, 1, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_option(gates, dtype):
    for inclusive, read, state in itertools.product((True, False), repeat=3):
        assert_close(make((2, 1, 70, 24, 20), gates, dtype=dtype, read=read, state=state), inclusive)


@pytest.mark.parametrize("gates", [0, 1, 128])
def test_several_segments_and_wide_heads(gates):
    assert_close(make((1, 1, 600, 128, 136), gates))
    assert_close(make((1, 1, 256, 128, 48), gates))
    assert_close(make((1, 1, 257, 128, 16), gates))


def test_widest_head():
    assert_close(make((1, 1, 40, 256, 256), 1))


def test_long_sequence():
    inputs = make((1, 1, 10_000, 16, 8), 1)
    inputs[3] = 0.01 * inputs[3]
    assert_close(inputs)


def test_a_gate_that_is_always_the_same_does_not_drift():
    inputs = make((1, 1, 4000, 16, 16), 1)
    inputs[3], inputs[4] = torch.full_like(inputs[3], -1e-3), 0.01 * inputs[4]
    assert_close(inputs)


@pytest.mark.parametrize("gates", [0, 1, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_columns_shared_out_between_threads(threads, gates, dtype):
    threads(3)
    for n, values in ((1, 40), (33, 64), (300, 100), (0, 40), (40, 8)):
        assert_close(make((1, 1, n, 24, values), gates, dtype=dtype))


def test_heads_shared_out_between_threads_change_nothing(threads):
    inputs = make((2, 3, 50, 16, 16), 1)
    threads(1)
    one = delta_rule.run(*inputs, 64, 16, True)
    threads(2)
    two = delta_rule.run(*inputs, 64, 16, True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("gates", [1, 16])
@pytest.mark.parametrize("gate", [0.0, -50.0, -1e4, -math.inf])
def test_extreme_gates(gates, gate):
    for share in (0.2, 1.0):
        inputs = make((1, 2, 90, 16, 16), gates)
        where = torch.rand(inputs[3].shape) < share
        inputs[3] = inputs[3].masked_fill(where, gate)
        found, expected = both(inputs)
        for name, result in found.items():
            # a forgotten state has a gradient of next to nothing: errors are of the largest number, or of 1
            result, wanted = result.detach().double(), expected[name].detach()
            assert float((result - wanted).abs().max()) <= FLOAT32 * max(1.0, float(wanted.abs().max())), name
        if gate == -math.inf:
            assert not found["grad log_decay"][where].any()


def test_forgetting_everything_is_a_reset():
    inputs = make((1, 2, 60, 16, 16), 1)
    inputs[3][:, :, 25] = -math.inf
    out, state = delta_rule.run(*inputs, 64, 16, True)
    rest = [t[:, :, 25:] for t in inputs[:5]]
    rest[3] = rest[3].clone()
    rest[3][:, :, 0] = 0
    fresh, fresh_state = delta_rule.run(*rest, None, 64, 16, True)
    assert error(out[:, :, 25:], fresh.double()) <= FLOAT32
    assert error(state, fresh_state.double()) <= FLOAT32


def test_rates_of_zero_write_nothing_and_have_gradients():
    inputs = make((1, 2, 40, 16, 16), 1)
    inputs[4] = inputs[4].masked_fill(torch.rand(inputs[4].shape) < 0.5, 0)
    assert_close(inputs)


def test_split_and_resume_equals_whole():
    q, k, v, g, beta, state = make((2, 2, 91, 12, 20), 12)
    whole, last = delta_rule.run(q, k, v, g, beta, state, 64, 16, True)
    first, middle = delta_rule.run(*(x[:, :, :37] for x in (q, k, v, g, beta)), state, 64, 16, True)
    second, end = delta_rule.run(*(x[:, :, 37:] for x in (q, k, v, g, beta)), middle, 64, 16, True)
    assert error(torch.cat([first, second], 2), whole.double()) <= FLOAT32
    assert error(end, last.double()) <= FLOAT32


def test_any_strides_and_nothing_written_outside():
    inputs = make((2, 3, 45, 16, 24), 1)
    expected = delta_rule.run(*inputs, 64, 16, True)
    spread = []
    for x in (*inputs[:4], inputs[4][..., None], inputs[5]):
        b, h, n, width = x.shape
        view = torch.full((b, n, h, width + 3), math.nan)[..., 1 : 1 + width].transpose(1, 2)
        spread.append(view.copy_(x))
    spread[4] = spread[4][..., 0]
    found = delta_rule.run(*spread, 64, 16, True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # last axes that are not contiguous cost a copy; heads that share keys do not
    found = delta_rule.run(*(x.mT.contiguous().mT for x in inputs), 64, 16, True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    inputs[1] = inputs[1][:, :1].expand(-1, 3, -1, -1)
    assert_close(inputs)


def test_no_tokens_rows_or_heads():
    for shape in ((1, 2, 0, 8, 8), (0, 2, 5, 8, 8), (2, 0, 5, 8, 8)):
        for gates in (0, 1, 8):
            assert_close(make(shape, gates))
            assert_close(make(shape, gates, state=False))


def test_nan_spreads_to_what_follows_and_not_to_chunks_before():
    inputs = make((1, 2, 100, 16, 16), 1)
    inputs[2][0, 0, 70, 3] = math.nan
    out, state = delta_rule.run(*inputs, 64, 16, True)
    assert out[0, 0, 70:, 3].isnan().all()
    assert not out[0, 0, :32].isnan().any() and not out[0, 1].isnan().any()
    assert state[0, 0, :, 3].isnan().all()


def test_mixed_dtypes_are_computed_in_float32():
    q, k, v, g, beta, state = make((1, 2, 40, 16, 16), 1)
    out, last = delta_rule.run(q, k, v.bfloat16(), g.bfloat16(), beta.bfloat16(), state.bfloat16(), 64, 16, True)
    expected, end = reference.run(
        *(x.double() for x in (q, k, v.bfloat16(), g.bfloat16(), beta.bfloat16(), state.bfloat16())), 64, 16, True
    )
    assert out.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert error(out, expected) <= BFLOAT16
    assert error(last, end) <= FLOAT32


def test_only_the_gradients_that_are_needed():
    for wanted in range(6):
        inputs = make((1, 2, 40, 8, 8), 1)
        inputs[wanted].requires_grad_()
        out, state = delta_rule.run(*inputs, 64, 16, True)
        (out.sum() + state.sum()).backward()
        expected = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        out, state = reference.run(*expected, 64, 16, True)
        (out.sum() + state.sum()).backward()
        assert [x.grad is None for x in inputs] == [i != wanted for i in range(6)]
        assert error(inputs[wanted].grad, expected[wanted].grad) <= FLOAT32


@pytest.mark.parametrize("which", ["out", "state"])
def test_gradients_of_one_result_alone(which):
    inputs = make((1, 2, 300, 8, 8), 1)
    results = []
    for run, dtype in ((delta_rule.run, torch.float32), (reference.run, torch.float64)):
        x = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        out, state = run(*x, 64, 16, True)
        (out if which == "out" else state).square().sum().backward()
        results.append([torch.zeros_like(t) if t.grad is None else t.grad for t in x])
    for found, expected in zip(*results, strict=True):
        assert error(found, expected) <= 2 * FLOAT32


def test_second_derivatives_are_refused():
    inputs = [x.requires_grad_() for x in make((1, 1, 8, 4, 4), 1)]
    out, _ = delta_rule.run(*inputs, 64, 16, True)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[1], create_graph=True)
    with pytest.raises(Unsupported, match="second derivative"):
        grad.sum().backward()


def test_bad_calls_are_refused_before_the_kernel():
    good = make((1, 2, 8, 4, 6), 1)

    def refused(**change):
        inputs = [change.get(name, x) for name, x in zip(NAMES, good, strict=True)]
        assert delta_rule.refuses(*inputs, 64, 16, True)
        if change.get("beta", good[4]) is not None:
            with pytest.raises(Unsupported):
                torch.ops.regard.delta_rule(*inputs, True, False)

    refused(q=torch.randn(1, 2, 8, 5))
    refused(v=torch.randn(1, 2, 7, 6))
    refused(log_decay=torch.randn(1, 2, 8, 3))
    refused(state=torch.randn(1, 2, 6, 4))
    refused(beta=torch.randn(1, 2, 8, 1))
    refused(k=good[1].double())
    refused(beta=None)
    assert delta_rule.refuses(*good, 64, 16, True) is None


@pytest.mark.parametrize("gates", [0, 1, 8])
def test_opcheck(gates):
    torch.use_deterministic_algorithms(False)
    for state in (True, False):
        q, k, v, g, beta, s = (
            None if x is None else x.requires_grad_() for x in make((1, 2, 20, 8, 6), gates, state=state)
        )
        torch.library.opcheck(torch.ops.regard.delta_rule.default, (q, k, v, g, beta, s, True, True))
    inputs = [None if x is None else x.detach() for x in (q, k, v, g, beta, s)]
    kept = torch.empty(1, 2, 0, 8, 6)
    needed = [x is not None for x in inputs]
    torch.library.opcheck(
        torch.ops.regard.delta_rule_backward.default,
        (torch.randn(1, 2, 20, 6), torch.randn(1, 2, 8, 6), *inputs, kept, True, needed),
    )


def test_compiles_whole():
    torch.use_deterministic_algorithms(False)

    def call(q, k, v, g, beta, state):
        out, last = delta_rule.run(q, k, v, g, beta, state, 64, 16, True)
        return out.square().sum() + last.square().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() for x in make((1, 2, 300, 8, 6), 1)]
    expected = torch.autograd.grad(call(*inputs), inputs)
    found = torch.autograd.grad(compiled(*inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
