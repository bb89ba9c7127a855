"""The native softmax scan against float64: sizes, instruction sets, threads, gradients, extremes."""

from __future__ import annotations

import itertools

import pytest
import torch

from regard.backends.native import library
from regard.contract import Unsupported
from regard.engines.softmax_scan import Carry, empty_carry, softmax_scan
from regard.engines.softmax_scan import native_form as native
from regard.engines.softmax_scan import torch_form as torch_backend

NAMES = ("output", "m", "u", "w", "grad_s", "grad_v", "grad_m", "grad_u", "grad_w", "grad_decay", "grad_mix")


@pytest.fixture(autouse=True)
def poisoned():
    """Outputs and workspaces full of NaN, so that a number that is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    threads = torch.get_num_threads()
    with library.poisoned_workspaces():
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(before)


def sample(n, q, v, *, batch=2, heads=3, decay=False, mix=False, dtype=torch.float32, scale=3.0, state=True):
    s, values = scale * torch.randn(batch, heads, n, q), torch.randn(batch, heads, n, v).to(dtype)
    carry = empty_carry(s, values)
    if state:
        carry = Carry(torch.randn_like(carry.m), torch.rand_like(carry.u) + 0.5, torch.randn_like(carry.w))
    gate = -torch.rand(batch, 1, n) if decay else None
    weights = torch.rand(batch, heads, n, q) if mix else None
    return [s, values, *carry, gate, weights]


def run(backend, inputs, grads=None, dtype=None):
    """Outputs and, given gradients of output, u and w, the gradients of all inputs; by name."""
    leaves = [None if x is None else (x.detach() if dtype is None else x.detach().to(dtype)) for x in inputs]
    if grads is not None:
        leaves = [None if x is None else x.requires_grad_() for x in leaves]
    s, v, m, u, w, gate, mix = leaves
    output, carry = backend.run(s, v, Carry(m, u, w), 16, gate, mix)
    found = {"output": output, "m": carry.m, "u": carry.u, "w": carry.w}
    if grads is not None:
        given = [x for x in leaves if x is not None]
        targets = [output, carry.u, carry.w]
        cotangents = [g.to(t.dtype) for g, t in zip(grads, targets, strict=True)]
        gradients = iter(torch.autograd.grad(targets, given, cotangents))
        found.update({name: next(gradients) for name, x in zip(NAMES[4:], leaves, strict=True) if x is not None})
    return found


def cotangents(inputs):
    s, v, _, u, w, _, mix = inputs
    shape = (*s.shape, v.shape[-1]) if mix is None else v.shape
    return torch.randn(shape), torch.randn_like(u), torch.randn_like(w)


def assert_equal(found, expected, tolerance):
    for name, value in found.items():
        assert torch.isfinite(value).all(), name
        error = (value.double() - expected[name]).abs().max() if value.numel() else 0
        bound = expected[name].abs().max() if value.numel() else 1
        assert error <= tolerance * max(bound, 0.1), (name, error, bound)


SIZES = [(1, 1, 1), (2, 3, 8), (31, 1, 64), (128, 2, 33), (129, 1, 7), (131, 5, 16), (97, 13, 130), (257, 49, 64)]


@pytest.mark.parametrize("isa", library.instruction_sets() if library.why_missing() is None else [])
@pytest.mark.parametrize(("decay", "mix"), list(itertools.product((False, True), repeat=2)))
def test_outputs_and_gradients_equal_float64_for_every_size_and_instruction_set(isa, decay, mix):
    for n, q, v in SIZES:
        inputs = sample(n, q, v, batch=1, heads=2, decay=decay, mix=mix)
        grads = cotangents(inputs)
        with library.using_instruction_set(isa):
            found = run(native, inputs, grads)
        assert_equal(found, run(torch_backend, inputs, grads, torch.float64), 5e-6)


def test_a_long_sequence_keeps_its_precision():
    inputs = sample(10_007, 1, 16, batch=1, heads=1, decay=True)
    inputs[5] = inputs[5] * 0.01
    found = run(native, inputs)
    s, v, *_ = expected = [None if x is None else x.double() for x in inputs]
    whole = torch_backend.run(s, v, Carry(*expected[2:5]), 64, expected[5], None)[0]
    assert (found["output"].double() - whole).abs().max() <= 2e-6 * whole.abs().max()


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (3, 1), (2, 3)])
def test_threads_and_split_columns_change_no_output_and_gradients_by_rounding_only(mix, batch, heads):
    inputs = sample(150, 3, 100, batch=batch, heads=heads, mix=mix, decay=True)
    grads = cotangents(inputs)
    torch.set_num_threads(1)
    one = run(native, inputs, grads)
    torch.set_num_threads(3)
    three, again = run(native, inputs, grads), run(native, inputs, grads)
    for name in one:
        assert torch.equal(three[name], again[name]), name
        if not name.startswith("grad"):
            assert torch.equal(one[name], three[name]), name
    assert_equal(three, {k: x.double() for k, x in one.items()}, 2e-6)


@pytest.mark.parametrize("mix", [False, True])
def test_any_strides_are_read(mix):
    inputs = sample(37, 4, 24, mix=mix, decay=True)
    grads = cotangents(inputs)
    expected = run(native, inputs, grads)
    strided = list(inputs)
    strided[0] = inputs[0].mT.contiguous().mT
    strided[1] = inputs[1].transpose(1, 2).contiguous().transpose(1, 2)
    strided[5] = inputs[5].repeat_interleave(2, -1)[..., ::2]
    if mix:
        strided[6] = torch.stack([inputs[6]] * 2, -1)[..., 0]
    output = grads[0].transpose(2, 3).contiguous().transpose(2, 3) if not mix else grads[0].mT.contiguous().mT
    found = run(native, strided, (output, *grads[1:]))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("mix", [False, True])
def test_bfloat16_values_are_scanned_in_float32(mix):
    inputs = sample(200, 3, 40, mix=mix, dtype=torch.bfloat16)
    grads = cotangents(inputs)
    found = run(native, inputs, grads)
    assert found["output"].dtype == found["grad_v"].dtype == torch.bfloat16
    assert {found[x].dtype for x in ("m", "u", "w", "grad_s", "grad_w")} == {torch.float32}
    assert_equal(found, run(torch_backend, inputs, [g.bfloat16() for g in grads], torch.float64), 1e-2)


@pytest.mark.parametrize("mix", [False, True])
def test_split_and_resume_equals_whole(mix):
    s, v, m, u, w, gate, weights = sample(75, 3, 20, decay=True, mix=mix)
    whole, last = native.run(s, v, Carry(m, u, w), 16, gate, weights)
    carry, parts = Carry(m, u, w), []
    for part in (slice(0, 0), slice(0, 1), slice(1, 40), slice(40, 75)):
        here = None if weights is None else weights[:, :, part]
        output, carry = native.run(s[:, :, part], v[:, :, part], carry, 16, gate[:, :, part], here)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(carry, last, rtol=1e-5, atol=1e-5)


def test_no_tokens_keep_the_carry_and_its_gradient():
    for n, q, v in ((0, 2, 5), (0, 1, 64)):
        s, values, m, u, w, gate, _ = sample(n, q, v, decay=True)
        u.requires_grad_()
        output, carry = native.run(s, values, Carry(m, u, w), 16, gate, None)
        assert output.shape == (2, 3, 0, q, v)
        torch.testing.assert_close(carry, Carry(m, u.detach(), w))
        carry.u.sum().backward()
        assert (u.grad == 1).all()
    for shape in ((0, 3, 5, 1), (2, 0, 5, 1), (2, 3, 5, 0)):
        s, values = torch.zeros(shape), torch.zeros(*shape[:3], 4)
        assert native.run(s, values, empty_carry(s, values), 16, None, None)[0].shape == (*shape, 4)


@pytest.mark.parametrize("mix", [False, True])
def test_extreme_scores_and_skipped_tokens(mix):
    inputs = sample(90, 2, 20, mix=mix, state=False)
    s = inputs[0]
    s.mul_(1e4 / 3)
    s[:, :, :5] = -torch.inf
    s[:, 0, 30:60] = -torch.inf
    grads = cotangents(inputs)
    found = run(native, inputs, grads)
    assert (found["output"][:, :, :5] == 0).all()
    assert (found["grad_s"][:, :, :5] == 0).all()
    assert_equal(found, run(torch_backend, inputs, grads, torch.float64), 5e-6)


def test_where_nothing_is_seen_the_carry_stays_empty_and_gradients_are_zero():
    inputs = sample(40, 2, 9, state=False)
    inputs[0].fill_(-torch.inf)
    s, v = inputs[0].requires_grad_(), inputs[1].requires_grad_()
    output, carry = native.run(s, v, Carry(*inputs[2:5]), 16, None, None)
    assert (output == 0).all()
    assert (carry.m == -torch.inf).all()
    assert (carry.u == 0).all()
    output.sum().backward()
    assert (s.grad == 0).all()
    assert (v.grad == 0).all()


@pytest.mark.parametrize("gate", [-50.0, -1e4, -torch.inf, 0.0])
def test_strong_decay_forgets_exactly_what_it_should(gate):
    s, v, m, u, w, _, _ = sample(40, 2, 17)
    decay = torch.zeros(1, 1, 40)
    decay[..., 23] = gate
    output, _ = native.run(s, v, Carry(m, u, w), 16, decay, None)
    expected, _ = torch_backend.run(
        s.double(), v.double(), Carry(m.double(), u.double(), w.double()), 64, decay.clamp(min=-1e5).double(), None
    )
    assert (output - expected).abs().max() <= 2e-6 * expected.abs().max()
    if gate == -torch.inf:
        alone, _ = native.run(s[:, :, 23:], v[:, :, 23:], empty_carry(s, v), 16, None, None)
        torch.testing.assert_close(output[:, :, 23:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mix", [False, True])
def test_a_nan_score_spreads_to_all_later_tokens_and_no_earlier_one(mix):
    inputs = sample(50, 2, 20, mix=mix)
    inputs[0][0, 1, 20, 1] = torch.nan
    found = run(native, inputs)
    reached = found["output"][0, 1] if mix else found["output"][0, 1, :, 1]
    assert reached[20:].isnan().all()
    assert torch.isfinite(reached[:20]).all()
    assert torch.isfinite(found["output"][1]).all()
    assert found["m"][0, 1, 1].isnan()
    assert found["u"][0, 1, 1].isnan()


def test_gradients_that_are_not_needed_are_left_out():
    s, v, m, u, w, gate, mix = sample(33, 3, 12, decay=True, mix=True)
    grads = torch.randn_like(v)
    leaves = {"s": s, "v": v, "log_decay": gate, "mix": mix}
    whole = {k: x.clone().requires_grad_() for k, x in leaves.items()}
    out = native.run(whole["s"], whole["v"], Carry(m, u, w), 16, whole["log_decay"], whole["mix"])[0]
    expected = dict(zip(leaves, torch.autograd.grad(out, list(whole.values()), grads), strict=True))
    for name in leaves:
        here = {k: x.clone().requires_grad_(k == name) for k, x in leaves.items()}
        out = native.run(here["s"], here["v"], Carry(m, u, w), 16, here["log_decay"], here["mix"])[0]
        (found,) = torch.autograd.grad(out, [here[name]], grads)
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-5)


def test_the_maximum_carries_no_gradient_and_second_derivatives_are_refused():
    s, v, m, u, w, _, _ = sample(9, 1, 4)
    s.requires_grad_()
    output, carry = native.run(s, v, Carry(m, u, w), 16, None, None)
    assert not carry.m.requires_grad
    (grad,) = torch.autograd.grad(output.sum(), s, create_graph=True)
    with pytest.raises(Unsupported, match="second derivatives"):
        torch.autograd.grad(grad.sum(), s)


def test_bad_calls_are_refused_before_a_pointer_is_passed():
    s, v, m, u, w, _, _ = sample(9, 2, 4)
    scan = torch.ops.regard.softmax_scan
    for bad in (
        (s[:, :, :8], v, None, None, m, u, w),
        (s, v, torch.zeros(2, 3, 8), None, m, u, w),
        (s, v, None, s[:, :1], m, u, w),
        (s, v, None, None, m[:, :1], u, w),
        (s, v, None, None, m, u, w.double()),
        (s.double(), v, None, None, m, u, w),
        (s, v.double(), None, None, m, u, w),
        (s[0], v, None, None, m, u, w),
    ):
        with pytest.raises(Unsupported, match="native softmax scan"):
            scan(*bad)
    with pytest.raises(Unsupported, match="native"):
        softmax_scan(s.double(), v.double(), backend="native")


@pytest.mark.parametrize(("decay", "mix"), [(False, False), (True, True)])
def test_custom_ops_are_well_formed(decay, mix):
    s, v, m, u, w, gate, weights = sample(9, 2, 5, batch=1, heads=2, decay=decay, mix=mix)
    leaves = [x if x is None else x.requires_grad_() for x in (s, v, gate, weights, m, u, w)]
    torch.library.opcheck(torch.ops.regard.softmax_scan, tuple(leaves))


def test_compiles_whole_with_gradients():
    s, v, m, u, w, gate, mix = sample(20, 2, 6, decay=True, mix=True)

    def function(s, v):
        output, carry = native.run(s, v, Carry(m, u, w), 16, gate, mix)
        plain, _ = native.run(s, v, carry, 16, None, None)
        return output.sum() + plain.square().sum()

    torch.use_deterministic_algorithms(False)
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().clone().requires_grad_() for x in (s, v)]
        results.append(torch.autograd.grad(f(*leaves), leaves))
    torch.testing.assert_close(results[1], results[0])


def test_the_engine_takes_the_native_backend():
    s, v, *_ = sample(20, 2, 6)
    found, _ = softmax_scan(s, v, backend="native")
    torch.testing.assert_close(found, softmax_scan(s, v, backend="torch")[0], rtol=1e-5, atol=1e-5)
