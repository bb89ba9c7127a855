"""Tests specific to random feature attention: its estimate, forgetting, and what a layer learns."""

from __future__ import annotations

import math

import pytest
import torch
from support import calls, close
from torch.nn.functional import logsigmoid, normalize

from regard.contract import Unsupported
from regard.create import create_layer
from regard.functional import softmax_attention
from regard.mechanisms.random_feature import MECHANISM

run = calls(MECHANISM)


def inputs(n: int, features: int = 6, width: int = 8) -> dict[str, torch.Tensor]:
    q, k, v = (torch.randn(2, 2, n, width, dtype=torch.float64) for _ in range(3))
    return {"q": q, "k": k, "v": v, "w": torch.randn(2, features, width, dtype=torch.float64) / 2}


def error_to_softmax(features: int) -> float:
    found = []
    for _ in range(20):
        given = inputs(32, features)
        given["w"] = 2 * given["w"]
        units = [normalize(given[name], dim=-1) for name in "qk"]
        expected = softmax_attention(*units, given["v"], pattern="noncausal-self", scale=1.5)
        found.append(float((run(given, pattern="noncausal-self", scale=1.5).output - expected).square().mean()))
    return math.sqrt(sum(found) / len(found))


def test_it_estimates_softmax_between_unit_vectors_with_an_error_that_falls_as_the_root_of_the_features():
    assert 0.15 < error_to_softmax(2048) / error_to_softmax(128) < 0.4  # expected: 1/4


def test_lengths_of_queries_and_keys_do_not_count():
    given = inputs(9)
    longer = {**given, "q": 7 * given["q"], "k": given["k"] / 3}
    close(run(longer).output, run(given).output)


@pytest.mark.parametrize("form", [None, "reference"])
def test_with_a_gate_each_token_takes_what_the_gate_leaves(form):
    given = inputs(11)
    given["log_gate"] = logsigmoid(torch.randn(2, 2, 11, dtype=torch.float64))
    angles = {name: normalize(given[name], dim=-1) @ given["w"].mT for name in "qk"}
    q, k = (torch.cat([a.sin(), a.cos()], -1) / math.sqrt(6) for a in angles.values())
    s, z = torch.zeros(2, 2, 12, 8, dtype=torch.float64), torch.zeros(2, 2, 12, dtype=torch.float64)
    outputs = []
    for t in range(11):
        g = given["log_gate"][:, :, t].exp()
        s = g[..., None, None] * s + ((1 - g)[..., None] * k[:, :, t])[..., None] * given["v"][:, :, t, None]
        z = g[..., None] * z + (1 - g)[..., None] * k[:, :, t]
        o = (q[:, :, t, :, None] * s).sum(2)
        outputs.append(o / (q[:, :, t] * z).sum(-1, keepdim=True).clamp(min=1e-2))
    close(run(given, {"gate": True}, form=form).output, torch.stack(outputs, 2))


def test_an_estimate_below_the_least_denominator_is_raised_to_it():
    given = inputs(1, features=4)
    given["w"] = 40 * torch.ones_like(given["w"])
    values = torch.ones_like(given["v"])
    found = run({**given, "v": values}, {"eps": 0.5}).output
    angles = [normalize(given[name], dim=-1) @ given["w"].mT for name in "qk"]
    estimate = (angles[0] - angles[1]).cos().mean(-1, keepdim=True)
    close(found, (estimate / estimate.clamp(min=0.5)).expand_as(values))


def test_a_layer_learns_sigma_and_its_gate_and_keeps_its_draw():
    layer = create_layer("rfa", 16, 2, pattern="causal-self", num_features=5, gate=True)
    drawn = layer.projection.drawn.clone()
    layer(torch.randn(2, 9, 16)).output.square().sum().backward()
    assert layer.projection.log_sigma.grad.any() and layer.projection.gate.weight.grad.any()
    assert torch.equal(layer.projection.drawn, drawn) and drawn.shape == (2, 5, 8)
    assert create_layer("rfa", 16, 2, learn_sigma=False).projection.log_sigma is None


@pytest.mark.parametrize("pattern", ["noncausal-self", "noncausal-cross", "causal-cross"])
def test_a_gate_without_an_order_is_refused(pattern):
    with pytest.raises(Unsupported, match="gate"):
        create_layer("random_feature", 16, 2, pattern=pattern, gate=True)
    with pytest.raises(Unsupported, match="gate"):
        run({**inputs(4), "log_gate": torch.zeros(2, 2, 4, dtype=torch.float64)}, {"gate": True}, pattern=pattern)


@pytest.mark.parametrize("options", [{"num_features": 0}, {"eps": 0.0}])
def test_what_cannot_be_is_refused(options):
    with pytest.raises(Unsupported, match=next(iter(options))):
        MECHANISM.options(**options)
