"""Attention to chosen pages on every instruction set: pages and outputs are those of float64."""

from __future__ import annotations

import pytest
import torch

from regard.contract import Unsupported
from regard.engines.quest_attention import Problem, native_form, quest_attention

from .kernels import QUEST, quest_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_length_width_and_grouping(instruction_set, dtype):
    for seed, (heads, width, values, page, chosen, shared) in enumerate(
        [(6, 64, 64, 16, 4, True), (6, 17, 5, 8, 3, False), (3, 8, 33, 1, 20, True), (12, 20, 16, 4, 40, False), (3, 5, 8, 16, 0, True)]
    ):  # fmt: skip
        torch.set_num_threads((1, 2, 5)[seed % 3])
        counts = torch.randint(0, 641, (2, 3)).tolist()
        counts[0][:2] = [0, 640]
        given = quest_of(counts, slots=640, page=page, heads=heads, width=width, values=values, dtype=dtype)
        QUEST.check(given, page=page, chosen=chosen, shared=shared)


@torch.no_grad()
def test_many_pages_are_scored_by_several_threads(threads):
    given = quest_of([[16384, 15001], [1, 9000]], slots=16384, page=8, width=33)
    QUEST.check(given, chosen=100, shared=False)


def test_of_equal_bounds_the_first_pages_are_read_and_extremes_are_in_order():
    given = quest_of([[64]], heads=1, width=1, values=8)
    given["q"], given["v"] = torch.ones(1, 1, 1, 1), torch.eye(8).repeat_interleave(8, 0)[None, None]
    for bounds, expected in (
        ([0.0] * 8, [0, 1, 2]),
        ([-1e30, 5.0, -torch.inf, -5.0, 1e-40, -1e-40, torch.inf, 0.0], [1, 4, 6]),
        ([3.0, 1.0, 3.0, 3.0, 3.0, 2.0, 1.0, 9.0], [0, 2, 3]),
    ):
        k, low, high = torch.zeros(1, 1, 64, 1), torch.zeros(1, 1, 8, 1), torch.tensor(bounds).view(1, 1, 8, 1)
        output = native_form.run(Problem(given["q"], k, given["v"], low, high, given["counts"], 8, 3, True, 1.0))
        assert output.flatten().nonzero().flatten().tolist() == sorted({*expected, 7})


def test_nan_in_a_page_that_is_read_propagates_and_elsewhere_does_not_matter():
    given = quest_of([[60]], heads=2)
    for x in ("k", "v"):
        given[x][:, :, 60:] = torch.nan
    given["low"][:, :, 7:] = given["high"][:, :, 7:] = torch.nan
    assert QUEST.run(given)["o"].isfinite().all()
    given["q"][0, 0] = torch.nan
    assert QUEST.run(given)["o"][0, 0].isnan().all()
    given = quest_of([[60]], heads=2)
    given["k"][0, 0, 9] = given["low"][0, 0, 1] = given["high"][0, 0, 1] = torch.nan  # its bounds exceed all others
    assert QUEST.run(given)["o"].isnan().all()


def test_the_short_way_gives_what_the_operator_gives():
    given = quest_of([[64, 30]], heads=4)
    by_token = torch.randn(1, 1, 4, 8).transpose(1, 2)  # the layout of a layer's projections
    for q in (given["q"], by_token):
        problem = Problem(*(given | {"q": q}).values(), 8, 3, True, 0.3)
        with torch.no_grad():
            found = native_form.plain(problem)
        assert found is not None and torch.equal(found, native_form.run(problem))
    with torch.autograd.profiler.profile():  # an observer is active
        assert native_form.plain(problem) is None
        options = {"page": 8, "chosen": 3, "scale": 0.3}
        assert torch.equal(quest_attention(*(given | {"q": q}).values(), **options), found)


def test_counts_that_would_be_read_beyond_memory_are_refused_on_both_ways():
    given = quest_of([[64, 30]], heads=4)
    given["counts"][0, 1] = 65
    problem = Problem(*given.values(), 8, 3, True, 0.3)
    with pytest.raises(RuntimeError, match="bad argument"):
        native_form.plain(problem)
    with pytest.raises(Unsupported, match="65"):
        native_form.run(problem)
