"""Tests specific to bounded-memory control: its slots, their running softmax, its limits, and recorded outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import calls, check_recorded, close, cut, in_pieces, load, qkv, refused
from torch import Tensor

from regard.create import create_layer
from regard.functional import softmax_attention
from regard.mechanisms import abc
from regard.mechanisms.abc import MECHANISM

run = calls(MECHANISM)


def inputs(n: int, m: int | None = None, groups: int = 2) -> dict[str, Tensor]:
    slots = {"slots_k": torch.randn(4, 5, dtype=torch.float64), "slots_v": torch.randn(3, 5, dtype=torch.float64)}
    return qkv(n, m, groups=groups, value_dim=3) | slots


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    weights = np.exp(x - x.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def definition(tensors: dict[str, Tensor], causal: bool) -> Tensor:
    """The definition, one query at a time; queries that see no key give 0."""
    q, k, v, slots_k, slots_v = (x.numpy() for x in tensors.values())
    found = np.zeros((*q.shape[:3], v.shape[3]))
    n, m = q.shape[2], k.shape[2]
    for b, h, i in np.ndindex(*q.shape[:3]):
        g, seen = h * k.shape[1] // q.shape[1], i + m - n + 1 if causal else m
        if seen > 0:
            keys, values = k[b, g, :seen], v[b, g, :seen]
            slot_keys, slot_values = softmax(keys @ slots_k, 0).T @ keys, softmax(values @ slots_v, 0).T @ values
            found[b, h, i] = softmax(slot_keys @ q[b, h, i] / 2, 0) @ slot_values
    return torch.from_numpy(found)


@pytest.mark.parametrize(
    ("pattern", "n", "m"),
    [
        *(("causal-self", n, m) for n, m in ((9, 9), (3, 8), (8, 3), (1, 6), (5, 0))),
        *(("noncausal-self", 9, 9), ("noncausal-cross", 9, 7), ("causal-cross", 9, 7)),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 3000.0])
def test_equals_the_definition_whatever_the_size_of_the_scores(pattern, n, m, groups, size):
    """Slots accumulate over the past; the benchmark's causal code only has the current token's share of each slot."""
    tensors = inputs(n, m, groups)
    tensors |= {name: size * tensors[name] for name in ("slots_k", "slots_v")}
    expected = definition(tensors, pattern == "causal-self")
    for form in ("reference", "parallel"):
        close(run(tensors, pattern=pattern, form=form, chunk_size=4).output, expected)


def test_blocks_of_tokens_equal_the_definition_and_leave_the_state_of_the_whole(monkeypatch):
    monkeypatch.setattr(abc, "BLOCK", 3)
    tensors = inputs(13, groups=1)
    whole = run(tensors, return_state=True)
    close(whole.output, definition(tensors, True))
    parts = torch.arange(13).split([4, 0, 8, 1])
    found, state = in_pieces(lambda part, s: run(cut(tensors, part), state=s, return_state=True), parts)
    close(found, whole.output)
    for name, x in whole.state.tensors().items():
        close(state.tensors()[name], x)


def test_a_slot_for_each_token_gives_softmax_attention():
    """Keys and values are unit vectors, and the controls so large that each slot holds a single token."""
    basis, sharp = torch.eye(4, dtype=torch.float64).expand(2, 2, 4, 4), 1000 * torch.eye(4, dtype=torch.float64)
    q, k, v = qkv(6)["q"], basis, basis[:, :, [2, 0, 1, 3]]
    tensors = {"q": q, "k": k, "v": v, "slots_k": sharp, "slots_v": sharp[:, [2, 0, 1, 3]]}
    expected = softmax_attention(q, k, v, pattern="noncausal-cross")
    close(run(tensors, pattern="noncausal-cross").output, expected)


def test_heads_of_a_layer_share_their_controls():
    layer = create_layer("abc", 16, 4, value_dim=6, slots=7)
    assert layer.projection.slots_k.shape == (4, 7)
    assert layer.projection.slots_v.shape == (6, 7)
    refused("slots_v", run, inputs(5) | {"slots_v": torch.randn(3, 2, dtype=torch.float64)})


@pytest.mark.parametrize(
    ("name", "pattern"), [("abc_noncausal_cab", "noncausal-self"), ("abc_cross_cab", "causal-cross")]
)
def test_parity_with_the_benchmarks_code(name, pattern):
    recorded = load(name)
    leaves = {x: recorded[x].requires_grad_() for x in "qkv"}
    slots = {name: recorded[name] for name in ("slots_k", "slots_v")}
    check_recorded(recorded, run(leaves | slots, pattern=pattern).output, leaves, 1e-10)
