"""Tests specific to MLP-Mixer: one static network for all channels and a fixed number of places."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import calls, close, refused
from torch import Tensor

from regard.contract import Mask, Pattern
from regard.create import create_layer
from regard.mechanisms.mlp_mixer import MECHANISM, sample_inputs

run = calls(MECHANISM, "noncausal-self")


def inputs(n: int, places: int = 12, batch: int = 2, channels: int = 6) -> dict[str, Tensor]:
    call = {"dtype": torch.float64, "pattern": Pattern.NONCAUSAL_SELF, "config": MECHANISM.options()}
    sizes = {"l": places, "d": channels}
    return sample_inputs(torch.default_generator, batch=batch, n=n, m=n, sizes=sizes, **call)


def test_every_channel_goes_through_the_same_network_along_tokens():
    x = inputs(12)
    hidden = F.gelu(F.linear(x["x"].mT, x["up"], x["up_bias"]))
    close(run(x).output, F.linear(hidden, x["down"], x["down_bias"]).mT)
    order = torch.randperm(6)
    close(run({**x, "x": x["x"][..., order]}).output, run(x).output[..., order])


@pytest.mark.parametrize("n", [1, 7, 11])
def test_missing_tokens_are_zeros(n):
    x = inputs(n)
    whole = {**x, "x": F.pad(x["x"], (0, 0, 0, 12 - n))}
    close(run(x).output, run(whole).output[:, :n])
    longer = {**x, "x": F.pad(x["x"], (0, 0, 0, 20 - n), value=float("nan"))}  # padded past the last place
    close(run(longer, mask=Mask(lengths=torch.tensor([n, n]))).output[:, :n], run(x).output)


def test_masked_places_of_a_grid_are_zeros_and_the_others_stay():
    x, valid = inputs(12), torch.rand(2, 12) < 0.6
    found = run(x, mask=Mask(valid=valid), grid=(3, 4)).output
    expected = run({**x, "x": torch.where(valid[..., None], x["x"], 0)}).output
    close(found, torch.where(valid[..., None], expected, 0))


def test_without_an_activation_what_a_token_gets_of_another_does_not_depend_on_them():
    x = inputs(6, batch=1, channels=2)

    def gradient(activation: str) -> Tensor:
        token = torch.randn_like(x["x"])
        return torch.func.jacrev(lambda t: run({**x, "x": t}, {"activation": activation}).output)(token)

    close(gradient("none"), gradient("none"))
    assert (gradient("gelu") - gradient("gelu")).abs().max() > 1e-3


def test_dropout_comes_after_both_matrices():
    x = inputs(12, batch=20)
    exact, found = run(x).output, run(x, dropout=0.5).output
    kept = found != 0
    assert 0.4 < kept.double().mean() < 0.6
    assert (found - 2 * exact)[kept].abs().min() > 1e-9  # hidden numbers were dropped too


def test_more_tokens_than_places_are_refused():
    refused(
        "mlp_mixer on 13 tokens.*at most 12.*length=13",
        run,
        inputs(13) | {k: v for k, v in inputs(12).items() if k != "x"},
    )
    layer = create_layer("mlp_mixer", 6, pattern="noncausal-self", length=9)
    refused("on 10 tokens", layer, torch.zeros(1, 10, 6))
    refused("dropout=1", create_layer, "mlp_mixer", 6, pattern="noncausal-self", dropout=1.0)


def test_initial_values():
    weights = create_layer("mlp_mixer", 6, pattern="noncausal-self", length=400, hidden=100).weights
    assert weights["up"].std().item() == pytest.approx(400**-0.5, rel=0.05)
    assert weights["down"].std().item() == pytest.approx(100**-0.5, rel=0.05)
    assert weights["up"].abs().max() < 2.3 * 400**-0.5
    assert (weights["up_bias"] == 0).all() and (weights["down_bias"] == 0).all()
