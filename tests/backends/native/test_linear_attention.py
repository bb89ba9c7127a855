"""Native linear attention against the torch form in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from regard.contract import Unsupported
from regard.engines.feature_maps import FEATURE_MAPS, NONNEGATIVE
from regard.engines.linear_attention import Problem, Rule
from regard.engines.linear_attention import native_form as native

from .kernels import ELU, LINEAR, linear

EPS = {"relu": 1e-3, "relu_squared": 1e-3}
"""eps for rectified features, whose denominators may nearly vanish; 1e-6 for the others."""
RULES = [Rule(name, 1.3, None) for name in FEATURE_MAPS] + [Rule(n, 0.7, EPS.get(n, 1e-6)) for n in NONNEGATIVE]
RULES.append(Rule("relu", 1.0, 1e-6, 1e-3))
SHAPES = [
    (0, 1, 2, 8, 8),
    (1, 2, 3, 8, 8),
    (61, 1, 1, 33, 65),
    (64, 1, 2, 64, 64),
    (31, 1, 1, 7, 130),
    (48, 2, 2, 130, 9),
]
"""Cases with fewer heads than threads, where value features are split, and with more."""


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_outputs_states_and_gradients_are_those_of_float64(rule):
    for threads, shape in itertools.product((1, 2), SHAPES):
        torch.set_num_threads(threads)
        LINEAR.check_every_set(linear(*shape, rule), rule=rule)


@pytest.mark.parametrize("rule", [ELU, Rule("exp", 0.5, 1e-3), Rule("sigmoid", 1.0, None)], ids=str)
def test_keys_after_a_rows_length_write_nothing(instruction_set, rule):
    x = linear(70, 5, 2, 16, 24, rule, valid=[70, 33, 1, 0, 48])
    LINEAR.check(x, rule=rule)
    found = LINEAR.run(x, rule=rule)
    assert torch.equal(found["last"][3], x["state"][3])
    short = {n: y[1:2] if n == "state" else y[1:2, :, :33] for n, y in x.items() if n != "valid"}
    alone = LINEAR.run(short, rule=rule)
    assert torch.equal(found["o"][1:2, :, :33], alone["o"]) and torch.equal(found["last"][1:2], alone["last"])


@pytest.mark.parametrize("threads", [1, 2])
def test_queries_and_keys_shared_by_groups_of_heads(threads):
    torch.set_num_threads(threads)
    LINEAR.check(linear(37, 2, 6, 16, 8, groups=2))
    LINEAR.check(linear(37, 1, 4, 16, 8) | {"k": torch.randn(1, 1, 37, 16)})


def test_ten_thousand_tokens_lose_nothing():
    LINEAR.check(linear(10_000, 1, 1, 32, 32), only=("o", "last"))


@pytest.mark.parametrize("feature_map", NONNEGATIVE)
def test_nan_stays_nan_and_in_its_head(instruction_set, feature_map):
    LINEAR.check_nan(linear(100), rule=Rule(feature_map, 1.0, 1e-6))


def test_bfloat16_in_and_out_with_float32_between(instruction_set):
    x = linear(90, 1, 2, 16, 33)
    for chosen in ("qkv", "q", "k", "v"):
        LINEAR.check({name: y.bfloat16() if name in chosen else y for name, y in x.items()})


@pytest.mark.parametrize(
    "change",
    [
        {"k": torch.randn(1, 2, 10, 8).half()},
        {"v": torch.randn(1, 2, 10, 0)},
        {"state": torch.randn(1, 2, 8, 4)},  # lacks the normaliser
        {"valid": torch.tensor([3, 4])},
        {"rule": Rule("tanh", 1.0, 1e-6)},
    ],
)
def test_what_does_not_fit_is_left_to_torch_or_refused(change):
    x = linear(10, 1, 2, 8, 4) | {"valid": None, "rule": ELU} | change
    assert native.refuses(Problem(x["q"], x["k"], x["v"], x["state"], x["valid"]), x["rule"], 64) is not None
    with pytest.raises(Unsupported):
        LINEAR.run(x)
