"""What is peculiar to Mamba-2: its reductions, its block, and parity with recorded outputs of the official code."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regard.apply import absorb, apply
from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Pattern, Unsupported
from regard.create import create_layer
from regard.engines.recurrent_forms import MatrixState
from regard.layers.state_space import GatedRMSNorm
from regard.mechanisms.mamba2 import MECHANISM, Mamba2Layer, sample_inputs

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
WANT_STATE = Context(want=frozenset({"state"}))
OPTIONS = [
    {},
    {"conv_width": 0},
    {"conv_width": 1},
    {"gate": False},
    {"skip_kind": "none"},
    {"skip_kind": "channel"},
    {"norm": False},
    {"norm_before_gate": True},
    {"groups": 2},
    {"head_dim": 8, "groups": 4},
    {"d_ssm": 16},
    {"dt_limit": (0.05, 0.1)},
    {"constant": ("dt", "B", "C")},
    {"constant": ("B",)},
    {"chunk_size": 3},
]


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def make_layer(pattern: str = "causal-self", dim: int = 16, heads: int = 2, **options) -> Mamba2Layer:
    torch.manual_seed(len(str(options)))
    layer = create_layer("mamba2", dim, heads, pattern=pattern, **{"d_state": 8, **options}).double()
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return layer


def inputs_of(pattern: str = "causal-self", n: int = 21, m: int | None = None, **sizes) -> dict[str, torch.Tensor]:
    return sample_inputs(
        torch.Generator().manual_seed(n),
        batch=2,
        n=n,
        m=n if m is None else m,
        dtype=torch.float64,
        pattern=Pattern(pattern),
        config=MECHANISM.config(),
        sizes=sizes,
    )


def run(inputs, **call):
    return apply(MECHANISM, inputs, **call)


def close(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape
    assert float((found - expected).detach().abs().max()) <= tolerance * float(expected.detach().abs().max())


def test_recurrence_equals_masked_attention_and_chunks_of_any_size():
    x = inputs_of()
    heads = x["v"].shape[1]
    q, k = (x[name].repeat_interleave(heads // x[name].shape[1], 1) for name in "qk")
    log_decay = x["dt"] * x["a"][:, None]
    n = q.shape[2]
    decay = torch.zeros(2, heads, n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1):
            decay[:, :, i, j] = log_decay[:, :, j + 1 : i + 1].sum(-1).exp()
    dual = (decay * (q @ k.mT)) @ (x["dt"][..., None] * x["v"]) + x["skip"][:, None] * x["v"]
    final = torch.einsum("bhj,bhjk,bhjv->bhkv", decay[:, :, -1], k, x["dt"][..., None] * x["v"])
    close(run(x, form="reference").output, dual)
    for size in (1, 16, 64):
        result = run(x, chunk_size=size, return_state=True)
        close(result.output, dual)
        close(result.state.memory, final)


def test_noncausal_self_counts_a_token_once():
    x = inputs_of("noncausal-self", n=1)
    single = run(x, pattern="noncausal-self").output
    close(single, run(x, pattern="causal-self").output)


def test_groups_of_queries_and_keys_serve_consecutive_heads():
    x = inputs_of(h=6, g=3)
    whole = run(x).output
    for head in range(6):
        own = {name: t[:, head : head + 1] if name in ("v", "dt") else t for name, t in x.items()}
        own |= {name: x[name][:, head // 2 : head // 2 + 1] for name in "qk"}
        own |= {name: x[name][head : head + 1] for name in ("a", "skip")}
        close(whole[:, head : head + 1], run(own).output)


def test_unit_steps_with_a_fixed_decay_are_retention():
    x = inputs_of()
    x["dt"] = torch.ones_like(x["dt"])
    x["a"] = torch.tensor([0.9, 0.8, 0.99, 0.5], dtype=torch.float64).log()
    del x["skip"]
    distance = torch.arange(21)[:, None] - torch.arange(21)
    weights = torch.where(distance >= 0, x["a"].exp()[:, None, None] ** distance.clamp(min=0), 0)
    q, k = (x[name].repeat_interleave(2, 1) for name in "qk")
    close(run(x).output, (weights * (q @ k.mT)) @ x["v"])


def test_without_decay_it_is_unnormalised_linear_attention():
    x = inputs_of()
    del x["skip"]
    x["a"] = torch.zeros_like(x["a"])
    q, k = (x[name].repeat_interleave(2, 1) for name in "qk")
    linear = get_mechanism("linear")
    config = linear.options(feature_map="identity", normalize=False)
    expected = apply(linear, {"q": q, "k": k, "v": x["dt"][..., None] * x["v"]}, config=config).output
    close(run(x).output, expected)


def test_equals_gated_linear_attention_with_a_scalar_gate():
    x = inputs_of()
    del x["skip"]
    q, k = (x[name].repeat_interleave(2, 1) for name in "qk")
    gated = {"q": q, "k": k, "v": x["dt"][..., None] * x["v"], "log_decay": (x["dt"] * x["a"][:, None])[..., None]}
    gated["log_decay"] = gated["log_decay"].expand_as(k)
    close(run(x).output, apply(get_mechanism("gated_linear"), gated, scale=1.0).output)


def test_constant_step_and_keys_are_a_convolution():
    x = inputs_of()
    del x["skip"]
    for name in ("q", "k", "dt"):
        x[name] = x[name][:, :, :1].expand_as(x[name])
    n = 21
    power = torch.arange(n, dtype=torch.float64)[:, None, None] * (x["dt"][:, :, 0] * x["a"])
    inner = (x["q"] * x["k"])[:, :, 0].sum(-1).repeat_interleave(2, 1)
    kernel = power.exp() * inner * x["dt"][:, :, 0]  # (n, b, h)
    spectrum = torch.fft.rfft(kernel.permute(1, 2, 0), 2 * n)[..., None] * torch.fft.rfft(x["v"], 2 * n, dim=2)
    close(run(x).output, torch.fft.irfft(spectrum, 2 * n, dim=2)[:, :, :n])


def test_a_zero_step_freezes_the_state_and_a_long_one_forgets_it():
    x = inputs_of(n=1)
    memory = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    state = MatrixState(memory, torch.tensor([3, 5]))
    q = x["q"].repeat_interleave(2, 1)
    frozen = run({**x, "dt": torch.zeros_like(x["dt"])}, state=state)
    assert torch.equal(frozen.state.memory, memory)
    close(frozen.output, q @ memory + x["skip"][:, None] * x["v"])
    x["dt"] = torch.full_like(x["dt"], 1e5)
    result = run(x, state=state)
    write = 1e5 * x["k"].repeat_interleave(2, 1).mT @ x["v"]
    close(result.state.memory, write)


def test_strong_decays_stay_finite_with_finite_gradients():
    x = {name: t.float().requires_grad_() for name, t in inputs_of(n=130).items()}
    scaled = {**x, "a": x["a"] * 300}
    output = run(scaled).output
    output.square().sum().backward()
    assert output.isfinite().all()
    assert all(t.grad.isfinite().all() for t in x.values())


def test_cross_patterns_refuse_a_skip_and_read_the_absorbed_memory():
    x = inputs_of("noncausal-cross", n=4, m=9)
    with pytest.raises(Unsupported, match="skip"):
        run({**x, "skip": torch.zeros(4, 6, dtype=torch.float64)}, pattern="noncausal-cross")
    expected = run(x, pattern="causal-cross", form="reference").output
    close(run(x, pattern="causal-cross").output, expected)
    state = absorb(MECHANISM, x, pattern="causal-cross")
    close(run({"q": x["q"]}, pattern="causal-cross", state=state).output, expected)


@pytest.mark.parametrize("name", ["mamba2_ssd", "mamba2_ssd_initial_state", "mamba2_ssd_strong_decay"])
def test_parity_with_ssd_minimal(name):
    f = load(name)
    leaves = {key: f[key].clone().requires_grad_() for key in ("x", "log_decay", "B", "C")}
    state = None
    if "initial_state" in f:
        leaves["initial_state"] = f["initial_state"].clone().requires_grad_()
        state = MatrixState(leaves["initial_state"].mT, torch.zeros(2, dtype=torch.long))
    # the recorded x is already multiplied by dt: a = -1 with dt = -log_decay, and x divided by it
    dt = -leaves["log_decay"]
    inputs = {
        "q": leaves["C"],
        "k": leaves["B"],
        "v": leaves["x"] / dt[..., None],
        "dt": dt,
        "a": -torch.ones(2).double(),
    }
    result = run(inputs, state=state, return_state=True)
    close(result.output, f["out"], 1e-10)  # observed 2e-16
    close(result.state.memory.mT, f["state"], 1e-10)
    loss = (result.output * f["grad_out"]).sum() + (result.state.memory.mT * f["grad_state"]).sum()
    for key, found in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        close(found, f[f"grad_{key}"], 1e-10)  # observed up to 7e-16


def test_parity_of_the_gated_norm():
    f = load("mamba2_gated_norm")
    for name, groups, first in (
        ("out_gate_first", 2, False),
        ("out_norm_first", 2, True),
        ("out_gate_first_one_group", 1, False),
    ):
        norm = GatedRMSNorm(24, groups, norm_before_gate=first).double()
        norm.weight.data = f["weight"]
        close(norm(f["y"], f["z"]), f[name], 1e-10)  # observed 0


BLOCKS = ["mamba2_block", "mamba2_block_one_group_dt_limit", "mamba2_block_left_padded", "mamba2_block_right_padded"]


def recorded_block(f) -> Mamba2Layer:
    limit = tuple(f["time_step_limit"].tolist()) if "time_step_limit" in f else (0.0, math.inf)
    layer = create_layer(
        "mamba2", 12, int(f["heads"]), d_state=int(f["state_size"]), groups=int(f["groups"]), dt_limit=limit
    )
    weights = {key.removeprefix("weight_"): t for key, t in f.items() if key.startswith("weight_")}
    layer.load_state_dict(
        {
            "A_log": weights["A_log"],
            "dt_bias": weights["dt_bias"],
            "D": weights["D"],
            "in_proj.weight": weights["in_proj_weight"],
            "conv.weight": weights["conv1d_weight"][:, 0],
            "conv.bias": weights["conv1d_bias"],
            "norm.weight": weights["norm_weight"],
            "out_proj.weight": weights["out_proj_weight"],
        }
    )
    assert (layer.heads, layer.head_dim) == (int(f["heads"]), int(f["head_dim"]))
    return layer


@pytest.mark.parametrize("name", BLOCKS)
def test_parity_of_the_block(name):
    """At valid places; where the recorded code writes into padding it is not followed."""
    f = load(name)
    layer = recorded_block(f)
    valid = f.get("attention_mask", torch.ones(f["x"].shape[:2], dtype=torch.bool))
    poisoned = torch.where(valid[..., None], f["x"], float("nan")).requires_grad_()
    output = layer(poisoned, context=Context(mask=Mask(valid=valid))).output
    close(output[valid], f["out"][valid], 2e-5)  # observed 1e-7 to 2e-7
    assert (output[~valid] == 0).all()
    (output * torch.where(valid[..., None], f["grad_out"], 0)).sum().backward()
    if valid.all():
        close(poisoned.grad, f["grad_x"], 2e-5)  # observed 2e-7
    assert (poisoned.grad[~valid] == 0).all()


def test_parity_of_decoding_after_a_prefix():
    f = load("mamba2_block")
    layer = recorded_block(f)
    state = layer(f["x"], context=WANT_STATE).state
    close(state.mechanism.memory.mT, f["state"], 2e-5)  # observed 1e-7
    close(state.convolutions[0].mT, f["conv_state"][..., 1:], 2e-5)  # exact; the recorded cache has one input more
    for t in range(f["step_x"].shape[1]):
        output, state = layer.step(f["step_x"][:, t], state)
        close(output, f["step_out"][:, t], 2e-5)  # observed up to 1e-7


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prefill_and_steps_equal_the_whole_with_every_option(options):
    layer = make_layer(**options)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    whole = layer(x).output
    for split in (1, 2, 6):  # shorter than the convolution too
        first = layer(x[:, :split], context=WANT_STATE)
        outputs, state = [first.output], first.state
        for t in range(split, 9):
            y, state = layer.step(x[:, t], state)
            outputs.append(y[:, None])
        close(torch.cat(outputs, 1), whole)
        assert state.length.tolist() == [9, 9]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decoding_goes_on_after_padded_prompts(options):
    """No step is taken in the padding: neither a decay nor the convolution's bias gets into the state."""
    layer = make_layer(**options)
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    prompt = torch.full((2, 7, 16), float("nan"), dtype=torch.float64)
    valid = torch.tensor([[1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    counts = valid.sum(1).tolist()
    for row, count in enumerate(counts):
        prompt[row, valid[row]] = x[row, :count]
    state = layer(prompt, context=Context(mask=Mask(valid=valid), want=frozenset({"state"}))).state
    assert state.length.tolist() == counts
    tail = torch.stack([x[row, count : count + 4] for row, count in enumerate(counts)])
    outputs = []
    for t in range(4):
        y, state = layer.step(tail[:, t], state)
        outputs.append(y)
    for row, count in enumerate(counts):
        close(torch.stack(outputs, 1)[row], layer(x[row : row + 1, : count + 4]).output[0, count:])


@pytest.mark.parametrize("pattern", list(Pattern))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padded_rows_equal_rows_alone_with_every_option(options, pattern):
    layer = make_layer(pattern, **options)
    x, memory = torch.randn(2, 7, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    valid = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    seen = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]], dtype=torch.bool)
    context = Context(mask=Mask(valid=valid), memory_mask=Mask(valid=seen) if pattern.cross else None)
    poisoned = torch.where(valid[..., None], x, float("nan"))
    keys = torch.where(seen[..., None], memory, float("nan")) if pattern.cross else None
    output = layer(poisoned, keys, context=context).output
    for row in range(2):
        own = memory[row : row + 1, seen[row]] if pattern.cross else None
        close(output[row : row + 1, valid[row]], layer(x[row : row + 1, valid[row]], own).output)
    assert (output[~valid] == 0).all()


@pytest.mark.parametrize("pattern", ["noncausal-cross", "causal-cross"])
@pytest.mark.parametrize("options", [{}, {"initial_states": True}, {"constant": ("dt", "C")}, {"d_ssm": 16}], ids=str)
def test_memory_in_pieces_equals_the_whole(pattern, options):
    layer = make_layer(pattern, memory_dim=5, **options)
    x, memory = torch.randn(2, 4, 16, dtype=torch.float64), torch.randn(2, 8, 5, dtype=torch.float64)
    whole = layer(x, memory).output
    state = None
    for part in (memory[:, :1], memory[:, 1:3], memory[:, 3:]):
        state = layer.encode_memory(part, state=state)
        assert state.length.tolist() == [0, 0]  # counts queries
    outputs = []
    for t in range(4):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
    close(torch.stack(outputs, 1), whole)
    # queries are independent of each other
    close(layer(x.flip(1), memory).output.flip(1), whole)


def test_learned_initial_states_start_every_sequence_and_document():
    layer = make_layer(initial_states=True)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    whole = layer(x).output
    plain = make_layer()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "initial_states"})
    assert (plain(x).output - whole).abs().max() > 1e-3
    packed = layer(x, context=Context(mask=Mask(cu_seqlens=torch.tensor([0, 4, 4, 9])))).output
    close(packed[:, :4], layer(x[:, :4]).output)
    close(packed[:, 4:], layer(x[:, 4:]).output)
    after = layer(x[:, :5], context=WANT_STATE).state
    close(layer(x[:, 5:], state=after).output, whole[:, 5:])
    close(layer(x, state=after.reset(torch.tensor([True]))).output, whole)
    with pytest.raises(Unsupported, match="initial_states"):
        make_layer("noncausal-self", initial_states=True)


def test_noncausal_block_sees_both_sides_and_its_convolution_is_centred():
    layer = make_layer("noncausal-self", conv_width=3)
    layer.A_log.data.fill_(50.0)  # a decay that forgets everything: only the convolution reaches other tokens
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    base = layer(x).output
    changed = x.clone()
    changed[:, 4] += 1
    moved = (layer(changed).output - base).abs().amax((0, 2)) > 1e-9
    assert moved.nonzero().flatten().tolist() == [3, 4, 5]


def test_part_of_the_inside_can_be_a_gated_mlp():
    """Order of the projection's features: MLP gate, MLP, z, x, B, C, dt; the MLP comes first in the output."""
    layer = make_layer(d_ssm=16, heads=2)
    assert layer.in_proj.weight.shape[0] == 2 * 16 + 2 * 16 + 2 * 8 + 2
    layer.out_proj.weight.data[:, 16:] = 0
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    gate, value = (x @ layer.in_proj.weight[:32].mT).chunk(2, -1)
    close(layer(x).output, (F.silu(gate) * value) @ layer.out_proj.weight[:, :16].mT)


def test_skip_is_added_before_the_gate():
    layer = make_layer(norm=False, conv_width=0)
    layer.dt_bias.data.fill_(-100.0)  # no step: nothing is written
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    z, inner = x @ layer.in_proj.weight[:32].mT, F.silu(x @ layer.in_proj.weight[32:64].mT)
    y = layer.D.repeat_interleave(16) * inner * F.silu(z)
    layer.in_proj.weight.data[-2:] = 0
    close(layer(x).output, y @ layer.out_proj.weight.mT)


def test_initial_values():
    torch.manual_seed(0)
    layer = create_layer("mamba2", 256, 64)
    dt, a = F.softplus(layer.dt_bias).detach(), -layer.A_log.detach().exp()
    assert float(dt.min()) >= 1e-3 * 0.99 and float(dt.max()) <= 0.1 * 1.01
    assert float(a.min()) >= -16.01 and float(a.max()) <= -0.99
    assert float(dt.max()) > 0.05 and float(a.min()) < -12  # the whole range is used
    assert (layer.D == 1).all() and (layer.norm.weight == 1).all()


def test_parameter_count():
    dim, heads, state, groups = 32, 4, 16, 2
    layer = create_layer("mamba2", dim, heads, d_state=state, groups=groups)
    inner = 2 * dim
    mixed = inner + 2 * groups * state
    expected = dim * (inner + mixed + heads) + mixed * (4 + 1) + 3 * heads + inner + inner * dim
    assert sum(p.numel() for p in layer.parameters()) == expected


def test_time_constants_keep_float32_and_have_no_weight_decay():
    layer = create_layer("mamba2", 16, 2, d_state=8, skip_kind="channel")
    before = {name: getattr(layer, name).detach().clone() for name in layer.FLOAT32}
    layer = layer.to(torch.bfloat16)
    for name, value in before.items():
        parameter = getattr(layer, name)
        assert parameter.dtype == torch.float32 and torch.equal(parameter, value)
        assert parameter._no_weight_decay
    assert layer.in_proj.weight.dtype == torch.bfloat16
    output = layer(torch.randn(1, 5, 16).bfloat16()).output
    assert output.dtype == torch.bfloat16 and output.isfinite().all()
    assert layer.double().A_log.dtype == torch.float64


def test_head_dim_sets_the_number_of_heads():
    layer = create_layer("mamba2", 32, 4)
    assert (layer.heads, layer.head_dim) == (4, 16)
    layer = create_layer("mamba2", 32, 4, head_dim=8)
    assert (layer.heads, layer.head_dim) == (8, 8)


def test_state_is_constant_in_the_length():
    assert MECHANISM.recurrent
    layer = make_layer()
    sizes = {layer(torch.randn(1, n, 16).double(), context=WANT_STATE).state.nbytes for n in (1, 3, 50)}
    assert len(sizes) == 1


def test_causal_self_with_other_numbers_of_queries_aligns_at_the_end():
    x = inputs_of(n=5, m=9)
    longer = {**x, "q": torch.cat([torch.zeros(2, 2, 4, 8).double(), x["q"]], 2)}
    close(run(x).output, run(longer).output[:, :, 4:])
    close(run(x).output, run(x, form="reference").output)


@pytest.mark.parametrize(
    "options",
    [
        {"skip_kind": "all"},
        {"constant": ("x",)},
        {"d_state": 0},
        {"dt_limit": (1.0, 0.5)},
        {"dt_init": (0.0, 0.1)},
        {"expand": -1.0},
        {"norm_before_gate": True, "gate": False},
        {"groups": 3},
        {"head_dim": 7},
        {"d_ssm": 33},
        {"memory_dim": 8},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options):
    with pytest.raises(Unsupported):
        make_layer(**options)


def test_calls_that_cannot_be_honoured_are_refused():
    layer = make_layer()
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    bias = torch.zeros(1, 1, 4, 4)
    for context in (
        Context(mask=Mask(bias=bias)),
        Context(roles=torch.zeros(1, 4, dtype=torch.long)),
        Context(want=frozenset({"weights"})),
    ):
        with pytest.raises(Unsupported):
            layer(x, context=context)
    with pytest.raises(Unsupported, match="memory"):
        layer(x, x)
    with pytest.raises(Unsupported, match="memory"):
        make_layer("causal-cross")(x)
    with pytest.raises(Unsupported, match="state"):
        make_layer("noncausal-self")(x, context=WANT_STATE)


def test_empty_memory_gives_zero():
    layer = make_layer("noncausal-cross")
    x, memory = torch.randn(1, 3, 16).double(), torch.randn(1, 0, 16).double()
    assert (layer(x, memory).output == 0).all()
