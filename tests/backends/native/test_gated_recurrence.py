"""The native gated recurrence and its step against the torch engine in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regard.backends.native import library
from regard.contract import Unsupported
from regard.engines.gated_recurrence import gated_recurrence, gated_recurrence_reference, gated_recurrence_step
from regard.engines.gated_recurrence import native_form as native
from regard.engines.gated_recurrence import torch_form as plain

SETS = [name for name in library.instruction_sets() if "bf16" not in name] if library.why_missing() is None else []
NAMES = ("q", "k", "v", "log_decay", "state")


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest):
    with library.using_instruction_set(request.param), library.poisoned_workspaces():
        yield request.param


@pytest.fixture(params=(1, 2))
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def gates(*shape: int) -> Tensor:
    """From none at all to forgetting everything."""
    g = -torch.nn.functional.softplus(2 * torch.randn(shape))
    for share, value in ((0.3, 0.0), (0.08, -50.0), (0.04, -1e4), (0.04, -math.inf)):
        g = torch.where(torch.rand(shape) < share, value, g)
    return g


def inputs(
    batch: int, heads: int, n: int, width: int, value_width: int, decay: str, groups: int | None = None
) -> dict[str, Tensor | None]:
    groups = groups or heads
    q, k = torch.randn(2, batch, groups, n, width) / width**0.25
    g = None if decay == "none" else gates(batch, heads, n, 1 if decay == "scalar" else width)
    v, state = torch.randn(batch, heads, n, value_width), torch.randn(batch, heads, width, value_width)
    return {"q": q, "k": k, "v": v, "log_decay": g, "state": state}


def run(backend, x: dict[str, Tensor | None], inclusive: bool = True) -> tuple[Tensor | None, Tensor]:
    return backend.run(x["q"], x["k"], x["v"], x["log_decay"], None, x["state"], 64, 16, inclusive)


def with_gradients(backend, x, inclusive, grad_o, grad_state, dtype):
    leaves = {name: None if y is None else y.detach().to(dtype).requires_grad_() for name, y in x.items()}
    o, state = run(backend, leaves, inclusive)
    loss = (state * grad_state.to(state.dtype)).sum()
    loss = loss if o is None else loss + (o * grad_o.to(dtype)).sum()
    wanted = [name for name, y in leaves.items() if y is not None and (o is not None or name != "q")]
    grads = torch.autograd.grad(loss, [leaves[name] for name in wanted], allow_unused=True, materialize_grads=True)
    return {"o": o, "final": state, **dict(zip(wanted, grads, strict=True))}


def assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    assert found.shape == expected.shape, what
    if expected.numel():
        error, largest = (found.double() - expected).abs().max(), expected.abs().max()
        assert error <= tolerance * largest + 1e-30, f"{what}: {error:.1e} of {largest:.1e}"


def assert_agrees(x: dict[str, Tensor | None], inclusive: bool = True, tolerance: float = 2e-6) -> None:
    grad_o, grad_state = torch.randn_like(x["v"]), torch.randn_like(x["state"])
    found = with_gradients(native, x, inclusive, grad_o, grad_state, torch.float32)
    expected = with_gradients(plain, x, inclusive, grad_o, grad_state, torch.float64)
    for name, y in expected.items():
        if y is not None:
            assert_close(found[name], y.detach(), tolerance, name)


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_outputs_states_and_gradients_are_those_of_float64(instruction_set, decay, threads):
    # more heads than threads, and fewer, where value features are split
    for number, shape in enumerate(
        (
            (1, 2, 0, 8, 8),
            (2, 3, 1, 8, 8),
            (1, 1, 17, 16, 24),
            (1, 1, 61, 33, 65),
            (1, 2, 64, 64, 64),
            (1, 1, 31, 7, 130),
            (1, 3, 48, 130, 9),
            (1, 1, 18, 256, 256),
        )
    ):
        assert_agrees(inputs(*shape, decay), inclusive=number % 2 == threads % 2)


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_long_sequences_cross_checkpoints(decay):
    assert_agrees(inputs(1, 1, 531, 16, 33, decay))


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_queries_and_keys_shared_by_groups_of_heads(threads, decay):
    assert_agrees(inputs(2, 6, 37, 16, 8, decay, groups=2))
    x = inputs(1, 4, 37, 16, 8, decay, groups=1)
    x["q"] = torch.randn(1, 2, 37, 16)
    assert_agrees(x)


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_ten_thousand_tokens_of_weak_decay_lose_nothing(decay):
    x = inputs(1, 1, 10_000, 32, 32, decay)
    x["log_decay"] = None if x["log_decay"] is None else -1e-3 * torch.rand_like(x["log_decay"])
    exact = {name: None if y is None else y.double() for name, y in x.items()}
    for found, expected in zip(run(native, x), run(plain, exact), strict=True):
        assert_close(found, expected, 2e-6)


def test_the_same_gate_at_ten_thousand_tokens_does_not_drift():
    # a decay rounded to float at every block would be wrong by hundreds of roundings in the same direction
    candidates = -1e-4 * (1 + 0.1 * torch.rand(1000))
    exact = (16 * candidates.double()).exp()
    gate = candidates[(exact.float() - exact).abs().argmax()]  # whose decay over 16 tokens rounds worst
    x = inputs(1, 1, 10_000, 8, 8, "vector")
    x["k"], x["v"] = torch.rand_like(x["k"]), torch.rand_like(x["v"])
    x["log_decay"] = gate.expand_as(x["log_decay"]).contiguous()
    for found, expected in zip(run(native, x), run(plain, {n: y.double() for n, y in x.items()}), strict=True):
        assert_close(found, expected, 2e-6)


@pytest.mark.parametrize("gate", [-1.0, -50.0, -1e4, -math.inf])
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_strong_gates_everywhere(instruction_set, gate, decay):
    x = inputs(1, 1, 70, 16, 16, decay)
    x["log_decay"] = torch.full_like(x["log_decay"], gate)
    assert_agrees(x)
    if gate < -1:  # nothing but a token's own write is left
        o, state = run(native, x)
        assert_close(o, ((x["q"] * x["k"]).sum(-1, keepdim=True) * x["v"]).double(), 2e-6)
        assert_close(state, (x["k"][:, :, -1, :, None] * x["v"][:, :, -1, None, :]).double(), 2e-6)


def test_a_gate_that_forgets_everything_has_no_gradient_and_cuts_the_past():
    x = inputs(1, 1, 40, 8, 8, "vector")
    x["log_decay"] = -torch.rand_like(x["log_decay"])
    x["log_decay"][:, :, 21] = -math.inf
    grad_o = torch.randn_like(x["v"])
    grad_o[:, :, :21] = 0
    grads = with_gradients(native, x, True, grad_o, torch.randn_like(x["state"]), torch.float32)
    assert (grads["log_decay"][:, :, 21] == 0).all()
    assert (grads["state"] == 0).all()
    whole, _ = run(native, x)
    later = {name: None if y is None else y[:, :, 21:] for name, y in x.items()} | {"state": None}
    assert torch.allclose(whole[:, :, 21:], run(native, later)[0], rtol=0, atol=1e-5)


def test_gradients_reach_what_only_the_state_or_only_the_output_depends_on():
    x = inputs(1, 2, 50, 8, 8, "vector")
    for use in ((1.0, 0.0), (0.0, 1.0)):
        results = []
        for backend, dtype in ((native, torch.float32), (plain, torch.float64)):
            leaves = {name: y.to(dtype).requires_grad_() for name, y in x.items()}
            o, state = run(backend, leaves)
            chosen = o if use[0] else state
            wanted = [leaves[name] for name in NAMES if use[0] or name != "q"]
            results.append(torch.autograd.grad(chosen.sin().sum(), wanted))
        for found, expected in zip(*results, strict=True):
            assert_close(found, expected, 2e-6)


def test_without_queries_the_state_alone(instruction_set):
    for decay in ("none", "scalar", "vector"):
        x = inputs(2, 2, 75, 16, 24, decay)
        expected = run(native, x)[1]
        nothing, state = run(native, x | {"q": None})
        assert nothing is None
        assert torch.allclose(state, expected, rtol=0, atol=2e-6 * expected.abs().max().item())
        assert_agrees(x | {"q": None})


def test_split_and_resume_equals_whole():
    x = inputs(1, 2, 100, 16, 24, "vector")
    whole, final = run(native, x)
    first, state = run(native, {name: y if name == "state" else y[:, :, :37] for name, y in x.items()})
    rest, last = run(native, {name: state if name == "state" else y[:, :, 37:] for name, y in x.items()})
    assert_close(torch.cat([first, rest], 2), whole.double(), 2e-6)
    assert_close(last, final.double(), 2e-6)


def test_later_tokens_change_nothing_before_them():
    x = inputs(1, 1, 60, 16, 16, "vector")
    before, _ = run(native, x)
    for name in ("q", "k", "v", "log_decay"):
        x[name] = x[name].clone()
        x[name][:, :, 41:] = -torch.rand_like(x[name][:, :, 41:])
    after, _ = run(native, x)
    assert torch.equal(before[:, :, :41], after[:, :, :41])


def test_nan_stays_nan_and_in_its_head():
    x = inputs(1, 2, 40, 8, 8, "vector")
    x["v"][0, 0, 20] = math.nan
    o, state = run(native, x)
    assert o[0, 0, 20:].isnan().all() and state[0, 0].isnan().all()
    assert o[0, 1].isfinite().all() and not o[0, 0, :16].isnan().any()


def test_any_strides_are_read_in_place():
    x = inputs(2, 3, 21, 16, 24, "vector")
    expected = run(native, x)
    strided = {}
    for name in ("q", "k", "v", "log_decay"):
        strided[name] = x[name].transpose(1, 2).contiguous().transpose(1, 2)  # (B, N, H, D) in memory
    strided["state"] = x["state"].mT.contiguous().mT
    for found, same in zip(run(native, strided), expected, strict=True):
        assert torch.equal(found, same)
    every_second = x["v"].repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(run(native, strided | {"v": every_second})[0], expected[0])
    one = torch.randn(1, 1, 21, 16).expand(2, 3, -1, -1)
    shared = x | {"k": one}
    assert torch.equal(run(native, shared)[0], run(native, x | {"k": one.contiguous()})[0])


def test_results_do_not_depend_on_who_runs_what(threads):
    x = inputs(1, 3, 300, 16, 70, "vector", groups=1)
    grad_o, grad_state = torch.randn_like(x["v"]), torch.randn_like(x["state"])
    first = with_gradients(native, x, True, grad_o, grad_state, torch.float32)
    for _ in range(5):
        again = with_gradients(native, x, True, grad_o, grad_state, torch.float32)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_bfloat16_in_and_out_with_float32_between(instruction_set, decay):
    x = inputs(1, 2, 90, 16, 33, decay)
    x = {name: y if y is None or name == "state" else y.bfloat16() for name, y in x.items()}
    grad_o, grad_state = torch.randn_like(x["v"]), torch.randn_like(x["state"])

    def gradients(backend, dtype):
        leaves = {n: None if y is None else y.to(dtype or y.dtype).requires_grad_() for n, y in x.items()}
        o, state = run(backend, leaves)
        loss = (o * grad_o.to(o.dtype)).sum() + (state * grad_state.to(state.dtype)).sum()
        return [o, state, *torch.autograd.grad(loss, [y for y in leaves.values() if y is not None])]

    for found, expected in zip(gradients(native, None), gradients(plain, torch.float64), strict=True):
        assert_close(found, expected.detach(), 4e-3 if found.dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
@pytest.mark.parametrize("correcting", [False, True])
def test_a_step_is_one_token_of_the_recurrence(instruction_set, decay, correcting):
    for batch, heads, groups, width, value_width in ((2, 4, 4, 64, 64), (3, 4, 2, 33, 65), (1, 2, 1, 7, 5)):
        x = inputs(batch, heads, 1, width, value_width, decay, groups)
        tensors = [y if y is None or name == "state" else y[:, :, 0] for name, y in x.items()]
        tensors.insert(4, torch.rand(batch, heads) if correcting else None)
        grad_o, grad_state = torch.randn(batch, heads, value_width), torch.randn_like(x["state"])

        def results(backend, dtype, tensors=tensors, grad_o=grad_o, grad_state=grad_state):
            leaves = [None if y is None else y.to(dtype).requires_grad_() for y in tensors]
            o, state = backend.run_step(*leaves)
            loss = (o * grad_o.to(dtype)).sum() + (state * grad_state.to(dtype)).sum()
            return [o, state, *torch.autograd.grad(loss, [y for y in leaves if y is not None])]

        for found, expected in zip(results(native, torch.float32), results(plain, torch.float64), strict=True):
            assert_close(found, expected.detach(), 2e-6)


def test_states_larger_than_the_caches_take_a_step():
    q, k, v = torch.randn(3, 130, 8, 64)
    g, state = -torch.rand(130, 8, 64), torch.randn(130, 8, 64, 64)
    expected = plain.run_step(q, k, v, g, None, state)
    for _ in range(3):  # the memory of a state that is gone serves the next
        found = native.run_step(q, k, v, g, None, state)
        for x, y in zip(found, expected, strict=True):
            assert torch.allclose(x, y, rtol=0, atol=1e-4)
        del found, x
    kept = native.run_step(q, k, v, g, None, state)[1]
    view = kept[3]
    copy = view.clone()
    del kept
    native.run_step(q, k, v, g, None, 2 * state)
    assert torch.equal(view, copy)


def test_a_step_in_bfloat16_keeps_its_state_in_float32():
    q, k, v = torch.randn(3, 2, 2, 16).bfloat16()
    g, state = -torch.rand(2, 2, 16).bfloat16(), torch.randn(2, 2, 16, 16)
    o, new = native.run_step(q, k, v, g, None, state)
    exact, expected = plain.run_step(*(x.double() for x in (q, k, v, g)), None, state.double())
    assert o.dtype == torch.bfloat16 and new.dtype == torch.float32
    assert_close(o, exact, 4e-3)
    assert_close(new, expected, 2e-6)


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_the_operators_pass_opcheck(decay):
    x = inputs(1, 2, 20, 8, 8, decay)
    tensors = [None if y is None else y.requires_grad_() for y in x.values()]
    torch.library.opcheck(native._gated_recurrence.overload, (*tensors, True, True))
    tokens = [None if y is None else y[:, :, 0].detach().requires_grad_() for y in tensors[:4]]
    torch.library.opcheck(native._gated_recurrence_step.overload, (*tokens, None, tensors[4].detach()))


def test_compiles_whole():
    x = inputs(1, 2, 40, 8, 8, "vector")
    leaves = {name: y.requires_grad_() for name, y in x.items()}

    def loss(q, k, v, g, state):
        o, final = gated_recurrence(q, k, v, g, state=state, backend="native")
        step, last = gated_recurrence_step(
            q[:, :, 0], k[:, :, 0], v[:, :, 0], g[:, :, 0], None, final, backend="native"
        )
        return o.square().sum() + step.sum() + last.square().sum()

    expected = torch.autograd.grad(loss(*leaves.values()), list(leaves.values()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, same in zip(
        torch.autograd.grad(compiled(*leaves.values()), list(leaves.values())), expected, strict=True
    ):
        assert torch.allclose(found, same, rtol=1e-5, atol=1e-5)


def test_the_engine_runs_the_definition_on_it():
    x = inputs(1, 2, 30, 8, 8, "vector")
    o, _ = gated_recurrence(x["q"], x["k"], x["v"], x["log_decay"], backend="native")
    exact = (None if y is None else y.double() for y in (x["q"], x["k"], x["v"], x["log_decay"]))
    assert_close(o, gated_recurrence_reference(*exact), 2e-6)


def test_a_second_derivative_is_refused():
    x = {name: y.requires_grad_() for name, y in inputs(1, 1, 5, 4, 4, "vector").items()}
    (grad,) = torch.autograd.grad(run(native, x)[0].square().sum(), [x["v"]], create_graph=True)
    with pytest.raises(Unsupported, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.randn(1, 2, 11, 8)},
        {"k": torch.randn(1, 3, 10, 8)},
        {"v": torch.randn(1, 2, 10)},
        {"v": torch.randn(1, 2, 10, 0)},
        {"log_decay": torch.randn(1, 2, 10, 3)},
        {"log_decay": torch.randn(1, 1, 10, 8)},
        {"state": torch.randn(1, 2, 8, 7)},
        {"state": torch.randn(1, 2, 8, 4).double()},
        {"k": torch.randn(1, 2, 10, 8).half()},
        {"k": torch.randn(1, 2, 10, 8, device="meta")},
    ],
)
def test_what_does_not_fit_is_refused_before_the_kernel(change):
    x = inputs(1, 2, 10, 8, 4, "vector") | change
    arguments = (x["q"], x["k"], x["v"], x["log_decay"], None, x["state"], 64, 16, True)
    assert native.refuses(*arguments) is not None
    if x["k"].is_meta:  # there torch itself asks for shapes only
        return
    with pytest.raises(Unsupported):
        native._gated_recurrence(x["q"], x["k"], x["v"], x["log_decay"], x["state"], True, False)


def test_gradients_that_are_not_its_own_are_refused():
    x = inputs(1, 2, 10, 8, 4, "vector")
    kept = torch.empty(1, 2, 0, 8, 4)
    tensors = [x[name] for name in NAMES]
    for grad_o, final, checkpoints in (
        (torch.randn(1, 2, 9, 4), None, kept),
        (None, torch.randn(1, 2, 4, 8), kept),
        (None, None, torch.randn(1, 2, 1, 8, 4)),
    ):
        with pytest.raises(Unsupported):
            native._gated_recurrence_backward(grad_o, final, *tensors, checkpoints, True, [True] * 5)
