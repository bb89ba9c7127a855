"""What is peculiar to FAVOR+: its features, what their offset must not carry, its redraws, and recorded outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import calls, close, load, qkv
from torch import Tensor

from regard.contract import ALL_PATTERNS, Call, Context, Mask, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.functional import performer_attention, softmax_attention
from regard.mechanisms.performer import MECHANISM, Config, cost, draw_features, exponents
from regard.workbench.properties import split_and_resume
from regard.workbench.subjects import Subject

OPTIONS = [{}, {"feature_eps": 0.1, "eps": 0.3}, {"kernel": "relu"}, {"feature_eps": 0.0, "least_denominator": 0.1}]
run = calls(MECHANISM)


def inputs(n: int, m: int | None = None, batch: int = 2, features: int = 5) -> dict[str, Tensor]:
    return qkv(n, m, batch=batch, value_dim=3) | {"w": torch.randn(features, 4, dtype=torch.float64)}


def phi(x: np.ndarray, w: np.ndarray, config: Config, seen: np.ndarray) -> np.ndarray:
    """Features of one token; `seen` are the tokens whose exponents share its maximum."""
    if config.kernel == "relu":
        return np.maximum(w @ x, 0) + config.offset
    largest = max((w @ y).max() - y @ y / 2 for y in seen)
    return (np.exp(w @ x - x @ x / 2 - largest) + config.offset) / math.sqrt(len(w))


def paired(tensors: dict[str, Tensor], pattern: str, options: dict) -> Tensor:
    """The definition of the docstring, one pair of tokens after the other."""
    config = Config(**options)
    q, k, v, w = (tensors[name].numpy() for name in ("q", "k", "v", "w"))
    q, k = q * 4**-0.25, k * 4**-0.25
    found = np.zeros((*q.shape[:3], v.shape[3]))
    n, m = q.shape[2], k.shape[2]
    for b, h, i in np.ndindex(*q.shape[:3]):
        keys = k[b, h, : max(i + m - n + 1, 0)] if pattern == "causal-self" else k[b, h]
        query = phi(q[b, h, i], w, config, q[b, h, i : i + 1])
        weights = np.array([query @ phi(key, w, config, keys) for key in keys])
        if len(keys):
            found[b, h, i] = weights @ v[b, h, : len(keys)] / max(weights.sum() + config.eps, config.least_denominator)
    return torch.from_numpy(found)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_definition_over_pairs(options, pattern):
    for n, m in ((9, 9), *([(3, 8), (8, 3), (5, 0)] if pattern != "noncausal-self" else [])):
        tensors = inputs(n, m)
        close(run(tensors, options, pattern=pattern).output, paired(tensors, pattern, options))


# what the estimate is worth


def error_to_softmax(features: int, orthogonal: bool, repeats: int = 30) -> float:
    generator = torch.Generator().manual_seed(features)
    q, k, v = (torch.randn(1, 1, 64, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    q, k = q / 2, k / 2  # the variance grows with exp(|q + k|^2)
    expected = softmax_attention(q, k, v, pattern="noncausal-self")
    errors = []
    for _ in range(repeats):
        w = draw_features(features, 16, orthogonal=orthogonal, generator=generator, dtype=torch.float64)
        found = performer_attention(q, k, v, w, pattern="noncausal-self", feature_eps=0.0, eps=0.0)
        errors.append(float((found - expected).square().mean()))
    return (sum(errors) / repeats) ** 0.5


def test_the_error_falls_as_the_root_of_the_features_and_orthogonal_ones_err_less():
    few, many = error_to_softmax(64, False), error_to_softmax(1024, False)
    assert 0.15 < many / few < 0.4  # 1/4 for 16 times as many
    for features in (16, 64):
        assert error_to_softmax(features, True) < error_to_softmax(features, False)


def test_blocks_of_features_are_orthogonal_with_the_norms_of_gaussian_vectors():
    w = draw_features(20, 8, dtype=torch.float64)
    for block in w.split(8):
        gram = block @ block.mT
        close(gram - torch.diag(gram.diagonal()), torch.zeros_like(gram))
    many = draw_features(40000, 4, dtype=torch.float64)
    assert abs(float(many.square().sum(-1).mean()) - 4) < 0.1
    assert abs(float(many.square().sum(-1).var()) - 8) < 0.6
    assert (many.mean(0).abs() < 0.05).all()


# precision and state


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self", "noncausal-cross"])
def test_padding_changes_nothing_through_the_maximum(pattern):
    """Forms see zeros in the padding, whose exponents, 0, are above those of long keys."""
    tensors, lengths, options = inputs(10), torch.tensor([10, 6]), {"feature_eps": 0.1}
    tensors["k"] = 20 * torch.nn.functional.normalize(tensors["k"], dim=-1)
    assert (exponents(Call(Pattern.CAUSAL_SELF, Config(), scale=0.5), tensors["k"], tensors["w"]) < 0).all()
    mask = {"memory_mask" if "cross" in pattern else "mask": Mask(lengths=lengths)}
    found = run(tensors, options, pattern=pattern, **mask).output[1:, :, :6]
    alone = {name: x if name == "w" else x[1:, :, :6] for name, x in tensors.items()}
    close(found, run(alone, options, pattern=pattern).output)


@pytest.mark.parametrize("options", OPTIONS)
def test_four_thousand_tokens_stay_precise_in_float32(options):
    tensors = inputs(4000, batch=1)
    single = run({name: x.float() for name, x in tensors.items()}, options).output
    close(single.double(), run(tensors, options).output, MECHANISM.tolerances[torch.float32])


@pytest.mark.parametrize("options", OPTIONS[1:])
def test_a_sequence_may_be_split_with_any_offset_and_kernel(options):
    assert split_and_resume(Subject(MECHANISM, Pattern.CAUSAL_SELF, options), torch.float64) < 1e-12


def test_the_state_has_the_size_that_the_card_says():
    state = run(inputs(30, batch=1), return_state=True).state
    numbers = sum(x.numel() for name, x in state.tensors().items() if name != "length")
    assert numbers == cost(Shape(1, 2, 1, 1000, 4, 3), Config(num_features=5)).state
    assert MECHANISM.recurrent


# layers


def test_a_layer_has_the_paper_s_number_of_features_unless_told():
    assert create_layer("performer", 32, 2).projection.features.shape == (int(16 * math.log(16)), 16)
    assert create_layer("performer", 32, 2, num_features=7).projection.features.shape == (7, 16)
    assert create_layer("performer", 2, 2).projection.features.shape == (1, 1)


def test_features_are_drawn_anew_in_training_only_and_saved():
    layer = create_layer("performer", 8, 2, redraw=3)
    x, first = torch.randn(2, 5, 8), layer.projection.features
    output = layer(x).output
    for _ in range(2):
        layer(x)
    assert not torch.equal(layer.projection.features, first)
    output.sum().backward()  # a graph keeps the features that it was made with
    layer.eval()
    kept = layer.projection.features
    for _ in range(7):
        layer(x)
    assert torch.equal(layer.projection.features, kept)
    again = create_layer("performer", 8, 2, redraw=3)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.eval()(x).output, layer(x).output)


@pytest.mark.parametrize("options", [{"redraw": 1}, {"fresh": True}], ids=str)
def test_the_generator_draws_features_in_training_and_fresh_ones_are_used_once(options):
    layer, x = create_layer("performer", 8, 2, **options), torch.randn(2, 5, 8)
    before = layer.projection.features

    def output(seed: int) -> Tensor:
        return layer(x, context=Context(generator=torch.Generator().manual_seed(seed))).output

    assert torch.equal(output(0), output(0)) and not torch.equal(output(0), output(1))
    assert torch.equal(layer.projection.features, before) == ("fresh" in options)
    layer.eval()
    assert torch.equal(output(0), output(1))


def test_weights_of_a_softmax_layer_give_nearly_its_outputs():
    torch.manual_seed(0)
    softmax = create_layer("softmax", 32, 2, pattern="noncausal-self")
    performer = create_layer("performer", 32, 2, pattern="noncausal-self", num_features=4096, feature_eps=0.0).eval()
    performer.load_state_dict(softmax.state_dict(), strict=False)
    x = 0.5 * torch.randn(1, 20, 32)
    close(performer(x).output, softmax(x).output, 0.05)


# refusals


BAD = {"kernel": "cosine", "num_features": 0, "feature_eps": -1e-4, "eps": math.nan, "redraw": -1}
BAD |= {"least_denominator": math.inf}


@pytest.mark.parametrize(("option", "value"), BAD.items())
def test_bad_options_are_refused(option, value):
    with pytest.raises(Unsupported):
        Config(**{option: value})


@pytest.mark.parametrize(
    "call",
    [{"mask": Mask(bias=torch.zeros(1, 1, 5, 5))}, {"dropout": 0.1}, {"want": {"weights"}}, {"scale": -1.0}],
)
def test_what_needs_a_weight_for_each_pair_or_a_negative_scale_is_refused(call):
    with pytest.raises(Unsupported, match="performer"):
        run(inputs(5), **call)


# parity


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("performer_softmax_cross", "noncausal-cross"),
        ("performer_softmax_causal", "causal-self"),
        ("performer_relu_noncausal", "noncausal-self"),
    ],
)
def test_parity_with_a_third_partys_code(name, pattern):
    """Recorded without the offset of the softmax kernel, beside which its maxima (of w.x alone) would not cancel."""
    recorded = load(name)
    tensors = {x: recorded[x].requires_grad_(x != "w") for x in "qkvw"}
    options = {"eps": 0.0} | ({"kernel": "relu"} if "relu" in name else {"feature_eps": 0.0})
    output = run(tensors, options, pattern=pattern).output
    gradients = torch.autograd.grad(output, [tensors[x] for x in "qkv"], recorded["grad_out"])
    for key, found in zip(("out", "grad_q", "grad_k", "grad_v"), (output, *gradients), strict=True):
        close(found, recorded[key], 1e-10)
