"""The native distance of estimated maps against the torch form in float64, and the cases that it leaves to torch."""

from __future__ import annotations

import pytest
import torch

from regard.contract import Unsupported
from regard.core.visibility import Ranks
from regard.engines.map_distance import Problem, map_distance
from regard.training import peak_memory

from .kernels import MAPS, last_of, maps_of

SIZES = [
    {"n": 0, "m": 3},
    {"n": 1, "m": 1, "heads": 1, "groups": 1},
    {"n": 67, "m": 67, "width": 17, "pixels": 40},
    {"n": 9, "m": 300, "heads": 6, "groups": 3, "width": 64, "pixels": 16},
    {"n": 40, "m": 23, "pixels": 5},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("target", [True, False])
def test_distances_and_gradients_equal_float64(instruction_set, dtype, sizes, target):
    x = maps_of(**sizes, target=target, jitter=target, dtype=dtype)
    MAPS.check(x, ranks=last_of(sizes["n"], sizes["m"], True))


@pytest.mark.parametrize("target", [True, False])
def test_scores_that_grow_along_the_keys_are_those_of_float64(target):
    """When the maximum grows, sums relative to the smaller one must shrink."""
    x = maps_of(90, heads=2, groups=2, target=target)
    x["k"] = x["k"] + torch.linspace(-2, 2, 90)[:, None] * x["q"].mean(2, keepdim=True)
    x["k"][:, :, 70:] *= 4 if target else 90  # to nothing
    MAPS.check(x, ranks=last_of(90, 90, True))


@pytest.mark.parametrize("target", [True, False])
def test_keys_in_other_slots_than_their_ranks_are_compared_with_their_own_pixels(target):
    x = maps_of(30, 50, target=target, jitter=True)
    order = torch.stack([torch.randperm(50), torch.randperm(50)])
    moved = dict(x)
    moved["k"] = x["k"].gather(2, order[:, None, :, None].expand_as(x["k"]))
    moved["jitter"] = x["jitter"].gather(1, order)
    if target:
        moved["target"] = x["target"].gather(3, order[:, None, None].expand_as(x["target"]))
    there = Ranks(torch.arange(20, 50)[None], order, None, None, plain=False)
    MAPS.check(moved, ranks=there)
    found, expected = (MAPS.run(y, ranks=where) for y, where in ((moved, there), (x, last_of(30, 50, True))))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=4e-6)


def test_nothing_is_as_wide_as_the_keys():
    x = maps_of(2000, batch=1, heads=2, groups=2, pixels=16)
    x["estimate"].requires_grad_()

    def step():
        torch.autograd.grad(sum(y.sum() for y in MAPS.run(x, ranks=last_of(2000, 2000, True)).values()), x["estimate"])

    assert peak_memory(step).bytes < 2.6 * 4 * x["estimate"].numel()


def test_a_teacher_that_learns_is_left_to_torch():
    x = maps_of(9, target=True)
    problem = Problem(x["totals"], last_of(9, 9, True), 0.5, None, x["target"].requires_grad_())
    kl, _ = map_distance(x["q"], x["k"], x["estimate"], problem)
    assert torch.autograd.grad(kl.sum(), x["target"])[0].abs().sum() > 0
    with pytest.raises(Unsupported, match="no gradient of a teacher"):
        map_distance(x["q"], x["k"], x["estimate"], problem, "native")
