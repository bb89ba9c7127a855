"""Tests specific to Mamba: its definition, its kinship with Mamba-2, and its block."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import calls, close, refused, shaken
from torch import Tensor

from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Pattern
from regard.create import create_layer
from regard.engines.selective_scan import selective_scan_reference
from regard.mechanisms.mamba import MECHANISM, MambaLayer
from regard.workbench.verification.subjects import Subject

run = calls(MECHANISM)
OPTIONS = [
    {},
    {"conv_width": 0},
    {"conv_width": 1},
    {"gate": False},
    {"skip": False},
    {"norm": True},
    {"norm": True, "norm_before_gate": True},
    {"norm": True, "groups": 4},
    {"groups": 2},
    {"scalar_a": True},
    {"dt_rank": 5},
    {"dt_limit": (0.05, 0.1)},
    {"constant": ("dt",)},
    {"constant": ("B",)},
    {"constant": ("C",), "gate": False},
    {"constant": ("dt", "B", "C")},
]


def sample(
    n: int = 21, m: int | None = None, pattern: Pattern = Pattern.CAUSAL_SELF, **sizes: int
) -> dict[str, Tensor]:
    return Subject(MECHANISM, pattern).inputs(n, n if m is None else m, **sizes)


def steps_of(inputs: dict[str, Tensor]) -> Tensor:
    return F.softplus(inputs["dt"] + inputs["dt_bias"]) if "dt_bias" in inputs else inputs["dt"]


def hidden_attention(inputs: dict[str, Tensor], pattern: Pattern, scale: float) -> Tensor:
    """Attention matrices per channel, whose states decay differently; cross patterns read after the last memory token."""
    dt, n, m = steps_of(inputs), inputs["c"].shape[1], inputs["x"].shape[1]
    b, c = (inputs[name].repeat_interleave(4, 2) for name in "bc")  # (b, n, e, k)
    weights = torch.zeros(2, n, m, 8, dtype=torch.float64)
    for i in range(n):
        t = m - 1 if pattern.cross else i + m - n
        for s in range(t + 1 if pattern.causal else m):
            between = dt[:, s + 1 : t + 1] if s <= t else dt[:, t:s]
            decay = (between.sum(1)[..., None] * inputs["a"]).exp()
            weights[:, i, s] = scale * (c[:, i] * decay * b[:, s]).sum(-1) * dt[:, s]
    y = torch.einsum("btse,bse->bte", weights, inputs["x"])
    if "skip" in inputs:
        y = y + inputs["skip"] * inputs["x"][:, m - n :]
    return y * F.silu(inputs["z"]) if "z" in inputs else y


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("bare", [False, True], ids=["all inputs", "only those that it needs"])
def test_equals_hidden_attention(pattern, bare):
    inputs = sample(12, 12 if pattern is Pattern.NONCAUSAL_SELF else 17, pattern)
    if bare:  # without a bias, steps are used as given
        inputs["dt"] = steps_of(inputs)
        inputs = {name: inputs[name] for name in ("x", "dt", "a", "b", "c")}
    for form in (None, "reference"):
        close(run(inputs, pattern=pattern, form=form).output, hidden_attention(inputs, pattern, 1.0))
        found = run(inputs, pattern=pattern, form=form, scale=0.3).output
        close(found, hidden_attention(inputs, pattern, 0.3))


def test_equal_decays_in_a_channel_are_mamba2_with_a_head_a_channel():
    """This is SSD with heads of one feature and a single group."""
    x = sample(g=1)
    x["a"] = x["a"][:, :1].expand(-1, 4)
    inputs = {
        "q": x["c"].transpose(1, 2),
        "k": x["b"].transpose(1, 2),
        "v": x["x"].mT[..., None],
        "dt": steps_of(x).mT,
        "a": x["a"][:, 0],
        "skip": x["skip"][:, None],
    }
    close(run(x).output, calls(get_mechanism("mamba2"))(inputs).output[..., 0].mT * F.silu(x["z"]))


def block_by_hand(layer: MambaLayer, u: Tensor) -> Tensor:
    """The paper's block, computed from the layer's parameters."""
    config, inner = layer.config, layer.inner
    projected = u @ layer.in_proj.weight.mT
    x, z = projected[..., :inner], projected[..., inner:]
    if config.conv_width:
        past = F.pad(x, (0, 0, config.conv_width - 1, 0))
        taps = [layer.conv.weight[:, j] * past[:, j : j + u.shape[1]] for j in range(config.conv_width)]
        x = sum(taps) + layer.conv.bias  # oldest first
    x = F.silu(x)
    left = x if layer.x_proj is None else x @ layer.x_proj.weight.mT
    dt = torch.zeros_like(x)
    if "dt" not in config.constant:
        rank = config.dt_rank or 1
        dt, left = left[..., :rank] @ layer.dt_proj.weight.mT, left[..., rank:]
    dt = F.softplus(dt + layer.dt_bias).clamp(*config.dt_limit)
    keys = {}
    for name in ("B", "C"):
        if name in config.constant:
            keys[name] = layer.constants[name].expand(*u.shape[:2], -1, -1)
        else:
            keys[name] = left[..., : config.groups * config.d_state].unflatten(-1, (config.groups, config.d_state))
            left = left[..., config.groups * config.d_state :]
    a = -layer.A_log.exp().expand(-1, config.d_state)
    y, _ = selective_scan_reference(x, dt, a, keys["B"], keys["C"])
    y = y + layer.D * x if config.skip else y
    z = z if config.gate else None
    if layer.norm is not None:
        y = layer.norm(y, z)
    elif z is not None:
        y = y * F.silu(z)
    return y @ layer.out_proj.weight.mT


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_block_equals_its_definition_with_every_option(options):
    layer = shaken(create_layer("mamba", 16, **{"d_state": 8, **options}))
    u = 3 * torch.randn(2, 11, 16, dtype=torch.float64)
    close(layer(u).output, block_by_hand(layer, u))


def test_initial_values():
    layer = create_layer("mamba", 256)
    torch.testing.assert_close(-layer.A_log.exp(), -torch.arange(1.0, 17.0).expand(512, 16))
    assert (layer.D == 1).all()
    assert 0.9 < layer.dt_proj.weight.abs().max() * math.sqrt(16) <= 1
    scalar = create_layer("mamba", 256, scalar_a=True).A_log.detach().exp()
    assert scalar.shape == (512, 1)
    assert float(scalar.min()) >= 1 and float(scalar.max()) <= 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_layer("mamba", 16, expand=0.01), "for 0 channels"),
        (lambda: run(sample(g=3)), "3 groups"),
        (lambda: run(sample(), pattern="noncausal-cross"), "skip"),
    ],
)
def test_what_it_cannot_do_is_refused(call, message):
    refused(message, call)
