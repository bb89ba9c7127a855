"""Tests specific to differential attention: pairs of heads, what cancels, lambda by depth, and parity."""

from __future__ import annotations

import pytest
import torch
from support import calls, check_recorded, close, load, qkv, refused
from torch import Tensor

from regard.contract import ALL_PATTERNS, Mask
from regard.core.visibility import DistanceBias
from regard.create import create_layer
from regard.functional import softmax_attention
from regard.mechanisms.differential import MECHANISM, depth_lambda
from regard.models import LanguageModel, LanguageModelConfig, differential_plan

run = calls(MECHANISM)


def inputs(heads: int = 4, kv_heads: int = 4) -> dict[str, Tensor]:
    lam = torch.rand(heads // 2, dtype=torch.float64)
    return qkv(6, heads=heads, groups=kv_heads, dim=3, value_dim=2) | {"lam": lam}


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_each_map_is_softmax_attention_to_the_values_of_both_heads_of_its_pair(pattern):
    given = inputs(heads=8, kv_heads=8)
    values = torch.cat(given["v"].chunk(2, 1), -1)
    maps = zip(given["q"].chunk(2, 1), given["k"].chunk(2, 1), strict=True)
    first, second = (softmax_attention(q, k, values, pattern=pattern) for q, k in maps)
    expected = first - given["lam"][:, None, None] * second
    close(run(given, pattern=pattern).output, torch.cat(expected.chunk(2, -1), 1))


def test_equal_maps_cancel_and_weights_sum_to_what_is_left():
    given = inputs()
    same = given | {name: given[name][:, [0, 1, 0, 1]] for name in "qk"}
    close(run(same | {"lam": torch.ones(2).double()}).output, torch.zeros_like(given["v"]))
    weights = run(given, want={"weights"}).extras["weights"]
    close(weights.sum(-1), (1 - given["lam"])[:, None].expand(2, 2, 6))


@pytest.mark.parametrize("by_distance", [False, True])
def test_biases_belong_to_heads_and_so_to_one_of_the_maps(by_distance):
    given, table = inputs(), torch.randn(4, 11, dtype=torch.float64)
    position_bias = DistanceBias(lambda d: table[:, d + 5])
    told = position_bias if by_distance else (lambda i, j: position_bias(i, j))
    mask = Mask(bias=table[:, torch.arange(6) - torch.arange(6)[:, None] + 5][None])
    expected = run(given, pattern="noncausal-self", mask=mask, form="reference").output
    close(run(given, pattern="noncausal-self", position_bias=told).output, expected)


def test_the_plan_of_the_paper_has_lambda_by_depth():
    assert depth_lambda(1) == pytest.approx(0.2)
    plan = differential_plan(3, short_convolution=2)
    model = LanguageModel(LanguageModelConfig(7, dim=8, num_heads=2, plan=plan))
    initial = [block.mixer.config.lambda_init for block in model.blocks]
    assert initial == [depth_lambda(layer) for layer in (1, 2, 3)]
    assert initial == sorted(initial) and initial[-1] < 0.8
    assert all(block.mixer.convolutions for block in model.blocks)
    constant = differential_plan(2, lambda_init=0.5)
    assert [options["lambda_init"] for _, options in constant] == [0.5, 0.5]


@pytest.mark.parametrize(("name", "heads", "dim"), [("naive", 4, 16), ("grouped", 8, 32)])
def test_parity_with_the_authors_code(name, heads, dim):
    recorded = load(f"differential_{name}")
    options = {"num_kv_heads": 4, "lambda_init": float(recorded["lambda_init"])}
    layer = create_layer("differential", dim, heads, **options).double()

    def apart(weight: Tensor, count: int) -> Tensor:
        """Reorder rows from adjacent heads of a pair to all first heads, then all second heads."""
        return weight.unflatten(0, (count // 2, 2, -1)).transpose(0, 1).flatten(0, 2)

    weights = {
        "query.weight": apart(recorded["q_proj_weight"], heads),
        "key.weight": apart(recorded["k_proj_weight"], 4),
        "value.weight": apart(recorded["v_proj_weight"], 4),
        "output.weight": apart(recorded["out_proj_weight"].T, heads).T,
        "merge.norm.weight": recorded["subln_weight"],
        **{f"projection.{vector}": recorded[f"lambda_{vector}"] for vector in ("q1", "k1", "q2", "k2")},
    }
    layer.load_state_dict(weights)
    x = recorded["x"].requires_grad_()
    check_recorded(recorded, layer(x).output, {"x": x, "lambda_q1": layer.projection.q1})


def test_what_makes_no_pairs_is_refused():
    for options in ({"num_heads": 3}, {"num_heads": 4, "num_kv_heads": 1}):
        refused("even", create_layer, "differential", 12, **options)
    for given in (inputs(heads=3, kv_heads=3), inputs(heads=6, kv_heads=3)):
        refused("even", run, given)
    refused("try lam", run, inputs() | {"lam": torch.ones(4).double()})
