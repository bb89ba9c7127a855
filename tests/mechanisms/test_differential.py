"""What is peculiar to differential attention: pairs of heads, what cancels, lambda by depth, and parity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Context, Mask, Unsupported
from regard.core.visibility import DistanceBias
from regard.create import create_layer
from regard.mechanisms.differential import MECHANISM, Config, depth_lambda
from regard.models import LanguageModel, LanguageModelConfig, differential_plan

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
SOFTMAX = get_mechanism("softmax")


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def inputs(n=6, heads=4, kv_heads=4):
    shapes = {"q": (2, heads, n, 3), "k": (2, kv_heads, n, 3), "v": (2, kv_heads, n, 2)}
    found = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return found | {"lam": torch.rand(heads // 2, dtype=torch.float64)}


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_each_map_is_softmax_attention_to_the_values_of_both_heads_of_its_pair(pattern):
    given = inputs(heads=8)
    values = torch.cat(given["v"].chunk(2, 1), -1)
    first, second = (
        apply(SOFTMAX, {"q": q, "k": k, "v": values}, pattern=pattern).output
        for q, k in zip(given["q"].chunk(2, 1), given["k"].chunk(2, 1), strict=True)
    )
    expected = first - given["lam"][:, None, None] * second
    close(apply(MECHANISM, given, pattern=pattern).output, torch.cat(expected.chunk(2, -1), 1))


def test_equal_maps_cancel_and_weights_sum_to_what_is_left():
    given = inputs()
    same = given | {name: given[name][:, [0, 1, 0, 1]] for name in "qk"}
    close(apply(MECHANISM, same | {"lam": torch.ones(2).double()}).output, torch.zeros_like(given["v"]))
    weights = apply(MECHANISM, given, want={"weights"}).extras["weights"]
    close(weights.sum(-1), (1 - given["lam"])[:, None].expand(2, 2, 6))


@pytest.mark.parametrize("by_distance", [False, True])
def test_biases_belong_to_heads_and_so_to_one_of_the_maps(by_distance):
    given, table = inputs(), torch.randn(4, 11, dtype=torch.float64)
    distance = torch.arange(6) - torch.arange(6)[:, None] + 5
    position_bias = DistanceBias(lambda d: table[:, d + 5])
    told = position_bias if by_distance else (lambda i, j: position_bias(i, j))
    call = {"pattern": "noncausal-self"}
    expected = apply(MECHANISM, given, mask=Mask(bias=table[:, distance][None]), form="reference", **call).output
    close(apply(MECHANISM, given, position_bias=told, **call).output, expected)
    close(apply(MECHANISM, given, mask=Mask(bias=table[:, distance][None]), **call).output, expected)


def test_a_layer_has_the_parameters_of_softmax_attention_and_those_of_lambda_and_norm():
    layers = (create_layer(name, 16, 4, num_kv_heads=2, value_dim=6) for name in ("differential", "softmax"))
    own, plain = (sum(p.numel() for p in layer.parameters()) for layer in layers)
    assert own == plain + 4 * 4 + 2 * 6


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


@pytest.mark.parametrize("name", ["naive", "grouped"])
def test_parity_with_the_authors_code(name):
    with np.load(FIXTURES / f"differential_{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    heads, kv_heads, dim = (4, 4, 16) if name == "naive" else (8, 4, 32)
    options = {"num_kv_heads": kv_heads, "lambda_init": float(arrays["lambda_init"])}
    layer = create_layer("differential", dim, heads, **options).double()

    def apart(weight, count):
        """Rows of pairs whose heads lie side by side, those of all first heads first."""
        return weight.unflatten(0, (count // 2, 2, -1)).transpose(0, 1).flatten(0, 2)

    weights = {
        "query.weight": apart(arrays["q_proj_weight"], heads),
        "key.weight": apart(arrays["k_proj_weight"], kv_heads),
        "value.weight": apart(arrays["v_proj_weight"], kv_heads),
        "output.weight": apart(arrays["out_proj_weight"].T, heads).T,
        "merge.norm.weight": arrays["subln_weight"],
        **{f"projection.{vector}": arrays[f"lambda_{vector}"] for vector in ("q1", "k1", "q2", "k2")},
    }
    layer.load_state_dict(weights)
    x = arrays["x"].requires_grad_()
    output = layer(x, context=Context()).output
    close(output, arrays["out"])
    gradients = torch.autograd.grad(output, [x, layer.projection.q1], arrays["grad_out"])
    close(gradients[0], arrays["grad_x"])
    close(gradients[1], arrays["grad_lambda_q1"])


def test_what_makes_no_pairs_is_refused():
    for options in ({"num_heads": 3}, {"num_heads": 4, "num_kv_heads": 1}):
        with pytest.raises(Unsupported, match="even"):
            create_layer("differential", 12, **options)
    for given in (inputs(heads=3, kv_heads=3), inputs(heads=6, kv_heads=3)):
        with pytest.raises(Unsupported, match="even"):
            apply(MECHANISM, given)
    with pytest.raises(Unsupported, match="try lam"):
        apply(MECHANISM, inputs() | {"lam": torch.ones(4).double()})
    for initial in (-0.1, 1.0, float("nan")):
        with pytest.raises(Unsupported):
            Config(lambda_init=initial)
