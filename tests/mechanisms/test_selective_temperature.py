"""Tests specific to selective temperature: positions from the start, terms, sharing, the effect of sharpness, and parity."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import calls, close, load, qkv, refused, shaken

from regard.apply import absorb
from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Context, LayerCall, Mask, Pattern
from regard.create import create_layer
from regard.mechanisms.selective_temperature import MECHANISM
from regard.training.optimizer import parameter_groups
from regard.workbench.verification.subjects import Subject

run, softmax = calls(MECHANISM), calls(get_mechanism("softmax"))
inputs = Subject(MECHANISM, Pattern.CAUSAL_SELF, {"k_temperature": "both"}).inputs
"""Makes inputs with every term."""


def make(pattern: str = "causal-self", dim: int = 8, heads: int = 2, **options):
    return create_layer("selective_temperature", dim, heads, pattern=pattern, **options).double()


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_softmax_attention_of_scaled_queries_keys_and_values_before_any_bias(pattern, groups):
    n, m = (9, 7) if pattern.cross else (9, 9)
    tensors, scaled = inputs(n, m, g=groups), {}
    call = {"pattern": pattern, "mask": Mask(bias=torch.randn(2, 2, n, m, dtype=torch.float64))}
    for name, length in {"q": n, "k": m, "v": m}.items():
        seen = torch.arange(1, n + 1) if pattern == "causal-self" else torch.full((length,), m)
        tau = 1 + tensors[f"{name}_token"] + tensors[f"{name}_slope"][:, None] * seen.double().log()
        assert (tau > 0).all()
        scaled[name] = tau[..., None] * tensors[name]
    expected = softmax(scaled, **call).output
    for form in ("reference", None):
        found = run(tensors, form=form, **call).output
        close(found, expected)
        if pattern == "causal-self":  # log 1 = 0: slopes do not affect the first token, which reads its own value
            own = (1 + tensors["v_token"][..., :1]) * tensors["v"][:, :, 0]
            close(found[:, :, 0], own.expand_as(found[:, :, 0]))


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_without_terms_it_is_softmax_bit_for_bit(pattern):
    tensors, call = qkv(9, 7 if pattern.cross else 9), {"pattern": pattern, "want": {"weights", "lse"}}
    found, expected = run(tensors, **call), softmax(tensors, **call)
    assert torch.equal(found.output, expected.output)
    for name in ("weights", "lse"):
        assert torch.equal(found.extras[name], expected.extras[name])


def test_constant_temperatures_of_queries_and_values_are_a_scale_and_a_factor():
    tensors, constant = qkv(8), torch.full((2, 2, 8), 0.6, dtype=torch.float64)
    close(run(tensors | {"q_token": constant}).output, softmax(tensors, scale=1.6 * 0.5).output)
    close(run(tensors | {"v_token": constant}).output, 1.6 * softmax(tensors).output)


def weight_of_the_marked_key(n: int, delta: float, slope: float) -> float:
    """The last query's weight for a key whose score is larger by delta than those of the other n - 1."""
    k = torch.zeros(1, 1, n, 1, dtype=torch.float64)
    k[:, :, n // 2] = delta
    tensors = {"q": torch.ones_like(k), "k": k, "v": torch.zeros_like(k), "q_slope": torch.tensor([slope]).double()}
    return float(run(tensors, scale=1.0, want={"weights"}).extras["weights"][0, 0, -1, n // 2])


@pytest.mark.parametrize("n", [4, 64, 512])
@pytest.mark.parametrize("delta", [0.0, 1.5])  # equal scores give equal weights
def test_a_marked_keys_weight_has_its_closed_form(n, delta):
    tau = 1 + 0.7 * math.log(n)
    assert weight_of_the_marked_key(n, delta, 0.7) == pytest.approx(1 / (1 + (n - 1) * math.exp(-delta * tau)))


def test_memory_with_terms_for_a_part_of_it_is_refused():
    tensors, call = inputs(7), {"pattern": "noncausal-cross"}
    state = absorb(MECHANISM, {name: tensors[name] for name in ("k", "v", "v_token")}, **call)
    refused("v_token", absorb, MECHANISM, {name: tensors[name] for name in "kv"}, state=state, **call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_scaled_tensors_in_float32_unless_they_are_to_be_rounded(dtype):
    tensors = inputs(40, dtype=dtype)
    expected = run({name: x.double() for name, x in tensors.items()}, form="reference").output
    errors = {}
    for rounded in (False, True):
        result = run(tensors, {"round_scaled": rounded}, return_state=True)
        assert result.output.dtype == dtype
        assert result.state.v.dtype == (dtype if rounded else torch.float32)
        errors[rounded] = float((result.output - expected).abs().max() / expected.abs().max())
    assert errors[False] < MECHANISM.tolerances[dtype] < 20 * errors[True]
    assert errors[False] < errors[True]


@pytest.mark.parametrize(
    ("options", "slope"),
    [
        ({}, 0.5),
        ({"position_start": -10.0}, 1 / (1 + math.exp(10))),
        ({"position_form": "double_exp"}, math.exp(-math.exp(2.0))),
        ({"position_form": "double_exp", "position_start": 1.5}, math.exp(-math.exp(1.5))),
        ({"position_form": "linear"}, 1e-5),
        ({"position_form": "linear", "position_start": 0.25}, 0.25),
    ],
)
def test_layers_start_with_the_stated_slope_and_no_token_terms(options, slope):
    layer, x = make(**options), torch.randn(2, 6, 8, dtype=torch.float64)
    found = layer.projection.inputs(qkv(6), LayerCall(x, x, Context()))
    assert set(found) == {"q", "k", "v", "q_token", "v_token", "q_slope", "v_slope"}
    for name in "qv":
        assert (found[f"{name}_token"] == 0).all()
        close(found[f"{name}_slope"], torch.full((2,), slope, dtype=torch.float64), 1e-6)
    layer(x).output.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.projection.parameters())
    assert any(layer.projection.alpha is p for p in parameter_groups(layer, 0.1)[-1]["params"])


def test_a_layer_that_starts_near_the_identity_is_its_softmax_layer():
    plain = create_layer("softmax", 8, 2, positions="rotary").double()
    layer = make(positions="rotary", position_start=-40.0)
    assert layer.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    close(layer(x).output, plain(x).output)


def test_token_terms_read_the_projected_heads_before_rotation_and_before_any_temperature():
    layer = shaken(make(positions="rotary"), 0.5)
    x, seen = torch.randn(1, 9, 8, dtype=torch.float64), {}
    layer.projection.register_forward_hook(lambda module, given, result: seen.update(result[0]))
    layer(x)
    for name, linear in (("q", layer.query), ("v", layer.value)):
        head = linear(x).unflatten(-1, (2, 4)).transpose(1, 2)
        close(seen[f"{name}_token"], (F.gelu(head) * layer.projection.weights[name][:, None]).sum(-1).tanh())


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("positions", [None, "rotary"])
def test_a_norm_of_queries_comes_before_the_temperature_and_does_not_cancel_it(norm, positions):
    options = {"query_key_norm": norm, "positions": positions}
    layer = shaken(make(**options, q_temperature="position", v_temperature="none"), 0.5)
    plain = create_layer("softmax", 8, 2, **options).double()
    plain.load_state_dict({name: x for name, x in layer.state_dict().items() if "projection" not in name})
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    found = layer(x).output
    assert ((found - plain(x).output)[:, 1:].abs().amax(-1) > 1e-6).all()
    tau = 1 + layer.projection.alpha.sigmoid()[:, None] * torch.arange(1, 10, dtype=torch.float64).log()
    plain.query_norm.register_forward_hook(lambda module, given, normed: tau[..., None] * normed)
    close(found, plain(x).output)


@pytest.mark.parametrize("options", MECHANISM.variants.values(), ids=MECHANISM.variants)
def test_gradients_of_a_layers_own_parameters_are_those_of_differences(options):
    layer = shaken(make(**{"position_start": 1.0, **options}), 0.3)
    names, values = zip(*layer.projection.named_parameters(prefix="projection"), strict=True)
    x = torch.randn(1, 6, 8, dtype=torch.float64)

    def output(*given):
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,)).output

    assert torch.autograd.gradcheck(output, values)


def test_a_group_of_heads_shares_the_mean_of_its_alphas():
    layer = make(heads=4, num_kv_heads=2)
    layer.projection.alpha.data.copy_(torch.tensor([1.0, 3.0, -2.0, 0.0]))
    found = layer.projection.inputs({}, LayerCall(None, None, Context()))
    close(found["q_slope"], torch.tensor([1.0, 3.0, -2.0, 0.0], dtype=torch.float64).sigmoid())
    close(found["v_slope"], torch.tensor([2.0, -1.0], dtype=torch.float64).sigmoid())


@pytest.mark.parametrize("name", ["rotary", "grouped", "gpt2"])
def test_parity_with_the_authors_position_term_for_queries(name):
    arrays = load(f"selective_temperature_{name}")
    layer = make(
        dim=16,
        heads=4 if name == "grouped" else 2,
        num_kv_heads=2,
        positions="rotary" if name == "rotary" else None,
        q_temperature="position",
        v_temperature="none",
        position_form="double_exp",
        position_granularity="layer",
    )
    weights = {f"{part}.weight": arrays[f"weight_{part}"] for part in ("query", "key", "value", "output")}
    layer.load_state_dict(weights | {"projection.alpha": arrays["beta"][None]})
    x = arrays["x"].requires_grad_()
    output = layer(x).output
    close(output, arrays["out"])
    gradients = torch.autograd.grad(output, [x, layer.projection.alpha], arrays["grad_out"])
    close(gradients[0], arrays["grad_x"])
    close(gradients[1][0], arrays["grad_beta"])
