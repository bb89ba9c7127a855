"""Tests specific to ProbSparse attention: chosen queries, the output of the others, its random sample, and recorded outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import calls, check_recorded, close, load, qkv
from torch import Tensor

from regard.functional import softmax_attention
from regard.mechanisms.probsparse import MECHANISM

FEW = {"factor": 1}
run = calls(MECHANISM, "noncausal-self")


def count(length: int, factor: int) -> int:
    return min(length, max(1, factor * math.ceil(math.log(length))))


def definition(tensors: dict[str, Tensor], factor: int = 1, places: np.ndarray | float = 0.5) -> Tensor:
    """The definition, one row, head and query at a time."""
    q, k, v = (tensors[name].numpy() for name in "qkv")
    found = np.zeros((*q.shape[:3], v.shape[3]))
    n, m = q.shape[2], k.shape[2]
    if not n or not m:
        return torch.from_numpy(found)
    u = count(m, factor)
    sample = np.floor((np.arange(u) + places) * m / u).astype(int)
    assert len(set(sample)) == u
    for b, h in np.ndindex(*q.shape[:2]):
        g = h * k.shape[1] // q.shape[1]
        scores = q[b, h] @ k[b, g][sample].T
        measure = scores.max(-1) - scores.sum(-1) / m
        found[b, h] = v[b, g].mean(0)
        for i in np.argsort(-measure)[: count(n, factor)]:
            weights = np.exp(q[b, h, i] @ k[b, g].T / 2)
            found[b, h, i] = weights / weights.sum() @ v[b, g]
    return torch.from_numpy(found)


@pytest.mark.parametrize(("n", "m"), [(30, 30), (7, 40), (40, 7), (1, 9), (9, 1), (1, 1), (0, 5), (5, 0)])
@pytest.mark.parametrize(("groups", "factor"), [(1, 1), (2, 3)])
def test_it_is_the_definition(n, m, groups, factor):
    tensors = qkv(n, m, groups=groups, value_dim=3)
    for pattern in ("noncausal-cross", *(["noncausal-self"] if n == m else [])):
        close(run(tensors, {"factor": factor}, pattern=pattern).output, definition(tensors, factor))


def test_with_a_large_factor_it_is_softmax_attention():
    tensors = qkv(25)
    close(run(tensors, {"factor": 25}).output, softmax_attention(*tensors.values(), pattern="noncausal-self"))


def test_queries_that_stand_out_are_chosen_and_the_others_get_the_mean():
    tensors = qkv(50)
    tensors["q"] = 0.01 * tensors["q"]
    tensors["q"][0, :, [7, 31]] = 30 * tensors["k"][0, :, [6, 18]]  # sampled keys
    tensors["q"][1, 1, 49] = 30 * tensors["k"][1, 1, 6]
    found, mean = run(tensors, FEW).output, tensors["v"].mean(2, keepdim=True)
    attend = (found - mean).abs().amax(-1) > 1e-9
    assert (attend.sum(-1) == count(50, 1)).all()
    assert attend[0, :, [7, 31]].all() and attend[1, 1, 49]
    close(found[~attend], mean.expand_as(found)[~attend])
    assert not torch.equal(attend[0, 0], attend[0, 1])  # each head chooses for itself


@pytest.mark.parametrize("form", ["reference", "parallel"])
def test_training_moves_sampled_keys_within_their_strata(form):
    tensors = qkv(60)
    places = torch.rand(count(60, 1), generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
    found = run(tensors, FEW, form=form, training=True, generator=torch.Generator().manual_seed(3))
    close(found.output, definition(tensors, places=places))
    fixed = run(tensors, FEW | {"jitter": False}, form=form, training=True)
    assert torch.equal(fixed.output, run(tensors, FEW, form=form).output)


def test_parity_with_the_benchmarks_code():
    """Recorded with our evenly spread sample in place of the benchmark's random one."""
    recorded = load("probsparse_cab")
    tensors = {x: recorded[x].requires_grad_() for x in "qkv"}
    output = run(tensors, {"factor": 2}).output
    check_recorded(recorded, output, tensors, 1e-10)
