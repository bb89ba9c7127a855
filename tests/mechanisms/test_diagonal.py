"""Tests specific to DiagAttention: independent blocks, ReLU weights and their norm, a cache that empties."""

from __future__ import annotations

import pytest
import torch
from support import calls, close, qkv, refused
from torch import Tensor
from transnormer_checks import NORM, check_equals_the_authors_layer

from regard.contract import Mask
from regard.create import create_layer
from regard.mechanisms.diagonal import MECHANISM, Config

OPTIONS = [
    {"block": 5},
    {"block": 4, "activation": "relu"},
    {"block": 1},
    {"block": 7, "activation": "relu", "output_norm": "none"},
    {"block": 3, "activation": "relu", "form": "window"},
    {"block": 3, "form": "window", "output_norm": "simple_rms"},
    {"block": 6, "output_norm": "layer"},
    {"block": 60},  # one block: softmax attention
    {"block": 60, "activation": "relu", "output_norm": "rms"},
]

run = calls(MECHANISM)


def allowed(config: Config, pattern: str, n: int) -> Tensor:
    """Visible pairs, by the definition in words."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    if config.form == "block":
        seen = i // config.block == j // config.block
        return seen & (j <= i) if pattern == "causal-self" else seen
    return (j <= i) & (j > i - config.block) if pattern == "causal-self" else (i - j).abs() <= config.block


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
@pytest.mark.parametrize("n", [13, 50])
def test_equals_its_definition(options, pattern, n):
    """Pairs outside a block do not enter the denominator, and the norm is over all heads."""
    tensors, config = qkv(n), Config(**options)
    seen, scores = allowed(config, pattern, n), tensors["q"] @ tensors["k"].mT / 2
    relu = config.activation == "relu"
    weights = scores.relu() * seen if relu else scores.masked_fill(~seen, -torch.inf).softmax(-1)
    norm = NORM[options.get("output_norm", "simple_rms" if relu else "none")]
    expected = norm((weights @ tensors["v"]).transpose(1, 2).flatten(2)).unflatten(-1, (2, 4)).transpose(1, 2)
    for form in ("reference", None):
        close(run(tensors, options, pattern=pattern, form=form).output, expected)


def test_a_layer_has_weights_for_the_norms_that_have_some():
    for norm in ("layer", "rms"):
        assert create_layer("diagonal", 8, 2, output_norm=norm).merge.weight.shape == (2, 1, 4)
    assert not list(create_layer("diagonal", 8, 2).merge.parameters())


def test_what_it_lacks_is_refused_with_the_reason():
    state = run(qkv(3), return_state=True).state
    refused("pairwise bias", run, qkv(3), state=state, mask=Mask(bias=torch.zeros(1, 1, 3, 3)))
    refused("log-sum-exp", run, qkv(3), {"activation": "relu"}, want={"lse"})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("diagonal_t1", {"activation": "relu", "block": 5}),
        ("diagonal_t2", {"activation": "softmax", "block": 4}),
    ],
)
def test_equals_the_authors_layer(name, options):
    check_equals_the_authors_layer("diagonal", name, options)
