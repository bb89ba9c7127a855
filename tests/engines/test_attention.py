"""The attention engine in torch against its definition, for every way of cutting the work into blocks, and what it stores."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_problems import CAUSAL, Problem, counted, plain, random_problem
from support import calls, close, qkv, saved_for_backward, watched
from torch import Tensor

import regard.engines.attention.torch_form as backend
from regard.apply import apply
from regard.backends.native import library
from regard.catalogue import get_mechanism
from regard.contract import BlockMask, Mask, Unsupported
from regard.core.visibility import CountedRanks, Visibility, block_numbers
from regard.engines.attention import attention
from regard.positions import create_positions


def small_problem(seed: int) -> Problem:
    problem = random_problem(seed, torch.float64, (1, 5, 13, 37, 64), (1, 7, 40), (5, 3, 8), block=8)
    if problem.rule == "softmax" and problem.sink is None and seed % 2:
        problem.stretch = (-0.2, 1.2)
    return problem


def differentiated(problem: Problem, by_definition: bool, weights: list[Tensor]) -> list[Tensor]:
    """Output at valid queries, weights, log-sum-exp, first derivatives, and second ones in random directions."""
    given, leaves = problem.leaves()
    output, shares, lse = (
        given.expected() if by_definition else given.found("torch", want_weights=bool(len(weights) % 2))
    )
    valid = torch.ones(output.shape[:1] + output.shape[2:3]) if problem.valid is None else problem.valid
    output = output * valid[:, None, :, None]
    total = (output * weights[0]).sum()
    if lse is not None and problem.rule == "softmax":
        total = total + torch.where(lse > -torch.inf, lse, 0).sum()
    tensors = list(leaves.values())
    options = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(total, tensors, create_graph=True, **options)
    products = sum((g * d).sum() for g, d in zip(first, weights[1:], strict=False))
    second = torch.autograd.grad(products + sum(0 * x.sum() for x in tensors), tensors, **options)
    return [output, shares, lse, *first, *second]


def cut_small(monkeypatch: pytest.MonkeyPatch, pairs: int, smallest: int, band: int) -> None:
    monkeypatch.setattr(backend, "PAIRS_AT_ONCE", pairs)
    monkeypatch.setattr(backend, "SMALLEST_BLOCK", smallest)
    monkeypatch.setattr(backend, "LARGEST_BAND", band)


@pytest.mark.parametrize(
    ("pairs", "smallest", "band"),
    [(1, 5, 4), (1 << 10, 4, 512), (1 << 22, 4, 8), (1 << 22, 64, 512)],
)
def test_every_cut_equals_the_definition(monkeypatch, pairs, smallest, band):
    cut_small(monkeypatch, pairs, smallest, band)
    for seed in range(20):
        problem = small_problem(seed * 100 + smallest)
        weights = [torch.randn(*problem.q.shape[:3], problem.v.shape[3], dtype=torch.float64)]
        weights += [torch.randn_like(x) for x in problem.leaves()[1].values()]
        results = [differentiated(problem, by_definition, weights) for by_definition in (False, True)]
        for place, (found, expected) in enumerate(zip(*results, strict=True)):
            if found is not None:
                near = 1e-12 if place < 3 else 1e-11
                torch.testing.assert_close(found, expected, rtol=near, atol=near)


def test_the_random_problems_reach_bands_and_blocks(monkeypatch):
    cut_small(monkeypatch, 1 << 10, 4, 8)
    kinds = set()
    in_bands = backend._in_bands
    monkeypatch.setattr(backend, "_in_bands", lambda *a: (kinds.add("bands"), in_bands(*a))[1])
    again = backend._maybe_again
    monkeypatch.setattr(backend, "_maybe_again", lambda f, t, a: (kinds.add(f"again={a}"), again(f, t, a))[1])
    for seed in range(40):
        small_problem(seed).leaves()[0].found("torch")
    assert kinds == {"bands", "again=True", "again=False"}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("causal", [False, True])
def test_second_derivatives_of_softmax_exist_where_the_native_kernels_send_for_them(dtype, tolerance, causal):
    problem = plain(9, batch=2, width=4, visibility=Visibility(causal=causal), dtype=torch.float64)
    direction = torch.randn_like(problem.q)

    def second_of(dtype: torch.dtype, asked: str) -> list[Tensor]:
        given, leaves = problem.leaves(dtype)
        output = given.found(asked, want_lse=False)[0]
        (first,) = torch.autograd.grad(output.square().sum(), leaves["q"], create_graph=True)
        return list(torch.autograd.grad((first * direction.to(dtype)).sum(), list(leaves.values())))

    for found, expected in zip(second_of(dtype, "torch"), second_of(torch.float64, "torch"), strict=True):
        close(found.double(), expected, tolerance)
    if library.why_missing() is None:
        with pytest.raises(Unsupported, match="try backend='torch'"):
            second_of(dtype, "native")


def test_the_kernel_s_gradients_are_kept_by_nothing_that_saves_tensors_anew():
    """Under saved-tensor hooks, such as those of checkpointing, nothing else may keep the tensors alive."""
    q = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or len(kept) - 1, lambda i: kept[i]):
        output = backend.sdpa(q, q.detach(), q.detach(), torch.ones(5, 5, dtype=torch.bool).tril(), scale=0.5)
    assert len(kept) == 6
    (found,) = torch.autograd.grad(output.square().sum(), q)
    again = F.scaled_dot_product_attention(q, q.detach(), q.detach(), is_causal=True, scale=0.5)
    torch.testing.assert_close(found, *torch.autograd.grad(again.square().sum(), q))


def test_no_kernel_is_given_a_row_that_sees_nothing(monkeypatch):
    """Some kernels return NaN for such rows, which selecting afterwards does not remove from the gradients."""
    note = lambda *tensors, **options: options.get("attn_mask")  # noqa: E731
    given = watched(monkeypatch, torch.nn.functional, "scaled_dot_product_attention", note)
    bias = torch.zeros(1, 1, 9, 9)
    bias[..., 4, :] = -torch.inf
    tensors, lengths = qkv(9, heads=1, dtype=torch.float32), Mask(lengths=torch.tensor([0, 9]))
    apply(get_mechanism("softmax"), tensors, mask=Mask(bias=bias), backend="torch")
    for name in ("softmax", "local"):
        apply(get_mechanism(name), tensors, pattern="noncausal-self", mask=lengths, backend="torch")
    masks = [mask if mask.dtype == torch.bool else mask > -torch.inf for mask in given if mask is not None]
    assert len(masks) == 3 and all(mask.any(-1).all() for mask in masks)


def test_large_hidden_scores_leave_gradients_finite():
    problem = plain(5, heads=1, width=2)
    problem.k[..., 4, :] = 1e6 * problem.q[..., 0, :]
    given, leaves = problem.leaves(torch.float64)
    output = given.found("torch", want_weights=True, want_lse=False)[0]
    found = torch.autograd.grad(output[:, :, :4].square().sum(), list(leaves.values()))
    assert all(gradient.isfinite().all() for gradient in found)


# Tensors stored for the backward pass.


def stored(run: Any) -> int:
    """Bytes that `run()` stores for its backward pass."""
    return sum(saved_for_backward(run))


def leaves(n: int, heads: int = 1, dim: int = 4, **more: Any) -> dict[str, Tensor]:
    given = qkv(n, batch=1, heads=heads, dim=dim, dtype=torch.float32, **more)
    return {name: x.requires_grad_() for name, x in given.items()}


@pytest.mark.parametrize(
    ("options", "mask"),
    [({}, False), ({"window": 200}, False), ({"form": "block", "block": 100}, False), ({}, True)],
)
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_a_window_needs_memory_linear_in_length(options, mask, pattern):
    run = calls(get_mechanism("local"), pattern)

    def kept(n: int) -> int:
        given = Mask(lengths=torch.tensor([n - 3])) if mask else None
        return stored(lambda: run(leaves(n, dim=8), options, mask=given))

    assert kept(16384) < 4.4 * kept(4096)


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
@pytest.mark.parametrize("kind", ["bias", "position_bias", "blocks", "lengths", "dropout"])
def test_no_matrix_of_all_pairs_is_kept_for_backward(monkeypatch, name, kind):
    n = 1024
    monkeypatch.setattr(backend, "PAIRS_AT_ONCE", 1 << 16)
    scheme = create_positions("relative", dim=8, heads=2, head_dim=4)
    options: dict[str, Any] = {
        "bias": {"mask": Mask(bias=torch.randn(1, 2, 1, n))},
        "blocks": {"mask": Mask(blocks=BlockMask(torch.rand(1, 2, 16, 16) > 0.3, 64))},
        "lengths": {"mask": Mask(lengths=torch.tensor([n - 9]))},
        "position_bias": {"position_bias": lambda i, j: scheme.bias(i, j, False)},
        "dropout": {"dropout": 0.1},
    }[kind]
    run = calls(get_mechanism(name), "noncausal-self")
    assert stored(lambda: run(leaves(n, 2), **options)) < n * n


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_values_of_another_width_need_no_score_matrix(pattern):
    run = calls(get_mechanism("softmax"), pattern)
    assert stored(lambda: run(leaves(700, 2, value_dim=6))) < 2 * 700 * 700


# Dropout.


@pytest.mark.parametrize("name", ["softmax", "local"])
def test_seeded_dropout_is_the_same_when_a_block_is_computed_again(monkeypatch, name):
    tensors, call = qkv(48, batch=1), calls(get_mechanism(name))

    def run(v: Tensor) -> Tensor:
        return call(tensors | {"v": v}, dropout=0.4, generator=torch.Generator().manual_seed(5)).output

    cut_small(monkeypatch, 1 << 8, 4, 8)
    # the output is linear in v, so its derivative along a direction is the output for that direction with the same dropout
    v, direction, weight = tensors["v"].requires_grad_(), torch.randn_like(tensors["v"]), torch.randn_like(tensors["v"])
    (gradient,) = torch.autograd.grad((run(v) * weight).sum(), v)
    close((gradient * direction).sum(), (run(direction) * weight).sum(), 1e-11)


# Ranks and visibility.


@pytest.mark.parametrize("seed", range(30))
def test_counts_and_idle_limits_agree_with_the_mask(seed):
    pick = random.Random(seed)
    n, m, first = pick.randint(1, 12), pick.randint(1, 12), pick.randint(-4, 12)
    limits = [pick.choice(some) for some in ([None, 0, 3, 9], [None, 0, 2, 9], [None, 1, 4, 20])]
    rule = Visibility(pick.random() < 0.5, *limits, pick.randint(0, 2), pick.randint(0, 2))
    queries, keys = torch.arange(first, first + n)[None], torch.arange(m)[None]
    seen = rule.mask(queries, keys).expand(1, n, m)
    assert torch.equal(rule.count(queries, torch.tensor([[m]])), seen.sum(-1))
    assert torch.equal(rule.within(first, n, m).mask(queries, keys).expand(1, n, m), seen)
    back, ahead = rule.reach()
    distance = (keys[:, None] - queries[..., None])[seen]
    assert back is None or (distance >= -back).all()
    assert ahead is None or (distance <= ahead).all()


# Compiled programs and refusals.


@pytest.mark.parametrize(("name", "options"), [("softmax", {}), ("sigmoid", {"window": (3, None)})])
def test_blocked_work_compiles_whole(monkeypatch, name, options):
    cut_small(monkeypatch, 1 << 7, 4, 4)
    tensors, call = leaves(16), calls(get_mechanism(name))

    def run(**tensors: Tensor) -> Tensor:
        return call(tensors, options, dropout=1e-9).output.sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(**tensors), list(tensors.values())) for f in (compiled, run))
    torch.testing.assert_close(found, expected)


def test_blocks_are_numbered_alike_compiled():
    """Compiled by inductor, whose vectors of 16 leave one token over."""

    def numbers():
        return block_numbers(torch.arange(17), 16)

    torch.compiler.reset()
    assert torch.equal(torch.compile(numbers, fullgraph=True)(), numbers())


@pytest.mark.parametrize(
    ("told", "options"),
    [
        ("rule", {"rule": "softplus"}),
        ("log-sum-exp", {"rule": "sigmoid", "want_lse": True}),
        ("shift", {"shift": 1.0}),
        ("bias of shape", {"bias": torch.zeros(1, 1, 3, 4)}),
        ("stretch", {"rule": "sigmoid", "stretch": (-0.1, 1.0)}),
        ("stretch", {"stretch": (0.1, 1.0)}),
        ("stretch", {"stretch": (-0.1, 0.9)}),
    ],
)
def test_what_does_not_fit_is_refused(told, options):
    q = torch.randn(2, 2, 3, 4)
    with pytest.raises(Unsupported, match=told):
        attention(q, q, q, counted(3, 3), visibility=CAUSAL, scale=1.0, **options)


@pytest.mark.parametrize("first", [0, 5, 24, 37])
def test_blocks_of_ranks_that_begin_anywhere_are_cut_into_bands(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    cut_small(monkeypatch, 1 << 22, 8, 16)
    n, rule = 64, Visibility(causal=True, block=8, lookback=1)
    q, k, v = (torch.randn(1, 2, size, 4, dtype=torch.float64) for size in (n, n + first, n + first))
    where = CountedRanks(n, n + first, first, True, q.device)
    assert backend.Band.of(rule, where, n, n + first) is not None
    found, _, _ = attention(q, k, v, where, visibility=rule, scale=0.7, backend="torch")
    hidden = ~rule.mask(where.queries, where.keys)[:, None]
    close(found, (0.7 * q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ v)
