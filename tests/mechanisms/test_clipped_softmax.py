"""Tests specific to clipped softmax: exact zeros and ones, where they begin, the gradients that they pass, and parity."""

from __future__ import annotations

import math

import pytest
import torch
from support import calls, check_recorded, close, load, qkv, refused
from torch import Tensor

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import Context, Mask
from regard.create import create_layer
from regard.mechanisms.clipped_softmax import MECHANISM, Config, SilentRows, silent_rows

run = calls(MECHANISM, "noncausal-self")


def inputs(n: int, batch: int = 2, spread: float = 3.0) -> dict[str, Tensor]:
    tensors = qkv(n, batch=batch)
    return tensors | {"q": spread * tensors["q"]}


def weights_of_scores(scores: Tensor, **options: float) -> Tensor:
    """The weights for one query and head with the given scores."""
    m = scores.shape[-1]
    tensors = {"q": torch.ones(1, 1, 1, 1), "k": scores.view(1, 1, m, 1), "v": torch.zeros(1, 1, m, 1)}
    tensors = {name: x.double() for name, x in tensors.items()}
    return run(tensors, options, pattern="noncausal-cross", scale=1.0, want={"weights"}).extras["weights"].flatten()


def test_without_a_stretch_it_is_softmax_bit_for_bit():
    tensors = {name: x.requires_grad_() for name, x in inputs(9).items()}
    call = {"pattern": "causal-self"}
    outputs = [run(tensors, {"gamma": 0.0}, **call).output, apply(get_mechanism("softmax"), tensors, **call).output]
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(o.square().sum(), list(tensors.values())) for o in outputs]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_weights_have_the_values_of_the_worked_example():
    scores = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    close(weights_of_scores(scores, gamma=-0.25), torch.tensor([0.375, 0.125, 0.0], dtype=torch.float64), 1e-15)
    close(weights_of_scores(scores, gamma=0.0, zeta=2.0), torch.tensor([1.0, 0.6, 0.4], dtype=torch.float64), 1e-15)


@pytest.mark.parametrize(("gamma", "zeta"), [(-0.3, 1.0), (-0.03, 1.1), (0.0, 1.5), (-0.001, 1.003)])
def test_a_weight_is_exactly_0_or_1_beyond_its_threshold_and_nowhere_else(gamma, zeta):
    zero, one = -gamma / (zeta - gamma), (1 - gamma) / (zeta - gamma)
    for p in (zero - 1e-9, zero + 1e-9, one - 1e-9, one + 1e-9, *torch.rand(20).tolist()):
        if 0 < p < 1:
            scores = torch.tensor([p, 1 - p], dtype=torch.float64).log()
            weight = float(weights_of_scores(scores, gamma=gamma, zeta=zeta)[0])
            assert (weight == 0) == (p <= zero)
            assert (weight == 1) == (p >= one)


@pytest.mark.parametrize("m", [3, 20, 200])
def test_a_finite_score_makes_all_other_weights_exactly_zero(m):
    gamma = -0.02
    t = -gamma / (1 - gamma)
    if 1 / t <= m - 1:
        assert (weights_of_scores(torch.zeros(m), gamma=gamma)[1:] == 0).all()
        return
    switch = math.log(1 / t - (m - 1))
    for score, zeros in ((switch - 1e-6, False), (switch + 1e-6, True)):
        scores = torch.zeros(m, dtype=torch.float64)
        scores[0] = score
        weights = weights_of_scores(scores, gamma=gamma)
        assert bool((weights[1:] == 0).all()) == zeros
        assert weights[0] < 1 and weights.sum() <= 1


def test_rows_sum_to_at_most_one_and_to_zero_without_gradients_where_weights_are_spread_out():
    options, tensors = {"length": 40}, inputs(40)
    sums = run(tensors, options, want={"weights"}).extras["weights"].sum(-1)
    assert (sums >= 0).all() and (sums <= 1 + 1e-12).all()
    assert (sums < 1 - 1e-3).any()
    still = {name: x.requires_grad_() for name, x in inputs(40, spread=0.0).items()}
    dead = run(still, options, want={"weights"})
    assert (dead.output == 0).all() and silent_rows(dead.extras["weights"]).tolist() == [80, 80]
    for gradient in torch.autograd.grad(dead.output.sum(), list(still.values())):
        assert (gradient == 0).all()


def test_equal_weights_over_the_training_length_die_from_the_stated_alpha_on():
    m = 50
    for alpha, dead in ((m / (m - 1) - 1e-6, False), (m / (m - 1) + 1e-6, True)):
        assert bool((weights_of_scores(torch.zeros(m), alpha=alpha, length=m) == 0).all()) == dead
    alive = run(inputs(1000, batch=1, spread=0.0), want={"weights"})
    assert silent_rows(alive.extras["weights"]).tolist() == [0, 0]


def test_rows_that_never_spoke_are_dead_and_those_that_fell_silent_chose_to():
    valid = torch.rand(2, 50) > 0.2
    found, seen = SilentRows(valid), torch.zeros(2, 2, 50, dtype=torch.bool)
    for spread in (0.1, 3.0, 0.5):
        call = {"pattern": "causal-self", "want": {"weights"}}
        weights = run(inputs(50, spread=spread), {"alpha": 2.0, "length": 40}, **call).extras["weights"]
        silent = (weights == 0).all(-1)
        fell, seen = seen & silent, seen | ~silent
        dead, chosen = found.measure(weights)
        for share, expected in ((dead, ~seen), (chosen, fell)):
            close(share, torch.stack([expected[:, h][valid].float().mean() for h in range(2)]), 1e-6)
        if spread == 0.1:
            assert (chosen == 0).all() and (dead > 0.1).all()
    assert (chosen > 0).all()
    refused("the same batch", found.measure, weights[:, :, 1:])


def test_masked_keys_have_weight_exactly_zero():
    bias = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    bias[..., 2] = -torch.inf
    bias[..., 4, :] = -torch.inf
    found = run(inputs(6), {"gamma": -0.01, "zeta": 1.2}, mask=Mask(bias=bias), want={"weights"})
    assert (found.extras["weights"][..., 2] == 0).all() and (found.output[:, :, 4] == 0).all()


def test_dropout_comes_after_the_clip():
    m = 400
    tensors = {"q": torch.zeros(1, 1, 1, 4), "k": torch.zeros(1, 1, m, 4), "v": torch.eye(m)[None, None]}
    output = run(tensors, {"gamma": -0.5 / m}, pattern="noncausal-cross", dropout=0.25).output
    kept = output[output != 0]
    weight = (1 + 0.5 / m) / m - 0.5 / m
    torch.testing.assert_close(kept, torch.full_like(kept, weight / 0.75))
    assert abs(kept.numel() / m - 0.75) < 0.1


def test_gamma_follows_the_training_length_and_the_warm_up():
    assert Config(length=128).stretch() == (-0.025, 1.0)
    assert Config(alpha=12, length=512, zeta=1.01).stretch() == (-12 / 512, 1.01)
    warming = Config(gamma=-0.04, warmup=100)
    assert [warming.stretch(p)[0] for p in (0, 25, 100, 900, None)] == [0, -0.01, -0.04, -0.04, -0.04]
    layer = create_layer("clipped_softmax", 8, 2, gamma=-0.3, warmup=10).double()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    begun = layer(x, context=Context(progress=0.0)).output
    plain = create_layer("softmax", 8, 2).double()
    plain.load_state_dict(layer.state_dict())
    close(begun, plain(x).output)
    assert not torch.allclose(layer(x).output, begun)
    close(layer(x, context=Context(progress=10.0)).output, layer(x).output)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("clipped_softmax_padded", "noncausal-self"), ("clipped_softmax_causal", "causal-self")],
)
def test_parity_with_the_authors_layer(name, pattern):
    arrays = load(name)
    config = {"gamma": float(arrays["gamma"]), "zeta": float(arrays["zeta"])}
    layer = create_layer("clipped_softmax", 16, 2, pattern=pattern, bias=True, **config).double()
    inside = [f"{part}.{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")]
    weights = {name: arrays[f"weight_{name.replace('.', '_')}"] for name in inside}
    layer.load_state_dict(weights | {"output.weight": torch.eye(16), "output.bias": torch.zeros(16)})
    x, mask = arrays["x"].requires_grad_(), None
    if "mask" in arrays:  # the authors' code masks only padded keys
        bias = torch.zeros(2, 1, 1, 14, dtype=torch.float64)
        mask = Mask(bias=bias.masked_fill(~arrays["mask"][:, None, None], -torch.inf))
    result = layer(x, context=Context(mask=mask, want=frozenset({"weights"})))
    close(result.extras["weights"], arrays["attn"])  # observed 3e-16
    check_recorded(arrays | {"out": arrays["core_out"]}, result.output, {"x": x})  # observed 4e-16
