"""Tests specific to FAVOR+: its features, leaks through their offset, its redraws, and recorded outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import calls, check_recorded, close, load, qkv, refused
from torch import Tensor

from regard.contract import ALL_PATTERNS, Call, Mask, Pattern
from regard.create import create_layer
from regard.functional import performer_attention, softmax_attention
from regard.mechanisms.performer import MECHANISM, Config, draw_features, exponents

OPTIONS = [{}, {"feature_eps": 0.1, "eps": 0.3}, {"kernel": "relu"}, {"feature_eps": 0.0, "least_denominator": 0.1}]
run = calls(MECHANISM)


def inputs(n: int, m: int | None = None, batch: int = 2, features: int = 5) -> dict[str, Tensor]:
    return qkv(n, m, batch=batch, value_dim=3) | {"w": torch.randn(features, 4, dtype=torch.float64)}


def phi(x: np.ndarray, w: np.ndarray, config: Config, seen: np.ndarray) -> np.ndarray:
    """Features of one token; the maximum exponent is taken over the tokens `seen`."""
    if config.kernel == "relu":
        return np.maximum(w @ x, 0) + config.offset
    largest = max((w @ y).max() - y @ y / 2 for y in seen)
    return (np.exp(w @ x - x @ x / 2 - largest) + config.offset) / math.sqrt(len(w))


def paired(tensors: dict[str, Tensor], pattern: str, options: dict) -> Tensor:
    """The definition in the mechanism's docstring, one pair of tokens at a time."""
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


# quality of the estimate


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
    assert 0.15 < many / few < 0.4  # expected: 1/4
    for features in (16, 64):
        assert error_to_softmax(features, True) < error_to_softmax(features, False)


# precision and state


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self", "noncausal-cross"])
def test_padding_changes_nothing_through_the_maximum(pattern):
    """Padding appears as zeros, whose exponent of 0 is larger than those of long keys."""
    tensors, lengths, options = inputs(10), torch.tensor([10, 6]), {"feature_eps": 0.1}
    tensors["k"] = 20 * torch.nn.functional.normalize(tensors["k"], dim=-1)
    assert (exponents(Call(Pattern.CAUSAL_SELF, Config(), scale=0.5), tensors["k"], tensors["w"]) < 0).all()
    mask = {"memory_mask" if "cross" in pattern else "mask": Mask(lengths=lengths)}
    found = run(tensors, options, pattern=pattern, **mask).output[1:, :, :6]
    alone = {name: x if name == "w" else x[1:, :, :6] for name, x in tensors.items()}
    close(found, run(alone, options, pattern=pattern).output)


# layers


def test_a_layer_has_the_paper_s_number_of_features_unless_told():
    assert create_layer("performer", 32, 2).projection.features.shape == (int(16 * math.log(16)), 16)
    assert create_layer("performer", 32, 2, num_features=7).projection.features.shape == (7, 16)
    assert create_layer("performer", 2, 2).projection.features.shape == (1, 1)


def test_a_negative_scale_is_refused():
    refused("scale", run, inputs(5), scale=-1.0)


def test_weights_of_a_softmax_layer_give_nearly_its_outputs():
    torch.manual_seed(0)
    softmax = create_layer("softmax", 32, 2, pattern="noncausal-self")
    performer = create_layer("performer", 32, 2, pattern="noncausal-self", num_features=4096, feature_eps=0.0).eval()
    performer.load_state_dict(softmax.state_dict(), strict=False)
    x = 0.5 * torch.randn(1, 20, 32)
    close(performer(x).output, softmax(x).output, 0.05)


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
    """Recorded without the softmax kernel's offset: with it, that code's maxima (of w.x alone) would not cancel."""
    recorded = load(name)
    tensors = {x: recorded[x].requires_grad_(x != "w") for x in "qkvw"}
    options = {"eps": 0.0} | ({"kernel": "relu"} if "relu" in name else {"feature_eps": 0.0})
    output = run(tensors, options, pattern=pattern).output
    check_recorded(recorded, output, {x: tensors[x] for x in "qkv"}, 1e-10)
