"""What is peculiar to complex rotary attention: parity with the authors' layer, its factorised form, what it is at special
angles, its phase near zero and at the negative real axis, and the layer's start."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import absorb, apply
from regard.contract import ALL_PATTERNS, Context, Mask, Shape, Unsupported
from regard.create import create_layer
from regard.functional import softmax_attention
from regard.mechanisms import complex_rotary as module
from regard.mechanisms.complex_rotary import MECHANISM, Config, cost, phase_of
from regard.positions import Rotary
from regard.training.optimizer import parameter_groups

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
ROTARY = Config(score_scale="rsqrt")
NO_POSITION = Config(position="none")


def inputs(n: int, m: int | None = None, groups: int = 2, width: int = 8) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes = {
        "q": (2, 2, n, width),
        "k": (2, groups, m, width),
        "v": (2, groups, m, 3),
        "angle_scale": (groups, width // 2),
        "phase": (2, width // 2),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def run(tensors: dict[str, Tensor], pattern: str = "causal-self", config: Config | None = None, **call: Any) -> Any:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config() if config is None else config, **call)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def pairwise(tensors: dict[str, Tensor], first: int = 0, base: float = 1e4, position: bool = True) -> Tensor:
    """S, one pair at a time, as the real part of a sum of products of complex powers; query m has the rank first + m."""
    q, k, _, delta, b = tensors.values()
    heads, f = q.shape[1], q.shape[-1] // 2
    k, delta = (x.repeat_interleave(heads // x.shape[axis], axis) for x, axis in ((k, 1), (delta, 0)))
    scores = torch.empty(2, heads, q.shape[2], k.shape[2], dtype=torch.float64)
    for m in range(q.shape[2]):
        for n in range(k.shape[2]):
            x, y = (torch.complex(u[..., :f], u[..., f:]) for u in (q[:, :, m], k[:, :, n]))
            turn = (first + m - n) * base ** (-2 * torch.arange(f).double() / (2 * f)) * position
            angle = delta * (torch.angle(x) - torch.angle(y)) + b + turn
            scores[:, :, m, n] = (x.abs() * y.abs() * torch.exp(1j * angle)).real.sum(-1)
    return scores


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("config", [Config(base=50.0), Config(position="none", score_scale="rsqrt")])
def test_the_factorised_form_equals_cosines_of_pairs(config, groups, pattern):
    tensors = inputs(9, 9 if pattern == "noncausal-self" else 13, groups)
    first = 4 if pattern == "causal-self" else 0
    scores = pairwise(tensors, first, config.base, config.position != "none")
    scores = scores * (8**-0.5 if config.score_scale == "rsqrt" else 1)
    if pattern == "causal-self":
        scores = scores.masked_fill(~torch.ones(9, 13).tril(4).bool(), -torch.inf)
    values = tensors["v"].repeat_interleave(2 // groups, 1)
    expected = scores.softmax(-1) @ values
    for form in ("parallel", "reference"):
        close(run(tensors, pattern, config, form=form).output, expected, 1e-7)  # 1e-9 inside the magnitudes
    close(run(tensors, pattern, config).output, run(tensors, pattern, config, form="reference").output)


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
    """A recording, and a layer with its weights."""
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        fixture = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    layer = create_layer("complex_rotary", 16, 2, pattern="causal-self").double()
    layer.load_state_dict({own: fixture[theirs] for own, theirs in NAMES.items()})
    return fixture, layer


@pytest.mark.parametrize(("slope", "tolerance"), [(phase_of, 1e-7), (torch.atan2, 1e-12)])
def test_a_layer_equals_the_authors_under_a_causal_mask_with_gradients(slope, tolerance, monkeypatch) -> None:
    """The slope of a phase has 1e-9 here; with theirs, gradients are equal too."""
    monkeypatch.setattr(module, "phase_of", slope)
    fixture, layer = recorded("complex_rotary_causal")
    x = fixture["x"].requires_grad_()
    result = layer(x, context=Context(want=frozenset({"weights"})))
    close(result.output, fixture["out"])
    close(result.extras["weights"], fixture["attn"])
    result.output.backward(fixture["grad_out"])
    close(x.grad, fixture["grad_x"], tolerance)
    for own, parameter in layer.named_parameters():
        close(parameter.grad, fixture["grad_" + NAMES[own].removeprefix("weight_")], tolerance)


def test_a_layer_decodes_as_the_authors_do_from_a_cache() -> None:
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
    tensors = inputs(11, 11 if pattern.cross is False else 14)
    q, k, v = (tensors[name] for name in "qkv")
    scheme = Rotary(head_dim=8)
    turned = (scheme.rotate(x, torch.arange(x.shape[2])[None]) for x in (q, k))
    expected = softmax_attention(*turned, v, pattern=pattern)
    ones = {"angle_scale": torch.ones(2, 4, dtype=torch.float64), "phase": torch.zeros(2, 4, dtype=torch.float64)}
    close(run(tensors | ones, pattern, ROTARY).output, expected, 1e-7)
    alone = {name: tensors[name] for name in "qkv"}
    close(run(alone, pattern, ROTARY).output, expected)
    plain = softmax_attention(q, k, v, pattern=pattern, scale=1.0)
    close(run(alone, pattern, NO_POSITION).output, plain)
    close(run(tensors | ones, pattern, NO_POSITION).output, plain, 1e-7)


def weights(tensors: dict[str, Tensor], config: Config | None = None) -> Tensor:
    return run(tensors, "noncausal-self", config, want={"weights"}).extras["weights"]


def test_delta_of_zero_sees_magnitudes_alone():
    tensors = inputs(10)
    zeros = {"angle_scale": torch.zeros(2, 4, dtype=torch.float64), "phase": torch.zeros(2, 4, dtype=torch.float64)}
    turned = {}
    for name in "qk":
        turn = torch.polar(torch.ones(2, 2, 10, 4, dtype=torch.float64), torch.randn(2, 2, 10, 4, dtype=torch.float64))
        z = torch.complex(*tensors[name].chunk(2, -1)) * turn
        turned[name] = torch.cat([z.real, z.imag], -1)
    close(weights(tensors | turned | zeros), weights(tensors | zeros))
    assert (weights(tensors | turned) - weights(tensors)).abs().max() > 1e-2
    magnitudes = [torch.complex(*tensors[name].chunk(2, -1)).abs() for name in "qk"]
    close(weights(tensors | zeros, NO_POSITION), (magnitudes[0] @ magnitudes[1].mT).softmax(-1), 1e-7)


def test_a_phase_of_a_turn_changes_nothing_and_of_half_a_turn_the_sign():
    tensors = inputs(8)
    turned = tensors | {"phase": tensors["phase"] + 2 * math.pi}
    close(weights(turned), weights(tensors))
    scores = [weights(t).log() for t in (tensors, tensors | {"phase": tensors["phase"] + math.pi})]
    centred = [s - s.mean(-1, keepdim=True) for s in scores]
    close(centred[0], -centred[1], 1e-9)


def test_scores_depend_on_the_difference_of_positions_alone():
    tensors = inputs(20)
    hidden = torch.zeros(1, 1, 20, 20, dtype=torch.float64)
    hidden[..., :7] = -torch.inf
    later = run(tensors, mask=Mask(bias=hidden)).output[:, :, 7:]
    cut = {name: x[:, :, 7:] if name in "qkv" else x for name, x in tensors.items()}
    close(later, run(cut).output)


def test_learned_frequencies_start_as_the_fixed_ones_and_far_positions_stay_exact():
    tensors = inputs(9)
    g = 1e4 ** (-torch.arange(4, dtype=torch.float64) / 4)
    learned = tensors | {"frequencies": g.expand(2, -1).clone().requires_grad_()}
    found = run(learned, config=Config(position="learned")).output
    close(found, run(tensors).output)
    (gradient,) = torch.autograd.grad(found.square().sum(), learned["frequencies"])
    assert (gradient != 0).all()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
        far = {name: x.detach().to(dtype) for name, x in learned.items()}
        exact = {name: x.double() for name, x in far.items()}
        for config in (Config(position="learned", score_scale="rsqrt"), ROTARY):
            names = [name for name in far if name != "frequencies" or config.position == "learned"]
            memory = torch.zeros(2, 2, 20_000, 8)
            memory[:, :, -9:], values = far["k"], torch.zeros(2, 2, 20_000, 3)
            values[:, :, -9:] = far["v"]
            outputs = []
            for given in (far, exact):
                whole = {name: given[name] for name in names} | {"k": memory.to(given["k"]), "v": values.to(given["v"])}
                bias = torch.full((1, 1, 1, 20_000), -torch.inf).to(given["q"])
                bias[..., -9:] = 0
                outputs.append(run(whole, config=config, mask=Mask(bias=bias)).output.double())
            assert (outputs[0] - outputs[1]).abs().max() < tolerance * outputs[1].abs().max()


# the phase


def test_gradients_are_exact_away_from_zero_and_the_negative_axis():
    tensors = {name: x[:1, :, :4].clone() if name in "qkv" else x for name, x in inputs(4, width=4).items()}
    tensors["frequencies"] = torch.rand(2, 2, dtype=torch.float64)
    for name in "qk":
        real, imaginary = tensors[name].chunk(2, -1)
        tensors[name] = torch.cat([real.abs() + 0.1, imaginary], -1)
    leaves = [x.requires_grad_() for x in tensors.values()]

    def function(*given: Tensor) -> Tensor:
        return run(dict(zip(tensors, given, strict=True)), config=Config(position="learned")).output

    assert torch.autograd.gradcheck(function, leaves, atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-20, 1e-12, 1e-8, 1e-5, 1e-3])
def test_gradients_stay_bounded_for_vanishing_queries_and_keys(size):
    tensors = inputs(6)
    tensors |= {name: size * tensors[name] for name in "qk"}
    leaves = {name: x.float().requires_grad_() for name, x in tensors.items()}
    for config in (None, NO_POSITION):
        found = torch.autograd.grad(run(leaves, config=config).output.sum(), list(leaves.values()))
        for gradient in found:
            assert gradient.isfinite().all()
            assert gradient.abs().max() < 100  # atan2's own would be the delta over the size


def test_the_slope_of_a_phase_is_that_of_its_magnitude():
    u = torch.tensor([3e-5, -2e-5], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(phase_of(u[1], u[0]), u)
    close(slope, torch.tensor([2e-5, 3e-5], dtype=torch.float64) / (1.3e-9 + 1e-9))


@pytest.mark.parametrize("delta", [1.0, 2.0, -3.0, 0.5, 1.3])
def test_only_whole_deltas_are_continuous_across_the_negative_axis(delta):
    tensors = inputs(5)
    tensors["angle_scale"] = torch.full((2, 4), delta, dtype=torch.float64)
    sides = []
    for sign in (1, -1):
        moved = tensors["q"].clone()
        moved[..., 0], moved[..., 4] = -1.5, sign * 1e-13
        sides.append(pairwise(tensors | {"q": moved}))
        shown = weights(tensors | {"q": moved})
        close(shown, sides[-1].softmax(-1), 1e-7)
    jump = (sides[0] - sides[1]).abs()
    magnitude = 1.5 * torch.complex(*tensors["k"].chunk(2, -1)).abs()[..., 0]
    most = 2 * magnitude * abs(math.sin(math.pi * delta))
    assert (jump <= most[:, :, None] + 1e-9).all()
    assert (jump.max() < 1e-9) == (delta == round(delta))


# state


def test_a_key_in_the_cache_is_turned_once_by_its_own_position():
    tensors = inputs(12)
    state = run(tensors, return_state=True).state
    again = run({name: x[:, :, :7] if name in "qkv" else x for name, x in tensors.items()}, return_state=True).state
    assert torch.equal(again.k, state.k[:, :, :7])
    numbers = state.k[:1].numel() + state.v[:1].numel()
    assert numbers == cost(Shape(1, 2, 1, 12, 8, 3), Config()).state
    half = run({name: x.bfloat16() for name, x in tensors.items()}, return_state=True).state
    assert half.k.dtype == torch.float32 and half.v.dtype == torch.bfloat16


def test_queries_of_a_memory_are_counted_on_from_call_to_call():
    tensors = inputs(9, 14)
    whole = run(tensors, "causal-cross").output
    state = None
    for part in torch.arange(14).split([3, 11]):
        piece = {
            name: x[:, :, part] if name in "kv" else x
            for name, x in tensors.items()
            if name in ("k", "v", "angle_scale")
        }
        state = absorb(MECHANISM, piece, pattern="causal-cross", state=state)
    outputs = []
    for part in torch.arange(9).split([1, 1, 5, 2]):
        queries = {name: tensors[name] for name in ("angle_scale", "phase")} | {"q": tensors["q"][:, :, part]}
        result = run(queries, "causal-cross", state=state)
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 2), whole)


def test_masked_keys_have_weight_zero():
    tensors, lengths = inputs(8), torch.tensor([8, 3])
    found = run(tensors, "noncausal-self", mask=Mask(lengths=lengths), want={"weights"}).extras["weights"]
    assert (found[1, :, :3, 3:] == 0).all() and (found[0] > 0).all()


# the layer


def test_a_layer_has_two_numbers_for_each_head_and_plane():
    def parameters(**options: Any) -> int:
        return sum(p.numel() for p in create_layer("complex_rotary", 32, 4, **options).parameters())

    assert parameters() == 4 * 32 * 32 + 32
    assert parameters(per_head=False) == 4 * 32 * 32 + 8
    assert parameters(learn_phase=False) == 4 * 32 * 32 + 16
    assert parameters(position="learned") == 4 * 32 * 32 + 48
    assert parameters(num_kv_heads=2) == 3 * 32 * 32 + 8 + 16


def test_a_layer_started_at_one_is_the_rotary_layer_and_others_start_as_they_say():
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    for position in ("rotary", "learned"):
        for kv_heads in (4, 2):
            made = create_layer(
                "complex_rotary", 32, 4, delta="ones", score_scale="rsqrt", position=position, num_kv_heads=kv_heads
            ).double()
            rotary = create_layer("softmax", 32, 4, positions="rotary", num_kv_heads=kv_heads).double()
            made.load_state_dict(rotary.state_dict(), strict=False)
            close(made(x).output, rotary(x).output, 1e-6)
    wide = create_layer("complex_rotary", 8, 2, head_dim=4000)
    assert wide.projection.delta.std().item() == pytest.approx(2000**-0.5, rel=0.1)
    assert not wide.projection.phase.any()
    assert not create_layer("complex_rotary", 32, 4, delta="zeros").projection.delta.any()


def test_weight_decay_leaves_angles_alone():
    layer = create_layer("complex_rotary", 32, 4, position="learned")
    decayed, kept = parameter_groups(layer, 0.1)
    angles = {id(p) for p in layer.projection.parameters()}
    assert angles == {id(p) for p in kept["params"]} and len(decayed["params"]) == 4


@pytest.mark.parametrize(
    "options",
    [{"position": "alibi"}, {"base": 1.0}, {"base": math.inf}, {"score_scale": "sqrt"}, {"delta": "random"}],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


def test_calls_that_cannot_be_honoured_are_refused():
    tensors = inputs(4)
    with pytest.raises(Unsupported, match="an even number"):
        run({name: torch.randn(1, 2, 4, 7) for name in "qkv"})
    with pytest.raises(Unsupported, match="4: one for each pair"):
        run(tensors | {name: torch.ones(2, 8, dtype=torch.float64) for name in ("angle_scale", "phase")})
    with pytest.raises(Unsupported, match="head_dim=6"):
        create_layer("complex_rotary", 10, 2)
    with pytest.raises(Unsupported, match="rotary positions"):
        create_layer("complex_rotary", 16, 2, positions="rotary")
