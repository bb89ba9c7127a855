"""What is peculiar to Mamba: its definition and reductions, its block, and parity with recorded outputs of other code."""

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
from regard.engines.selective_scan import SelectiveState, selective_scan_reference
from regard.mechanisms.mamba import MECHANISM, MambaLayer, sample_inputs
from regard.models import LanguageModel, LanguageModelConfig

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
WANT_STATE = Context(want=frozenset({"state"}))
OPTIONS = [
    {},
    {"conv_width": 0},
    {"conv_width": 1},
    {"gate": False},
    {"skip": False},
    {"norm": True},
    {"norm": True, "norm_before_gate": True},
    {"groups": 2},
    {"scalar_a": True},
    {"dt_rank": 5},
    {"dt_limit": (0.05, 0.1)},
    {"constant": ("dt",)},
    {"constant": ("B",)},
    {"constant": ("C",), "gate": False},
    {"constant": ("dt", "B", "C")},
    {"chunk_size": 3},
]


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def make_layer(pattern: str = "causal-self", dim: int = 16, **options) -> MambaLayer:
    torch.manual_seed(len(str(options)))
    layer = create_layer("mamba", dim, pattern=pattern, **{"d_state": 8, **options}).double()
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


def steps_of(x):
    return F.softplus(x["dt"] + x["dt_bias"])


def test_recurrence_equals_hidden_attention():
    """A matrix of pairs for each channel, decays differing between its states."""
    x = inputs_of()
    dt, n = steps_of(x), 21
    b, c = (x[name].repeat_interleave(4, 2) for name in "bc")  # (b, n, e, k)
    weights = torch.zeros(2, n, n, 8, dtype=torch.float64)
    for t in range(n):
        for s in range(t + 1):
            decay = (dt[:, s + 1 : t + 1].sum(1)[..., None] * x["a"]).exp()
            weights[:, t, s] = (c[:, t] * decay * b[:, s]).sum(-1) * dt[:, s]
    y = torch.einsum("btse,bse->bte", weights, x["x"]) + x["skip"] * x["x"]
    expected = y * F.silu(x["z"])
    close(run(x, form="reference").output, expected)
    for size in (1, 16, 64):
        close(run(x, chunk_size=size, return_state=True).output, expected)


def test_noncausal_self_counts_a_token_once():
    x = inputs_of("noncausal-self", n=1)
    close(run(x, pattern="noncausal-self").output, run(x, pattern="causal-self").output)


def test_noncausal_self_is_symmetric_in_time():
    x = inputs_of("noncausal-self")
    flipped = {name: t.flip(1) if t.ndim > 2 else t for name, t in x.items()}
    close(run(flipped, pattern="noncausal-self").output.flip(1), run(x, pattern="noncausal-self").output)


def test_equal_decays_in_a_channel_are_mamba2_with_a_head_a_channel():
    """SSD with heads of one feature, and one group."""
    x = inputs_of(g=1)
    x["a"] = x["a"][:, :1].expand(-1, 4)
    inputs = {
        "q": x["c"].transpose(1, 2),
        "k": x["b"].transpose(1, 2),
        "v": x["x"].mT[..., None],
        "dt": steps_of(x).mT,
        "a": x["a"][:, 0],
        "skip": x["skip"][:, None],
    }
    expected = apply(get_mechanism("mamba2"), inputs).output[..., 0].mT * F.silu(x["z"])
    close(run(x).output, expected)


def test_constant_step_and_matrices_are_a_convolution():
    """Without selection it is S4D-real: y = x * K with K_t = C exp(A dt t) B dt."""
    x = inputs_of()
    for name in ("dt", "b", "c"):
        x[name] = x[name][:, :1].expand_as(x[name])
    n, dt = 21, steps_of(x)[:, 0]
    b, c = (x[name][:, 0].repeat_interleave(4, 1) for name in "bc")
    time = torch.arange(n, dtype=torch.float64)[:, None, None, None]
    kernel = ((time * dt[..., None] * x["a"]).exp() * b * c).sum(-1) * dt  # (n, b, e)
    spectrum = torch.fft.rfft(kernel.movedim(0, 1), 2 * n, dim=1) * torch.fft.rfft(x["x"], 2 * n, dim=1)
    y = torch.fft.irfft(spectrum, 2 * n, dim=1)[:, :n]
    close(run(x).output, (y + x["skip"] * x["x"]) * F.silu(x["z"]))


def test_a_zero_step_reads_the_old_state_and_a_long_one_forgets_it():
    x = inputs_of(n=1)
    del x["dt_bias"], x["z"]
    memory = torch.randn(2, 8, 4, dtype=torch.float64)
    state = SelectiveState(memory, torch.tensor([3, 5]))
    c = x["c"][:, 0].repeat_interleave(4, 1)
    frozen = run({**x, "dt": torch.zeros_like(x["dt"])}, state=state)
    assert torch.equal(frozen.state.memory, memory)
    close(frozen.output[:, 0], (memory * c).sum(-1) + x["skip"] * x["x"][:, 0])
    x["dt"] = torch.full_like(x["dt"], 1e6)
    x["a"] = x["a"] - 0.1
    write = 1e6 * x["x"][:, 0, :, None] * x["b"][:, 0].repeat_interleave(4, 1)
    close(run(x, state=state).state.memory, write)


def test_steps_without_a_bias_are_taken_as_they_are():
    x = inputs_of()
    steps = {**x, "dt": steps_of(x)}
    del steps["dt_bias"]
    close(run(steps).output, run(x).output)
    close(run(steps, form="reference").output, run(x).output)


def test_scale_multiplies_what_is_read_but_not_the_skip():
    x = inputs_of()
    scaled = {**x, "c": 0.3 * x["c"]}
    close(run(x, scale=0.3).output, run(scaled).output)
    close(run(x, scale=0.3, form="reference").output, run(scaled).output)


def test_strong_decays_stay_finite_with_finite_gradients():
    x = {name: t.float().requires_grad_() for name, t in inputs_of(n=130).items()}
    output = run({**x, "a": x["a"] * 300}).output
    output.square().sum().backward()
    assert output.isfinite().all()
    assert all(t.grad.isfinite().all() for t in x.values())


def test_cross_patterns_refuse_a_skip_and_read_the_absorbed_memory():
    x = inputs_of("noncausal-cross", n=4, m=9)
    with pytest.raises(Unsupported, match="skip"):
        run({**x, "skip": torch.zeros(8, dtype=torch.float64)}, pattern="noncausal-cross")
    expected = run(x, pattern="causal-cross", form="reference").output
    close(run(x, pattern="causal-cross").output, expected)
    state = absorb(MECHANISM, x, pattern="causal-cross")
    close(run({"c": x["c"], "z": x["z"]}, pattern="causal-cross", state=state).output, expected)


def test_groups_that_do_not_divide_the_channels_are_refused():
    x = inputs_of(g=3)
    assert x["x"].shape[-1] == 8
    with pytest.raises(Unsupported, match="3 groups"):
        run(x)


def test_causal_self_with_other_numbers_of_queries_aligns_at_the_end():
    x = inputs_of(n=5, m=9)
    longer = {**x, **{n: torch.cat([torch.zeros(2, 4, *x[n].shape[2:]).double(), x[n]], 1) for n in "cz"}}
    close(run(x).output, run(longer).output[:, 4:])
    close(run(x).output, run(x, form="reference").output)


def recorded_block(f) -> MambaLayer:
    weights = {key.removeprefix("weight_"): t for key, t in f.items() if key.startswith("weight_")}
    rank, states = weights["dt_proj_weight"].shape[1], weights["A_log"].shape[1]
    layer = create_layer("mamba", f["x"].shape[-1], d_state=states, dt_rank=rank).double()
    layer.load_state_dict(
        {
            "A_log": weights["A_log"],
            "D": weights["D"],
            "dt_bias": weights["dt_proj_bias"],
            "in_proj.weight": weights["in_proj_weight"],
            "conv.weight": weights["conv1d_weight"][:, 0],
            "conv.bias": weights["conv1d_bias"],
            "x_proj.weight": weights["x_proj_weight"],
            "dt_proj.weight": weights["dt_proj_weight"],
            "out_proj.weight": weights["out_proj_weight"],
        }
    )
    return layer


@pytest.mark.parametrize("name", ["mamba_block", "mamba_block_left_padded"])
def test_parity_of_the_block(name):
    """At valid places; where the recorded code writes into padding it is not followed."""
    f = load(name)
    layer = recorded_block(f)
    valid = f.get("attention_mask", torch.ones(f["x"].shape[:2], dtype=torch.bool))
    poisoned = torch.where(valid[..., None], f["x"], float("nan")).requires_grad_()
    output = layer(poisoned, context=Context(mask=Mask(valid=valid))).output
    close(output[valid], f["out"][valid], 1e-10)  # observed up to 2e-16
    assert (output[~valid] == 0).all()
    (output * torch.where(valid[..., None], f["grad_out"], 0)).sum().backward()
    if valid.all():
        close(poisoned.grad, f["grad_x"], 1e-10)  # observed 3e-16
    assert (poisoned.grad[~valid] == 0).all()


def test_parity_of_decoding_after_a_prefix():
    f = load("mamba_block")
    layer = recorded_block(f)
    state = layer(f["x"], context=WANT_STATE).state
    close(state.mechanism.memory, f["state"], 1e-10)  # observed 3e-16
    close(state.convolutions[0].mT, f["conv_state"][..., 1:], 1e-10)  # observed 0; the recorded has one more
    for t in range(f["step_x"].shape[1]):
        output, state = layer.step(f["step_x"][:, t], state)
        close(output, f["step_out"][:, t], 1e-10)  # observed up to 5e-16


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
    """No step is taken in the padding: neither softplus(dt_bias) nor the convolution's bias gets into the state."""
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


def test_packed_documents_start_from_an_empty_state_and_convolution():
    layer = make_layer()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    packed = layer(x, context=Context(mask=Mask(cu_seqlens=torch.tensor([0, 4, 4, 9])))).output
    close(packed[:, :4], layer(x[:, :4]).output)
    close(packed[:, 4:], layer(x[:, 4:]).output)


@pytest.mark.parametrize("pattern", ["noncausal-cross", "causal-cross"])
@pytest.mark.parametrize("options", [{}, {"constant": ("dt", "C")}, {"constant": ("C",), "gate": False}], ids=str)
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


def test_noncausal_block_sees_both_sides_and_its_convolution_is_centred():
    layer = make_layer("noncausal-self", conv_width=3)
    layer.A_log.data.fill_(50.0)  # a decay that forgets everything: only the convolution reaches other tokens
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    base = layer(x).output
    changed = x.clone()
    changed[:, 4] += 1
    moved = (layer(changed).output - base).abs().amax((0, 2)) > 1e-9
    assert moved.nonzero().flatten().tolist() == [3, 4, 5]


def test_skip_is_added_before_the_gate_and_x_precedes_z():
    layer = make_layer(conv_width=0)
    layer.dt_bias.data.fill_(-100.0)  # no step: nothing is written
    layer.dt_proj.weight.data.zero_()
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    inner, z = F.silu(x @ layer.in_proj.weight[:32].mT), x @ layer.in_proj.weight[32:].mT
    close(layer(x).output, (layer.D * inner * F.silu(z)) @ layer.out_proj.weight.mT)


def block_by_hand(layer: MambaLayer, u: torch.Tensor) -> torch.Tensor:
    """The block as the paper has it, token by token, from the layer's parameters."""
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

    def norm(y):
        parts = y.unflatten(-1, (config.groups, -1))
        return (parts * (parts.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(-2) * layer.norm.weight

    if config.norm_before_gate:
        y = norm(y)
    y = y * F.silu(z) if config.gate else y
    if config.norm and not config.norm_before_gate:
        y = norm(y)
    return y @ layer.out_proj.weight.mT


@pytest.mark.parametrize("options", [*OPTIONS, {"norm": True, "groups": 4}], ids=str)
def test_the_block_equals_its_definition_with_every_option(options):
    layer = make_layer(**options)
    u = 3 * torch.randn(2, 11, 16, dtype=torch.float64)
    close(layer(u).output, block_by_hand(layer, u))


def test_without_selection_the_layer_is_linear_and_time_invariant_between_its_nonlinearities():
    """S4D-real, the control: y of the core is a convolution of its input."""
    layer = make_layer(constant=("dt", "B", "C"), conv_width=0, gate=False, skip=False)
    assert layer.x_proj is None
    assert layer.dt_proj is None
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    dt, a = F.softplus(layer.dt_bias), -layer.A_log.exp()
    time = torch.arange(12, dtype=torch.float64)[:, None, None]
    inner = layer.constants["B"][0] * layer.constants["C"][0]
    kernel = ((time * dt[:, None] * a).exp() * inner).sum(-1) * dt  # (n, e)
    u = F.silu(layer.in_proj(x))
    y = torch.stack([(kernel[: t + 1].flip(0) * u[:, : t + 1]).sum(1) for t in range(12)], 1)
    close(layer(x).output, y @ layer.out_proj.weight.mT)


def test_initial_values():
    torch.manual_seed(0)
    layer = create_layer("mamba", 256)
    dt, a = F.softplus(layer.dt_bias).detach(), -layer.A_log.detach().exp()
    assert float(dt.min()) >= 1e-3 * 0.99 and float(dt.max()) <= 0.1 * 1.01
    assert float(dt.max()) > 0.05 and float(dt.min()) < 0.002  # the whole range is used
    torch.testing.assert_close(a, -torch.arange(1.0, 17.0).expand(512, 16))
    assert (layer.D == 1).all()
    bound = layer.dt_proj.weight.abs().max() * math.sqrt(16)
    assert 0.9 < bound <= 1
    scalar = create_layer("mamba", 256, scalar_a=True).A_log.detach().exp()
    assert scalar.shape == (512, 1)
    assert float(scalar.min()) >= 1 and float(scalar.max()) <= 16


def test_the_bias_of_the_steps_survives_a_pass_that_zeroes_biases():
    model = LanguageModel(LanguageModelConfig(50, dim=32, num_heads=2, plan="mamba", num_layers=1))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and not name.endswith("dt_bias"):
            torch.nn.init.zeros_(parameter)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.zeros_(module.bias)
    (layer,) = [m for m in model.modules() if isinstance(m, MambaLayer)]
    dt = F.softplus(layer.dt_bias).detach()
    assert 1e-3 * 0.99 <= float(dt.min()) <= float(dt.max()) <= 0.1 * 1.01


def test_parameter_count():
    dim, states, rank, width = 32, 16, 2, 4
    inner = 2 * dim
    layer = create_layer("mamba", dim)
    expected = dim * 2 * inner + inner * (width + 1) + inner * (rank + 2 * states)
    expected += rank * inner + inner + inner * states + inner + inner * dim
    assert sum(p.numel() for p in layer.parameters()) == expected


def test_time_constants_keep_float32_and_have_no_weight_decay():
    layer = create_layer("mamba", 16, d_state=8)
    before = {name: getattr(layer, name).detach().clone() for name in layer.FLOAT32}
    layer = layer.to(torch.bfloat16)
    for name, value in before.items():
        parameter = getattr(layer, name)
        assert parameter.dtype == torch.float32 and torch.equal(parameter, value)
        assert parameter._no_weight_decay
    assert layer.in_proj.weight.dtype == torch.bfloat16
    result = layer(torch.randn(1, 5, 16).bfloat16(), context=WANT_STATE)
    assert result.output.dtype == torch.bfloat16 and result.output.isfinite().all()
    assert result.state.mechanism.memory.dtype == torch.float32
    assert layer.double().A_log.dtype == torch.float64


def test_output_is_as_long_as_the_input_whatever_the_convolution():
    for width in (1, 2, 4, 7):
        for n in (0, 1, 3, 20):
            assert make_layer(conv_width=width)(torch.randn(2, n, 16).double()).output.shape == (2, n, 16)


def test_state_is_constant_in_the_length():
    assert MECHANISM.recurrent
    layer = make_layer()
    sizes = {layer(torch.randn(1, n, 16).double(), context=WANT_STATE).state.nbytes for n in (1, 3, 50)}
    assert len(sizes) == 1


@pytest.mark.parametrize("pattern", list(Pattern))
def test_every_projection_can_be_of_another_kind(pattern):
    layer = create_layer("mamba", 16, pattern=pattern, linear="token_parameter")
    memory = torch.randn(2, 5, 16) if Pattern(pattern).cross else None
    assert layer(torch.randn(2, 6, 16), memory).output.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"constant": ("x",)},
        {"d_state": 0},
        {"dt_rank": 0},
        {"conv_width": -1},
        {"dt_limit": (1.0, 0.5)},
        {"dt_init": (0.0, 0.1)},
        {"expand": -1.0},
        {"expand": 0.01},
        {"norm_before_gate": True},
        {"norm": True, "norm_before_gate": True, "gate": False},
        {"groups": 3},
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
