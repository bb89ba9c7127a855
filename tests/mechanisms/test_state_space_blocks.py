"""Tests of both the mamba and the mamba2 block: parity, padded prompts, memory in pieces, time constants, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import close, load, refused, shaken
from torch import Tensor, nn

from regard.contract import ALL_PATTERNS, Context, Mask
from regard.create import create_layer
from regard.models import LanguageModel, LanguageModelConfig

both = pytest.mark.parametrize("name", ["mamba", "mamba2"])
WANT_STATE = frozenset({"state"})


def make_layer(name: str, pattern: str = "causal-self", **options: object) -> nn.Module:
    return shaken(create_layer(name, 16, 2, pattern=pattern, **{"d_state": 8, **options}))


def recorded_block(f: dict[str, Tensor]) -> nn.Module:
    weights = {key.removeprefix("weight_"): x for key, x in f.items() if key.startswith("weight_")}
    if "heads" in f:
        name, heads = "mamba2", int(f["heads"])
        limit = tuple(f["time_step_limit"].tolist()) if "time_step_limit" in f else (0.0, math.inf)
        options = {"d_state": int(f["state_size"]), "groups": int(f["groups"]), "dt_limit": limit}
    else:
        name, heads = "mamba", 1
        weights["dt_bias"] = weights["dt_proj_bias"]
        options = {"d_state": weights["A_log"].shape[1], "dt_rank": weights["dt_proj_weight"].shape[1]}
    layer = create_layer(name, f["x"].shape[-1], heads, **options).to(f["x"].dtype)
    weights |= {"conv_weight": weights["conv1d_weight"][:, 0], "conv_bias": weights["conv1d_bias"]}
    layer.load_state_dict({own: weights[own.replace(".", "_")] for own in layer.state_dict()})
    return layer


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("mamba_block", 1e-10),  # observed 3e-16
        ("mamba_block_left_padded", 1e-10),
        ("mamba2_block", 2e-5),  # observed 2e-7
        ("mamba2_block_one_group_dt_limit", 2e-5),
        ("mamba2_block_left_padded", 2e-5),
        ("mamba2_block_right_padded", 2e-5),
    ],
)
def test_parity_of_the_block(name, tolerance):
    """Only valid places are compared: the recorded code also writes into padding."""
    f = load(name)
    valid = f.get("attention_mask", torch.ones(f["x"].shape[:2], dtype=torch.bool))
    poisoned = torch.where(valid[..., None], f["x"], float("nan")).requires_grad_()
    output = recorded_block(f)(poisoned, context=Context(mask=Mask(valid=valid))).output
    close(output[valid], f["out"][valid], tolerance)
    assert (output[~valid] == 0).all()
    (gradient,) = torch.autograd.grad(output, poisoned, torch.where(valid[..., None], f["grad_out"], 0))
    if valid.all():
        close(gradient, f["grad_x"], tolerance)
    assert (gradient[~valid] == 0).all()


@pytest.mark.parametrize(("name", "tolerance"), [("mamba_block", 1e-10), ("mamba2_block", 2e-5)])
def test_parity_of_decoding_after_a_prefix(name, tolerance):
    f = load(name)
    layer = recorded_block(f)
    state = layer(f["x"], context=Context(want=WANT_STATE)).state
    memory = state.mechanism.memory
    close(memory if name == "mamba_block" else memory.mT, f["state"], tolerance)
    close(state.convolutions[0].mT, f["conv_state"][..., 1:], tolerance)  # the recorded cache has an extra input
    for t in range(f["step_x"].shape[1]):
        output, state = layer.step(f["step_x"][:, t], state)
        close(output, f["step_out"][:, t], tolerance)


@pytest.mark.parametrize("pattern", ["noncausal-cross", "causal-cross"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mamba", {}),
        ("mamba", {"constant": ("dt", "C")}),
        ("mamba", {"constant": ("C",), "gate": False}),  # does not read the queries
        ("mamba2", {}),
        ("mamba2", {"constant": ("dt", "C")}),
        ("mamba2", {"initial_states": True}),
        ("mamba2", {"d_ssm": 16}),
    ],
)
def test_memory_in_pieces_then_steps_equal_the_whole(name, options, pattern):
    layer, state = make_layer(name, pattern, memory_dim=5, **options), None
    x, memory = torch.randn(2, 4, 16, dtype=torch.float64), torch.randn(2, 8, 5, dtype=torch.float64)
    expected = layer(x, memory).output
    for part in (memory[:, :1], memory[:, 1:3], memory[:, 3:]):
        state = layer.encode_memory(part, state=state)
        assert state.length.tolist() == [0, 0]  # length counts queries
    for t in range(4):
        output, state = layer.step(x[:, t], state)
        close(output, expected[:, t])


@both
def test_a_noncausal_convolution_is_centred(name):
    layer = make_layer(name, "noncausal-self", conv_width=3)
    layer.A_log.data.fill_(50.0)  # the decay forgets everything: only the convolution reaches other tokens
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4] += 1
    moved = (layer(changed).output - layer(x).output).abs().amax((0, 2)) > 1e-9
    assert moved.nonzero().flatten().tolist() == [3, 4, 5]


@both
def test_steps_start_log_uniform_from_a_thousandth_to_a_tenth(name):
    torch.manual_seed(0)
    dt = F.softplus(create_layer(name, 256, 64).dt_bias).detach()
    assert 1e-3 * 0.99 <= float(dt.min()) < 0.002 and 0.05 < float(dt.max()) <= 0.1 * 1.01


@both
def test_the_bias_of_the_steps_survives_a_pass_that_zeroes_biases(name):
    model = LanguageModel(LanguageModelConfig(50, dim=32, num_heads=2, plan=name, num_layers=1))
    layer = model.blocks[0].mixer
    before = layer.dt_bias.detach().clone()
    for module in model.modules():
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.zeros_(module.bias)
    assert torch.equal(layer.dt_bias, before)


@both
@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_every_projection_can_be_of_another_kind(name, pattern):
    layer = create_layer(name, 16, 2, pattern=pattern, linear="token_parameter")
    memory = torch.randn(2, 5, 16) if pattern.cross else None
    assert not any(isinstance(module, nn.Linear) for module in layer.modules())
    assert layer(torch.randn(2, 6, 16), memory).output.isfinite().all()


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constant": ("x",)}, "constant"),
        ({"d_state": 0}, "d_state=0"),
        ({"conv_width": -1}, "conv_width=-1"),
        ({"dt_limit": (1.0, 0.5)}, "dt_limit"),
        ({"dt_init": (0.0, 0.1)}, "dt_init"),
        ({"expand": -1.0}, "expand=-1.0"),
        ({"norm": True, "norm_before_gate": True, "gate": False}, "without a norm or a gate"),
        ({"norm": False, "norm_before_gate": True}, "without a norm or a gate"),
        ({"groups": 3}, "groups=3"),
        ({"memory_dim": 8}, "memory_dim in causal-self"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(name, options, message):
    refused(message, make_layer, name, **options)


@both
@pytest.mark.parametrize(
    ("pattern", "with_memory", "context", "message"),
    [
        ("causal-self", False, Context(mask=Mask(bias=torch.zeros(1, 1, 4, 4))), "bias"),
        ("causal-self", False, Context(roles=torch.zeros(1, 4, dtype=torch.long)), "roles"),
        ("causal-self", False, Context(want=frozenset({"weights"})), "weights"),
        ("causal-self", True, None, "memory"),
        ("causal-cross", False, None, "memory"),
        ("noncausal-self", False, Context(want=WANT_STATE), "state"),
    ],
)
def test_calls_that_cannot_be_honoured_are_refused(name, pattern, with_memory, context, message):
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    refused(message, lambda: make_layer(name, pattern)(x, x if with_memory else None, context=context))
