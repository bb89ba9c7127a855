"""What is peculiar to NormAttention: its sums, its norm over all heads, rotation after the map, bounded gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transnormer_checks import check_equals_the_authors_layer

from regard.apply import absorb, apply
from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Context, Mask, Shape, Unsupported
from regard.create import create_layer
from regard.layers.head_norm import HEAD_NORMS
from regard.mechanisms.norm_linear import MAPS, MECHANISM, Config, cost
from regard.positions import create_positions

RECORDED = {
    "norm_linear_t1": {"feature_map": "plain_elu"},
    "norm_linear_t2": {"feature_map": "elu"},
    "norm_linear_t2_causal": {"feature_map": "elu"},
}
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
NORM = {
    "simple_rms": lambda x: x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + 1e-8),
    "rms": lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6),
    "layer": lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-5),
    "none": lambda x: x,
}
WANT_STATE = Context(want=frozenset({"state"}))


def inputs(n: int, m: int | None = None, batch: int = 2) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes = {"q": (n, 4), "k": (m, 4), "v": (m, 3)}
    return {name: torch.randn(batch, 2, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def run(tensors: dict[str, Tensor], pattern: str = "causal-self", options: dict | None = None, **call: Any) -> Tensor:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**(options or {})), **call).output


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def concatenated(o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("options", [{"feature_map": f} for f in MAPS] + [{"output_norm": n} for n in HEAD_NORMS])
def test_every_map_and_norm_in_every_form_equals_the_definition(options, pattern):
    tensors, config = inputs(11, 8 if pattern.cross else None), Config(**options)
    f = MAP[config.feature_map]
    weights = f(tensors["q"]) @ f(tensors["k"]).mT
    weights = weights.tril() if pattern == "causal-self" else weights
    expected = NORM[config.output_norm](concatenated(weights @ tensors["v"]))
    forms = {"causal-self": ("reference", "parallel", "chunked"), "noncausal-self": ("reference", "parallel")}
    for form in forms.get(pattern, ("reference", "parallel", "absorb+read")):
        for chunk_size in (1, 4, 64):
            close(concatenated(run(tensors, pattern, options, form=form, chunk_size=chunk_size)), expected)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_with_a_denominator_and_without_a_norm_it_is_linear_attention(pattern):
    tensors = inputs(9, 12 if pattern.cross else None)
    found = run(tensors, pattern, {"denominator": True, "output_norm": "none"})
    close(found, apply(get_mechanism("linear"), tensors, pattern=pattern).output)


def test_without_a_denominator_it_is_the_norm_of_the_numerator_of_linear_attention():
    tensors = inputs(9)
    linear = get_mechanism("linear")
    numerator = apply(linear, tensors, config=linear.options(normalize=False)).output
    close(concatenated(run(tensors)), NORM["simple_rms"](concatenated(numerator)))


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_the_size_of_values_does_not_matter(pattern):
    tensors = inputs(9)
    larger = {**tensors, "v": 1e3 * tensors["v"]}
    close(run(larger, pattern), run(tensors, pattern), 1e-8)
    mirrored = {**tensors, "k": 7 * tensors["k"]}
    options = {"feature_map": "relu"}
    some = run(tensors, pattern, options)
    close(run(mirrored, pattern, options), some, 1e-5)
    assert some.abs().max() > 0.1


def test_the_norm_is_over_all_heads_and_has_root_mean_square_one():
    tensors = inputs(9)
    tensors["v"][:, 1] *= 50
    output = run(tensors)
    close(concatenated(output).square().mean(-1), torch.ones(2, 9, dtype=torch.float64), 1e-6)
    size = output.square().mean((0, 2, 3))
    assert size[1] > 100 * size[0]  # a norm of each head would have made them equal
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


def test_a_state_carries_the_sums_and_no_normaliser():
    tensors = inputs(9)
    state = apply(MECHANISM, tensors, return_state=True).state
    close(state.memory, MAP["elu"](tensors["k"]).mT @ tensors["v"])
    assert cost(Shape(1, 2, 1, 9, 4, 3), Config()).state == state.memory[0].numel()
    assert MECHANISM.recurrent
    mask, config = Mask(lengths=torch.tensor([9, 4])), Config(denominator=True)
    padded = apply(MECHANISM, tensors, mask=mask, return_state=True, config=config).state
    close(padded.memory[1, ..., -1], MAP["elu"](tensors["k"][1, :, :4]).sum(1))


@pytest.mark.parametrize("positions", ["lrpe", "rotary"])
@pytest.mark.parametrize("feature_map", ["elu", "plain_elu"])
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_rotation_comes_after_the_map_in_every_form(pattern, feature_map, positions):
    scheme = create_positions(positions, dim=8, heads=2, head_dim=4).double()
    tensors = inputs(13)
    where = torch.arange(13)[None]
    q, k = (scheme.rotate(MAP[feature_map](tensors[name]), where) for name in "qk")
    weights = q @ k.mT if pattern == "noncausal-self" else (q @ k.mT).tril()
    expected = NORM["simple_rms"](concatenated(weights @ tensors["v"]))
    options = {"feature_map": feature_map}
    for form in ("reference", "parallel"):
        close(concatenated(run(tensors, pattern, options, form=form, rotate=scheme.rotate)), expected)
    if pattern == "causal-self":
        state, outputs = None, []
        for part in torch.arange(13).split([4, 1, 1, 7]):
            piece = {name: x[:, :, part] for name, x in tensors.items()}
            call = {"state": state, "return_state": True, "config": Config(**options), "rotate": scheme.rotate}
            result = apply(MECHANISM, piece, **call)
            outputs.append(result.output)
            state = result.state
        close(concatenated(torch.cat(outputs, 2)), expected)
        fewer = {**tensors, "q": tensors["q"][:, :, 6:]}
        close(
            run(fewer, options=options, rotate=scheme.rotate),
            run(tensors, options=options, rotate=scheme.rotate)[:, :, 6:],
        )


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_a_rotating_layer_ignores_padding_and_decodes_as_it_reads(pattern):
    layer = create_layer("norm_linear", 8, 2, pattern=pattern, positions="lrpe").double()
    x, valid = torch.randn(2, 12, 8, dtype=torch.float64), torch.rand(2, 12) > 0.4
    valid[:, 0] = True
    found = layer(x.masked_fill(~valid[..., None], torch.nan), context=Context(mask=Mask(valid=valid))).output
    for row in range(2):
        close(found[row, valid[row]], layer(x[row : row + 1, valid[row]]).output[0])
    assert layer.positions.angles.requires_grad
    layer(x).output.square().sum().backward()
    assert layer.positions.angles.grad.abs().min() > 0
    if pattern == "causal-self":
        state, outputs = None, []
        for t in range(12):
            y, state = layer.step(x[:, t], state)
            outputs.append(y)
        close(torch.stack(outputs, 1), layer(x).output)
    with pytest.raises(Unsupported, match="explicit positions"):
        layer(x, context=Context(positions=torch.arange(12).expand(2, -1)))


def test_the_order_of_a_memory_does_not_matter():
    tensors, order = inputs(5, 9), torch.randperm(9)
    shuffled = {**tensors, "k": tensors["k"][:, :, order], "v": tensors["v"][:, :, order]}
    close(run(shuffled, "causal-cross"), run(tensors, "causal-cross"))
    state = None
    for part in torch.arange(9).split([4, 0, 5]):
        piece = {name: tensors[name][:, :, part] for name in "kv"}
        state = absorb(MECHANISM, piece, pattern="noncausal-cross", state=state)
    close(run({"q": tensors["q"]}, "noncausal-cross", state=state), run(tensors, "noncausal-cross"))


def test_padded_keys_are_left_out_after_the_map():
    """1 + elu(0) is 1: keys that are zeroed before the map would count."""
    tensors, lengths = inputs(9), torch.tensor([9, 4])
    for pattern in ("causal-self", "noncausal-self"):
        found = run(tensors, pattern, {"output_norm": "none"}, mask=Mask(lengths=lengths))
        short = {name: x[1:, :, :4] for name, x in tensors.items()}
        close(found[1:, :, :4], run(short, pattern, {"output_norm": "none"}))


def test_half_precision_survives_sums_beyond_its_range():
    """Sums over the sequence pass 65504, the largest number of float16, long before the norm."""
    tensors = {name: 8 + x.half() for name, x in inputs(400).items()}
    found = run(tensors)
    assert found.dtype == torch.float16 and found.isfinite().all()
    exact = run({name: x.double() for name, x in tensors.items()})
    assert (found.double() - exact).abs().max() < 2e-3 * exact.abs().max()
    assert (
        exact / run({name: x.double() for name, x in tensors.items()}, options={"output_norm": "none"})
    ).min() < 1e-4


def steepest(name: str, scores: Tensor, **options: Any) -> float:
    """Largest derivative of a weight by a score: keys and values are unit vectors, so that queries are scores and outputs
    are weights."""
    card, unit = get_mechanism(name), torch.eye(scores.shape[-1], dtype=torch.float64)[None, None]

    def weights(q: Tensor) -> Tensor:
        call = {"pattern": "noncausal-self", "scale": 1.0, "config": card.options(**options)}
        return apply(card, {"q": q, "k": unit, "v": unit}, **call).output

    return float(torch.autograd.functional.jacobian(weights, scores).abs().max())


def test_a_denominator_makes_gradients_grow_as_scores_shrink():
    """Section 3.1: a derivative by a score has the factor 1 / score under a denominator, and none without; that of softmax
    is at most 1 / 4. The norm has the factor again where all scores of a query shrink together, since outputs then stay as
    they are."""
    scores, sizes = 0.1 + torch.rand(1, 1, 9, 9, dtype=torch.float64), [1e-1, 1e-2, 1e-3, 1e-4]
    none = {"feature_map": "relu", "output_norm": "none"}
    for options, growth in (
        (none | {"denominator": True}, 10),
        (none, 1),
        ({"feature_map": "relu", "output_norm": "simple_rms"}, 10),
    ):
        found = [steepest("norm_linear", size * scores, **options) for size in sizes]
        for larger, smaller in itertools.pairwise(found):
            assert smaller / larger == pytest.approx(growth, rel=1e-2)
    for size in (*sizes, 10.0):
        assert 0.01 < steepest("softmax", size * scores) <= 0.25


def test_bad_options_are_refused_with_what_is_supported():
    for options, message in (
        ({"feature_map": "tanh"}, "plain_elu"),
        ({"output_norm": "batch"}, "simple_rms"),
        ({"feature_map": "plain_elu", "denominator": True}, "denominator=False"),
        ({"feature_map": "silu", "denominator": True}, "may vanish"),
    ):
        with pytest.raises(Unsupported, match=message):
            Config(**options)
    scheme = create_positions("rotary", dim=8, heads=2, head_dim=4)
    with pytest.raises(Unsupported, match="positions that rotate"):
        run(inputs(3), options={"denominator": True}, rotate=scheme.rotate)
    with pytest.raises(Unsupported, match="self patterns"):
        create_layer("norm_linear", 8, 2, pattern="causal-cross", positions="lrpe")


# parity


@pytest.mark.parametrize(("name", "options"), RECORDED.items())
def test_equals_the_authors_layer(name, options):
    check_equals_the_authors_layer("norm_linear", name, options, close)
