"""Tests specific to gated linear attention: its special cases, strong gates, its layer, and recorded official outputs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import calls, close, cut, in_pieces, load, refused
from torch import Tensor

from regard.apply import absorb
from regard.contract import Context, LayerCall
from regard.create import create_layer
from regard.engines.recurrent_forms import MatrixState
from regard.functional import gated_linear_attention, mamba2
from regard.mechanisms.gated_linear import MECHANISM, Config, sample_inputs

run = calls(MECHANISM)
NAMES = ("q", "k", "v", "log_decay")


def inputs(n: int, batch: int = 2, **sizes: int) -> dict[str, Tensor]:
    """Inputs with a gate for each key feature (8, or `k`); values have 6 features, or `v`."""
    call = {"batch": batch, "n": n, "m": n, "dtype": torch.float64, "config": Config(), "sizes": sizes}
    return sample_inputs(torch.default_generator, **call)


def ungated(n: int) -> dict[str, Tensor]:
    return {name: x for name, x in inputs(n).items() if name != "log_decay"}


def gates_of(layer, x: Tensor) -> Tensor | None:
    heads = {"k": torch.zeros(len(x), 4, x.shape[1], 8, dtype=x.dtype)}
    return layer.projection.inputs(heads, LayerCall(x, x, Context())).get("log_decay")


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize(("feature_map", "phi"), [("identity", lambda x: x), ("elu", lambda x: F.elu(x) + 1)])
def test_without_decay_it_is_cumulative_linear_attention_of_features_that_are_scaled_once(feature_map, phi, scale):
    tensors, call = ungated(17), {"options": {"feature_map": feature_map}, "scale": scale}
    q, k, v = tensors.values()
    expected = (phi(q) @ phi(k).mT * (scale or 8**-0.5)).tril() @ v
    close(run(tensors, **call).output, expected)
    close(run({**tensors, "log_decay": torch.zeros_like(k)}, **call).output, expected)


def test_a_constant_scalar_gate_is_retention():
    tensors, gamma = ungated(17), 0.83
    q, k, v = tensors.values()
    age = (torch.arange(17)[:, None] - torch.arange(17)).double()
    expected = ((q @ k.mT * 8**-0.5).tril() * gamma ** age.clamp(min=0)) @ v
    log_decay = torch.full_like(k[..., :1], math.log(gamma))
    close(run({**tensors, "log_decay": log_decay}).output, expected)
    close(run({**tensors, "log_decay": log_decay.expand_as(k)}).output, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_an_infinite_gate_starts_a_new_sequence_with_finite_gradients(dtype, tolerance):
    tensors = {name: x.to(dtype) for name, x in inputs(40).items()}
    tensors["log_decay"][:, :, 13] = -math.inf
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    whole = run(leaves, chunk_size=16).output
    close(whole[:, :, 13:], run(cut(tensors, slice(13, None), NAMES)).output, tolerance)
    whole.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves.values())
    assert (leaves["log_decay"].grad[:, :, 13] == 0).all()


def test_strong_gates_keep_float32_precise():
    """Differences of cumulative sums would give errors of 1e-5; 8e-8 was observed."""
    tensors = inputs(200)
    g = tensors["log_decay"]
    tensors["log_decay"] = torch.where(torch.rand(g.shape) < 0.3, -50.0, g)
    single = {name: x.float() for name, x in tensors.items()}
    expected = run({name: x.double() for name, x in single.items()}, form="reference").output
    close(run(single).output.double(), expected, 2e-6)


def test_gradient_of_gates_is_a_reverse_cumulative_sum():
    tensors = {name: x.requires_grad_() for name, x in inputs(33).items()}
    output = run(tensors, chunk_size=8).output
    (output * torch.randn_like(output)).sum().backward()
    q, k, g = tensors["q"], tensors["k"], tensors["log_decay"]
    difference = (q * q.grad - k * k.grad).detach()
    close(g.grad, difference.flip(2).cumsum(2).flip(2), 1e-11)


def test_noncausal_counts_a_token_once_and_reads_backwards_before_the_write():
    tensors = inputs(9)
    flipped = {name: x.flip(2) for name, x in tensors.items()}
    own = 8**-0.5 * (tensors["q"] * tensors["k"]).sum(-1, keepdim=True) * tensors["v"]
    expected = run(tensors).output + run(flipped).output.flip(2) - own
    close(run(tensors, pattern="noncausal-self").output, expected)


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-cross"])
def test_the_order_of_tokens_matters_where_they_have_gates(pattern):
    tensors, order = inputs(9), torch.tensor([2, 0, 1, 3, 4, 5, 6, 7, 8])
    permuted = cut(tensors, order, ("k", "v", "log_decay"))
    found, other = (run(x, pattern=pattern).output[:, :, 8] for x in (tensors, permuted))
    assert (found - other).abs().max() > 1e-3
    del tensors["log_decay"], permuted["log_decay"]
    close(run(tensors, pattern=pattern).output[:, :, 8], run(permuted, pattern=pattern).output[:, :, 8])


def test_a_gate_of_steps_is_the_recurrence_of_mamba2_and_begins_with_a_long_memory():
    layer = create_layer("gated_linear", 32, 4, gate="step").double()
    x, tensors = torch.randn(2, 11, 32, dtype=torch.float64), ungated(11)
    q, k, v = (y.repeat_interleave(2, 1) for y in tensors.values())
    made = layer.projection.inputs({"q": q, "k": k, "v": v}, LayerCall(x, x, Context()))
    step = F.softplus(layer.projection.step(x)).mT
    close(run(made).output, mamba2(q, k, v, step, -torch.ones(4, dtype=torch.float64), scale=8**-0.5))
    begun = F.softplus(layer.projection.step.bias.detach())
    assert begun.min() > 1e-3 * 0.99 and begun.max() < 0.1 * 1.01


def test_clamping_bounds_what_one_token_forgets():
    tensors = inputs(13)
    tensors["log_decay"][:, :, 3] = -math.inf
    clamped = {**tensors, "log_decay": tensors["log_decay"].clamp(min=-0.7)}
    close(run(tensors, {"clamp_min": -0.7}).output, run(clamped).output)


@pytest.mark.parametrize("pattern", ["causal-self", "causal-cross"])
def test_groups_of_queries_share_keys_and_gates(pattern):
    tensors = inputs(10) | {"value_log_decay": -torch.rand(2, 2, 10, 6, dtype=torch.float64)}
    queries = {"q": torch.randn(2, 6, 10, 8, dtype=torch.float64)}
    repeated = {name: x.repeat_interleave(3, 1) for name, x in tensors.items()} | queries
    expected = run(repeated, pattern=pattern, form="reference").output
    close(run(tensors | queries, pattern=pattern).output, expected)
    if pattern == "causal-cross":  # the memory does not determine how many heads will read it
        memory = {name: x for name, x in tensors.items() if name != "q"}
        state = absorb(MECHANISM, memory, pattern=pattern, heads=6)
        close(run(queries, pattern=pattern, state=state).output, expected)


def test_functions_take_the_gate_as_fourth_argument_and_refuse_another_width():
    tensors = inputs(6)
    close(gated_linear_attention(*tensors.values()), run(tensors).output)
    refused("log_decay with 4 features", run, {**tensors, "log_decay": tensors["log_decay"][..., :4]})


@pytest.mark.parametrize("name", ["gated_linear_recurrent", "gated_linear_initial_state", "gated_linear_strong_gates"])
@pytest.mark.parametrize("form", ["chunked", "step"])
def test_parity_with_recorded_official_outputs(name, form):
    recorded, call = load(name), {"form": form, "chunk_size": 8}
    tensors = {x: recorded[x].requires_grad_() for x in NAMES}
    start = recorded.get("initial_state", torch.zeros_like(recorded["state"])).requires_grad_()
    state, n = MatrixState(start, torch.zeros(2, dtype=torch.long)), tensors["q"].shape[2]
    parts = torch.arange(n).split(n if form == "chunked" else 1)
    output, state = in_pieces(lambda p, s: run(cut(tensors, p, NAMES), state=s, **call), parts, state)
    close(output, recorded["out"], 1e-10)  # observed 5e-16
    close(state.memory, recorded["state"], 1e-10)
    loss = (output * recorded["grad_out"]).sum()
    if "grad_state" in recorded:
        loss = loss + (state.memory * recorded["grad_state"]).sum()
    loss.backward()
    for x in NAMES:
        close(tensors[x].grad, recorded[f"grad_{x}"], 1e-10)  # observed 5e-16
    if "grad_initial_state" in recorded:
        # the official code keeps S_0 in float32, so this gradient was recorded rounded; observed 2e-8
        close(start.grad, recorded["grad_initial_state"], 2e-7)


def layer_of(**options):
    return create_layer("gla", 64, 4, **options).double()


def test_layer_has_half_width_keys_and_a_low_rank_gate_of_key_width():
    layer = layer_of()
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters()}
    assert shapes["query.weight"] == shapes["key.weight"] == (32, 64)
    assert shapes["value.weight"] == shapes["gate.weight"] == shapes["output.weight"] == (64, 64)
    assert shapes["output_norm.weight"] == (16,)
    gate = [shapes[f"projection.key_gate.{name}"] for name in ("0.weight", "1.weight", "1.bias")]
    assert gate == [(16, 64), (32, 16), (32,)]
    assert len(layer.convolutions) == 0 and layer.positions.name == "none"


def test_layer_equals_its_equations_written_out():
    layer, x = layer_of(), torch.randn(2, 11, 64, dtype=torch.float64)

    def heads(y):
        return y.unflatten(-1, (4, -1)).transpose(1, 2)

    down, up = layer.projection.key_gate
    log_decay = heads(F.logsigmoid(up(down(x))) / 16)
    o = run({"q": heads(layer.query(x)), "k": heads(layer.key(x)), "v": heads(layer.value(x)), "log_decay": log_decay})
    normed = o.output * torch.rsqrt(o.output.square().mean(-1, keepdim=True) + 1e-6)
    close(layer(x).output, layer.output(normed.transpose(1, 2).flatten(2) * F.silu(layer.gate(x))))


@pytest.mark.parametrize("tau", [1, 16, 32])
def test_normalizer_divides_the_log_sigmoid_so_that_decay_starts_near_a_root_of_one_half(tau):
    gate = gates_of(layer_of(gate_normalizer=tau), 0.1 * torch.randn(2, 9, 64, dtype=torch.float64))
    assert gate.shape == (2, 4, 9, 8)
    assert (gate.exp() - 2 ** (-1 / tau)).abs().max() < 0.2 / tau


def test_fixed_gates_are_those_of_retention_and_scalar_gates_are_one_a_head():
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    fixed = gates_of(layer_of(gate="fixed"), x)
    close(fixed[0, :, 0, 0].exp(), torch.tensor([1 - 2.0 ** -(5 + h) for h in range(4)], dtype=torch.float64))
    assert fixed.shape == gates_of(layer_of(gate="scalar"), x).shape
    assert gates_of(layer_of(gate="none"), x) is None


@pytest.mark.parametrize("gate", ["diagonal", "scalar", "fixed"])
def test_gates_stay_in_float32_in_a_bfloat16_layer(gate):
    log_decay = gates_of(layer_of(gate=gate).bfloat16(), torch.zeros(1, 3, 64, dtype=torch.bfloat16))
    assert log_decay.dtype == torch.float32
    if gate == "fixed":
        close(log_decay[0, :, 0, 0], torch.log1p(-(2.0 ** -torch.arange(5, 9))), 1e-7)


def test_layer_widths_that_do_not_divide_are_refused_with_the_nearest():
    refused("head_dim=1", create_layer, "gla", 12, 4)
    layer = create_layer("gla", 12, 4, head_dim=5)
    assert (layer.head_dim, layer.value_dim) == (5, 3)
    wide = create_layer("gla", 16, 4, key_expand=1.0, value_expand=2.0)
    assert wide(torch.randn(1, 3, 16)).output.shape == (1, 3, 16)
