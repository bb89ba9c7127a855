"""What is peculiar to the delta rule: writing over what is stored, its transitions, its layer, and recorded outputs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Context, Mask, Unsupported
from regard.create import create_layer
from regard.engines.gated_recurrence import gated_recurrence
from regard.engines.recurrent_forms import MatrixState
from regard.layers.parts import LayerCall
from regard.mechanisms.delta_rule import MECHANISM, Config, sample_inputs

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
WANT_STATE = Context(want=frozenset({"state"}))
RAW = {"normalize_queries": False, "normalize_keys": False}
VARIANTS = [
    {},
    {"use_beta": False},
    {"feature_map": "elu", "norm": "sum"},
    {"feature_map": "elu", "use_beta": False},
    {"feature_map": "silu", "allow_negative_eigenvalues": True},
    {"feature_map": "relu", "gated": True},
    {"gated": True, "gate": "diagonal"},
    {"vector_beta": True},
    {"vector_beta": True, "gated": True, "allow_negative_eigenvalues": True},
]


def inputs_of(options=None, n: int = 21, m: int | None = None, *, seed: int = 0, batch: int = 2, **sizes: int):
    generator = torch.Generator().manual_seed(seed)
    m = n if m is None else m
    config = Config(**(options or {}))
    return sample_inputs(generator, batch=batch, n=n, m=m, dtype=torch.float64, config=config, sizes=sizes)


def run(tensors, pattern="causal-self", options=None, **call):
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**(options or {})), **call)


def cut(tensors, part: slice):
    return {name: x[:, :, part] for name, x in tensors.items()}


def unit(*shape: int, seed: int = 5):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def written(k, v, beta=None, state=None):
    """S after raw keys and values of one batch row and head, (K, V)."""
    tensors = {"q": k[None, None], "k": k[None, None], "v": v[None, None]}
    if beta is not None:
        tensors["beta"] = beta[None, None]
    if state is not None:
        state = MatrixState(state[None, None], torch.zeros(1, dtype=torch.long))
    return run(tensors, options=RAW, state=state, return_state=True).state.memory[0, 0]


def assert_close(found, expected, tolerance=1e-12):
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.mark.parametrize("pattern", [p.value for p in ALL_PATTERNS])
@pytest.mark.parametrize("options", VARIANTS)
def test_every_form_of_every_variant_equals_the_recurrence(options, pattern):
    tensors = inputs_of(options, 21, 26 if "cross" in pattern else None)
    expected = run(tensors, pattern, options, form="reference").output
    forms = {"causal-self": ("parallel", "chunked"), "noncausal-self": ("parallel",)}.get(
        pattern, ("parallel", "absorb+read")
    )
    for form in forms:
        for chunk_size in (1, 8, 16, 64):
            assert_close(run(tensors, pattern, options, form=form, chunk_size=chunk_size).output, expected)


@pytest.mark.parametrize("options", VARIANTS)
def test_split_and_resume_and_single_steps_equal_the_whole(options):
    tensors = inputs_of(options)
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
    assert state.length.tolist() == [21, 21]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("pattern", [p.value for p in ALL_PATTERNS])
def test_padding_neither_writes_nor_erases(options, pattern):
    tensors = inputs_of(options, 12)
    lengths = torch.tensor([12, 7])
    masks = {"mask": Mask(lengths=lengths)} | ({"memory_mask": Mask(lengths=lengths)} if "cross" in pattern else {})
    found = run(tensors, pattern, options, **masks).output
    alone = run({n: x[1:, :, :7] for n, x in tensors.items()}, pattern, options).output
    assert_close(found[1:, :, :7], alone)
    assert (found[1, :, 7:] == 0).all()
    if pattern == "causal-self":
        state = run(tensors, pattern, options, return_state=True, **masks).state
        short = {n: x[1:, :, :7] for n, x in tensors.items()}
        assert_close(state.memory[1:], run(short, pattern, options, return_state=True).state.memory)


def test_documents_packed_into_a_row_are_not_coupled_by_the_triangular_system():
    tensors = inputs_of(n=20, batch=1)
    borders = torch.tensor([0, 7, 7, 20])
    packed = run(tensors, mask=Mask(cu_seqlens=borders)).output
    separate = [run(cut(tensors, slice(0, 7))).output, run(cut(tensors, slice(7, 20))).output]
    assert_close(packed, torch.cat(separate, 2))


def test_orthonormal_keys_are_recalled_exactly_and_rewriting_one_leaves_the_others():
    k = torch.linalg.qr(unit(8, 8))[0]
    v = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    memory = written(k, v)
    assert_close(k @ memory, v)
    new = torch.ones(1, 5, dtype=torch.float64)
    memory = written(k[3:4], new, state=memory)
    assert_close(k @ memory, torch.cat([v[:3], new, v[4:]]))


def test_one_key_written_again_and_again_is_an_exponential_moving_average():
    rate, t = 0.3, 11
    k, v = unit(1, 6), torch.ones(1, 4, dtype=torch.float64)
    memory = written(k.expand(t, -1), v.expand(t, -1), torch.full((t,), rate, dtype=torch.float64))
    assert_close(k @ memory, (1 - (1 - rate) ** t) * v)


def test_without_writes_queries_read_the_first_state():
    tensors = inputs_of(n=6)
    tensors["beta"] = torch.zeros_like(tensors["beta"])
    start = torch.randn(2, 2, 8, 6, dtype=torch.float64)
    result = run(tensors, options=RAW, state=MatrixState(start, torch.zeros(2, dtype=torch.long)))
    assert_close(result.output, 8**-0.5 * tensors["q"] @ start)
    assert torch.equal(result.state.memory, start)


def test_repeated_keys_tell_it_from_linear_attention():
    k = unit(1, 6).expand(4, -1)
    v = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close(k[:1] @ written(k, v), v[-1:])  # the last value wins
    assert (k[:1] @ (k.mT @ v) - v[-1:]).abs().max() > 0.1  # linear attention adds them up


def test_the_prediction_uses_the_state_before_the_write_and_the_output_the_state_after():
    tensors = inputs_of(n=1)
    q, k, v, beta = tensors.values()
    expected = 8**-0.5 * (q * k).sum(-1, keepdim=True) * beta[..., None] * v
    assert_close(run(tensors, options=RAW).output, expected)


@pytest.mark.parametrize("chunk_size", [4, 64])
def test_transitions_are_the_product_of_householder_matrices(chunk_size):
    n = 13
    k = unit(1, 1, n, 6)
    beta = 2 * torch.rand(1, 1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    eye = torch.eye(6, dtype=torch.float64)
    product = eye
    for t in range(n):
        product = (eye - beta[0, 0, t] * torch.outer(k[0, 0, t], k[0, 0, t])) @ product
    start = eye[None, None]
    _, memory = gated_recurrence(
        None, k, torch.zeros(1, 1, n, 6).double(), None, beta, state=start, chunk_size=chunk_size
    )
    assert_close(memory[0, 0], product)
    _, memory = gated_recurrence(
        None, k, torch.zeros(1, 1, n, 6).double(), None, torch.full_like(beta, 2.0), state=start
    )
    assert_close(memory[0, 0] @ memory[0, 0].mT, eye)
    assert torch.linalg.det(memory[0, 0]).item() == pytest.approx((-1) ** n)


def test_a_token_that_comes_several_times_writes_several_keys():
    """The state goes on by a product of Householder matrices for each token, and decays once."""
    keys, n, width = 3, 5, 6
    x = inputs_of({"allow_negative_eigenvalues": True, "gated": True}, keys * n)
    decay = torch.where(torch.arange(keys * n)[:, None] % keys == 0, x["log_decay"], 0.0)
    x |= {"q": x["q"][:, :, ::keys].repeat_interleave(keys, 2), "log_decay": decay}
    options = {**RAW, "gated": True, "allow_negative_eigenvalues": True}
    found = run(x, options=options).output[:, :, keys - 1 :: keys]
    memory, eye = torch.zeros(2, 2, 8, width, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
    for t in range(n):
        memory = memory * x["log_decay"][:, :, keys * t].exp()[..., None]
        for i in range(keys * t, keys * (t + 1)):
            k, v, beta = x["k"][:, :, i], x["v"][:, :, i], x["beta"][:, :, i, None, None]
            memory = (eye - beta * k[..., None] * k[..., None, :]) @ memory + beta * k[..., None] * v[..., None, :]
        assert_close(found[:, :, t], (x["q"][:, :, keys * t, None] * 8**-0.5 @ memory)[:, :, 0])


def test_the_spectral_norm_of_the_state_never_grows_without_values():
    tensors = inputs_of({"allow_negative_eigenvalues": True}, 30)
    tensors["v"] = torch.zeros_like(tensors["v"])
    state = MatrixState(torch.randn(2, 2, 8, 6, dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    norm = torch.linalg.matrix_norm(state.memory, 2)
    for t in range(30):
        state = run(cut(tensors, slice(t, t + 1)), state=state).state
        after = torch.linalg.matrix_norm(state.memory, 2)
        assert (after <= norm * (1 + 1e-12)).all()
        norm = after


def test_negative_eigenvalues_track_the_parity_of_a_bit_string():
    bits = torch.randint(2, (1, 1, 200), generator=torch.Generator().manual_seed(4))
    k = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1, 200, 2)
    start = MatrixState(torch.tensor([[[[1.0], [0.0]]]], dtype=torch.float64), torch.zeros(1, dtype=torch.long))
    tensors = {"q": k, "k": k, "v": torch.zeros(1, 1, 200, 1, dtype=torch.float64)}

    def signs(rate):
        return run({**tensors, "beta": rate * bits.double()}, options=RAW, state=start, scale=1.0).output[..., 0]

    assert_close(signs(2.0), 1.0 - 2.0 * (bits.cumsum(-1) % 2))
    assert (signs(0.99)[..., 100:].abs() < 1e-12).all()  # with beta below 1 the parity fades


def test_unit_keys_stay_finite_where_raw_keys_explode():
    tensors = {n: x.float() for n, x in inputs_of(n=64, k=64).items()}
    tensors["beta"] = torch.ones_like(tensors["beta"])
    assert run(tensors).output.abs().max() < 100
    raw = run(tensors, options={"normalize_keys": False}).output
    assert not raw.abs().max() < 1e12  # why keys are normalised


def test_queries_and_keys_are_normalised_after_the_feature_map_with_eps_inside_the_root():
    tensors = inputs_of(n=9)
    q, k, v, beta = tensors.values()

    def normalised(x):
        y = F.silu(x)
        return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    by_hand = {"q": normalised(q), "k": normalised(k), "v": v, "beta": beta}
    assert_close(run(tensors, options={"feature_map": "silu"}).output, run(by_hand, options=RAW).output)
    scaled = {**tensors, "q": 3 * q}
    keys_only = {"normalize_queries": False}
    assert_close(run(scaled, options=keys_only).output, 3 * run(tensors, options=keys_only).output)


def test_sums_of_sum_normalised_keys_are_one_and_zero_keys_stay_zero_with_finite_gradients():
    tensors = inputs_of(n=5)
    q, k, v, beta = tensors.values()
    by_hand = {n: F.relu(x) / (F.relu(x).sum(-1, keepdim=True) + 1e-6) for n, x in (("q", q), ("k", k))}
    options = {"feature_map": "relu", "norm": "sum"}
    assert_close(run(tensors, options=options).output, run({**by_hand, "v": v, "beta": beta}, options=RAW).output)
    for norm in ({}, options):
        zero = {n: torch.zeros_like(x).requires_grad_() for n, x in tensors.items()}
        run(zero, options=norm).output.sum().backward()
        assert all(torch.isfinite(x.grad).all() for x in zero.values())


@pytest.mark.parametrize("gate", [-50.0, -1e4, -math.inf])
def test_strong_gates_leave_the_current_token_only(gate):
    tensors = inputs_of(n=40)
    q, k, v, beta = tensors.values()
    k = k / k.norm(dim=-1, keepdim=True)
    expected = 8**-0.5 * (q * k).sum(-1, keepdim=True) * beta[..., None] * v
    for width in (1, 8):
        log_decay = torch.full((2, 2, 40, width), gate, dtype=torch.float64)
        gated = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay.requires_grad_()}
        output = run(gated, options=RAW, chunk_size=16).output
        assert_close(output, expected)
        output.sum().backward()
        assert torch.isfinite(log_decay.grad).all()


def test_four_thousand_gated_steps_are_finite_and_equal_the_recurrence():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        tensors = {n: x.to(dtype) for n, x in inputs_of({"gated": True}, 4096, k=4, v=3).items()}
        tensors["log_decay"] = torch.full_like(tensors["log_decay"], -1.0)
        output = run(tensors).output
        last = run(cut(tensors, slice(4096 - 64, None)), form="reference").output[:, :, -1]
        assert torch.isfinite(output).all()
        assert_close(output[:, :, -1], last, tolerance)


def test_a_long_sequence_in_float32_keeps_the_published_precision():
    options = {"allow_negative_eigenvalues": True}
    single = {n: x.float() for n, x in inputs_of(options, 300, k=16, v=16).items()}
    expected = run({n: x.double() for n, x in single.items()}, options=options, form="reference").output
    for form in ("chunked", "reference"):
        found = run(single, options=options, form=form).output.double()
        # observed 5e-7 (the loop itself: 2e-7)
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("options", [{}, {"gated": True, "gate": "diagonal"}, {"vector_beta": True}])
def test_gradcheck_through_states(options):
    tensors = inputs_of(options, 5, batch=1, h=1, k=3, v=2)
    start = torch.randn(1, 1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = list(tensors)

    def function(memory, *inputs):
        state = MatrixState(memory, torch.zeros(1, dtype=torch.long))
        result = run(dict(zip(names, inputs, strict=True)), options=options, state=state, chunk_size=3)
        return result.output, result.state.memory

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (start, *tensors.values())])


@pytest.mark.parametrize("options", VARIANTS)
def test_gradients_through_the_triangular_solve_equal_those_through_the_loop(options):
    gradients = []
    for form in ("chunked", "reference"):
        tensors = {n: x.requires_grad_() for n, x in inputs_of(options, 19).items()}
        output = run(tensors, options=options, form=form, chunk_size=8).output
        (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        gradients.append([x.grad for x in tensors.values()])
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected, 1e-11)


def test_rate_of_a_vector_beta_belongs_to_its_value_feature():
    tensors = inputs_of({"vector_beta": True}, 9)
    q, k, v, rate = tensors.values()
    columns = [run({"q": q, "k": k, "v": v[..., i : i + 1], "beta": rate[..., i]}).output for i in range(6)]
    assert_close(run(tensors).output, torch.cat(columns, -1))
    half = torch.full_like(rate[..., 0], 0.5)
    assert_close(run({**tensors, "beta": half}).output, run({**tensors, "value_beta": 0.5 * rate}).output)


def test_without_beta_it_is_one_and_a_given_beta_is_refused_where_it_is_not_used():
    tensors = inputs_of(n=8)
    without = {n: x for n, x in tensors.items() if n != "beta"}
    assert_close(run(without).output, run({**tensors, "beta": torch.ones_like(tensors["beta"])}).output)
    with pytest.raises(Unsupported, match="use_beta"):
        run(tensors, options={"use_beta": False})
    with pytest.raises(Unsupported, match="use_beta"):
        run({**without, "value_beta": torch.ones_like(tensors["v"])}, options={"use_beta": False})
    with pytest.raises(Unsupported, match="log_decay with 3 features"):
        run({**tensors, "log_decay": torch.zeros(2, 2, 8, 3)})


def test_noncausal_counts_a_token_once_and_reads_backwards_before_the_write():
    tensors = inputs_of(n=7)
    flipped = {n: x.flip(2) for n, x in tensors.items()}
    backward = []
    for t in range(7):  # what the tokens after t have written, in reverse order
        state = run(cut(flipped, slice(0, 6 - t)), return_state=True).state.memory
        q = tensors["q"][:, :, t, None]
        backward.append(8**-0.5 * q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt() @ state)
    expected = run(tensors).output + torch.cat(backward, 2)
    assert_close(run(tensors, "noncausal-self").output, expected)


def test_the_last_memory_under_a_key_wins_in_cross_patterns():
    k = unit(1, 1, 1, 8).expand(-1, -1, 2, -1)
    v = torch.tensor([[[[1.0, 1.0], [5.0, 7.0]]]], dtype=torch.float64)
    found = run({"q": k[:, :, :1], "k": k, "v": v}, "noncausal-cross", RAW, scale=1.0).output
    assert_close(found, v[:, :, 1:])


@pytest.mark.parametrize(
    "name",
    [
        "delta_rule_recurrent",
        "delta_rule_chunkwise",
        "delta_rule_parallel",
        "delta_rule_initial_state",
        "delta_rule_negative_eigenvalues",
    ],
)
@pytest.mark.parametrize("form", ["chunked", "step"])
def test_parity_with_recorded_official_outputs(name, form):
    recorded = load(name)
    tensors = {n: recorded[n].requires_grad_() for n in ("q", "k", "v", "beta")}
    start = recorded.get("initial_state", torch.zeros(2, 2, 8, 6, dtype=torch.float64)).requires_grad_()
    state = MatrixState(start, torch.zeros(2, dtype=torch.long))
    outputs, size = [], tensors["q"].shape[2] if form == "chunked" else 1
    for t in range(0, tensors["q"].shape[2], size):
        part = cut(tensors, slice(t, t + size))
        result = run(part, options=RAW, state=state, form=form, chunk_size=8)
        outputs.append(result.output)
        state = result.state
    output = torch.cat(outputs, 2)
    assert_close(output, recorded["out"], 1e-10)  # observed 6e-16
    if "state" in recorded:
        assert_close(state.memory, recorded["state"], 1e-10)
    if "grad_out" not in recorded:
        return
    loss = (output * recorded["grad_out"]).sum()
    if "grad_state" in recorded:
        loss = loss + (state.memory * recorded["grad_state"]).sum()
    loss.backward()
    for leaf in tensors:
        assert_close(tensors[leaf].grad, recorded[f"grad_{leaf}"], 1e-10)  # observed 6e-16
    if "grad_initial_state" in recorded:
        assert_close(start.grad, recorded["grad_initial_state"], 1e-10)


def test_parity_of_normalised_raw_keys_and_of_the_attention_matrix_on_rated_values():
    recorded = load("delta_rule_parallel")
    tensors = {"q": recorded["q"], "k": recorded["k_raw"], "v": recorded["v"], "beta": recorded["beta"]}
    options = {"normalize_queries": False}
    assert_close(run(tensors, options=options).output, recorded["out"], 1e-10)
    identity = torch.eye(32, dtype=torch.float64).expand(2, 2, 32, 32)
    # out = A (beta v): the output of values 1 / beta at one token each is a column of A
    rates = recorded["beta"][..., None]
    assert_close(run({**tensors, "v": identity / rates}, options=options).output, recorded["attn"], 1e-10)


def layer_of(**options):
    torch.manual_seed(0)
    return create_layer("deltanet", 64, 4, **options).double()


def test_layer_convolves_activates_and_normalises_and_has_about_four_squares_of_parameters():
    layer, x = layer_of(), torch.randn(2, 11, 64, dtype=torch.float64)
    count = sum(p.numel() for p in layer.parameters())
    assert count == 4 * 64**2 + 64 * 4 + 3 * 64 * 4 + 16
    assert layer.gate is None and layer.positions.name == "none"

    def heads(y, convolution):
        return F.silu(
            F.conv1d(F.pad(y.mT, (3, 0)), convolution.weight[:, None], groups=64).mT.unflatten(-1, (4, 16))
        ).transpose(1, 2)

    q, k, v = (
        heads(module(x), convolution)
        for module, convolution in zip((layer.query, layer.key, layer.value), layer.convolutions, strict=True)
    )
    beta = torch.sigmoid(layer.projection.rate(x)).mT
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    o = run({"q": q, "k": k, "v": v, "beta": beta}, options=RAW, form="reference").output
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6)
    assert_close(layer(x).output, layer.output(o.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"short_convolution": 0, "feature_map": "silu"},
        {"convolution_activation": None, "feature_map": "elu", "norm": "sum"},
        {"use_beta": False},
        {"allow_negative_eigenvalues": True, "num_kv_heads": 2},
        {"vector_beta": True, "num_kv_heads": 2},
        {"gated": True, "output_gate": "swish"},
        {"gated": True, "gate": "diagonal", "output_gate": "sigmoid", "output_gate_rank": 8, "num_kv_heads": 2},
        {"value_expand": 2.0},
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


def test_layer_reads_absorbed_memory_with_grouped_heads():
    layer = layer_of(pattern="noncausal-cross", memory_dim=48, num_kv_heads=2, vector_beta=True)
    x, memory = torch.randn(2, 5, 64, dtype=torch.float64), torch.randn(2, 9, 48, dtype=torch.float64)
    assert_close(layer(x, state=layer.encode_memory(memory)).output, layer(x, memory).output)


def test_rates_of_the_layer_lie_in_their_range_and_its_decay_starts_slow():
    z = 30 * torch.randn(2, 9, 64, dtype=torch.float64)
    for options, top in (({}, 1.0), ({"allow_negative_eigenvalues": True}, 2.0)):
        beta = layer_of(**options).projection.inputs({}, LayerCall(z, z, Context()))["beta"]
        assert beta.shape == (2, 4, 9)
        assert 0.9 * top < beta.max() <= top
    start = layer_of(gated=True).projection.inputs({}, LayerCall(z, 0 * z, Context()))["log_decay"]
    assert start.shape == (2, 4, 9, 1)
    assert ((start < -1e-3 * 0.99) & (start > -1.6 * 1.01)).all()
    layer = layer_of(gated=True)
    z = z / 30
    own = layer.projection
    expected = -own.log_strength.exp() * F.softplus(own.gate(z) + own.gate_bias)
    assert_close(own.inputs({}, LayerCall(z, z, Context()))["log_decay"][..., 0], expected.mT)
    layer = layer.bfloat16()
    found = layer.projection.inputs({}, LayerCall(None, z.bfloat16(), Context()))
    assert found["beta"].dtype == found["log_decay"].dtype == torch.float32


def test_autocast_does_not_reach_the_solve_or_the_state():
    tensors = {n: x.float() for n, x in inputs_of({"gated": True}, 30).items()}
    plain = run(tensors, return_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(tensors, return_state=True)
    assert torch.equal(found.output, plain.output) and torch.equal(found.state.memory, plain.state.memory)


def test_options_are_checked():
    for options in (
        {"feature_map": "exp"},
        {"norm": "max"},
        {"norm": "sum"},
        {"norm": "sum", "feature_map": "silu"},
        {"eps": 0.0},
        {"use_beta": False, "allow_negative_eigenvalues": True},
        {"use_beta": False, "vector_beta": True},
        {"gated": True, "gate": "fixed"},
        {"gate": "diagonal"},
    ):
        with pytest.raises(Unsupported):
            MECHANISM.options(**options)
    assert get_mechanism("deltanet") is MECHANISM


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
    assert_close(layer(x).output, theirs(x), 2e-6)
