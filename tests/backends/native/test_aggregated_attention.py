"""Native aggregated attention against the torch form in float64, and the cases that it leaves to torch."""

from __future__ import annotations

import pytest
import torch

from regard.backends.native import library
from regard.contract import Unsupported
from regard.engines.aggregated_attention import Problem, aggregated_attention

from .kernels import AGGREGATED, aggregated_of

CASES = [
    {"grid": (0, 4)},
    {"grid": (1, 1), "factor": 1, "heads": 1, "width": 1},
    {"grid": (4, 6), "window": 5, "width": 17},
    {"grid": (14, 14), "batch": 1, "width": 24},
    {"grid": (21, 18), "factor": 3, "window": 1},
    {"grid": (20, 8), "factor": 4, "window": 7, "batch": 1, "heads": 1},
    {"grid": (2, 140), "batch": 1, "width": 8},
    {"grid": (12, 76), "factor": 4, "batch": 1, "heads": 2},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_equal_float64(dtype, case):
    options = {name: case[name] for name in ("grid", "factor", "window") if name in case}
    AGGREGATED.check_every_set(aggregated_of(**case, dtype=dtype), **options)


def test_scores_far_apart_are_those_of_float64():
    x = aggregated_of((8, 8), batch=1)
    x["table"], x["near_bias"] = 60 * x["table"], 60 * x["near_bias"]
    AGGREGATED.check_every_set(x, grid=(8, 8))


def test_a_place_without_a_direction_has_scores_of_what_queries_are_moved_by_and_no_gradient_of_its_length():
    x = aggregated_of((4, 4))
    for name in ("q", "k", "far_k"):
        x[name][:, :, 1] = 0
    found = AGGREGATED.gradients(x, weights := {}, grid=(4, 4))
    y = {name: t if name not in ("q", "k", "far_k") else t.clone() for name, t in x.items()}
    for name in ("q", "k", "far_k"):
        y[name][:, :, 1] = 1e-30  # any direction, almost no length
    assert torch.isfinite(found["o"]).all()
    moved = AGGREGATED.gradients(y, weights, grid=(4, 4))
    AGGREGATED.close(moved["o"], found["o"].double(), "o")


def test_nan_of_a_place_reaches_the_places_around_it_alone():
    x = aggregated_of((10, 6), batch=1, heads=1)
    x["v"][0, 0, 4 * 6 + 5] = torch.nan  # at the edge of the map
    hit = AGGREGATED.run(x, grid=(10, 6))["o"].isnan().any(-1).view(10, 6)
    expected = torch.zeros(10, 6, dtype=torch.bool)
    expected[3:6, 4:] = True
    assert torch.equal(hit, expected)


def test_what_it_lacks_is_left_to_torch_or_refused_by_name():
    x = aggregated_of((4, 4))
    heads = [x.pop(name) for name in ("q", "k", "v", "far_k", "far_v")]
    for options in ({"grid": (4, 5)}, {"window": 5}, {"factor": 4}, {"window": 2}):
        problem = Problem(**{"grid": (4, 4), "factor": 2, "window": 3} | options, **x)
        with pytest.raises(Unsupported, match="native"):
            aggregated_attention(*heads, problem, "native")
    whole = Problem((4, 4), 2, 3, **{name: t.double() for name, t in x.items()})
    doubles = [t.double() for t in heads]
    assert aggregated_attention(*doubles, whole).dtype == torch.float64
    with pytest.raises(Unsupported, match="float64"):
        aggregated_attention(*doubles, whole, "native")
    assert library.why_missing() is None
