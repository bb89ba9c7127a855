"""The native conserved flows against float64: sizes, instruction sets, threads, options, gradients, extremes."""

from __future__ import annotations

import pytest
import torch

from regard.backends.native import library
from regard.contract import Unsupported
from regard.engines.conserved_flows import Rule, Sums, conserved_flows, empty_sums
from regard.engines.conserved_flows import native_form as native
from regard.engines.conserved_flows import torch_form as torch_backend

RULES = [
    Rule(True, True, (-1.0, 1.0), 1.0, 1e-3),
    Rule(True, True, None, 0.3, 1e-3),
    Rule(False, True, (-1.0, 1.0), 1.0, 1e-3),
    Rule(True, False, (-10.0, 10.0), 2.0, 1e-6),
    Rule(False, False, None, 1.0, 1e-6),
]


@pytest.fixture(autouse=True)
def poisoned():
    """Outputs and workspaces full of NaN, so that a number that is never written shows."""
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    with library.poisoned_workspaces():
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(before)


def sample(n, d, *, batch=2, heads=3, padded=False):
    sinks, sources = torch.rand(batch, heads, n, d), torch.rand(batch, heads, n, d)
    valid = torch.randint(0, n + 1, (batch,)) if padded else None
    if padded:
        hidden = torch.arange(n) >= valid[:, None]
        sinks, sources = (x.masked_fill(hidden[:, None, :, None], 0) for x in (sinks, sources))
    totals = torch.rand(4, batch, heads, d)
    sums = Sums(totals, torch.randn(batch, heads), torch.rand(batch, heads) + 0.5, torch.randint(0, 9, (batch,)))
    return sinks, sources, sums, valid


def run(backend, sinks, sources, sums, rule, valid, grads=None, dtype=torch.float32):
    """Outputs, then gradients of sinks, sources, totals and normalizer."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (sinks, sources, sums.totals, sums.normalizer)]
    before = Sums(leaves[2], sums.maximum.to(dtype), leaves[3], sums.length)
    competition, acceptance, after = backend.run(leaves[0], leaves[1], before, rule, valid)
    outputs = [competition, acceptance, after.totals, after.normalizer]
    found = [*outputs, after.maximum]
    if grads is not None:
        used = [(o, g.to(dtype)) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        gradients = torch.autograd.grad([o for o, _ in used], leaves, [g for _, g in used], allow_unused=True)
        found += [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]
    return found


def cotangents(sinks, sums):
    tokens = sinks.shape[:3]
    return [torch.randn(tokens), torch.randn(tokens), torch.randn_like(sums.totals), torch.randn_like(sums.normalizer)]


def assert_equal(found, expected, tolerance):
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert torch.isfinite(x).all(), i
        error = (x.double() - y).abs().max() if x.numel() else 0.0
        assert error <= tolerance * max(y.abs().max() if y.numel() else 0.0, 0.1), (i, error)


@pytest.mark.parametrize("isa", library.instruction_sets() if library.why_missing() is None else [])
@pytest.mark.parametrize("rule", RULES)
def test_outputs_and_gradients_equal_float64(isa, rule):
    for n, d, padded in [
        (1, 3, False),
        (31, 64, False),
        (32, 17, True),
        (33, 8, False),
        (97, 130, True),
        (257, 16, False),
    ]:
        inputs = sample(n, d, batch=2, heads=2, padded=padded)
        grads = cotangents(inputs[0], inputs[2])
        with library.using_instruction_set(isa):
            found = run(native, *inputs[:3], rule, inputs[3], grads)
        assert_equal(found, run(torch_backend, *inputs[:3], rule, inputs[3], grads, torch.float64), 1e-5)


def test_threads_change_nothing():
    sinks, sources, sums, _ = sample(70, 20)
    grads = cotangents(sinks, sums)
    torch.set_num_threads(1)
    one = run(native, sinks, sources, sums, RULES[0], None, grads)
    torch.set_num_threads(3)
    three = run(native, sinks, sources, sums, RULES[0], None, grads)
    for x, y in zip(one, three, strict=True):
        assert torch.equal(x, y)


def test_any_strides_are_read():
    sinks, sources, sums, _ = sample(40, 24)
    grads = cotangents(sinks, sums)
    expected = run(native, sinks, sources, sums, RULES[0], None, grads)
    moved = sinks.transpose(1, 2).contiguous().transpose(1, 2), sources.mT.contiguous().mT
    for x, y in zip(run(native, *moved, sums, RULES[0], None, grads), expected, strict=True):
        assert torch.equal(x, y)


def test_split_and_resume_equals_whole():
    sinks, sources, _, _ = sample(75, 12)
    whole = native.run(sinks, sources, empty_sums(sinks), RULES[0], None)
    sums, parts = empty_sums(sinks), []
    for part in (slice(0, 0), slice(0, 1), slice(1, 40), slice(40, 75)):
        *found, sums = native.run(sinks[:, :, part], sources[:, :, part], sums, RULES[0], None)
        sums = sums._replace(length=sums.length + len(range(75)[part]))
        parts.append(found)
    for i in range(2):
        torch.testing.assert_close(torch.cat([p[i] for p in parts], 2), whole[i], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums[:3], whole[2][:3], rtol=1e-5, atol=1e-5)


def test_nothing_seen_gives_finite_numbers_and_zero_competition():
    sinks = torch.zeros(1, 2, 20, 4, requires_grad=True)
    rule = Rule(True, True, None, 1.0, 1e-6)
    competition, acceptance, after = native.run(sinks, sinks, empty_sums(sinks), rule, torch.zeros(1, dtype=torch.long))
    assert (competition == 0).all()
    assert torch.isfinite(acceptance).all()
    assert (after.maximum == -torch.inf).all()
    (competition.sum() + after.normalizer.sum()).backward()
    assert (sinks.grad == 0).all()


def test_nan_spreads_to_later_tokens_only():
    sinks, sources, sums, _ = sample(50, 8)
    sources[0, 1, 20, 3] = torch.nan
    competition, acceptance, _ = native.run(sinks, sources, sums, RULES[0], None)
    for x in (competition, acceptance):
        assert x[0, 1, 20:].isnan().all()
        assert torch.isfinite(x[0, 1, :20]).all()
        assert torch.isfinite(x[1]).all()


def test_no_tokens_keep_the_sums_and_their_gradient():
    sinks, sources, sums, _ = sample(0, 5)
    grads = cotangents(sinks, sums)
    found = run(native, sinks, sources, sums, RULES[0], None, grads)
    assert torch.equal(found[2], sums.totals)
    assert torch.equal(found[-2], grads[2])
    assert torch.equal(found[-1], grads[3])


def test_bad_calls_and_second_derivatives_are_refused():
    sinks, sources, sums, _ = sample(9, 4)
    options = (True, True, -1.0, 1.0, 1.0, 1e-6)
    flows = torch.ops.regard.conserved_flows
    for bad in (
        (sinks, sources[:, :, :8], *sums, None),
        (sinks, sources.double(), *sums, None),
        (sinks, sources, sums.totals[:3], *sums[1:], None),
        (sinks, sources, *sums[:3], sums.length.int(), None),
        (sinks, sources, *sums, torch.zeros(1, dtype=torch.long)),
        (sinks[0], sources[0], *sums, None),
    ):
        with pytest.raises(Unsupported, match="native conserved flows"):
            flows(*bad, *options)
    sinks.requires_grad_()
    (grad,) = torch.autograd.grad(native.run(sinks, sources, sums, RULES[0], None)[1].sum(), sinks, create_graph=True)
    with pytest.raises(Unsupported, match="second derivatives"):
        torch.autograd.grad(grad.sum(), sinks)


def test_the_custom_op_is_well_formed_and_compiles_whole():
    sinks, sources, sums, valid = sample(9, 5, batch=1, heads=2, padded=True)
    leaves = [x.requires_grad_() for x in (sinks, sources, sums.totals)]
    arguments = (*leaves, *sums[1:], valid, True, True, -1.0, 1.0, 1.0, 1e-6)
    torch.library.opcheck(torch.ops.regard.conserved_flows, arguments)

    def function(sinks, sources):
        competition, acceptance, after = conserved_flows(sinks, sources, sums, RULES[0], backend="native")
        return (competition + acceptance).sum() + after.totals.sum()

    torch.use_deterministic_algorithms(False)
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().clone().requires_grad_() for x in (sinks, sources)]
        results.append(torch.autograd.grad(f(*leaves), leaves))
    torch.testing.assert_close(results[1], results[0])
