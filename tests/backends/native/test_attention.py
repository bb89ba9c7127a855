"""The native attention kernel, forward and backward, against the definition in float64, under every option."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from attention_problems import CAUSAL, Problem, counted, plain, random_problem
from torch import Tensor

from regard import backends
from regard.catalogue import get_mechanism
from regard.contract import BlockMask, Pattern, Unsupported
from regard.core.visibility import DistanceBias, Ranks, Visibility
from regard.engines.attention import native_form as native
from regard.engines.attention.problem import RULES
from regard.engines.attention.problem import Problem as Call
from regard.layers.attention import AttentionLayer
from regard.layers.options import PositionOptions
from regard.measurement.memory import TensorMemory
from regard.positions import create_positions

from .kernels import GROUPED

# relative to the largest output; observed 1.8e-6 (for scores of some tens, as in torch's own kernel) and 3.7e-3
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
# relative to the tensor's largest gradient; in bfloat16 softmax's gradients are a difference that involves the rounded
# output; observed 1.6e-6 and 1.1e-2
OF_GRADIENTS = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
ALL = Visibility()
STRETCHES = [(-0.1, 1.0), (-0.03, 1.2), (0.0, 1.5), (-0.2, 2.0), (-0.02, 6.0)]

both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


def gradients(problem: Problem, weights: list[Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Gradients of output and log-sum-exp times `weights`, by the kernel, or by the torch form if `dtype` is float64."""
    given, leaves = problem.leaves(dtype)
    out, _, lse = given.found("torch" if dtype is torch.float64 else "native")
    return differentiate([out, lse], weights, leaves)


def differentiate(results: list[Tensor | None], weights: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    used = [(x, w.to(x.dtype)) for x, w in zip(results, weights, strict=False) if x is not None and x.requires_grad]
    if not used:  # no queries or no keys
        return {name: torch.zeros_like(x) for name, x in leaves.items()}
    found = torch.autograd.grad(
        [x for x, _ in used], list(leaves.values()), [w for _, w in used], allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def check(problem: Problem, with_gradients: bool = True) -> None:
    """Check output, log-sum-exp and gradients against the definition; queries that see nothing give 0 and get no gradient."""
    given, leaves = problem.leaves()
    out, _, lse = given.found("native")
    exact, exact_leaves = problem.leaves(torch.float64)
    by_pair = torch.zeros(problem.pairs, dtype=torch.float64, requires_grad=True)
    expected, _, expected_lse = exact.expected(by_pair)
    some = expected_lse > -math.inf
    assert out.dtype == problem.v.dtype and out.shape == expected.shape
    assert (out[~some] == 0).all()
    low, high = problem.stretch or (0.0, 1.0)
    if out.numel():
        size = expected.abs().max()
        if problem.stretch is not None:  # clipping shrinks numbers that were rounded when larger
            size = torch.maximum(size, (high - low) * replace(exact, v=exact.v.abs(), stretch=None).expected()[0].max())
        if problem.rule == "relu":  # weights near 0 come from products that were rounded when larger
            terms = replace(exact, q=exact.q.abs(), k=exact.k.abs(), v=exact.v.abs()).expected()[0]
            size = torch.maximum(size, terms.abs().max())
        assert (out.double() - expected).abs().max() <= TOLERANCE[out.dtype] * size, problem
    if lse is not None:
        assert lse.dtype == torch.float32 and torch.equal(lse == -math.inf, ~some)
        near = 2e-6 if out.dtype == torch.float32 else 2e-5
        torch.testing.assert_close(lse.double()[some], expected_lse[some], rtol=near, atol=near)
    if not with_gradients:
        return
    weights = [torch.randn(out.shape).to(out.dtype), torch.randn(some.shape).masked_fill(~some, 0)]
    found = differentiate([out, lse], weights, leaves)
    assert (found["q"][~some] == 0).all()
    results = [expected] if lse is None else [expected, expected_lse]
    wanted = differentiate(results, weights, exact_leaves | {"pairs": by_pair})
    whole = wanted
    if problem.stretch is not None:
        whole_problem, whole_leaves = replace(problem, stretch=None).leaves(torch.float64)
        whole = differentiate(list(whole_problem.expected()[::2]), weights, whole_leaves)
    for name, gradient in found.items():
        if gradient.numel():
            # where a gradient vanishes (one key, or sums over keys) its terms do not
            size = max(wanted[name].abs().max().item(), (high - low) * whole[name].abs().max().item(), high - low)
            if name == "bias":
                size = max(size, wanted["pairs"].abs().sum_to_size(gradient.shape).max().item())
            limit = OF_GRADIENTS[out.dtype] * (3 if name == "table" else 1)  # a sum over the whole diagonal
            error = (gradient.double() - wanted[name]).abs().max().item()
            assert error <= limit * size, (name, error / size, problem)


def moderate(problem: Problem) -> Problem:
    """The problem with scores of a few units, so that float32 weights are accurate to a few of the last digits."""
    return replace(problem, scale=1.5 * problem.q.shape[-1] ** -0.5)


def unambiguous(problem: Problem) -> Problem:
    """The problem with queries redrawn until rounding cannot decide which weights are clipped."""
    low, high = problem.stretch
    while problem.q.numel() and problem.k.numel():
        weights = replace(problem, stretch=None).leaves(torch.float64)[0].expected()[1].detach()
        stretched = (high - low) * weights + low
        # weights of 0, and weights of a query's only key, have no gradient on either side
        near = low < 0 and (stretched.abs() < 1e-6).any(), high > 1 and ((stretched - 1).abs() < 1e-6).any()
        if not any(near):
            break
        problem.q = torch.randn_like(problem.q)
    return problem


@both_dtypes
def test_every_mask_and_option_equals_the_definition(instruction_set, dtype):
    for seed in range(60):
        problem = random_problem(seed, dtype)
        check(problem, False)
        if seed % 2 and problem.rule != "relu":  # ReLU's gradient has steps
            check(moderate(problem))


@both_dtypes
def test_clipped_weights_equal_the_definition_under_every_mask_and_option(instruction_set, dtype):
    clipped = torch.zeros(3, dtype=torch.int64)
    for seed in range(24):
        stretch = random.Random(seed).choice(STRETCHES)
        problem = replace(random_problem(seed, dtype), rule="softmax", shift=0.0, sink=None, stretch=stretch)
        check(problem, False)
        if seed % 3 == 0:
            check(unambiguous(moderate(problem)))
        weights, whole = (in_float64(replace(problem, stretch=x))[1] for x in (stretch, None))
        weights = weights[whole > 0]
        kinds = weights == 0, weights == 1, (weights > 0) & (weights < 1)
        clipped += torch.stack([kind.sum() for kind in kinds])
    assert (clipped > 2_000).all()  # 0, 1 and in between


@pytest.mark.parametrize("rule", [*RULES, (0.0, 1.0), *STRETCHES], ids=str)
def test_every_length_and_width_equals_the_definition(instruction_set, rule):
    pick = random.Random(str(rule))
    options = {"stretch": rule} if isinstance(rule, tuple) else {"rule": rule}
    for n in (0, 1, 2, 7, 47, 48, 49, 63, 64, 65, 127, 193):
        for visibility in (ALL, CAUSAL):
            for dtype in list(TOLERANCE)[: 2 if rule == "softmax" else 1]:
                width, values = pick.choice([1, 8, 15, 64, 100, 256]), pick.choice([1, 8, 13, 64, 72, 256])
                problem = plain(n, width=width, values=values, visibility=visibility, dtype=dtype, **options)
                check(problem, "stretch" not in options and (rule != "relu" or n < 64))


# Clipped weights.


@both_dtypes
def test_clipped_weights_are_exactly_zero_and_one(instruction_set, dtype):
    """Keys that should weigh 0 have huge values, and the output must be the value of the one key that weighs 1."""
    problem = plain(64, 70, width=64, values=16, visibility=ALL, stretch=(-0.01, 1.01), scale=1.0, dtype=dtype)
    problem.q = 20 * torch.eye(64).to(dtype).expand(1, 2, -1, -1)
    problem.k = torch.eye(70, 64).to(dtype).expand(1, 2, -1, -1)
    problem.v[:, :, 64:] = 1e30
    assert torch.equal(problem.found("native")[0], problem.v[:, :, :64])


def test_gradients_at_a_bound_of_the_clip_are_those_of_one_side():
    # weights of 1 / 4: within the bounds, beyond the lower one, beyond the upper one, and exactly at them, where rounding
    # decides the side for all weights of a query
    given, weights = plain(1, 4, heads=1, visibility=ALL), [torch.randn(1, 1, 1, 16)]
    given.k[:] = given.k[:, :, :1]

    def gradient(stretch: tuple[float, float], dtype: torch.dtype) -> Tensor:
        return gradients(replace(given, stretch=stretch), weights, dtype)["k"].double()

    for at, inside, outside in (((-1.0, 3.0), (-0.99, 3.0), (-1.01, 3.0)), ((0.0, 4.0), (0.0, 3.99), (0.0, 4.01))):
        sides = [gradient(stretch, torch.float64) for stretch in (inside, outside)]
        assert sides[0].abs().max() > 0.1 and (sides[1] == 0).all()
        for side, stretch in zip(sides, (inside, outside), strict=True):
            torch.testing.assert_close(gradient(stretch, torch.float32), side, atol=1e-5, rtol=1e-5)
        found = gradient(at, torch.float32)
        assert min((found - side).abs().max() / sides[0].abs().max() for side in sides) < 0.01


def test_a_weight_of_almost_one_has_almost_no_gradient(instruction_set):
    # rounding decides whether the stretched weight exceeds 1, and must decide the same way everywhere
    n = 64
    given = plain(n, width=n, heads=1, scale=1.0, stretch=(-0.1, 1.0), visibility=ALL)
    given.k[:] = torch.eye(n)
    given.q[:] = torch.eye(n) * torch.linspace(15, 25, n)[:, None]
    weights = [torch.randn(1, 1, n, n)]
    found, wanted = gradients(given, weights), gradients(given, weights, torch.float64)
    # a weight has an error of 1e-6 here: half a unit in the last place of its score
    made_of = 25 * 1.1 * (weights[0] @ given.v.mT).abs().max()
    for name in "qk":
        assert (found[name] - wanted[name]).abs().max() <= 3e-6 * made_of, name


# Long sequences, bfloat16, and numbers of any size.


def beyond_rounding(out: Tensor, expected: Tensor) -> float:
    """The error of a bfloat16 output beyond half a unit in its last place, relative to the largest output.

    Rounding the output alone costs up to 3.9e-3. Softmax weights of at least 128 keys are rounded too if the processor
    multiplies bfloat16: observed up to 2.4e-3, mostly in outputs that are not the largest.
    """
    half = 2.0 ** (expected.abs().log2().floor() - 8)
    return float(((out.double() - expected).abs() - half).max() / expected.abs().max().clamp_min(1e-30))


def in_float64(problem: Problem) -> list[Tensor]:
    return [x.detach() for x in problem.leaves(torch.float64)[0].expected()]


@pytest.mark.parametrize("left", [None, 300])
@both_dtypes
def test_a_long_sequence_equals_the_definition_in_its_last_queries(instruction_set, left, dtype):
    n, last = (10_000 if dtype is torch.float32 else 5000), 40
    problem = plain(n, heads=1, visibility=Visibility(causal=True, left=left), dtype=dtype)
    if dtype is torch.bfloat16:
        problem.q, problem.v = 3 * problem.q, problem.v + 1  # some keys get most of the weight
    out, _, lse = problem.found("native")
    at = torch.arange(n)[None]
    end = replace(problem, q=problem.q[:, :, -last:], ranks=Ranks(at[:, -last:], at, n - last, n - last, True))
    expected, _, expected_lse = in_float64(end)
    if dtype is torch.bfloat16:
        assert beyond_rounding(out[:, :, -last:], expected) <= 3e-3
    else:
        assert (out[:, :, -last:] - expected).abs().max() <= 2e-6 * expected.abs().max()
    near = 1e-6 if dtype is torch.float32 else 2e-5
    torch.testing.assert_close(lse[:, :, -last:].double(), expected_lse, rtol=near, atol=near)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_bfloat16_weights_of_any_rule_and_sign_equal_the_definition(instruction_set, rule, scale):
    """Cases with few and many keys, odd widths and key counts, and weights dominated by one key."""
    for n, m, largest in ((1, 1, 1), (3, 2, 1), (50, 101, 1), (50, 131, 1), (49, 400, 1), (49, 400, 10)):
        options = {"rule": rule, "scale": scale, "shift": 0.0 if rule == "softmax" else -2.0}
        problem = plain(n, m, groups=1, width=17, values=33, visibility=ALL, dtype=torch.bfloat16, **options)
        problem.k[..., m // 2, :] *= largest
        rounded = rule == "softmax" and m >= 128
        error = beyond_rounding(problem.found("native")[0], in_float64(problem)[0])
        assert error <= (3e-3 if rounded else 1e-4), (n, m, largest)


@both_dtypes
@pytest.mark.parametrize("slope", [1e4, -1e4, 300.0, -300.0])
def test_scores_that_grow_or_fall_by_thousands_equal_the_definition(instruction_set, slope, dtype):
    """The reference value of the exponentials changes within a step and from step to step."""
    n = 200 if dtype is torch.float32 else 300
    for scale in (1.0, -1.0):
        problem = plain(n, width=8, visibility=ALL, scale=scale, dtype=dtype)
        problem.q, problem.k = torch.zeros(2, 1, 2, n, 8).to(dtype)
        problem.q[..., 0] = 1.0
        problem.k[..., 0] = slope * torch.linspace(-1, 1, n)
        check(problem, False)
        problem.k[0, 1] = problem.k[0, 1, torch.randperm(n)]
        if dtype is torch.float32:
            check(replace(problem, stretch=(-0.01, 1.2)), False)
        check(replace(problem, sink=torch.tensor([slope / 2, -slope])), False)


def test_gradients_are_right_for_scores_of_ten_thousand(instruction_set):
    # scores are exact in float32 (0 or +-1e4), and so is the log-sum-exp of a single largest score
    n = 80
    sign = torch.where(torch.rand(n) < 0.5, 1.0, -1.0)
    given = plain(n, width=128, scale=1.0)
    given.q = (torch.eye(n, 128) * 100 * sign[:, None]).expand(1, 2, -1, -1)
    given.k = (torch.eye(n, 128) * 100).expand(1, 2, -1, -1)
    weights = [torch.randn(1, 2, n, 128)]
    found = gradients(given, weights)
    for name, gradient in gradients(given, weights, torch.float64).items():
        assert (found[name] - gradient).abs().max() <= 3e-6 * gradient.abs().max(), name


@pytest.mark.parametrize("engine", ["attention", "clipped", "biased", "grouped"])
@pytest.mark.parametrize("size", [3e3, 1e4, 1e5])
def test_weights_of_scores_of_any_size_are_no_more_than_one(instruction_set, engine, size):
    """A value's gradient is a sum of weights times output gradients, however scores are rounded, which bounds it."""
    problem, at = plain(70, scale=1.0), torch.arange(70)[None]
    where = Ranks(at, at, None, None, False)
    problem = replace(problem, q=size * problem.q, k=size * problem.k, ranks=where)
    problem.bias = torch.randn(1, 2, 70, 70) if engine == "biased" else None
    problem.stretch = (-0.1, 1.1) if engine == "clipped" else None
    weights = torch.ones(1, 2, 70, 16)
    if engine == "grouped":
        given, options = {name: getattr(problem, name) for name in "qkv"}, {"landmark": at % 9 == 8, "own": at // 9}
        found = GROUPED.gradients(given, {"o": weights}, ranks=where, scale=1.0, **options)
        found = {name: found[f"grad {name}"] for name in "qkv"}
    else:
        found = gradients(problem, [weights, torch.zeros(1, 2, 70)])
    assert found["v"].abs().max() <= 70 * (1 + 1e-5)
    assert torch.isfinite(found["q"]).all() and torch.isfinite(found["k"]).all()


def test_sinks_of_any_size_leave_finite_gradients():
    weights = [torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70)]
    for value in (-math.inf, -1e4, 1e4, math.inf):
        given = plain(70, sink=torch.full((2,), value))
        found = gradients(given, weights)
        assert all(torch.isfinite(x).all() for x in found.values()), value
        wanted = gradients(replace(given, sink=given.sink.clamp(-1e30, 1e30)), weights, torch.float64)
        torch.testing.assert_close(found["k"].double(), wanted["k"], atol=1e-5, rtol=1e-5)


# Hidden pairs and NaN.


@both_dtypes
@pytest.mark.parametrize("rule", [*RULES, "clipped"])
def test_nan_reaches_what_sees_it_and_nothing_else(instruction_set, rule, dtype):
    options = {"rule": rule} if rule != "clipped" else {"stretch": (-0.02, 1.5)}
    for name in "qkv":
        problem = plain(130, dtype=dtype, **options)
        clean = problem.found("native")[0]
        getattr(problem, name)[0, 1, 70, 3] = math.nan
        found = problem.found("native")[0]
        hit, near = torch.zeros(2, *found.shape, dtype=torch.bool)
        hit[0, 1, slice(70, 71) if name == "q" else slice(70, None), slice(3, 4) if name == "v" else slice(None)] = True
        assert found[hit].isnan().all()
        # values of hidden keys are multiplied by 0 if they share a tile with visible ones, as in torch
        if name == "v":
            near[0, 1, 64 if instruction_set == "amx_bf16" else 66 : 70, 3] = True
        assert torch.equal(found[~hit & ~near], clean[~hit & ~near])


def test_nan_reaches_the_gradients_that_depend_on_it_and_no_others():
    given, weights = plain(140, heads=1), [torch.randn(1, 1, 140, 16)]
    given.q[0, 0, 70, 3] = math.nan
    found = gradients(given, weights)
    assert found["q"][0, 0, 70].isnan().all() and found["k"][0, 0, :71].isnan().all()
    assert found["v"][0, 0, :71].isnan().all()
    assert not found["q"][0, 0, :70].isnan().any() and not found["q"][0, 0, 71:].isnan().any()
    assert not found["k"][0, 0, 128:].isnan().any()
    given = plain(140, heads=1)
    given.v[0, 0, 100] = 3e38  # its product with a gradient overflows, even for queries that do not see it
    found = gradients(given, weights)["q"][0, 0]
    assert found[:100].isfinite().all() and not found[100:].isfinite().any()
    given = plain(9, sink=torch.tensor([math.nan, 0.0]))
    for name, gradient in gradients(given, [torch.randn(1, 2, 9, 16)]).items():
        by_head = gradient.movedim(-1 if name == "sink" else 1, 0)
        assert by_head[0].isnan().all() and not by_head[1].isnan().any()


def test_an_infinite_score_gives_nan_in_softmax_and_one_in_sigmoid():
    for rule in ("softmax", "sigmoid"):
        problem = plain(70, heads=1, visibility=ALL, rule=rule)
        problem.q, problem.k = torch.ones_like(problem.q), torch.ones_like(problem.k)
        problem.k[0, 0, 30] = math.inf
        out = problem.found("native")[0]
        if rule == "softmax":
            assert out.isnan().all()
        else:
            problem.k[0, 0, 30] = 1e6
            assert torch.equal(out, problem.found("native")[0])


def test_hidden_tiles_are_not_touched():
    """Only visible tiles are computed and read: keys and values elsewhere may hold anything."""
    n = 1024
    window = plain(n, visibility=Visibility(causal=True, left=70))
    blocks = plain(n, visibility=ALL, blocks=BlockMask(torch.eye(16, dtype=torch.bool)[None, None], 64))
    padded = replace(plain(n, visibility=ALL), ranks=counted(n, n, Pattern.NONCAUSAL_SELF, [448]))
    for problem, queries in ((window, slice(448, 500)), (blocks, slice(448, 512)), (padded, slice(0, 448))):
        clean = problem.found("native")[0]
        far = torch.ones(n, dtype=torch.bool)
        far[slice(0, 448) if problem is padded else slice(320, 512)] = False
        problem.k[:, :, far], problem.v[:, :, far] = math.nan, math.nan
        assert torch.equal(problem.found("native")[0][:, :, queries], clean[:, :, queries])


# Memory, threads, the operator and its callers.


def test_the_heads_of_a_token_lie_side_by_side():
    assert plain(20).found("native")[0].transpose(1, 2).is_contiguous()


def test_a_bias_a_head_needs_no_gradient_a_pair():
    n = 600
    given = plain(n, rule="sigmoid", bias=torch.randn(1, 2, 1, 1))
    with TensorMemory() as memory:
        gradients(given, [torch.randn(1, 2, n, 16)])
    assert memory.peak < 4 * n * n


def test_a_distance_bias_equals_the_function_of_ranks():
    i, j = torch.tensor([[3, 9], [0, 1]]), torch.arange(12)[None]
    for name in ("alibi", "relative"):
        scheme = create_positions(name, dim=16, heads=4, head_dim=4).double()
        for causal in (False, True):
            bias = DistanceBias(partial(scheme.by_distance, causal=causal))
            expected = scheme.bias(i, j, causal)
            assert torch.equal(bias(i, j), expected)
            table = bias.table(-9, 11, torch.device("cpu"))[:, 9 + j[0] - 3]
            assert torch.equal(table, scheme.bias(i[:1, :1], j, causal)[0, :, 0])
            assert torch.equal(bias.scaled(0.5, torch.float64)(i, j), 0.5 * expected.double())


def test_what_the_kernel_lacks_is_refused_with_a_reason():
    q, no_features = torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 0)

    def refusal(**changes: Any) -> str | None:
        tensors = [changes.pop(name, q) for name in "qkv"]
        call = {"ranks": counted(8, 8), "visibility": CAUSAL, "scale": 1.0, "want_lse": True}
        return native.refuses(*tensors, Call(**call | changes))

    assert refusal() is None
    assert refusal(bias=torch.zeros(1, 1, 8, 1, requires_grad=True)) is None
    assert refusal(stretch=(-0.1, 1.0)) is None
    for told, changes in (
        ("dropout", {"dropout": 0.1}),
        ("does not store the weights", {"want_weights": True}),
        ("DistanceBias", {"position_bias": lambda i, j: torch.zeros(1, 1, 8, 8)}),
        ("sink", {"stretch": (-0.1, 1.0), "sink": torch.zeros(2)}),
        ("no blocks", {"blocks": BlockMask(torch.zeros(1, 1, 0, 3, dtype=torch.bool), 4)}),
        ("features", {"v": no_features}),
        ("share", {"q": torch.zeros(1, 3, 8, 16)}),
    ):
        assert told in refusal(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"v": torch.zeros(2, 1, 12, 0)},
        {"distance": torch.zeros(2, 30), "distance_zero": 30},
        {"blocks": torch.ones(1, 1, 2, 2, dtype=torch.bool), "block_size": 0},
        {"blocks": torch.ones(1, 1, 2, 2, dtype=torch.uint8), "block_size": 4},
        {"limits": [1, -1]},
        {"rule": 5},
        {"rule": 4},
        {"rule": 4, "stretch": [0.1, 1.0]},
        {"rule": 4, "stretch": [-0.1, 1.0], "sink": torch.zeros(2)},
        {"rule": 0, "stretch": [-0.1, 1.0]},
    ],
)
def test_options_of_the_operator_that_do_not_belong_together_are_refused(changes):
    given: dict[str, Any] = {
        "q": torch.randn(2, 2, 9, 4), "k": torch.randn(2, 1, 12, 4), "v": torch.randn(2, 1, 12, 6),
        "sink": None, "bias": None, "distance": None, "query_ranks": torch.arange(9)[None], "key_ranks": torch.arange(12)[None], "first_rank": 0,
        "limits": [1, -1, -1, 0, 0, 0], "blocks": None, "block_size": 0, "scale": 0.5, "rule": 0, "shift": 0.0,
        "softcap": 0.0, "distance_zero": 0, "stretch": [],
    }  # fmt: skip
    torch.ops.regard.attention(*given.values())
    with pytest.raises(Unsupported, match="native attention"):
        torch.ops.regard.attention(*(given | changes).values())


@pytest.mark.usefixtures("_any_memory")  # the gradient of an embedding has no deterministic version
@pytest.mark.parametrize("positions", [None, "alibi", "relative", "rotary"])
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_layers_run_on_it_with_every_position_scheme(monkeypatch, positions, pattern):
    monkeypatch.setitem(backends.TORCH.engines, "attention", backends.Engine(lambda *_: pytest.fail("ran on torch")))
    layer = AttentionLayer(get_mechanism("softmax"), 32, 4, pattern=pattern, positions=PositionOptions(positions))
    x = torch.randn(2, 50, 32, requires_grad=True)
    found = torch.autograd.grad(layer(x).output.square().sum(), [x, *layer.parameters()])
    monkeypatch.undo()
    layer, x = layer.double(), x.detach().double().requires_grad_()
    expected = torch.autograd.grad(layer(x).output.square().sum(), [x, *layer.parameters()])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 3e-6 * b.abs().max()


@pytest.mark.parametrize("n", [5, 40])
@pytest.mark.parametrize("size", [2**31, 2**32, 2**40, 2**62])
def test_limits_and_blocks_of_any_size_are_those_of_all_tokens(n, size):
    problem, at = plain(n, width=8), torch.arange(n)[None]
    expected = problem.found("native")[0]
    blocks = BlockMask(torch.ones(1, 1, 1, 1, dtype=torch.bool), size)
    torch.testing.assert_close(replace(problem, blocks=blocks).found("native")[0], expected)
    where = Ranks(at, at, None, None, False)
    for limits in ({"left": size}, {"right": size}, {"block": size}, {"block": 3, "lookback": size, "lookahead": size}):
        visibility = Visibility(causal=True, **limits)
        torch.testing.assert_close(replace(problem, visibility=visibility, ranks=where).found("native")[0], expected)
