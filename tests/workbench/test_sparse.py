"""`regard sparse`: analyses, the model made by hand, and the command."""

from __future__ import annotations

import math

import pytest

from regard import Unsupported
from regard.workbench.sparse.analysis import (
    Observation,
    Point,
    crossing_length,
    frontier,
    larger_and_sparse,
    loss_z,
    noticeable_loss,
    safe_compression,
    scaling_law,
)
from regard.workbench.sparse.constructed import cost, isoflops, retrieval


def test_a_compression_is_safe_while_no_smaller_one_loses():
    dense = [0.8, 1.0, 0.9, 1.0, 0.8, 0.9]
    bad = [0.1, 0.2, 0.0, 0.1, 0.3, 0.2]
    assert safe_compression(dense, {2: dense, 4: dense[::-1], 8: bad, 16: dense}) == 4
    assert safe_compression(dense, {2: bad, 4: dense}) == 1 and safe_compression(dense, {}) == 1
    # the definition, with unbiased variances
    m, n = sum(dense) / 6, sum(bad) / 6
    error = math.sqrt(sum((x - m) ** 2 for x in dense) / 5 / 6 + sum((x - n) ** 2 for x in bad) / 5 / 6)
    assert loss_z(dense, bad) == pytest.approx((m - n) / error)
    assert loss_z([1, 1], [1, 1]) == 0 and loss_z([1, 1], [0, 0]) == math.inf
    at_the_border = [x - noticeable_loss(dense) for x in dense]
    assert loss_z(dense, at_the_border) == pytest.approx(1.645)


def test_the_frontier_has_what_nothing_cheaper_beats():
    points = [Point(1, 1, cost, (score,)) for cost, score in ((1, 0.2), (2, 0.1), (3, 0.6), (3, 0.5), (4, 0.6))]
    assert [(p.cost, p.score) for p in frontier(points)] == [(1, 0.2), (3, 0.6)]


def test_larger_sparse_models_are_compared_at_the_cost_of_dense_ones():
    dense, dear, cheap = Point(1, 1, 10, (0.0, 0.2) * 9), Point(2, 4, 11, (1.0,) * 18), Point(2, 8, 9, (0.5, 0.6) * 9)
    assert larger_and_sparse([dense, dear, cheap]) == [(dense, cheap)]
    assert larger_and_sparse([dense, dear]) == [(dense, None)]
    assert crossing_length({256: [dense, dear], 512: [dense, cheap], 1024: [dense, cheap]}) == 512
    assert crossing_length({256: [dense, dear]}) is None


def test_a_law_that_holds_is_found_and_holds_beyond_what_it_was_fitted_to():
    def score(p, n, c):
        return math.exp(-2 + 0.1 * math.log(p) - 0.05 * math.log(n) - 0.2 * math.log(c))

    seen = [
        Observation(p, n, c, score(p, n, c)) for p in (1e6, 1e7, 1e8) for n in (256, 512, 1024) for c in (1, 2, 4, 8)
    ]
    law = scaling_law(seen)
    assert (law.constant, law.parameters, law.length, law.compression) == pytest.approx((-2, 0.1, -0.05, -0.2))
    assert law.held_out == pytest.approx({"parameters": 1, "length": 1, "compression": 1})
    assert law.predict(Observation(1e9, 4096, 16, 0)) == pytest.approx(score(1e9, 4096, 16))
    assert scaling_law(seen[:3]) is None


def test_made_by_hand_a_wide_sparse_layer_beats_a_narrow_dense_one_where_contexts_are_long():
    dense, sparse = retrieval(4096, 16, 1, 40, seed=1), retrieval(4096, 64, 16, 40, seed=1)
    assert cost(4096, 64, 16) < cost(4096, 16, 1)
    assert sum(dense) / 40 < 0.6 < 0.9 < sum(sparse) / 40
    # with nothing in common in a page its bounds say little
    assert sum(retrieval(4096, 64, 16, 40, seed=1, topics=False)) / 40 < 0.6
    found = isoflops((256,), 3, widths=(16, 32), ratios=(1, 4))
    assert [(p.size, p.ratio) for p in found[256]] == [(16, 1), (16, 4), (32, 1), (32, 4)]
    with pytest.raises(Unsupported, match="multiples"):
        retrieval(100, 16, 1, 1, 0)
