"""Tests specific to Mamba-2: its definition and reductions, its block, and parity with the official recurrence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import calls, close, load, refused, shaken
from torch import Tensor

from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Context, Pattern
from regard.create import create_layer
from regard.engines.recurrent_forms import MatrixState
from regard.layers.state_space import GatedRMSNorm
from regard.mechanisms.mamba2 import MECHANISM, Mamba2Layer
from regard.workbench.verification.subjects import Subject

run = calls(MECHANISM)


def sample(n: int = 21, m: int | None = None, pattern: Pattern = Pattern.CAUSAL_SELF) -> dict[str, Tensor]:
    return Subject(MECHANISM, pattern).inputs(n, n if m is None else m, h=4, g=2)


def for_heads(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and dt v of each head; consecutive heads share a group of q and k."""
    q, k = (inputs[name].repeat_interleave(2, 1) for name in "qk")
    return q, k, inputs["dt"][..., None] * inputs["v"]


def make_layer(**options: object) -> Mamba2Layer:
    return shaken(create_layer("mamba2", 16, 2, **{"d_state": 8, **options}))


def masked_attention(inputs: dict[str, Tensor], pattern: Pattern) -> Tensor:
    """Products of queries and keys, decayed between the two tokens, or in cross patterns until the end of the memory."""
    q, k, v = for_heads(inputs)
    n, m = q.shape[2], k.shape[2]
    log_decay = inputs["dt"] * inputs["a"][:, None]
    decay = torch.zeros(2, 4, n, m, dtype=torch.float64)
    for i in range(n):
        t = m - 1 if pattern.cross else i + m - n
        for s in range(t + 1 if pattern.causal else m):
            between = log_decay[:, :, s + 1 : t + 1] if s <= t else log_decay[:, :, t:s]
            decay[:, :, i, s] = between.sum(-1).exp()
    y = (decay * (q @ k.mT)) @ v
    return y + inputs["skip"][:, None] * inputs["v"][:, :, m - n :] if "skip" in inputs else y


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("skip", [True, False])
def test_equals_masked_attention(pattern, skip):
    inputs = sample(12, 12 if pattern is Pattern.NONCAUSAL_SELF else 17, pattern)
    if not skip:
        inputs.pop("skip", None)
    for form in (None, "reference"):
        close(run(inputs, pattern=pattern, form=form).output, masked_attention(inputs, pattern))


def test_it_is_gated_linear_attention_with_a_scalar_gate_and_without_decay_linear_attention():
    inputs = sample()
    del inputs["skip"]
    q, k, v = for_heads(inputs)
    gate = (inputs["dt"] * inputs["a"][:, None])[..., None].expand_as(k)
    gated = calls(get_mechanism("gated_linear"))({"q": q, "k": k, "v": v, "log_decay": gate}, scale=1.0)
    close(run(inputs).output, gated.output)
    linear = calls(get_mechanism("linear"))
    expected = linear({"q": q, "k": k, "v": v}, {"feature_map": "identity", "normalize": False}).output
    close(run(inputs | {"a": torch.zeros_like(inputs["a"])}).output, expected)


def test_a_zero_step_freezes_the_state_and_a_long_one_forgets_it():
    x = sample(1)
    q, k, _ = for_heads(x)
    memory = torch.randn(2, 4, q.shape[-1], x["v"].shape[-1], dtype=torch.float64)
    state = MatrixState(memory, torch.tensor([3, 5]))
    frozen = run({**x, "dt": torch.zeros_like(x["dt"])}, state=state)
    assert torch.equal(frozen.state.memory, memory)
    close(frozen.output, q @ memory + x["skip"][:, None] * x["v"])
    long = run({**x, "dt": torch.full_like(x["dt"], 1e5)}, state=state)
    close(long.state.memory, 1e5 * k.mT @ x["v"])


def test_strong_decays_stay_finite_with_finite_gradients():
    x = {name: t.float().requires_grad_() for name, t in sample(130).items()}
    output = run({**x, "a": x["a"] * 300}).output
    output.square().sum().backward()
    assert output.isfinite().all()
    assert all(t.grad.isfinite().all() for t in x.values())


@pytest.mark.parametrize("name", ["mamba2_ssd", "mamba2_ssd_initial_state", "mamba2_ssd_strong_decay"])
def test_parity_with_ssd_minimal(name):
    f = load(name)
    leaves = {key: f[key].requires_grad_() for key in ("x", "log_decay", "B", "C", "initial_state") if key in f}
    state = None
    if "initial_state" in leaves:
        state = MatrixState(leaves["initial_state"].mT, torch.zeros(2, dtype=torch.long))
    # the recorded x is already multiplied by dt: take a = -1 and dt = -log_decay, and divide x by dt
    dt = -leaves["log_decay"]
    inputs = {"q": leaves["C"], "k": leaves["B"], "v": leaves["x"] / dt[..., None], "dt": dt}
    result = run(inputs | {"a": -torch.ones(2).double()}, state=state, return_state=True)
    close(result.output, f["out"], 1e-10)  # observed 2e-16
    close(result.state.memory.mT, f["state"], 1e-10)
    loss = (result.output * f["grad_out"]).sum() + (result.state.memory.mT * f["grad_state"]).sum()
    for key, found in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        close(found, f[f"grad_{key}"], 1e-10)  # observed up to 7e-16


@pytest.mark.parametrize(
    ("name", "groups", "first"),
    [("out_gate_first", 2, False), ("out_norm_first", 2, True), ("out_gate_first_one_group", 1, False)],
)
def test_parity_of_the_gated_norm(name, groups, first):
    f = load("mamba2_gated_norm")
    norm = GatedRMSNorm(24, groups, norm_before_gate=first).double()
    norm.weight.data = f["weight"]
    close(norm(f["y"], f["z"]), f[name], 1e-10)  # observed 0


def test_learned_initial_states_start_every_sequence():
    layer, plain = make_layer(initial_states=True), make_layer()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    whole = layer(x).output
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "initial_states"})
    assert (plain(x).output - whole).abs().max() > 1e-3
    after = layer(x[:, :5], context=Context(want=frozenset({"state"}))).state
    close(layer(x, state=after.reset(torch.tensor([True]))).output, whole)


def test_part_of_the_inside_can_be_a_gated_mlp():
    """Order of the projection's features: MLP gate, MLP, z, x, B, C, dt; the MLP comes first in the output."""
    layer = make_layer(d_ssm=16)
    assert layer.in_proj.weight.shape[0] == 2 * 16 + 2 * 16 + 2 * 8 + 2
    layer.out_proj.weight.data[:, 16:] = 0
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    gate, value = (x @ layer.in_proj.weight[:32].mT).chunk(2, -1)
    close(layer(x).output, (F.silu(gate) * value) @ layer.out_proj.weight[:, :16].mT)


@pytest.mark.parametrize("skip_kind", ["head", "channel"])
def test_skip_is_added_before_the_gate(skip_kind):
    layer = make_layer(norm=False, conv_width=0, skip_kind=skip_kind)
    layer.dt_bias.data.fill_(-100.0)  # a step of 0 writes nothing
    layer.in_proj.weight.data[-2:] = 0
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    z, inner = x @ layer.in_proj.weight[:32].mT, F.silu(x @ layer.in_proj.weight[32:64].mT)
    skip = layer.D.repeat_interleave(16) if skip_kind == "head" else layer.D.flatten()
    close(layer(x).output, (skip * inner * F.silu(z)) @ layer.out_proj.weight.mT)


def test_initial_values():
    layer = create_layer("mamba2", 256, 64)
    a = layer.A_log.detach().exp()
    assert float(a.min()) >= 0.99 and 12 < float(a.max()) <= 16.01
    assert (layer.D == 1).all() and (layer.norm.weight == 1).all()


@pytest.mark.parametrize(("options", "expected"), [({}, (4, 16)), ({"head_dim": 8}, (8, 8))])
def test_head_dim_sets_the_number_of_heads(options, expected):
    layer = create_layer("mamba2", 32, 4, **options)
    assert (layer.heads, layer.head_dim) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_layer(head_dim=7), "head_dim=7"),
        (lambda: make_layer(d_ssm=33), "d_ssm=33"),
        (lambda: make_layer(pattern="noncausal-self", initial_states=True), "initial_states"),
        (lambda: run(sample(), pattern="noncausal-cross"), "skip"),
    ],
)
def test_what_it_cannot_do_is_refused(call, message):
    refused(message, call)
