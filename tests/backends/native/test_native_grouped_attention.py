"""The native softmax in two levels against the reference of landmark attention in float64, and its refusals."""

from __future__ import annotations

import pytest
import torch

from regard import backends
from regard.apply import absorb, apply
from regard.backends.native import library
from regard.contract import BlockMask, Mask, Role, Unsupported
from regard.core.visibility import Ranks
from regard.engines.grouped_attention import grouped_attention, own_groups
from regard.mechanisms.landmark import MECHANISM, Config

SETS = library.instruction_sets() if library.why_missing() is None else []
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def poisoned():
    """Outputs and workspaces full of NaN, so that a number that is never written shows."""
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    with library.poisoned_workspaces():
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(before)


def sample(n, m=None, *, heads=2, groups=2, width=8, value_width=8, batch=2, dtype=torch.float32):
    m = n if m is None else m
    shapes = {"q": (batch, heads, n, width), "k": (batch, groups, m, width), "v": (batch, groups, m, value_width)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def regular(m, block, batch=2):
    return ((torch.arange(m) % (block + 1) == block).long() * int(Role.LANDMARK)).expand(batch, -1).contiguous()


def irregular(m, share=0.25, batch=2):
    return (torch.rand(batch, m) < share).long() * int(Role.LANDMARK)


def outputs(inputs, roles, grad, **call):
    """Output, and gradients of q, k and v."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    output = apply(MECHANISM, leaves, roles=roles, **call).output
    return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), grad.to(output.dtype))]


def compare(inputs, roles, **call):
    """The native fast form against float64, forward and backward: the reference, or the fast form where there is padding."""
    dtype = inputs["v"].dtype
    grad = torch.randn(*inputs["q"].shape[:3], inputs["v"].shape[-1]).to(dtype)
    exact = {name: x.double() for name, x in inputs.items()}
    padded = "mask" in call or "memory_mask" in call
    expected = outputs(exact, roles, grad, form="parallel" if padded else "reference", **call)
    with backends.recording() as used:
        found = outputs(inputs, roles, grad, backend="native", **call)
    assert used == {"native"}
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x.dtype == dtype
        assert x.isfinite().all(), i
        error = (x.double() - y).abs().max() if x.numel() else torch.zeros(())
        assert error <= TOLERANCES[dtype] * max(y.abs().max() if y.numel() else 0.0, 1.0), (i, error)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_outputs_and_gradients_equal_the_reference(isa, dtype):
    with library.using_instruction_set(isa):
        for n, block, width, value_width, heads, groups in [
            (0, 3, 8, 8, 1, 1),
            (1, 3, 8, 8, 1, 1),
            (67, 10, 17, 33, 2, 1),
            (64, 15, 64, 64, 1, 1),
            (97, 1, 5, 130, 3, 1),
            (131, 100, 8, 16, 2, 2),
        ]:
            inputs = sample(n, width=width, value_width=value_width, heads=heads, groups=groups, dtype=dtype)
            compare(inputs, regular(n, block))


def test_wide_heads_and_a_long_sequence():
    compare(sample(29, width=256, value_width=256, heads=1, groups=1), regular(29, 7))
    n = 1500
    inputs, roles = sample(n, heads=1, groups=1, batch=1, width=16), regular(n, 50, batch=1)
    exact = {name: x.double() for name, x in inputs.items()}
    found = apply(MECHANISM, inputs, roles=roles, backend="native").output
    torch.testing.assert_close(found.double(), apply(MECHANISM, exact, roles=roles).output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self", "noncausal-cross", "causal-cross"])
@pytest.mark.parametrize("softmax", ["grouped", "ignore", "plain"])
def test_patterns_and_softmaxes_equal_the_reference(pattern, softmax):
    for n, m in [(37, 37), (5, 70), (70, 23), (3, 1)]:
        if pattern == "noncausal-self" and n != m:
            continue
        compare(sample(n, m, groups=1), irregular(m), pattern=pattern, config=Config(softmax=softmax))


def test_groups_of_all_lengths_equal_the_reference():
    for share in (0.0, 0.02, 0.5, 1.0):
        compare(sample(150, heads=1, groups=1), irregular(150, share))


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self", "noncausal-cross"])
@pytest.mark.parametrize("side", ["right", "left", "inside"])
def test_padding_equals_torch(pattern, side):
    n = 40
    for lengths in ([40, 17], [0, 1], [33, 0]):
        valid = torch.arange(n) < torch.tensor(lengths)[:, None]
        if side == "left":
            valid = valid.flip(1)
        elif side == "inside":
            valid = valid[:, torch.randperm(n)]
        name = "memory_mask" if pattern == "noncausal-cross" else "mask"
        compare(sample(n), irregular(n), **{name: Mask(valid=valid)}, pattern=pattern)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_gradients_by_rounding_only_and_repeat_exactly(threads):
    inputs, roles, grad = sample(150, heads=1, groups=1, batch=1), regular(150, 20, batch=1), torch.randn(1, 1, 150, 8)
    one = outputs(inputs, roles, grad, backend="native")
    torch.set_num_threads(threads)
    found = outputs(inputs, roles, grad, backend="native")
    for x, y in zip(found, one, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    for x, y in zip(found, outputs(inputs, roles, grad, backend="native"), strict=True):
        assert torch.equal(x, y)


def test_a_cache_continues_and_memory_is_read():
    inputs, roles = sample(50), regular(50, 6)
    whole = apply(MECHANISM, inputs, roles=roles, backend="native").output
    state, found = None, []
    for part in (slice(0, 20), slice(20, 21), slice(21, 50)):
        piece = {name: x[:, :, part] for name, x in inputs.items()}
        result = apply(MECHANISM, piece, roles=roles[:, part], state=state, return_state=True, backend="native")
        state = result.state
        found.append(result.output)
    torch.testing.assert_close(torch.cat(found, 2), whole, rtol=0, atol=3e-6)
    state = absorb(MECHANISM, {n: inputs[n] for n in "kv"}, pattern="noncausal-cross", roles=roles)
    read = apply(MECHANISM, {"q": inputs["q"]}, pattern="noncausal-cross", state=state, backend="native").output
    whole = apply(MECHANISM, inputs, pattern="noncausal-cross", roles=roles, backend="native").output
    torch.testing.assert_close(read, whole, rtol=0, atol=3e-6)


def test_any_strides():
    inputs, roles, grad = sample(33), regular(33, 5), torch.randn(2, 2, 33, 8)
    expected = outputs(inputs, roles, grad, backend="native")
    turned = {n: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for n, x in inputs.items()}
    by_token = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in inputs.items()}
    for given in (turned, by_token):
        leaves = {name: x.requires_grad_() for name, x in given.items()}
        output = apply(MECHANISM, leaves, roles=roles, backend="native").output
        found = [output, *torch.autograd.grad(output, list(leaves.values()), grad.transpose(2, 3).contiguous().mT)]
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_values_may_be_less_precise_than_rotated_keys():
    inputs, roles = sample(33), regular(33, 5)
    inputs["v"] = inputs["v"].bfloat16()
    marks, ranks = roles != 0, Ranks(torch.arange(33)[None], torch.arange(33)[None], None, None, True)
    arguments = (*inputs.values(), ranks, marks, own_groups(ranks, marks))
    found, _ = grouped_attention(*arguments, causal=True, scale=0.3, backend="native")
    expected, _ = grouped_attention(*arguments, causal=True, scale=0.3, backend="torch")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)


def test_large_scores_stay_exact():
    inputs, roles = sample(70), regular(70, 6)
    inputs["q"] = (inputs["q"] * 8).round() * 512
    inputs["k"] = (inputs["k"] * 8).round() / 8
    exact = {name: x.double() for name, x in inputs.items()}
    found = apply(MECHANISM, inputs, roles=roles, backend="native", scale=1.0).output
    expected = apply(MECHANISM, exact, roles=roles, form="reference", scale=1.0).output
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert all(x.isfinite().all() for x in outputs(inputs, roles, torch.randn(2, 2, 70, 8), backend="native"))


def test_nan_spreads_to_all_that_see_it():
    for name in "qkv":
        inputs, roles = sample(70, batch=1), regular(70, 6, batch=1)
        inputs[name][:, 1, 30] = torch.nan
        found = apply(MECHANISM, inputs, roles=roles, backend="native").output.isnan()
        seeing = torch.arange(70) == 30 if name == "q" else torch.arange(70) >= 30
        assert found[0, 1, seeing].all()
        assert not found[:, 0].any()
        if name != "v":  # a weight of 0 times NaN is NaN
            assert not found[0, 1, ~seeing].any()


def test_gradients_that_are_not_wanted_are_not_made():
    inputs, roles = sample(20), regular(20, 4)
    whole = outputs(inputs, roles, torch.ones(2, 2, 20, 8), backend="native")
    for i, name in enumerate("qkv"):
        leaf = inputs[name].clone().requires_grad_()
        output = apply(MECHANISM, {**inputs, name: leaf}, roles=roles, backend="native").output
        torch.testing.assert_close(torch.autograd.grad(output.sum(), leaf)[0], whole[i + 1], rtol=0, atol=1e-6)


def test_what_it_lacks_is_left_to_torch():
    inputs, roles = sample(9), regular(9, 3)
    blocks = BlockMask(torch.ones(1, 1, 5, 5, dtype=torch.bool), 2)
    for call in (
        {"mask": Mask(bias=torch.zeros(1, 1, 9, 9))},
        {"mask": Mask(blocks=blocks)},
        {"dropout": 0.5},
        {"want": {"weights"}},
    ):
        apply(MECHANISM, inputs, roles=roles, **call)
        with pytest.raises(Unsupported, match="try torch"):
            apply(MECHANISM, inputs, roles=roles, backend="native", **call)
    config, start = Config(block=3, top_k=1), {n: x[:, :, :8] for n, x in inputs.items()}
    state = apply(MECHANISM, start, roles=roles[:, :8], config=config, return_state=True).state
    step = {n: x[:, :, 8:] for n, x in inputs.items()}
    with pytest.raises(Unsupported, match="try torch"):
        apply(MECHANISM, step, roles=roles[:, 8:], config=config, state=state, backend="native")


def test_bad_calls_are_refused_before_a_pointer_is_passed():
    q = torch.randn(1, 2, 5, 4)
    ranks, marks = torch.arange(5)[None], torch.zeros(1, 5, dtype=torch.bool)
    good = [q, q, q, ranks, ranks, marks, ranks]
    torch.ops.regard.grouped_attention(*good, True, 1.0)
    for at, bad in (
        (1, q[:, :, :4]),
        (1, q[..., :3]),
        (2, q.double()),
        (2, q[0]),
        (0, torch.randn(1, 3, 5, 4)),
        (3, ranks[:, :4]),
        (4, ranks.int()),
        (5, marks.long()),
        (6, ranks.expand(2, -1)),
    ):
        with pytest.raises(Unsupported, match="native grouped attention"):
            torch.ops.regard.grouped_attention(*good[:at], bad, *good[at + 1 :], True, 1.0)


def test_second_gradients_are_refused():
    inputs, roles = sample(9), regular(9, 3)
    leaf = inputs["q"].clone().requires_grad_()
    output = apply(MECHANISM, {**inputs, "q": leaf}, roles=roles, backend="native").output
    gradient = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)[0]
    with pytest.raises(Unsupported, match="gradients of gradients"):
        torch.autograd.grad(gradient.sum(), leaf)


def test_opcheck():
    q, k, v = (x.requires_grad_() for x in sample(9, groups=1, value_width=5).values())
    ranks, marks = torch.arange(9)[None], regular(9, 3) != 0
    own = (marks.cumsum(-1) - marks.long()).contiguous()
    torch.library.opcheck(torch.ops.regard.grouped_attention.default, (q, k, v, ranks, ranks, marks, own, True, 0.5))


def test_compiles_whole():
    inputs, roles = sample(20), regular(20, 4)

    def function(q, k, v):
        return apply(MECHANISM, {"q": q, "k": k, "v": v}, roles=roles, form="parallel", backend="native").output

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), function(**inputs))
