"""Tests specific to NormAttention: its sums, its norm over all heads, rotation after the feature map, bounded gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import calls, close, cut, qkv, refused
from torch import Tensor
from transnormer_checks import NORM, check_equals_the_authors_layer

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Context, Mask, Pattern, Unsupported
from regard.create import create_layer
from regard.layers.head_norm import HEAD_NORMS
from regard.mechanisms.norm_linear import MAPS, MECHANISM, Config
from regard.positions import create_positions
from regard.workbench.verification.properties.layers import layer_padding
from regard.workbench.verification.subjects import Subject

MAP = {
    "elu": lambda x: 1 + F.elu(x),
    "plain_elu": F.elu,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x) ** 2,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "identity": lambda x: x,
    "exp": torch.exp,
}
PLAIN = {"output_norm": "none"}
run = calls(MECHANISM)


def concatenated(o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("options", [{"feature_map": f} for f in MAPS] + [{"output_norm": n} for n in HEAD_NORMS])
def test_every_map_and_norm_is_its_definition(options, pattern):
    tensors, config = qkv(11, 8 if pattern.cross else None, value_dim=3), Config(**options)
    f = MAP[config.feature_map]
    weights = f(tensors["q"]) @ f(tensors["k"]).mT
    weights = weights.tril() if pattern == "causal-self" else weights
    expected = NORM[config.output_norm](concatenated(weights @ tensors["v"]))
    close(concatenated(run(tensors, options, pattern=pattern).output), expected)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_it_is_linear_attention_with_a_norm_in_place_of_the_denominator(pattern):
    tensors, linear = qkv(9, 12 if pattern.cross else None), get_mechanism("linear")
    padded = {"pattern": pattern, "memory_mask" if pattern.cross else "mask": Mask(lengths=torch.tensor([9, 4]))}
    divided = run(tensors, PLAIN | {"denominator": True}, **padded).output
    close(divided, apply(linear, tensors, **padded).output)
    numerator = apply(linear, tensors, config=linear.options(normalize=False), **padded).output
    close(concatenated(run(tensors, **padded).output), NORM["simple_rms"](concatenated(numerator)))


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_the_sizes_of_keys_and_values_do_not_matter(pattern):
    tensors = qkv(9)
    close(run(tensors | {"v": 1e3 * tensors["v"]}, pattern=pattern).output, run(tensors, pattern=pattern).output, 1e-8)
    options = {"feature_map": "relu"}
    found, expected = (
        run(tensors | {"k": size * tensors["k"]}, options, pattern=pattern).output for size in (7.0, 1.0)
    )
    close(found, expected, 1e-5)
    assert expected.abs().max() > 0.1


def test_the_norm_is_over_all_heads_and_has_root_mean_square_one():
    tensors = qkv(9, value_dim=3)
    tensors["v"][:, 1] *= 50
    output = run(tensors).output
    close(concatenated(output).square().mean(-1), torch.ones(2, 9, dtype=torch.float64), 1e-6)
    size = output.square().mean((0, 2, 3))
    assert size[1] > 100 * size[0]  # a norm for each head would make them equal
    assert not [name for name, _ in create_layer("norm_linear", 8, 2).merge.named_parameters()]


@pytest.mark.parametrize(("name", "learned"), [("rms", {"weight"}), ("layer", {"weight", "bias"})])
def test_norms_with_parameters_learn_one_number_a_feature(name, learned):
    layer = create_layer("norm_linear", 8, 2, output_norm=name).double()
    assert {parameter for parameter, _ in layer.merge.named_parameters()} == learned
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    plain = layer(x).output
    with torch.no_grad():
        layer.merge.weight.mul_(2)
        if layer.merge.bias is not None:
            layer.merge.bias.add_(1)
    shift = 0 if layer.merge.bias is None else layer.output.weight.sum(1)
    close(layer(x).output - layer.output.bias, 2 * (plain - layer.output.bias) + shift)


@pytest.mark.parametrize("positions", ["lrpe", "rotary"])
@pytest.mark.parametrize("feature_map", ["elu", "plain_elu"])
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_rotation_comes_after_the_map_in_every_form(pattern, feature_map, positions):
    rotate = create_positions(positions, dim=8, heads=2, head_dim=4).double().rotate
    tensors, where = qkv(13, value_dim=3), torch.arange(13)[None]
    q, k = (rotate(MAP[feature_map](tensors[name]), where) for name in "qk")
    weights = q @ k.mT if pattern == "noncausal-self" else (q @ k.mT).tril()
    expected = NORM["simple_rms"](concatenated(weights @ tensors["v"]))
    call = {"options": {"feature_map": feature_map}, "pattern": pattern, "rotate": rotate}
    for form in ("reference", "parallel"):
        close(concatenated(run(tensors, form=form, **call).output), expected)
    if pattern == "causal-self":
        fewer = run(cut(tensors, slice(6, None), ["q"]), **call).output
        close(concatenated(fewer), expected[:, 6:])


@pytest.mark.parametrize("pattern", [Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF])
def test_padding_takes_no_place_in_a_rotating_layer(pattern):
    assert layer_padding(Subject(MECHANISM, pattern, {"positions": "lrpe"}), torch.float64) < 1e-11


def test_half_precision_survives_sums_beyond_its_range():
    """Sums over the sequence exceed 65504, the largest float16 number, long before the norm."""
    tensors = {name: 8 + x.half() for name, x in qkv(400).items()}
    exact = {name: x.double() for name, x in tensors.items()}
    found, expected = run(tensors).output, run(exact).output
    assert found.dtype == torch.float16
    close(found.double(), expected, 2e-3)
    assert (expected / run(exact, PLAIN).output).min() < 1e-4


def steepest(name: str, scores: Tensor, **options: Any) -> float:
    """Largest derivative of a weight with respect to a score. Keys and values are unit vectors, so that queries are scores
    and outputs are weights."""
    card, unit = get_mechanism(name), torch.eye(scores.shape[-1], dtype=torch.float64)[None, None]

    def weights(q: Tensor) -> Tensor:
        call = {"pattern": "noncausal-self", "scale": 1.0, "config": card.options(**options)}
        return apply(card, {"q": q, "k": unit, "v": unit}, **call).output

    return float(torch.autograd.functional.jacobian(weights, scores).abs().max())


def test_a_denominator_makes_gradients_grow_as_scores_shrink():
    """Section 3.1: derivatives with respect to a score have a factor 1 / score with a denominator, and none without; those
    of softmax are at most 1 / 4. The norm brings the factor back if all scores of a query shrink together, since outputs
    then do not change."""
    scores, sizes = 0.1 + torch.rand(1, 1, 9, 9, dtype=torch.float64), [1e-1, 1e-2, 1e-3, 1e-4]
    for options, growth in ((PLAIN | {"denominator": True}, 10), (PLAIN, 1), ({"output_norm": "simple_rms"}, 10)):
        found = [steepest("norm_linear", size * scores, feature_map="relu", **options) for size in sizes]
        for larger, smaller in itertools.pairwise(found):
            assert smaller / larger == pytest.approx(growth, rel=1e-2)
    for size in (*sizes, 10.0):
        assert 0.01 < steepest("softmax", size * scores) <= 0.25


def test_positions_that_rotate_are_refused_where_they_mean_nothing():
    scheme = create_positions("rotary", dim=8, heads=2, head_dim=4)
    refused("positions that rotate", run, qkv(3), {"denominator": True}, rotate=scheme.rotate)
    refused("self patterns", create_layer, "norm_linear", 8, 2, pattern="causal-cross", positions="lrpe")
    layer = create_layer("norm_linear", 8, 2, positions="lrpe")
    with pytest.raises(Unsupported, match="explicit positions"):
        layer(torch.randn(2, 12, 8), context=Context(positions=torch.arange(12).expand(2, -1)))


@pytest.mark.parametrize(
    ("name", "feature_map"),
    [("norm_linear_t1", "plain_elu"), ("norm_linear_t2", "elu"), ("norm_linear_t2_causal", "elu")],
)
def test_equals_the_authors_layer(name, feature_map):
    check_equals_the_authors_layer("norm_linear", name, {"feature_map": feature_map})
