"""Tests specific to Sinkhorn attention: the definition in words, the soft permutation, the kept mixed block, and parity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import calls, check_recorded, close, cut, load, qkv, refused
from torch import Tensor

from regard.contract import Call, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.mechanisms import sinkhorn
from regard.mechanisms.sinkhorn import MECHANISM, Config, cost, sorting_weights

PATTERNS = [p.value for p in MECHANISM.patterns]
NONCAUSAL = ["noncausal-self", "noncausal-cross"]
run = calls(MECHANISM)


def one_row_in_words(q: Tensor, k: Tensor, v: Tensor, pattern: str, config: Config) -> Tensor:
    """The definition for one head and row."""
    size, n, m = config.block, len(q), len(k)
    causal, own = pattern == "causal-self", pattern.endswith("self")
    rows, columns = math.ceil(n / size), math.ceil(m / size)
    p = torch.zeros(rows, columns, dtype=torch.float64)
    pairs = [(i, j) for i in range(rows) for j in range(columns) if j < i or not causal]
    for i, j in pairs:
        query = q[: i * size + 1].mean(0) if causal else q[i * size : (i + 1) * size].mean(0)
        key = k[: (j + 1) * size].mean(0) if causal else k[j * size : (j + 1) * size].mean(0)
        p[i, j] = (max(0.0, float(query @ key) / 2) + 1e-6) ** (1 / config.temperature)
    for _ in range(config.iterations):
        total = p.sum(1)
        for i, j in pairs:
            p[i, j] /= total[i]
        before = p.clone()
        for i, j in pairs:
            p[i, j] /= before[: i + 1, j].sum() if causal else before[:, j].sum()
    places = min(size, m)
    mixed_k, mixed_v = torch.zeros(rows, places, 4).double(), torch.zeros(rows, places, 5).double()
    for i in range(rows):
        for j in range(columns):
            for mixed, x in ((mixed_k, k), (mixed_v, v)):
                block = x[j * size : (j + 1) * size]
                mixed[i, : len(block)] += p[i, j] * block
    outputs = []
    for i in range(n):
        block = i // size
        keys, values = mixed_k[block], mixed_v[block]
        if config.sortcut is not None:
            keys, values = mixed_k[: config.sortcut].flatten(0, 1), mixed_v[: config.sortcut].flatten(0, 1)
        if causal and block == 0:
            keys, values = keys[:0], values[:0]
        if own and config.sortcut is None:
            local = slice(block * size, i + 1 if causal else (block + 1) * size)
            keys, values = torch.cat([keys, k[local]]), torch.cat([values, v[local]])
        outputs.append((keys @ q[i] / 2).softmax(0) @ values)
    return torch.stack(outputs)


def in_words(tensors: dict[str, Tensor], pattern: str, options: dict) -> Tensor:
    flat = [x.flatten(0, 1) for x in tensors.values()]
    rows = [one_row_in_words(*row, pattern, Config(**options)) for row in zip(*flat, strict=True)]
    return torch.stack(rows).unflatten(0, (-1, 2))


OPTIONS: list[dict[str, Any]] = [
    {"block": 3},
    {"block": 1, "iterations": 2},
    {"block": 4, "iterations": 0, "temperature": 2.0},
    {"block": 30},  # one block: dense attention
]
SORTCUTS: list[dict[str, Any]] = [{"block": 4, "sortcut": blocks} for blocks in (1, 2, 50)]


@pytest.mark.parametrize(
    ("pattern", "options"), [(p, o) for p in PATTERNS for o in (OPTIONS + SORTCUTS if p in NONCAUSAL else OPTIONS)]
)
def test_each_form_equals_the_definition_in_words(pattern, options):
    for n, m in ((1, 1), (12, 12), (19, 19), (7, 17)):
        if n == m or "cross" in pattern:
            tensors = qkv(n, m, batch=1, value_dim=5)
            expected = in_words(tensors, pattern, options)
            for form in ("reference", None):
                close(run(tensors, options, pattern=pattern, form=form).output, expected, 1e-11)


def test_without_causality_rows_and_columns_sum_to_one():
    call = Call(Pattern.NONCAUSAL_SELF, Config(iterations=200, temperature=5.0), scale=0.5)
    weights = sorting_weights(call, *torch.randn(2, 3, 2, 6, 4, dtype=torch.float64))
    close(weights.sum(3), torch.ones(3, 2, 6, dtype=torch.float64), 1e-4)
    close(weights.sum(2), torch.ones(3, 2, 6, dtype=torch.float64), 1e-10)


@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self"])
def test_noise_is_drawn_in_training_only_from_the_generator(pattern):
    tensors = qkv(24)
    plain = run(tensors, {"block": 4}, pattern=pattern).output
    call = {"pattern": pattern, "training": True}
    noisy, defined = (
        run(tensors, {"block": 4}, generator=torch.Generator().manual_seed(1), form=form, **call).output
        for form in (None, "reference")
    )
    close(noisy, defined, 1e-11)
    assert not torch.allclose(noisy, plain)
    close(run(tensors, {"block": 4, "noise": False}, **call).output, plain)


def test_a_temperature_near_zero_with_noise_is_nearly_a_permutation():
    call = Call(Pattern.NONCAUSAL_SELF, Config(temperature=0.02, iterations=500), scale=1.0, training=True)
    weights = sorting_weights(call, *torch.randn(2, 1, 1, 5, 4, dtype=torch.float64))[0, 0]
    assert (weights.max(1).values > 0.9).all() or (weights.max(0).values > 0.9).all()


def test_gradients_through_the_sorting_stay_precise_in_float32():
    """The definition's ln(x + 1e-6) amplifies errors of x."""
    tensors, upstream, found = qkv(40, dtype=torch.float32), torch.randn(2, 2, 40, 4), []
    for dtype in (torch.float32, torch.float64):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
        output = run(leaves, {"block": 4}, pattern="noncausal-self").output
        found.append(torch.autograd.grad(output, list(leaves.values()), upstream.to(dtype)))
    for single, double in zip(*found, strict=True):
        close(single.double(), double, 2e-6)


def test_blocks_are_sorted_once_for_each_block_of_steps(monkeypatch):
    tensors, options, sorted_ = qkv(40), {"block": 5}, []
    inner = sinkhorn.sorting_weights
    state = run(cut(tensors, slice(0, 10)), options, return_state=True).state
    monkeypatch.setattr(sinkhorn, "sorting_weights", lambda *a: sorted_.append(1) or inner(*a))
    for t in range(10, 40):
        state = run(cut(tensors, slice(t, t + 1)), options, state=state).state
    assert len(sorted_) == 6
    counted = sum(x[0].numel() for n, x in state.tensors().items() if n not in ("length", "ranks"))
    assert counted == cost(Shape(1, 2, 1, 40, 4, 4), Config(**options)).state


@pytest.mark.parametrize("pattern", NONCAUSAL)
def test_parity_with_a_third_partys_code(pattern):
    arrays = load(f"sinkhorn_{pattern.removeprefix('noncausal-')}")
    q, k = arrays["q"].requires_grad_(), arrays["k"].requires_grad_()
    output = run({"q": q, "k": k, "v": k}, {"block": 4}, pattern=pattern).output
    check_recorded(arrays, output, {"q": q, "k": k}, 1e-10)


def test_what_it_lacks_is_refused_with_the_reason():
    refused("later tokens", run, qkv(5), {"sortcut": 1})
    with pytest.raises(Unsupported, match="absorbing memory"):
        create_layer("sinkhorn", 8, 2, pattern="noncausal-cross").encode_memory(torch.randn(1, 4, 8))
