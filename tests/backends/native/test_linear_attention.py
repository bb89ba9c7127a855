"""Native linear attention against the torch engine in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regard.backends.native import library
from regard.contract import Unsupported
from regard.engines.feature_maps import FEATURE_MAPS, NONNEGATIVE
from regard.engines.linear_attention import Rule, linear_attention
from regard.engines.linear_attention import native_form as native
from regard.engines.linear_attention import torch_form as plain

SETS = [name for name in library.instruction_sets() if "bf16" not in name] if library.why_missing() is None else []
ELU = Rule("elu", 1.0, 1e-6)
RULES = [Rule(name, 1.3, None) for name in FEATURE_MAPS] + [Rule(name, 0.7, 1e-6) for name in NONNEGATIVE]
SHAPES = (
    (1, 2, 0, 8, 8),
    (2, 3, 1, 8, 8),
    (1, 1, 61, 33, 65),
    (1, 2, 64, 64, 64),
    (1, 1, 31, 7, 130),
    (2, 2, 48, 130, 9),
)


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


def inputs(
    batch: int, heads: int, n: int, width: int, value_width: int, rule: Rule = ELU, groups: int | None = None
) -> dict[str, Tensor]:
    """The state is never negative, so that denominators do not vanish where `relu` kills features."""
    q, k = torch.randn(2, batch, groups or heads, n, width)
    v = torch.randn(batch, heads, n, value_width)
    state = torch.rand(batch, heads, width, value_width + (rule.eps is not None))
    return {"q": q, "k": k, "v": v, "state": state}


def run(backend, x: dict[str, Tensor | None], rule: Rule = ELU, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return backend.run(x["q"], x["k"], x["v"], rule, x["state"], valid, 64)


def with_gradients(backend, x, rule, valid, grad_o, grad_state, dtype):
    leaves = {name: None if y is None else y.detach().to(dtype or y.dtype).requires_grad_() for name, y in x.items()}
    o, state = run(backend, leaves, rule, valid)
    loss = (o * grad_o.to(o.dtype)).sum() + (state * grad_state.to(state.dtype)).sum()
    wanted = [name for name, y in leaves.items() if y is not None]
    grads = torch.autograd.grad(loss, [leaves[name] for name in wanted], allow_unused=True, materialize_grads=True)
    return {"o": o, "final": state, **dict(zip(wanted, grads, strict=True))}


def assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    assert found.shape == expected.shape, what
    if expected.numel():
        error, largest = (found.double() - expected).abs().max(), expected.abs().max()
        assert error <= tolerance * largest + 1e-30, f"{what}: {error:.1e} of {largest:.1e}"


def assert_agrees(x: dict[str, Tensor | None], rule: Rule = ELU, valid: Tensor | None = None) -> None:
    batch, heads, _, value_width = x["v"].shape
    grad_o = torch.randn_like(x["v"])
    grad_state = torch.randn(batch, heads, x["k"].shape[-1], value_width + (rule.eps is not None))
    found = with_gradients(native, x, rule, valid, grad_o, grad_state, torch.float32)
    expected = with_gradients(plain, x, rule, valid, grad_o, grad_state, torch.float64)
    for name, y in expected.items():
        assert_close(found[name], y.detach(), 2e-6, f"{name} of {rule}")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_outputs_states_and_gradients_are_those_of_float64(instruction_set, rule, threads):
    # fewer heads than threads, where value features are split, and more
    for shape in SHAPES:
        assert_agrees(inputs(*shape, rule), rule)


@pytest.mark.parametrize("rule", [ELU, Rule("sigmoid", 1.0, None)], ids=str)
def test_long_sequences_cross_checkpoints(instruction_set, rule):
    assert_agrees(inputs(1, 1, 531, 16, 33, rule), rule)


def test_a_sequence_may_begin_with_nothing_seen():
    assert_agrees(inputs(1, 2, 100, 16, 24) | {"state": None})


@pytest.mark.parametrize("rule", [ELU, Rule("exp", 0.5, 1e-3), Rule("sigmoid", 1.0, None)], ids=str)
def test_keys_after_a_rows_length_write_nothing(instruction_set, rule):
    x = inputs(5, 2, 70, 16, 24, rule)
    valid = torch.tensor([70, 33, 1, 0, 48])
    assert_agrees(x, rule, valid)
    o, state = run(native, x, rule, valid)
    assert torch.equal(state[3], x["state"][3])
    short, end = run(native, {n: y[1:2] if n == "state" else y[1:2, :, :33] for n, y in x.items()}, rule)
    assert torch.equal(o[1:2, :, :33], short) and torch.equal(state[1:2], end)


def test_queries_and_keys_shared_by_groups_of_heads(threads):
    assert_agrees(inputs(2, 6, 37, 16, 8, groups=2))
    assert_agrees(inputs(1, 4, 37, 16, 8) | {"k": torch.randn(1, 1, 37, 16)})


def test_ten_thousand_tokens_lose_nothing():
    x = inputs(1, 1, 10_000, 32, 32)
    exact = {name: y.double() for name, y in x.items()}
    for found, expected in zip(run(native, x), run(plain, exact), strict=True):
        assert_close(found, expected, 2e-6)


@pytest.mark.parametrize("size", [1e4, 50.0])
def test_large_features_neither_overflow_nor_hide_small_ones(size):
    x = inputs(1, 1, 40, 8, 8)
    x["q"], x["k"] = size * x["q"], size * x["k"]
    assert_agrees(x)


def test_a_query_that_meets_no_key_reads_zero_and_has_finite_gradients():
    x = {name: y.requires_grad_() for name, y in inputs(1, 1, 20, 8, 8).items() if name != "state"} | {"state": None}
    rule = Rule("relu", 1.0, 1e-6)
    o, _ = run(native, x, rule, torch.zeros(1, dtype=torch.int64))
    assert (o == 0).all()
    for grad in torch.autograd.grad(o.sum(), [x["q"], x["k"], x["v"]]):
        assert (grad == 0).all()


def test_gradients_reach_what_only_the_state_or_only_the_output_depends_on():
    x = inputs(1, 2, 50, 8, 8)
    for choose in (0, 1):
        weights, results = torch.randn_like(run(native, x)[choose]), []
        for backend, dtype in ((native, torch.float32), (plain, torch.float64)):
            leaves = {name: y.to(dtype).requires_grad_() for name, y in x.items()}
            wanted = [y for name, y in leaves.items() if choose == 0 or name != "q"]
            results.append(torch.autograd.grad((weights * run(backend, leaves)[choose]).sum(), wanted))
        for found, expected in zip(*results, strict=True):
            assert_close(found, expected, 2e-6)


@pytest.mark.parametrize("name", ["q", "k", "v", "state"])
def test_one_gradient_alone_is_the_same(name):
    x = inputs(1, 1, 50, 8, 40)
    leaves = {n: y.clone().requires_grad_() for n, y in x.items()}
    everything = dict(
        zip(leaves, torch.autograd.grad(run(native, leaves)[0].sum(), list(leaves.values())), strict=True)
    )
    alone = x | {name: x[name].clone().requires_grad_()}
    (grad,) = torch.autograd.grad(run(native, alone)[0].sum(), [alone[name]])
    assert torch.equal(grad, everything[name])


def test_split_and_resume_equals_whole():
    x = inputs(1, 2, 100, 16, 24)
    whole, final = run(native, x)
    first, state = run(native, {name: y if name == "state" else y[:, :, :37] for name, y in x.items()})
    rest, last = run(native, {name: state if name == "state" else y[:, :, 37:] for name, y in x.items()})
    assert_close(torch.cat([first, rest], 2), whole.double(), 2e-6)
    assert_close(last, final.double(), 2e-6)


def test_later_tokens_change_nothing_before_them():
    x = inputs(1, 1, 60, 16, 16)
    before, _ = run(native, x)
    for name in ("q", "k", "v"):
        x[name] = x[name].clone()
        x[name][:, :, 41:] = torch.randn_like(x[name][:, :, 41:])
    assert torch.equal(before[:, :, :41], run(native, x)[0][:, :, :41])


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("feature_map", NONNEGATIVE)
def test_nan_stays_nan_and_in_its_head(instruction_set, name, feature_map):
    x = inputs(1, 2, 40, 8, 8)
    x[name][0, 0, 20] = math.nan
    o, state = run(native, x, Rule(feature_map, 1.0, 1e-6))
    assert o[0, 0, 20].isnan().all()
    if name != "q":
        assert o[0, 0, 20:].isnan().all() and state[0, 0, :, :-1].isnan().all()
    assert o[0, 1].isfinite().all() and not o[0, 0, :16].isnan().any()


def test_any_strides_are_read_in_place():
    x = inputs(2, 3, 21, 16, 24)
    expected = run(native, x)
    strided = {"state": x["state"].mT.contiguous().mT}
    for name in ("q", "k", "v"):
        strided[name] = x[name].transpose(1, 2).contiguous().transpose(1, 2)  # (B, N, H, D) in memory
    for found, same in zip(run(native, strided), expected, strict=True):
        assert torch.equal(found, same)
    every_second = x["v"].repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(run(native, x | {"v": every_second})[0], expected[0])


def test_results_do_not_depend_on_who_runs_what(threads):
    x = inputs(1, 1, 300, 16, 70)
    grad_o, grad_state = torch.randn_like(x["v"]), torch.randn_like(x["state"])
    first = with_gradients(native, x, ELU, None, grad_o, grad_state, torch.float32)
    for _ in range(5):
        again = with_gradients(native, x, ELU, None, grad_o, grad_state, torch.float32)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_bfloat16_in_and_out_with_float32_between(instruction_set):
    x = inputs(1, 2, 90, 16, 33)
    x = {name: y if name == "state" else y.bfloat16() for name, y in x.items()}
    grad_o, grad_state = torch.randn_like(x["v"]), torch.randn_like(x["state"])
    found = with_gradients(native, x, ELU, None, grad_o, grad_state, None)
    expected = with_gradients(plain, x, ELU, None, grad_o, grad_state, torch.float64)
    for name, y in expected.items():
        assert_close(found[name], y.detach(), 4e-3 if found[name].dtype == torch.bfloat16 else 2e-6, name)


@pytest.mark.parametrize("rule", [ELU, Rule("silu", 0.5, None)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_the_operators_pass_opcheck(rule, padded):
    x = inputs(1, 2, 20, 8, 8, rule)
    tensors = [y.requires_grad_() for y in x.values()]
    valid = torch.tensor([13]) if padded else None
    options = (rule.feature_map, rule.scale, rule.eps, True)
    torch.library.opcheck(native._linear_attention.overload, (*tensors, valid, *options))


def test_compiles_whole():
    x = {name: y.requires_grad_() for name, y in inputs(2, 2, 40, 8, 8).items()}
    valid = torch.tensor([40, 17])

    def loss(q, k, v, state):
        o, final = linear_attention(q, k, v, ELU, state=state, valid=valid, backend="native")
        return o.square().sum() + final.square().sum()

    expected = torch.autograd.grad(loss(*x.values()), list(x.values()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, same in zip(torch.autograd.grad(compiled(*x.values()), list(x.values())), expected, strict=True):
        assert torch.allclose(found, same, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_refused():
    x = {name: y.requires_grad_() for name, y in inputs(1, 1, 5, 4, 4).items()}
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
        {"state": torch.randn(1, 2, 8, 4)},  # without the normaliser
        {"state": torch.randn(1, 2, 8, 5).double()},
        {"k": torch.randn(1, 2, 10, 8).half()},
        {"valid": torch.tensor([3, 4])},
        {"valid": torch.tensor([3], dtype=torch.int32)},
        {"feature_map": "tanh"},
    ],
)
def test_what_does_not_fit_is_refused_before_the_kernel(change):
    x = inputs(1, 2, 10, 8, 4) | {"valid": None, "feature_map": "elu"} | change
    rule = Rule(x["feature_map"], 1.0, 1e-6)
    assert native.refuses(x["q"], x["k"], x["v"], rule, x["state"], x["valid"], 64) is not None
    with pytest.raises(Unsupported):
        native._linear_attention(
            x["q"], x["k"], x["v"], x["state"], x["valid"], rule.feature_map, rule.scale, rule.eps, False
        )


def test_gradients_that_are_not_its_own_are_refused():
    x = inputs(1, 2, 10, 8, 4)
    kept, inverse = torch.empty(1, 2, 0, 8, 5), torch.ones(1, 2, 10)
    for grad_o, final, checkpoints, denominators in (
        (torch.randn(1, 2, 9, 4), None, kept, inverse),
        (None, torch.randn(1, 2, 8, 4), kept, inverse),
        (None, None, torch.randn(1, 2, 1, 8, 5), inverse),
        (torch.randn(1, 2, 10, 4), None, kept, inverse[:, :, :9]),
    ):
        with pytest.raises(Unsupported):
            native._linear_attention_backward(
                grad_o, final, *x.values(), None, checkpoints, denominators, "elu", 1.0, 1e-6, [True] * 4
            )
