"""Tests specific to the delta rule: overwriting stored values, its transitions, its layer, and recorded outputs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support import calls, close, cut, in_pieces, load, refused
from torch import Tensor

from regard.contract import Context, LayerCall
from regard.create import create_layer
from regard.engines.gated_recurrence import gated_recurrence
from regard.engines.recurrent_forms import MatrixState
from regard.mechanisms.delta_rule import MECHANISM, Config, sample_inputs

RAW = {"normalize_queries": False, "normalize_keys": False}

run = calls(MECHANISM)


def inputs_of(options: dict | None = None, n: int = 21, batch: int = 2, **sizes: int) -> dict[str, Tensor]:
    made = {"batch": batch, "n": n, "m": n, "dtype": torch.float64, "sizes": sizes}
    return sample_inputs(torch.default_generator, config=Config(**(options or {})), **made)


def tokens(tensors: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return cut(tensors, part, tuple(tensors))


def state_of(memory: Tensor) -> MatrixState:
    return MatrixState(memory, torch.zeros(memory.shape[0], dtype=torch.long))


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def written(k: Tensor, v: Tensor, beta: Tensor | None = None, state: Tensor | None = None) -> Tensor:
    """The state S after the raw keys and values of one batch row and head, (K, V)."""
    tensors = {"q": k, "k": k, "v": v} | ({} if beta is None else {"beta": beta})
    tensors = {name: x[None, None] for name, x in tensors.items()}
    start = None if state is None else state_of(state[None, None])
    return run(tensors, RAW, state=start, return_state=True).state.memory[0, 0]


# What a write does


def test_orthonormal_keys_are_recalled_exactly_and_rewriting_one_leaves_the_others():
    k = torch.linalg.qr(unit(8, 8))[0]
    v = torch.randn(8, 5, dtype=torch.float64)
    memory = written(k, v)
    close(k @ memory, v)
    new = torch.ones(1, 5, dtype=torch.float64)
    memory = written(k[3:4], new, state=memory)
    close(k @ memory, torch.cat([v[:3], new, v[4:]]))


def test_one_key_written_again_and_again_is_an_exponential_moving_average():
    rate, t = 0.3, 11
    k, v = unit(1, 6), torch.ones(1, 4, dtype=torch.float64)
    memory = written(k.expand(t, -1), v.expand(t, -1), torch.full((t,), rate, dtype=torch.float64))
    close(k @ memory, (1 - (1 - rate) ** t) * v)


def test_the_last_value_under_a_key_wins_where_linear_attention_adds_them_up():
    k, v = unit(1, 6).expand(4, -1), torch.randn(4, 3, dtype=torch.float64)
    close(k[:1] @ written(k, v), v[-1:])
    assert (k[:1] @ (k.mT @ v) - v[-1:]).abs().max() > 0.1
    memory = {"q": k[None, None, :1], "k": k[None, None], "v": v[None, None]}
    close(run(memory, RAW, pattern="noncausal-cross", scale=1.0).output[0, 0], v[-1:])


def test_without_writes_queries_read_the_first_state():
    tensors, start = inputs_of(n=6), torch.randn(2, 2, 8, 6, dtype=torch.float64)
    tensors["beta"] = torch.zeros_like(tensors["beta"])
    result = run(tensors, RAW, state=state_of(start))
    close(result.output, 8**-0.5 * tensors["q"] @ start)
    assert torch.equal(result.state.memory, start)


def test_noncausal_counts_a_token_once_and_reads_backwards_before_the_write():
    tensors = inputs_of(n=7)
    flipped = {name: x.flip(2) for name, x in tensors.items()}
    backward = []
    for t in range(7):  # the state written by the tokens after t, in reverse order
        state = run(tokens(flipped, slice(0, 6 - t)), return_state=True).state.memory
        q = tensors["q"][:, :, t, None]
        backward.append(8**-0.5 * q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt() @ state)
    expected = run(tensors).output + torch.cat(backward, 2)
    close(run(tensors, pattern="noncausal-self").output, expected)


# Transitions


@pytest.mark.parametrize("chunk_size", [4, 64])
def test_transitions_are_the_product_of_householder_matrices(chunk_size):
    n, eye = 13, torch.eye(6, dtype=torch.float64)
    k, beta = unit(n, 6), 2 * torch.rand(n, dtype=torch.float64)

    def transition(beta: Tensor) -> Tensor:
        x = (k[None, None], torch.zeros(1, 1, n, 6, dtype=torch.float64), None, beta[None, None])
        return gated_recurrence(None, *x, state=eye[None, None], chunk_size=chunk_size)[1][0, 0]

    product = eye
    for t in range(n):
        product = (eye - beta[t] * torch.outer(k[t], k[t])) @ product
    close(transition(beta), product)
    assert torch.linalg.matrix_norm(product, 2) <= 1 + 1e-12
    reflections = transition(torch.full_like(beta, 2.0))
    close(reflections @ reflections.mT, eye)
    assert torch.linalg.det(reflections).item() == pytest.approx((-1) ** n)


def test_negative_eigenvalues_track_the_parity_of_a_bit_string():
    bits = torch.randint(2, (1, 1, 200))
    k = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1, 200, 2)
    start = state_of(torch.tensor([[[[1.0], [0.0]]]], dtype=torch.float64))
    tensors = {"q": k, "k": k, "v": torch.zeros(1, 1, 200, 1, dtype=torch.float64)}

    def signs(rate: float) -> Tensor:
        return run({**tensors, "beta": rate * bits.double()}, RAW, state=start, scale=1.0).output[..., 0]

    close(signs(2.0), 1.0 - 2.0 * (bits.cumsum(-1) % 2).double())
    assert (signs(0.99)[..., 100:].abs() < 1e-12).all()  # with beta < 1 the parity fades


# Options


def test_unit_keys_stay_finite_where_raw_keys_explode():
    tensors = {name: x.float() for name, x in inputs_of(n=64, k=64).items()}
    tensors["beta"] = torch.ones_like(tensors["beta"])
    assert run(tensors).output.abs().max() < 100
    assert not run(tensors, {"normalize_keys": False}).output.abs().max() < 1e12


@pytest.mark.parametrize(
    ("options", "normalised"),
    [
        ({"feature_map": "silu"}, lambda x: F.silu(x) / (F.silu(x).square().sum(-1, keepdim=True) + 1e-6).sqrt()),
        ({"feature_map": "relu", "norm": "sum"}, lambda x: F.relu(x) / (F.relu(x).sum(-1, keepdim=True) + 1e-6)),
    ],
)
def test_queries_and_keys_are_normalised_after_the_feature_map(options, normalised):
    tensors = inputs_of(n=9)
    by_hand = tensors | {name: normalised(tensors[name]) for name in "qk"}
    close(run(tensors, options).output, run(by_hand, RAW).output)
    zero = {name: torch.zeros_like(x).requires_grad_() for name, x in tensors.items()}
    run(zero, options).output.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in zero.values())


def test_a_beta_is_one_if_not_given_and_refused_where_it_is_not_used():
    tensors = inputs_of(n=9)
    ones = {"beta": torch.ones_like(tensors["beta"])}
    without = {name: x for name, x in tensors.items() if name != "beta"}
    close(run(without).output, run(tensors | ones).output)
    for rates in ({"beta": tensors["beta"]}, {"value_beta": torch.ones_like(tensors["v"])}):
        refused("use_beta", run, without | rates, {"use_beta": False})
    words = "log_decay with 3 features for keys with 8;.* for a gate on each"
    refused(words, run, tensors | {"log_decay": torch.zeros(2, 2, 9, 3)})


def test_the_rate_of_a_vector_beta_belongs_to_its_value_feature():
    tensors = inputs_of({"vector_beta": True}, 9)
    q, k, v, rate = tensors.values()
    columns = [run({"q": q, "k": k, "v": v[..., i : i + 1], "beta": rate[..., i]}).output for i in range(6)]
    close(run(tensors).output, torch.cat(columns, -1))
    half = torch.full_like(rate[..., 0], 0.5)
    close(run({**tensors, "beta": half}).output, run({**tensors, "value_beta": 0.5 * rate}).output)


# Numerics


@pytest.mark.parametrize("form", ["chunked", "reference"])
def test_a_long_sequence_in_float32_keeps_the_published_precision(form):
    options = {"allow_negative_eigenvalues": True}
    single = {name: x.float() for name, x in inputs_of(options, 300, k=16, v=16).items()}
    expected = run({name: x.double() for name, x in single.items()}, options, form="reference").output
    close(run(single, options, form=form).output.double(), expected, 2e-6)  # observed 5e-7 (the loop itself: 2e-7)


# Parity


@pytest.mark.parametrize("name", ["recurrent", "chunkwise", "parallel", "initial_state", "negative_eigenvalues"])
@pytest.mark.parametrize("form", ["chunked", "step"])
def test_parity_with_recorded_official_outputs(name, form):
    recorded = load(f"delta_rule_{name}")
    start = recorded.get("initial_state", torch.zeros(2, 2, 8, 6, dtype=torch.float64)).requires_grad_()
    leaves = {x: recorded[x].requires_grad_() for x in ("q", "k", "v", "beta")}
    n, call = leaves["q"].shape[2], {"form": form, "chunk_size": 8}
    parts = torch.arange(n).split(n if form == "chunked" else 1)
    output, state = in_pieces(lambda p, s: run(tokens(leaves, p), RAW, state=s, **call), parts, state_of(start))
    close(output, recorded["out"], 1e-10)  # observed 6e-16
    if "state" in recorded:
        close(state.memory, recorded["state"], 1e-10)
    if "grad_out" in recorded:
        ends = [(output, recorded["grad_out"])]
        if "grad_state" in recorded:
            ends.append((state.memory, recorded["grad_state"]))
            leaves["initial_state"] = start
        torch.autograd.backward(*zip(*ends, strict=True))
        for x, leaf in leaves.items():
            close(leaf.grad, recorded[f"grad_{x}"], 1e-10)  # observed 6e-16


def test_parity_of_normalised_raw_keys_and_of_the_attention_matrix_on_rated_values():
    recorded = load("delta_rule_parallel")
    tensors = {"q": recorded["q"], "k": recorded["k_raw"], "v": recorded["v"], "beta": recorded["beta"]}
    options = {"normalize_queries": False}
    close(run(tensors, options).output, recorded["out"], 1e-10)
    identity = torch.eye(32, dtype=torch.float64).expand(2, 2, 32, 32)
    # out = A (beta v): with values of 1 / beta at a single token, the output is a column of A
    rates = recorded["beta"][..., None]
    close(run({**tensors, "v": identity / rates}, options).output, recorded["attn"], 1e-10)


def test_parity_with_the_layer_of_kimi_linear():
    modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    config = modeling.KimiLinearConfig(
        hidden_size=24, linear_num_heads=3, linear_head_dim=8, rms_norm_eps=1e-6, num_hidden_layers=1, hidden_act="silu"
    )
    torch.manual_seed(0)
    theirs = modeling.KimiLinearDeltaAttention(config, 0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.4)
    layer = create_layer("delta_rule", 24, 3, gated=True, gate="diagonal", output_gate="sigmoid", output_gate_rank=8)
    gate = theirs.forget_gate
    ours = {
        "query": theirs.q_proj.weight,
        "key": theirs.k_proj.weight,
        "value": theirs.v_proj.weight,
        "output": theirs.o_proj.weight,
        "gate.0": theirs.g_a_proj.weight,
        "gate.1": theirs.g_b_proj.weight,
        "projection.rate": theirs.b_proj.weight,
        "projection.gate.0": gate.f_a_proj.weight,
        "projection.gate.1": gate.f_b_proj.weight,
        "output_norm": theirs.o_norm.weight,
    } | {f"convolutions.{i}": w for i, w in enumerate(theirs.conv1d.weight[:, 0].chunk(3))}
    ours = {f"{name}.weight": weight for name, weight in ours.items()}
    ours |= {"projection.gate_bias": gate.dt_bias, "projection.log_strength": gate.A_log.flatten()}
    layer.load_state_dict(ours)
    x = torch.randn(2, 70, 24)
    exact = copy.deepcopy(layer).double()(x.double()).output
    close(layer(x).output.double(), exact, 2e-6)
    close(theirs(x).double(), exact, 5e-6)  # theirs computes only in float32, and rounds


# The layer


def layer_of(**options):
    return create_layer("deltanet", 64, 4, **options).double()


def test_the_layer_convolves_activates_and_normalises():
    layer, x = layer_of(), torch.randn(2, 11, 64, dtype=torch.float64)
    assert layer.gate is None and layer.positions.name == "none"
    heads = {}
    for name, linear, convolution in zip("qkv", (layer.query, layer.key, layer.value), layer.convolutions, strict=True):
        y = F.silu(F.conv1d(F.pad(linear(x).mT, (3, 0)), convolution.weight[:, None], groups=64)).mT
        y = y.unflatten(-1, (4, 16)).transpose(1, 2)
        heads[name] = y if name == "v" else y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    heads["beta"] = torch.sigmoid(layer.projection.rate(x)).mT
    o = run(heads, RAW, form="reference").output
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6)
    close(layer(x).output, layer.output(o.transpose(1, 2).flatten(2)))


def test_rates_of_the_layer_lie_in_their_range_and_its_decay_starts_slow():
    z = torch.randn(2, 9, 64, dtype=torch.float64)

    def rates(layer, z: Tensor) -> dict[str, Tensor]:
        return layer.projection.inputs({}, LayerCall(z, z, Context()))

    for options, top in (({}, 1.0), ({"allow_negative_eigenvalues": True}, 2.0)):
        beta = rates(layer_of(**options), 30 * z)["beta"]
        assert beta.shape == (2, 4, 9)
        assert 0.9 * top < beta.max() <= top
    layer = layer_of(gated=True)
    start = rates(layer, 0 * z)["log_decay"]
    assert start.shape == (2, 4, 9, 1)
    assert ((start < -1e-3 * 0.99) & (start > -1.6 * 1.01)).all()
    strengths = create_layer("deltanet", 512, 512, gated=True).projection.log_strength.exp()
    assert 1 <= strengths.min() < 1.1 and 15.9 < strengths.max() <= 16
    own = layer.projection
    expected = -own.log_strength.exp() * F.softplus(own.gate(z) + own.gate_bias)
    close(rates(layer, z)["log_decay"][..., 0], expected.mT)
    found = rates(layer.bfloat16(), z.bfloat16())
    assert found["beta"].dtype == found["log_decay"].dtype == torch.float32
