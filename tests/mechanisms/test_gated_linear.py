"""What is peculiar to gated linear attention: its special cases, strong gates, its layer, and recorded official outputs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regard.apply import absorb, apply
from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Context, Mask, Pattern, Unsupported
from regard.create import create_layer
from regard.engines.recurrent_forms import MatrixState
from regard.functional import gated_linear_attention
from regard.layers.parts import LayerCall
from regard.mechanisms.gated_linear import MECHANISM, Config, sample_inputs

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
WANT_STATE = Context(want=frozenset({"state"}))
VARIANTS = {
    "diagonal": {},
    "scalar": {"feature_map": "elu"},
    "none": {"feature_map": "silu"},
    "values": {},
    "values alone": {"feature_map": "relu"},
    "clamped": {"clamp_min": -0.5},
}


def inputs_of(variant: str = "diagonal", n: int = 21, m: int | None = None, *, seed: int = 0, **sizes: int):
    generator = torch.Generator().manual_seed(seed)
    m = n if m is None else m
    tensors = sample_inputs(generator, batch=2, n=n, m=m, dtype=torch.float64, sizes=sizes)
    if variant in ("none", "values alone"):
        del tensors["log_decay"]
    if variant == "scalar":
        tensors["log_decay"] = tensors["log_decay"][..., :1]
    if variant in ("values", "values alone", "clamped"):
        tensors["value_log_decay"] = -F.softplus(2 * torch.randn(tensors["v"].shape, generator=generator).double())
    return tensors


def run(tensors, pattern="causal-self", options=None, **call):
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**(options or {})), **call)


def cut(tensors, part: slice):
    return {name: x[:, :, part] for name, x in tensors.items()}


def assert_close(found, expected, tolerance=1e-12):
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.mark.parametrize("pattern", [p.value for p in ALL_PATTERNS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_form_of_every_variant_equals_the_recurrence(variant, pattern):
    options = VARIANTS[variant]
    tensors = inputs_of(variant, 21, 26 if "cross" in pattern else None)
    expected = run(tensors, pattern, options, form="reference").output
    forms = {"causal-self": ("parallel", "chunked"), "noncausal-self": ("parallel",)}.get(
        pattern, ("parallel", "absorb+read")
    )
    for form in forms:
        for chunk_size in (1, 4, 16, 64):
            assert_close(run(tensors, pattern, options, form=form, chunk_size=chunk_size).output, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_split_and_resume_and_single_steps_equal_the_whole(variant):
    options, tensors = VARIANTS[variant], inputs_of(variant)
    whole = run(tensors, options=options, return_state=True)
    first = run(cut(tensors, slice(0, 9)), options=options, return_state=True)
    rest = run(cut(tensors, slice(9, None)), options=options, state=first.state)
    assert_close(torch.cat([first.output, rest.output], 2), whole.output)
    assert_close(rest.state.memory, whole.state.memory)
    outputs, state = [first.output], first.state
    for t in range(9, 21):
        result = run(cut(tensors, slice(t, t + 1)), options=options, state=state, form="step")
        outputs.append(result.output)
        state = result.state
    assert_close(torch.cat(outputs, 2), whole.output)
    assert_close(state.memory, whole.state.memory)
    assert state.memory.shape == (2, 2, 8, 6)
    assert state.length.tolist() == [21, 21]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pattern", [p.value for p in ALL_PATTERNS])
def test_padding_changes_nothing_though_feature_maps_of_zero_may_not_be_zero(variant, pattern):
    options = VARIANTS[variant]
    tensors = inputs_of(variant, 12)
    lengths = torch.tensor([12, 7])
    masks = {"mask": Mask(lengths=lengths)} | ({"memory_mask": Mask(lengths=lengths)} if "cross" in pattern else {})
    found = run(tensors, pattern, options, **masks).output
    alone = run({n: x[1:, :, :7] for n, x in tensors.items()}, pattern, options).output
    assert_close(found[1:, :, :7], alone)
    assert (found[1, :, 7:] == 0).all()


def test_without_decay_it_is_cumulative_linear_attention():
    tensors = inputs_of("none", 17)
    q, k, v = tensors.values()
    expected = (q @ k.mT * 8**-0.5).tril() @ v
    assert_close(run(tensors).output, expected)
    assert_close(run({**tensors, "log_decay": torch.zeros_like(k)}).output, expected)


def test_a_constant_scalar_gate_is_retention():
    tensors, gamma = inputs_of("none", 17), 0.83
    q, k, v = tensors.values()
    age = (torch.arange(17)[:, None] - torch.arange(17)).double()
    expected = ((q @ k.mT * 8**-0.5).tril() * gamma ** age.clamp(min=0)) @ v
    log_decay = torch.full_like(k[..., :1], math.log(gamma))
    assert_close(run({**tensors, "log_decay": log_decay}).output, expected)
    assert_close(run({**tensors, "log_decay": log_decay.expand_as(k)}).output, expected)


def test_gates_of_minus_fifty_leave_the_current_token_only():
    tensors = inputs_of("none", 70)
    q, k, v = tensors.values()
    expected = 8**-0.5 * (q * k).sum(-1, keepdim=True) * v
    for gate in (-50.0, -1e4, -math.inf):
        for width in (1, 8):
            log_decay = torch.full((2, 2, 70, width), gate, dtype=torch.float64)
            assert_close(run({**tensors, "log_decay": log_decay}).output, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_infinite_gate_starts_a_new_sequence_with_finite_gradients(dtype):
    tensors = {n: x.to(dtype) for n, x in inputs_of("diagonal", 40).items()}
    tensors["log_decay"][:, :, 13] = -math.inf
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    whole = run(leaves, chunk_size=16).output
    assert_close(whole[:, :, 13:], run(cut(tensors, slice(13, None))).output, 1e-12 if dtype == torch.float64 else 2e-6)
    whole.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves.values())
    assert (leaves["log_decay"].grad[:, :, 13] == 0).all()


def test_strong_gates_keep_float32_precise():
    tensors = inputs_of("diagonal", 200)
    g = tensors["log_decay"]
    tensors["log_decay"] = torch.where(torch.rand(g.shape, generator=torch.Generator().manual_seed(1)) < 0.3, -50.0, g)
    single = {n: x.float() for n, x in tensors.items()}
    expected = run({n: x.double() for n, x in single.items()}, form="reference").output
    found = run(single).output.double()
    # observed 8e-8; differences of cumulative sums give 1e-5 here
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_four_thousand_steps_of_minus_one_are_finite_and_equal_the_recurrence(dtype):
    tensors = {n: x.to(dtype) for n, x in inputs_of("diagonal", 4096, k=4, v=3).items()}
    tensors["log_decay"] = torch.full_like(tensors["log_decay"], -1.0)
    result = run(tensors, return_state=True)
    # exp(-1) per token: all but the last 64 tokens have faded below 1e-27
    last = run(cut(tensors, slice(4096 - 64, None)), form="reference").output[:, :, -1]
    assert_close(result.output[:, :, -1], last, 1e-12 if dtype == torch.float64 else 2e-6)
    assert torch.isfinite(result.output).all() and torch.isfinite(result.state.memory).all()
    assert torch.isinf(torch.exp(-tensors["log_decay"].cumsum(2))).any()  # what a factorised form would compute


def test_gradient_of_gates_is_a_reverse_cumulative_sum():
    tensors = {n: x.requires_grad_() for n, x in inputs_of("diagonal", 33).items()}
    output = run(tensors, chunk_size=8).output
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    q, k, g = tensors["q"], tensors["k"], tensors["log_decay"]
    difference = (q * q.grad - k * k.grad).detach()
    assert_close(g.grad, difference.flip(2).cumsum(2).flip(2), 1e-11)


@pytest.mark.parametrize("variant", ["diagonal", "scalar", "values"])
def test_gradcheck_through_states(variant):
    generator = torch.Generator().manual_seed(0)
    sizes = {"h": 2 if variant == "diagonal" else 1, "k": 3, "v": 4, "l": 1 if variant == "scalar" else 3}
    tensors = sample_inputs(generator, batch=1, n=7, m=7, dtype=torch.float64, sizes=sizes)
    if variant == "values":
        tensors["value_log_decay"] = -torch.rand(1, 1, 7, 4, generator=generator, dtype=torch.float64)
    start = torch.randn(1, sizes["h"], 3, 4, generator=generator, dtype=torch.float64)
    names = list(tensors)

    def function(memory, *inputs):
        state = MatrixState(memory, torch.zeros(1, dtype=torch.long))
        result = run(dict(zip(names, inputs, strict=True)), state=state, chunk_size=3)
        return result.output, result.state.memory

    leaves = [x.requires_grad_() for x in (start, *tensors.values())]
    assert torch.autograd.gradcheck(function, leaves)


def test_noncausal_counts_a_token_once_and_reads_backwards_before_the_write():
    tensors = inputs_of("diagonal", 9)
    flipped = {n: x.flip(2) for n, x in tensors.items()}
    own = 8**-0.5 * (tensors["q"] * tensors["k"]).sum(-1, keepdim=True) * tensors["v"]
    expected = run(tensors).output + run(flipped).output.flip(2) - own
    assert_close(run(tensors, "noncausal-self").output, expected)


def test_order_of_earlier_tokens_matters_where_gates_differ():
    tensors = inputs_of("diagonal", 9)
    order = torch.tensor([2, 0, 1, 3, 4, 5, 6, 7, 8])
    permuted = {n: x[:, :, order] for n, x in tensors.items()}
    assert (run(tensors).output[:, :, 8] - run(permuted).output[:, :, 8]).abs().max() > 1e-3
    plain = {n: x for n, x in tensors.items() if n != "log_decay"}
    assert_close(run(plain).output[:, :, 8], run({n: permuted[n] for n in plain}).output[:, :, 8])


def test_order_of_the_memory_matters_in_cross_patterns_and_later_memory_is_kept_best():
    tensors = inputs_of("diagonal", 5, 11)
    reverse = {n: x if n == "q" else x.flip(2) for n, x in tensors.items()}
    pattern = Pattern.NONCAUSAL_CROSS
    assert (run(tensors, pattern).output - run(reverse, pattern).output).abs().max() > 1e-3


def test_clamping_bounds_what_one_token_forgets():
    tensors = inputs_of("diagonal", 13)
    tensors["log_decay"][:, :, 3] = -math.inf
    clamped = {**tensors, "log_decay": tensors["log_decay"].clamp(min=-0.7)}
    assert_close(run(tensors, options={"clamp_min": -0.7}).output, run(clamped).output)


def test_queries_are_scaled_once_after_the_feature_map():
    tensors = inputs_of("none", 6)
    q, k, v = tensors.values()
    expected = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT * 8**-0.5).tril() @ v
    assert_close(run(tensors, options={"feature_map": "elu"}).output, expected)
    assert_close(run(tensors, options={"feature_map": "elu"}, scale=1.0).output, expected * 8**0.5)


def test_groups_of_queries_share_keys_and_gates():
    tensors = inputs_of("diagonal", 10, h=2)
    queries = torch.randn(2, 6, 10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    repeated = {n: x.repeat_interleave(3, 1) for n, x in tensors.items() if n != "q"}
    assert_close(run({**tensors, "q": queries}).output, run({"q": queries, **repeated}, form="reference").output)


def test_functions_take_the_gate_as_fourth_argument_and_refuse_another_width():
    tensors = inputs_of("diagonal", 6)
    assert_close(gated_linear_attention(*tensors.values()), run(tensors).output)
    with pytest.raises(Unsupported, match="log_decay with 4 features"):
        run({**tensors, "log_decay": tensors["log_decay"][..., :4]})


@pytest.mark.parametrize("name", ["gated_linear_recurrent", "gated_linear_initial_state", "gated_linear_strong_gates"])
@pytest.mark.parametrize("form", ["chunked", "step"])
def test_parity_with_recorded_official_outputs(name, form):
    recorded = load(name)
    tensors = {n: recorded[n].requires_grad_() for n in ("q", "k", "v", "log_decay")}
    start = recorded.get("initial_state", torch.zeros_like(recorded["state"])).requires_grad_()
    state = MatrixState(start, torch.zeros(2, dtype=torch.long))
    if form == "chunked":
        result = run(tensors, state=state, chunk_size=8)
        output = result.output
    else:
        outputs = []
        for t in range(tensors["q"].shape[2]):
            result = run(cut(tensors, slice(t, t + 1)), state=state, form="step")
            outputs.append(result.output)
            state = result.state
        output = torch.cat(outputs, 2)
    assert_close(output, recorded["out"], 1e-10)  # observed 5e-16
    assert_close(result.state.memory, recorded["state"], 1e-10)
    loss = (output * recorded["grad_out"]).sum()
    if "grad_state" in recorded:
        loss = loss + (result.state.memory * recorded["grad_state"]).sum()
    loss.backward()
    for leaf in tensors:
        assert_close(tensors[leaf].grad, recorded[f"grad_{leaf}"], 1e-10)  # observed 5e-16
    if "grad_initial_state" in recorded:
        # the official code keeps S_0 in float32, so this gradient was recorded rounded; observed 2e-8
        assert_close(start.grad, recorded["grad_initial_state"], 2e-7)


def layer_of(**options):
    torch.manual_seed(0)
    return create_layer("gla", 64, 4, **options).double()


def test_layer_has_half_width_keys_a_low_rank_gate_of_key_width_and_about_four_squares_of_parameters():
    layer = layer_of()
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters()}
    assert shapes["query.weight"] == shapes["key.weight"] == (32, 64)
    assert shapes["value.weight"] == shapes["gate.weight"] == shapes["output.weight"] == (64, 64)
    assert shapes["output_norm.weight"] == (16,)
    assert [shapes[f"projection.key_gate.{n}"] for n in ("0.weight", "1.weight", "1.bias")] == [
        (16, 64),
        (32, 16),
        (32,),
    ]
    assert sum(math.prod(s) for s in shapes.values()) == 4 * 64**2 + 16 * (64 + 32) + 32 + 16
    assert len(layer.convolutions) == 0 and layer.positions.name == "none"


def test_layer_equals_its_equations_written_out():
    layer, x = layer_of(), torch.randn(2, 11, 64, dtype=torch.float64)

    def heads(y):
        return y.unflatten(-1, (4, -1)).transpose(1, 2)

    down, up = layer.projection.key_gate
    log_decay = heads(F.logsigmoid(up(down(x))) / 16)
    o = run({"q": heads(layer.query(x)), "k": heads(layer.key(x)), "v": heads(layer.value(x)), "log_decay": log_decay})
    normed = o.output * torch.rsqrt(o.output.square().mean(-1, keepdim=True) + 1e-6)
    expected = layer.output(normed.transpose(1, 2).flatten(2) * F.silu(layer.gate(x)))
    assert_close(layer(x).output, expected)


@pytest.mark.parametrize("tau", [1, 16, 32])
def test_normalizer_divides_the_log_sigmoid_so_that_decay_starts_near_a_root_of_one_half(tau):
    layer = layer_of(gate_normalizer=tau)
    z = 0.1 * torch.randn(2, 9, 64, dtype=torch.float64)
    gate = layer.projection.inputs({"k": torch.zeros(2, 4, 9, 8)}, LayerCall(z, z, Context()))["log_decay"]
    assert gate.shape == (2, 4, 9, 8)
    assert (gate.exp() - 2 ** (-1 / tau)).abs().max() < 0.2 / tau


def test_fixed_gates_are_those_of_retention_and_scalar_gates_are_one_a_head():
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    heads = {"k": torch.zeros(2, 4, 9, 8, dtype=torch.float64)}
    fixed = layer_of(gate="fixed").projection.inputs(dict(heads), LayerCall(x, x, Context()))["log_decay"]
    assert_close(fixed[0, :, 0, 0].exp(), torch.tensor([1 - 2.0 ** -(5 + h) for h in range(4)], dtype=torch.float64))
    assert (
        fixed.shape
        == layer_of(gate="scalar").projection.inputs(dict(heads), LayerCall(x, x, Context()))["log_decay"].shape
    )
    assert "log_decay" not in layer_of(gate="none").projection.inputs(dict(heads), LayerCall(x, x, Context()))


@pytest.mark.parametrize("gate", ["diagonal", "scalar", "fixed"])
def test_gates_stay_in_float32_in_a_bfloat16_layer(gate):
    layer = layer_of(gate=gate).bfloat16()
    x, k = torch.zeros(1, 3, 64, dtype=torch.bfloat16), torch.zeros(1, 4, 3, 8, dtype=torch.bfloat16)
    log_decay = layer.projection.inputs({"k": k}, LayerCall(x, x, Context()))["log_decay"]
    assert log_decay.dtype == torch.float32
    if gate == "fixed":
        exact = torch.log1p(-(2.0 ** -torch.arange(5, 9)))
        assert_close(log_decay[0, :, 0, 0], exact, 1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "scalar"},
        {"gate": "fixed"},
        {"gate": "none"},
        {"value_gate": True},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "value_gate": True},
        {"short_convolution": 4},
        {"feature_map": "elu", "positions": "rotary"},
    ],
)
def test_layer_decodes_token_by_token_with_padded_rows(options):
    layer, x = layer_of(**options), torch.randn(2, 12, 64, dtype=torch.float64)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, [0, 4]] = False  # padding left and inside
    prompt = x[:, :8].masked_fill(~valid[..., None], torch.nan)
    start = layer(prompt, context=WANT_STATE.replace(mask=Mask(valid=valid)))
    outputs, state = [], start.state
    for t in range(8, 12):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
    row = torch.cat([x[1, :8][valid[1]], x[1, 8:]])[None]
    assert_close(torch.stack(outputs, 1)[:1], layer(x[:1]).output[:, 8:])
    assert_close(torch.stack(outputs, 1)[1:], layer(row).output[:, 6:])


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"num_kv_heads": 2, "value_gate": True, "gate": "none"}])
def test_layer_absorbs_memory_in_pieces(options):
    layer = layer_of(pattern="causal-cross", memory_dim=48, **options)
    x, memory = torch.randn(2, 5, 64, dtype=torch.float64), torch.randn(2, 9, 48, dtype=torch.float64)
    expected = layer(x, memory).output
    state = layer.encode_memory(memory[:, 4:], state=layer.encode_memory(memory[:, :4]))
    assert_close(layer(x, state=state).output, expected)
    assert state.mechanism.memory.shape == (2, 4, 8, 16)


def test_absorbing_from_keys_with_fewer_heads_needs_the_heads_of_the_queries():
    tensors = inputs_of("diagonal", 5, 9)
    q = torch.randn(2, 4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    state = absorb(MECHANISM, {n: x for n, x in tensors.items() if n != "q"}, pattern="causal-cross", heads=4)
    expected = run({**tensors, "q": q}, "causal-cross").output
    assert_close(run({"q": q}, "causal-cross", state=state).output, expected)


def test_autocast_does_not_reach_the_state():
    tensors = {n: x.float() for n, x in inputs_of("diagonal", 30).items()}
    plain = run(tensors, return_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(tensors, return_state=True)
        stepped = run(cut(tensors, slice(0, 1)), state=plain.state, form="step")
    assert torch.equal(found.output, plain.output) and torch.equal(found.state.memory, plain.state.memory)
    assert torch.equal(stepped.output, run(cut(tensors, slice(0, 1)), state=plain.state, form="step").output)


def test_layer_widths_that_do_not_divide_are_refused_with_the_nearest():
    with pytest.raises(Unsupported, match="head_dim=1"):
        create_layer("gla", 12, 4)
    layer = create_layer("gla", 12, 4, head_dim=5)
    assert (layer.head_dim, layer.value_dim) == (5, 3)
    assert create_layer("gla", 16, 4, key_expand=1.0, value_expand=2.0)(torch.randn(1, 3, 16)).output.shape == (
        1,
        3,
        16,
    )


def test_options_are_checked():
    for options in (
        {"feature_map": "cosine"},
        {"gate": "dense"},
        {"gate_rank": 0},
        {"clamp_min": 0.1},
        {"clamp_min": math.nan},
        {"gate_normalizer": 0.0},
    ):
        with pytest.raises(Unsupported):
            MECHANISM.options(**options)
    assert get_mechanism("gla") is MECHANISM
