"""Tests specific to NiNformer: a gate that is a Mixer, and products that depend on the tokens' content."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import calls, close, refused
from torch import Tensor

from regard.contract import Mask, Pattern
from regard.create import create_layer
from regard.mechanisms import mlp_mixer
from regard.mechanisms.ninformer import MECHANISM, sample_inputs

run = calls(MECHANISM, "noncausal-self")
mix = calls(mlp_mixer.MECHANISM, "noncausal-self")


def inputs(n: int = 9, batch: int = 2, channels: int = 6, places: int = 9, **options) -> dict[str, Tensor]:
    call = {"dtype": torch.float64, "pattern": Pattern.NONCAUSAL_SELF, "config": MECHANISM.options(**options)}
    sizes = {"l": places, "d": channels}
    return sample_inputs(torch.default_generator, batch=batch, n=n, m=n, sizes=sizes, **call)


def mixer(x: dict[str, Tensor]) -> Tensor:
    """An MLP-Mixer block, built from the mlp_mixer mechanism and torch's functions."""
    width = x["x"].shape[-1:]
    normed = F.layer_norm(x["x"], width, x["token_norm"], x["token_norm_bias"])
    names = ("up", "up_bias", "down", "down_bias")
    first = x["x"] + mix({"x": normed, **{name: x[f"token_{name}"] for name in names}}).output
    normed = F.layer_norm(first, width, x["channel_norm"], x["channel_norm_bias"])
    hidden = F.gelu(F.linear(normed, x["channel_up"], x["channel_up_bias"]))
    return first + F.linear(hidden, x["channel_down"], x["channel_down_bias"])


def test_the_gate_is_a_block_of_mlp_mixer():
    x = inputs()
    gate = mixer(x)
    close(run({**x, "value": torch.ones_like(x["x"])}).output, gate)
    close(run(x).output, x["value"] * gate)
    close(run(x, {"gate": "sigmoid"}).output, x["value"] * gate.sigmoid())
    close(run(x, {"gate": "tanh", "combine": "add"}).output, x["value"] + gate.tanh())
    close(run(x, {"gate": "gelu"}).output, x["value"] * F.gelu(gate))


def test_networks_that_give_nothing_leave_a_product_of_each_token_alone():
    x = inputs()
    for name in x:
        if "down" in name:
            x[name] = torch.zeros_like(x[name])
    close(run(x).output, x["value"] * x["x"])


@pytest.mark.parametrize(("inner", "mixes"), [("mixer", True), ("token", True), ("channel", False)])
def test_places_matter_where_tokens_mix(inner, mixes):
    x, order = inputs(inner=inner), torch.randperm(9)
    permuted = {**x, "x": x["x"][:, order], "value": x["value"][:, order]}
    found = (run(permuted).output - run(x).output[:, order]).abs().max()
    assert found > 1e-3 if mixes else found < 1e-12


def test_homogeneous_of_degree_two_only_with_linear_networks():
    x = {name: t for name, t in inputs().items() if "bias" not in name and "norm" not in name}
    x |= {name: torch.zeros_like(t) for name, t in inputs().items() if name.endswith(("up_bias", "down_bias"))}
    tripled = {**x, "x": 3 * x["x"], "value": 3 * x["value"]}
    linear = {"activation": "none"}
    close(run(tripled, linear).output, 9 * run(x, linear).output)
    assert (run(tripled).output - 9 * run(x).output).abs().max() > 1e-2


def test_what_a_token_gets_of_another_depends_on_what_they_hold_even_with_linear_networks():
    x = {name: t for name, t in inputs(5, 1, 2, 5).items() if "norm" not in name}
    projection = torch.randn(2, 2, dtype=torch.float64)

    def gradient() -> Tensor:
        def unit(t: Tensor) -> Tensor:
            return run({**x, "x": t, "value": t @ projection}, {"activation": "none"}).output

        return torch.func.jacrev(unit)(torch.randn_like(x["x"]))[0, 1, :, 0, 3]

    first, second = gradient(), gradient()
    assert first.abs().min() > 1e-6 and (first - second).abs().max() > 1e-3


def test_masked_tokens_are_zeros_after_the_norm():
    x, valid = inputs(), torch.rand(2, 9) < 0.6
    x["token_norm_bias"] = x["token_norm_bias"] + 3
    found = run(x, mask=Mask(valid=valid), grid=(3, 3)).output
    normed = F.layer_norm(x["x"], (6,), x["token_norm"], x["token_norm_bias"])
    names = ("up", "up_bias", "down", "down_bias")
    kept = {"x": torch.where(valid[..., None], normed, 0), **{name: x[f"token_{name}"] for name in names}}
    token = {name: t for name, t in x.items() if not name.startswith("channel")}
    alone = run(token, mask=Mask(valid=valid), grid=(3, 3)).output
    close(alone[valid], (x["value"] * (x["x"] + mix(kept).output))[valid])
    assert (found[~valid] == 0).all()
    poisoned = {**x, "x": torch.where(valid[..., None], x["x"], 7.0)}
    close(run(poisoned, mask=Mask(valid=valid), grid=(3, 3)).output, found)


def test_what_cannot_be_is_refused():
    x = inputs()
    refused(
        "on 9 tokens.*at most 8", run, {**x, **{n: t for n, t in inputs(8, places=8).items() if n.startswith("token")}}
    )
    refused("without channel_down_bias", run, {n: t for n, t in x.items() if n != "channel_down_bias"})
    refused("without a gate", run, {n: x[n] for n in ("x", "value")})


def test_initial_values_are_those_of_torch():
    torch.manual_seed(0)
    weights = create_layer("ninformer", 64, pattern="noncausal-self", length=100, token_hidden=80).weights
    for name, fan_in in (("token_up", 100), ("token_down", 80), ("channel_up", 64), ("channel_down", 128)):
        for given in (weights[name], weights[f"{name}_bias"]):
            assert 0.9 * fan_in**-0.5 < given.abs().max() <= fan_in**-0.5
    assert (weights["token_norm"] == 1).all() and (weights["channel_norm_bias"] == 0).all()
