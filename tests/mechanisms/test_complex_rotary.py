"""Tests specific to complex rotary attention: parity with the authors' layer, its factorised form, special angles, its
phase near zero and at the negative real axis, and the layer's initial state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import calls, check_recorded, close, cut, load, qkv, refused
from torch import Tensor

from regard.contract import ALL_PATTERNS, Context, Mask, Shape, Unsupported
from regard.create import create_layer
from regard.functional import softmax_attention
from regard.mechanisms import complex_rotary as module
from regard.mechanisms.complex_rotary import MECHANISM, Config, cost, phase_of
from regard.positions import Rotary
from regard.training.optimizer import parameter_groups

ROTARY = {"score_scale": "rsqrt"}
NO_POSITION = {"position": "none"}

run = calls(MECHANISM)


def inputs(n: int, m: int | None = None, groups: int = 2) -> dict[str, Tensor]:
    angles = {"angle_scale": (groups, 4), "phase": (2, 4)}
    random = {name: torch.randn(shape, dtype=torch.float64) for name, shape in angles.items()}
    return qkv(n, m, groups=groups, dim=8, value_dim=3) | random


def angles(scale: float) -> dict[str, Tensor]:
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    return {"angle_scale": zeros + scale, "phase": zeros}


def as_complex(x: Tensor) -> Tensor:
    return torch.complex(*x.chunk(2, -1))


def weights(tensors: dict[str, Tensor], options: dict | None = None) -> Tensor:
    return run(tensors, options, pattern="noncausal-self", want={"weights"}).extras["weights"]


def pairwise(tensors: dict[str, Tensor], first: int = 0, base: float = 1e4, position: bool = True) -> Tensor:
    """Scores S as the real part of a sum of products of complex powers; query m has the rank first + m."""
    q, k, _, delta, b = tensors.values()
    heads, f = q.shape[1], q.shape[-1] // 2
    k, delta = (x.repeat_interleave(heads // x.shape[axis], axis) for x, axis in ((k, 1), (delta, 0)))
    x, y = as_complex(q)[:, :, :, None], as_complex(k)[:, :, None]
    distance = first + torch.arange(q.shape[2])[:, None, None] - torch.arange(k.shape[2])[:, None]
    turn = distance * base ** (-2 * torch.arange(f).double() / (2 * f)) * position
    angle = delta[:, None, None] * (x.angle() - y.angle()) + b[:, None, None] + turn
    return (x.abs() * y.abs() * torch.exp(1j * angle)).real.sum(-1)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", [{"base": 50.0}, {"position": "none", "score_scale": "rsqrt"}])
def test_the_factorised_form_equals_cosines_of_pairs(options, groups, pattern):
    tensors = inputs(9, 9 if pattern == "noncausal-self" else 13, groups)
    first = 4 if pattern == "causal-self" else 0
    scores = pairwise(tensors, first, options.get("base", 1e4), "position" not in options)
    scores = scores * (8**-0.5 if "score_scale" in options else 1)
    if pattern == "causal-self":
        scores = scores.masked_fill(~torch.ones(9, 13).tril(4).bool(), -torch.inf)
    expected = scores.softmax(-1) @ tensors["v"].repeat_interleave(2 // groups, 1)
    for form in ("parallel", "reference"):
        # the magnitudes contain a 1e-9
        close(run(tensors, options, pattern=pattern, form=form).output, expected, 1e-7)


# parity

NAMES = {
    "query.weight": "weight_W_q",
    "key.weight": "weight_W_k",
    "value.weight": "weight_W_v",
    "output.weight": "weight_W_o",
    "projection.delta": "delta",
    "projection.phase": "b",
}


def recorded(name: str) -> tuple[dict[str, Tensor], Any]:
    """A recording and a layer with its weights."""
    fixture = load(name)
    layer = create_layer("complex_rotary", 16, 2, pattern="causal-self").double()
    layer.load_state_dict({own: fixture[theirs] for own, theirs in NAMES.items()})
    return fixture, layer


@pytest.mark.parametrize(("slope", "tolerance"), [(phase_of, 1e-7), (torch.atan2, 1e-12)])
def test_a_layer_equals_the_authors_under_a_causal_mask_with_gradients(slope, tolerance, monkeypatch):
    """The derivative of a phase has a 1e-9 here; with the authors' derivative, gradients are equal too."""
    monkeypatch.setattr(module, "phase_of", slope)
    fixture, layer = recorded("complex_rotary_causal")
    x = fixture["x"].requires_grad_()
    result = layer(x, context=Context(want=frozenset({"weights"})))
    close(result.output, fixture["out"])
    close(result.extras["weights"], fixture["attn"])
    weights = {NAMES[own].removeprefix("weight_"): parameter for own, parameter in layer.named_parameters()}
    check_recorded(fixture, result.output, {"x": x} | weights, tolerance)


def test_a_layer_decodes_as_the_authors_do_from_a_cache():
    fixture, layer = recorded("complex_rotary_cached")
    x = fixture["x"]
    result = layer(x[:, :7], context=Context(want=frozenset({"state"})))
    close(result.output, fixture["out_prefill"])
    state = result.state
    for t in (7, 8):
        output, state = layer.step(x[:, t], state)
        close(output, fixture["out_steps"][:, t - 7])


# special angles


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_delta_of_one_is_rotary_attention(pattern):
    tensors = inputs(11, 14 if pattern.cross else 11)
    alone = {name: tensors[name] for name in "qkv"}
    q, k, v = alone.values()
    turned = (Rotary(head_dim=8).rotate(x, torch.arange(x.shape[2])[None]) for x in (q, k))
    rotary = softmax_attention(*turned, v, pattern=pattern)
    plain = softmax_attention(q, k, v, pattern=pattern, scale=1.0)
    for options, expected in ((ROTARY, rotary), (NO_POSITION, plain)):
        close(run(alone | angles(1), options, pattern=pattern).output, expected, 1e-7)
        close(run(alone, options, pattern=pattern).output, expected)


def test_delta_of_zero_without_positions_compares_magnitudes():
    tensors = inputs(10)
    q, k = (as_complex(tensors[name]).abs() for name in "qk")
    close(weights(tensors | angles(0), NO_POSITION), (q @ k.mT).softmax(-1), 1e-7)


def test_a_phase_of_a_turn_changes_nothing_and_of_half_a_turn_the_sign():
    tensors = inputs(8)
    whole, half = (tensors | {"phase": tensors["phase"] + turn * math.pi} for turn in (2, 1))
    close(weights(whole), weights(tensors))
    scores = [weights(t).log() for t in (tensors, half)]
    centred = [s - s.mean(-1, keepdim=True) for s in scores]
    close(centred[0], -centred[1], 1e-10)


# frequencies


def test_learned_frequencies_start_as_the_fixed_ones():
    tensors = inputs(9)
    g = (1e4 ** (-torch.arange(4, dtype=torch.float64) / 4)).expand(2, -1).clone().requires_grad_()
    found = run(tensors | {"frequencies": g}, {"position": "learned"}).output
    close(found, run(tensors).output)
    (gradient,) = torch.autograd.grad(found.square().sum(), g)
    assert (gradient != 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_far_positions_stay_exact(position, dtype, tolerance):
    """Nine queries attend to the last nine of 20,000 keys."""
    tensors = {name: x.to(dtype) for name, x in inputs(9, 20_000).items()}
    if position == "learned":
        tensors["frequencies"] = (1e4 ** (-torch.arange(4) / 4)).expand(2, -1).to(dtype)
    bias = torch.full((1, 1, 1, 20_000), -torch.inf, dtype=dtype)
    bias[..., -9:] = 0
    exact = {name: x.double() for name, x in tensors.items()}
    found, expected = (
        run(given, {"position": position, **ROTARY}, mask=Mask(bias=bias.to(given["q"]))).output.double()
        for given in (tensors, exact)
    )
    close(found, expected, tolerance)


# the phase


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-20, 1e-12, 1e-8, 1e-5, 1e-3])
def test_gradients_stay_bounded_for_vanishing_queries_and_keys(size):
    tensors = inputs(6)
    tensors |= {name: size * tensors[name] for name in "qk"}
    leaves = {name: x.float().requires_grad_() for name, x in tensors.items()}
    for options in ({}, NO_POSITION):
        for gradient in torch.autograd.grad(run(leaves, options).output.sum(), list(leaves.values())):
            assert gradient.isfinite().all()
            assert gradient.abs().max() < 100  # atan2's gradient would be delta / size


def test_the_slope_of_a_phase_is_that_of_its_magnitude():
    u = torch.tensor([3e-5, -2e-5], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(phase_of(u[1], u[0]), u)
    close(slope, torch.tensor([2e-5, 3e-5], dtype=torch.float64) / (1.3e-9 + 1e-9))


@pytest.mark.parametrize("delta", [1.0, 2.0, -3.0, 0.5, 1.3])
def test_only_whole_deltas_are_continuous_across_the_negative_axis(delta):
    tensors = inputs(5) | {"angle_scale": torch.full((2, 4), delta, dtype=torch.float64)}
    tensors["q"][..., 0] = -1.5
    sides = []
    for sign in (1, -1):
        tensors["q"][..., 4] = sign * 1e-13
        sides.append(pairwise(tensors))
        close(weights(tensors), sides[-1].softmax(-1), 1e-7)
    jump = (sides[0] - sides[1]).abs()
    most = 3 * as_complex(tensors["k"]).abs()[..., 0] * abs(math.sin(math.pi * delta))
    assert (jump <= most[:, :, None] + 1e-9).all()
    assert (jump.max() < 1e-9) == (delta == round(delta))


# state and layer


def test_a_key_in_the_cache_is_turned_once_by_its_own_position():
    tensors = inputs(12)
    state = run(tensors, return_state=True).state
    assert torch.equal(run(cut(tensors, slice(7)), return_state=True).state.k, state.k[:, :, :7])
    assert state.k[:1].numel() + state.v[:1].numel() == cost(Shape(1, 2, 1, 12, 8, 3), Config()).state
    half = run({name: x.bfloat16() for name, x in tensors.items()}, return_state=True).state
    assert half.k.dtype == torch.float32 and half.v.dtype == torch.bfloat16


@pytest.mark.parametrize("position", ["rotary", "learned"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_layer_started_at_one_is_the_rotary_layer(position, kv_heads):
    options = {"delta": "ones", "position": position, "num_kv_heads": kv_heads, **ROTARY}
    made = create_layer("complex_rotary", 32, 4, **options).double()
    rotary = create_layer("softmax", 32, 4, positions="rotary", num_kv_heads=kv_heads).double()
    made.load_state_dict(rotary.state_dict(), strict=False)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    close(made(x).output, rotary(x).output, 1e-6)


def test_other_layers_start_as_they_say():
    wide = create_layer("complex_rotary", 8, 2, head_dim=4000)
    assert wide.projection.delta.std().item() == pytest.approx(2000**-0.5, rel=0.1)
    assert not wide.projection.phase.any()
    assert not create_layer("complex_rotary", 32, 4, delta="zeros").projection.delta.any()


def test_weight_decay_leaves_angles_alone():
    layer = create_layer("complex_rotary", 32, 4, position="learned")
    decayed, kept = parameter_groups(layer, 0.1)
    own = {id(p) for p in layer.projection.parameters()}
    assert own == {id(p) for p in kept["params"]} and len(decayed["params"]) == 4


def test_calls_that_cannot_be_honoured_are_refused():
    refused("an even number", run, qkv(4, dim=7))
    with pytest.raises(Unsupported, match="4: one for each pair"):
        run(inputs(4) | {name: torch.ones(2, 8, dtype=torch.float64) for name in ("angle_scale", "phase")})
    refused("head_dim=6", create_layer, "complex_rotary", 10, 2)
    refused("rotary positions", create_layer, "complex_rotary", 16, 2, positions="rotary")
