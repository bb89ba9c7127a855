"""Tests specific to cosFormer: its reach, positions of every pattern, their limit, dead features, and recorded outputs."""

from __future__ import annotations

import math

import pytest
import torch
from support import calls, check_recorded, close, load, qkv, refused
from torch import Tensor

from regard.contract import Mask
from regard.create import create_layer
from regard.functional import linear_attention
from regard.mechanisms.cosformer import MECHANISM

REACH = {"length": 30}

run = calls(MECHANISM)


def paired(tensors: dict[str, Tensor], causal: bool, reach: float, eps: float = 1e-6) -> Tensor:
    """Attention by rectified products of pairs of tokens, times the cosine of their distance."""
    q, k, v = tensors.values()
    n, m = q.shape[2], k.shape[2]
    distance = torch.arange(n).double()[:, None] + (m - n if causal else 0) - torch.arange(m)
    weights = (q.relu() @ k.relu().mT) * torch.cos(math.pi * distance / (2 * reach))
    if causal:
        weights = weights * (distance >= 0)
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=eps)


@pytest.mark.parametrize("options", [REACH, {"length": 13, "eps": 0.5}])
@pytest.mark.parametrize(
    ("pattern", "n", "m"),
    [
        ("noncausal-self", 11, 11),
        ("causal-self", 11, 11),
        ("causal-self", 3, 8),  # queries are aligned with the last keys
        ("causal-self", 8, 3),
        ("noncausal-cross", 11, 13),
        ("causal-cross", 11, 13),
    ],
)
def test_it_is_the_sum_over_pairs(options, pattern, n, m):
    tensors = qkv(n, m, value_dim=3)
    expected = paired(tensors, pattern == "causal-self", options["length"], options.get("eps", 1e-6))
    for form in ("reference", None):
        close(run(tensors, options, pattern=pattern, form=form).output, expected)


def test_without_a_reach_noncausal_self_takes_each_rows_own_length():
    tensors, lengths = qkv(12), torch.tensor([12, 5])
    found = run(tensors, pattern="noncausal-self", mask=Mask(lengths=lengths)).output
    for b, n in enumerate(lengths):
        alone = {name: x[b : b + 1, :, :n] for name, x in tensors.items()}
        close(found[b : b + 1, :, :n], paired(alone, False, int(n)))


def test_a_far_reach_is_rectified_linear_attention():
    tensors = qkv(20)
    expected = linear_attention(*tensors.values(), feature_map="relu", eps=1e-12)
    for options in ({}, {"length": 10**6}):
        close(run(tensors, options).output, expected, 1e-5)
    assert (run(tensors, {"length": 20}).output - expected).abs().max() > 0.01


def test_positions_beyond_the_reach_are_refused():
    options = {"length": 8}
    for pattern in ("causal-self", "noncausal-self"):
        for form in ("reference", "parallel"):
            refused("position 9", run, qkv(9), options, pattern=pattern, form=form)
    for n, m in ((9, 4), (4, 9)):
        refused("position 9", run, qkv(n, m), options, pattern="causal-cross")
    run(qkv(9), options, mask=Mask(lengths=torch.tensor([8, 2])))  # padding does not count as a position
    state = run(qkv(8), options, return_state=True).state
    refused("position 9", run, qkv(1), options, state=state)


@pytest.mark.parametrize(
    ("name", "pattern", "length"),
    [
        ("cosformer_noncausal", "noncausal-self", None),
        ("cosformer_cross", "noncausal-cross", 12),
        ("cosformer_causal", "causal-self", 14),
    ],
)
def test_parity_with_the_official_layer(name, pattern, length):
    recorded = load(name)
    layer = create_layer("cosformer", 12, 3, pattern=pattern, length=length, bias=True).double()
    names = ("query", "key", "value", "output")
    weights = {f"{x}.weight": recorded[x] for x in names} | {f"{x}.bias": recorded[f"{x}_bias"] for x in names}
    layer.load_state_dict(weights)
    leaves = {x: recorded[x].requires_grad_() for x in ("x", "memory") if x in recorded}
    output = layer(*leaves.values()).output
    check_recorded(recorded, output, leaves, 1e-10)
