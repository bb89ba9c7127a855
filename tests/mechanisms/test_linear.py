"""What is peculiar to linear attention: closed forms, its feature maps, its normaliser, its state, and recorded outputs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import absorb, apply
from regard.contract import ALL_PATTERNS, Context, Mask, Shape, Unsupported
from regard.create import create_layer
from regard.engines.feature_maps import FEATURE_MAPS, NONNEGATIVE
from regard.engines.recurrent_forms import MatrixState
from regard.functional import linear_attention
from regard.mechanisms.linear import MECHANISM, Config, cost

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
OPTIONS = [{"feature_map": name} for name in NONNEGATIVE]
OPTIONS += [{"feature_map": name, "normalize": False} for name in FEATURE_MAPS]
PHI = {
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "relu": lambda x: x.clamp(min=0),
    "relu_squared": lambda x: x.clamp(min=0) ** 2,
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "exp": lambda x: x.exp(),
    "silu": lambda x: x / (1 + (-x).exp()),
    "identity": lambda x: x,
}


def load(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def inputs(n: int, m: int | None = None, batch: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes = {"q": (n, 4), "k": (m, 4), "v": (m, 3)}
    return {name: torch.randn(batch, 2, *shape, dtype=dtype) for name, shape in shapes.items()}


def run(tensors: dict[str, Tensor], pattern: str = "causal-self", options: dict | None = None, **call: Any) -> Any:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**(options or {})), **call)


def cut(tensors: dict[str, Tensor], part: slice | Tensor) -> dict[str, Tensor]:
    return {name: x[:, :, part] for name, x in tensors.items()}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def paired(tensors: dict[str, Tensor], pattern: str, options: dict, scale: float = 1.0) -> Tensor:
    """The sum over visible pairs, one query and one key at a time."""
    config, (q, k, v) = Config(**options), tensors.values()
    phi, n, m = PHI[config.feature_map], q.shape[2], k.shape[2]
    rows = []
    for i in range(n):
        above = torch.zeros(*v.shape[:2], v.shape[3], dtype=v.dtype)
        below = torch.zeros(*v.shape[:2], 1, dtype=v.dtype)
        for j in range(m):
            if pattern != "causal-self" or j <= i + m - n:
                weight = (phi(scale * q[:, :, i]) * phi(k[:, :, j])).sum(-1, keepdim=True)
                above, below = above + weight * v[:, :, j], below + weight
        rows.append(above / (below + config.eps) if config.normalize else above)
    return torch.stack(rows, 2)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_feature_map_in_every_form_equals_the_sum_over_pairs(options, pattern):
    tensors = inputs(11, 8 if pattern.cross else None)
    expected = paired(tensors, pattern, options)
    forms = {"causal-self": ("reference", "parallel", "chunked"), "noncausal-self": ("reference", "parallel")}
    for form in forms.get(pattern, ("reference", "parallel", "absorb+read")):
        for chunk_size in (1, 4, 64):
            close(run(tensors, pattern, options, form=form, chunk_size=chunk_size).output, expected)


@pytest.mark.parametrize(("n", "m"), [(3, 8), (8, 3), (1, 6), (5, 0), (0, 5)])
@pytest.mark.parametrize("options", [{}, {"feature_map": "silu", "normalize": False}])
def test_uneven_calls_align_bottom_right(options, n, m):
    tensors = inputs(n, m)
    for form in ("reference", "parallel"):
        found = run(tensors, options=options, form=form, chunk_size=2).output
        expected = paired(tensors, "causal-self", options) if n else tensors["v"][:, :, :0]
        close(found, expected)
        assert (found[:, :, : max(n - m, 0)] == 0).all()


def test_the_recurrence_of_the_paper_step_by_step():
    tensors = inputs(9)
    q, k, v = tensors.values()
    s, z, state = torch.zeros(2, 2, 4, 3).double(), torch.zeros(2, 2, 4).double(), None
    for i in range(9):
        key, query = PHI["elu"](k[:, :, i]), PHI["elu"](q[:, :, i])
        s, z = s + key[..., None] * v[:, :, i, None], z + key
        expected = (query[..., None] * s).sum(-2) / ((query * z).sum(-1, keepdim=True) + 1e-6)
        result = run(cut(tensors, slice(i, i + 1)), state=state, return_state=True)
        state = result.state
        close(result.output[:, :, 0], expected)
        close(state.memory, torch.cat([s, z[..., None]], -1))
        assert state.length.tolist() == [i + 1, i + 1]


def test_equal_keys_give_the_running_mean_up_to_eps():
    tensors = inputs(12)
    tensors["k"] = torch.zeros_like(tensors["k"])  # phi(0) = 1
    count = torch.arange(1.0, 13, dtype=torch.float64)[:, None]
    mean = tensors["v"].cumsum(2) / count
    total = count * PHI["elu"](tensors["q"]).sum(-1, keepdim=True)
    close(run(tensors).output, mean * total / (total + 1e-6))
    whole = tensors["v"].mean(2, keepdim=True).expand_as(mean)
    close(run(tensors, "noncausal-self", {"eps": 1e-300}).output, whole)


def test_one_key_gives_its_value_and_eps_its_share():
    tensors = inputs(4, 1)
    weight = (PHI["elu"](tensors["q"]) * PHI["elu"](tensors["k"])).sum(-1, keepdim=True)
    for eps in (1e-6, 0.5):
        close(run(tensors, "noncausal-cross", {"eps": eps}).output, weight / (weight + eps) * tensors["v"])


def test_without_a_normaliser_it_is_a_chain_of_products():
    tensors = inputs(10, 14)
    q, k, v = tensors.values()
    options = {"feature_map": "identity", "normalize": False}
    close(run(tensors, "noncausal-cross", options).output, q @ (k.mT @ v))
    close(run(tensors, "noncausal-cross", options, scale=0.3).output, 0.3 * q @ (k.mT @ v))


def test_disjoint_features_pick_their_own_values():
    """With one key a feature and a map that keeps zeros, attention is a table of values."""
    tensors = {"q": torch.eye(4).double().expand(2, 2, 4, 4), "k": torch.eye(4).double().expand(2, 2, 4, 4)}
    tensors["v"] = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    close(run(tensors, "noncausal-self", {"feature_map": "relu"}).output, tensors["v"] / (1 + 1e-6))


def test_the_scale_is_one_by_default_and_changes_the_kernel_unless_phi_is_homogeneous():
    tensors = inputs(8)
    assert MECHANISM.default_scale == 1.0
    close(run(tensors, scale=1.0).output, run(tensors).output)
    for name in ("relu", "relu_squared"):
        options = {"feature_map": name, "eps": 1e-300}
        close(run(tensors, options=options, scale=0.5).output, run(tensors, options=options).output)
    for name in ("elu", "sigmoid", "exp"):
        options = {"feature_map": name}
        scaled = run(tensors, options=options, scale=0.5).output
        assert (scaled - run(tensors, options=options).output).abs().max() > 1e-3
        close(scaled, paired(tensors, "causal-self", options, 0.5))


@pytest.mark.parametrize("name", NONNEGATIVE)
def test_normalised_outputs_are_means_of_values(name):
    tensors = inputs(15)
    output = run(tensors, options={"feature_map": name}).output
    low, high = tensors["v"].cummin(2).values, tensors["v"].cummax(2).values
    assert (output <= high.clamp(min=0) + 1e-12).all() and (output >= low.clamp(max=0) - 1e-12).all()


def test_features_that_are_all_zero_give_zero_with_finite_gradients():
    tensors = {name: (-x.abs() if name != "v" else x).requires_grad_() for name, x in inputs(6).items()}
    output = run(tensors, options={"feature_map": "relu"}).output
    assert (output == 0).all()
    output.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors.values())


# padding, documents and rows


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("options", OPTIONS)
def test_padding_changes_nothing_though_phi_of_zero_may_not_be_zero(options, pattern):
    tensors = inputs(12)
    valid = torch.rand(2, 12) > 0.4
    valid[:, 0] = False
    masks = {"mask": Mask(valid=valid)} | ({"memory_mask": Mask(valid=valid)} if pattern.cross else {})
    padded = {name: x.masked_fill(~valid[:, None, :, None], torch.nan) for name, x in tensors.items()}
    found = run(padded, pattern, options, **masks).output
    for b in range(2):
        alone = {name: x[b : b + 1, :, valid[b]] for name, x in tensors.items()}
        close(found[b : b + 1, :, valid[b]], run(alone, pattern, options).output)
        assert (found[b, :, ~valid[b]] == 0).all()


def test_padding_enters_neither_the_matrix_nor_the_normaliser_of_the_state():
    tensors, lengths = inputs(10), torch.tensor([0, 6])
    causal = run(tensors, mask=Mask(lengths=lengths), return_state=True).state
    memory = {"k": tensors["k"], "v": tensors["v"]}
    absorbed = absorb(MECHANISM, memory, pattern="noncausal-cross", memory_mask=Mask(lengths=lengths))
    short = run(cut(tensors, slice(0, 6)), return_state=True).state
    for state in (causal, absorbed):
        assert (state.memory[0] == 0).all() and state.length.tolist() == [0, 6]
        close(state.memory[1], short.memory[1])


def test_padded_keys_receive_no_gradient():
    tensors = {name: x.requires_grad_() for name, x in inputs(9).items()}
    lengths = torch.tensor([9, 4])
    for pattern in ("causal-self", "noncausal-self"):
        output = run(tensors, pattern, mask=Mask(lengths=lengths)).output
        for gradient in torch.autograd.grad(output.square().sum(), list(tensors.values())):
            assert (gradient[1, :, 4:] == 0).all() and (gradient[1, :, :4] != 0).any()


# state


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", [[1] * 17, [5, 0, 11, 1], [17]])
def test_split_and_resume_equals_whole(options, sizes):
    tensors = inputs(17)
    whole = run(tensors, options=options, return_state=True)
    state, outputs = None, []
    for part in torch.arange(17).split(sizes):
        result = run(cut(tensors, part), options=options, state=state, return_state=True, chunk_size=4)
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 2), whole.output)
    close(state.memory, whole.state.memory)
    assert torch.equal(state.length, whole.state.length)


def test_rows_continue_each_from_its_own_length():
    tensors = inputs(14)
    first, second = torch.tensor([9, 0]), torch.tensor([5, 14])
    state = run(tensors, mask=Mask(lengths=first), return_state=True).state
    rest = {name: torch.stack([torch.roll(x[0], -9, 1), x[1]]) for name, x in tensors.items()}
    result = run(rest, mask=Mask(lengths=second), state=state)
    whole = run(tensors, return_state=True)
    close(result.output[0, :, :5], whole.output[0, :, 9:])
    close(result.output[1], whole.output[1])
    close(result.state.memory, whole.state.memory)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_state_is_one_matrix_a_head_whose_size_the_card_says(normalize):
    options = {"normalize": normalize}
    expected = cost(Shape(1, 2, 1, 1000, 4, 3), Config(**options)).state
    for n in (1, 50):
        state = run(inputs(n, batch=1), options=options, return_state=True).state
        assert state.memory.shape == (1, 2, 4, 3 + normalize) and state.memory.numel() == expected
    assert MECHANISM.recurrent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_accumulates_in_float32(dtype):
    tensors = {name: x.to(dtype) for name, x in inputs(600).items()}
    tensors["k"] = torch.zeros_like(tensors["k"])
    result = run(tensors, return_state=True)
    assert result.output.dtype == dtype
    memory = {"k": tensors["k"], "v": tensors["v"]}
    absorbed = absorb(MECHANISM, memory, pattern="noncausal-cross")
    for state in (result.state, absorbed):
        assert state.memory.dtype == torch.float32
        assert (state.memory[..., -1] == 600).all()  # a bfloat16 count stops at 256
    expected = run({name: x.double() for name, x in tensors.items()}, form="reference").output
    assert (result.output - expected).abs().max() <= MECHANISM.tolerances[dtype] * expected.abs().max()


def test_autocast_reaches_neither_state_nor_absorbed_memory():
    tensors = inputs(30, dtype=torch.float32)
    memory = {"k": tensors["k"], "v": tensors["v"]}
    plain = run(tensors, return_state=True)
    absorbed = absorb(MECHANISM, memory, pattern="noncausal-cross")
    with torch.autocast("cpu", torch.bfloat16):
        found = run(tensors, return_state=True)
        again = absorb(MECHANISM, memory, pattern="noncausal-cross")
        read = run({"q": tensors["q"]}, "noncausal-cross", state=again).output
    assert torch.equal(found.output, plain.output) and torch.equal(found.state.memory, plain.state.memory)
    assert torch.equal(again.memory, absorbed.memory)
    assert torch.equal(read, run({"q": tensors["q"]}, "noncausal-cross", state=absorbed).output)


@pytest.mark.parametrize("pattern", ["noncausal-cross", "causal-cross"])
@pytest.mark.parametrize("options", [{}, {"feature_map": "silu", "normalize": False}])
def test_the_order_of_memory_does_not_matter_and_it_may_come_in_pieces(options, pattern):
    tensors, order = inputs(6, 20), torch.randperm(20)
    whole = run(tensors, pattern, options).output
    shuffled = {"q": tensors["q"]} | {name: tensors[name][:, :, order] for name in "kv"}
    close(run(shuffled, pattern, options).output, whole)
    state = None
    for part in order.split([3, 9, 8]):
        memory = {name: tensors[name][:, :, part] for name in "kv"}
        state = absorb(MECHANISM, memory, pattern=pattern, state=state, config=Config(**options))
    assert state.length.tolist() == [20, 20]
    close(run({"q": tensors["q"]}, pattern, options, state=state).output, whole)


def test_queries_of_cross_patterns_do_not_see_each_other():
    tensors = inputs(6, 9)
    whole = run(tensors, "causal-cross").output
    for i in range(6):
        close(run(tensors | {"q": tensors["q"][:, :, i : i + 1]}, "causal-cross").output, whole[:, :, i : i + 1])


# numerics and gradients


@pytest.mark.parametrize("options", [{}, {"feature_map": "sigmoid"}, {"feature_map": "identity", "normalize": False}])
def test_four_thousand_tokens_stay_precise_in_float32(options):
    tensors = inputs(4096, batch=1, dtype=torch.float32)
    result = run(tensors, options=options, return_state=True)
    double = {name: x.double() for name, x in tensors.items()}
    q, k, v = (PHI[options.get("feature_map", "elu")](x) if name != "v" else x for name, x in double.items())
    if options.get("normalize", True):
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    sums = (k[..., None] * v[..., None, :]).cumsum(2)
    expected = (q[..., None] * sums).sum(-2)
    if options.get("normalize", True):
        expected = expected[..., :-1] / (expected[..., -1:] + 1e-6)
    assert (result.output - expected).abs().max() <= 2e-6 * expected.abs().max()  # observed 3e-7
    assert (result.state.memory - sums[:, :, -1]).abs().max() <= 2e-6 * sums[:, :, -1].abs().max()


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-cross"])
@pytest.mark.parametrize("options", [o for o in OPTIONS if o["feature_map"] not in ("relu", "relu_squared")])
def test_gradcheck(options, pattern):
    tensors = [x.requires_grad_() for x in inputs(5, batch=1).values()]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run({"q": q, "k": k, "v": v}, pattern, options, chunk_size=2).output

    assert torch.autograd.gradcheck(function, tensors)


def test_gradients_flow_through_a_resumed_state():
    tensors = {name: x.requires_grad_() for name, x in inputs(12).items()}
    leaves, cotangent = list(tensors.values()), torch.randn(2, 2, 12, 3, dtype=torch.float64)
    first = run(cut(tensors, slice(0, 7)), return_state=True)
    rest = run(cut(tensors, slice(7, None)), state=first.state)
    split = torch.autograd.grad(torch.cat([first.output, rest.output], 2), leaves, cotangent)
    whole = torch.autograd.grad(run(tensors).output, leaves, cotangent)
    for a, b in zip(split, whole, strict=True):
        close(a, b)


# layers


@pytest.mark.parametrize("options", [{}, {"feature_map": "relu"}, {"feature_map": "silu", "normalize": False}])
def test_a_layer_decodes_token_by_token_with_padded_rows(options):
    torch.manual_seed(0)
    layer = create_layer("linear", 8, 2, num_kv_heads=1, **options).double()
    x, lengths = torch.randn(2, 9, 8, dtype=torch.float64), torch.tensor([5, 3])
    state = layer(x[:, :5], context=Context(mask=Mask(lengths=lengths), want=frozenset({"state"}))).state
    rows = [x[:1], torch.cat([x[1:, :3], x[1:, 5:]], 1)]
    for t in range(5, 9):
        y, state = layer.step(x[:, t], state)
        for row, whole in enumerate(rows):
            close(y[row], layer(whole).output[0, int(lengths[row]) + t - 5])


def test_a_layer_does_not_scale_its_queries():
    layer = create_layer("linear", 8, 2).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (layer.query, layer.key, layer.value))
    expected = layer.output(paired({"q": q, "k": k, "v": v}, "causal-self", {}).transpose(1, 2).flatten(2))
    close(layer(x).output, expected)


# refusals


@pytest.mark.parametrize(
    "options",
    [
        {"feature_map": "cosine"},
        {"feature_map": "silu"},
        {"feature_map": "identity"},
        {"eps": 0.0},
        {"eps": -1e-6},
        {"eps": math.nan},
        {"eps": math.inf},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


def test_what_needs_a_weight_for_each_pair_is_refused():
    tensors = inputs(5)
    bias = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    for call in ({"mask": Mask(bias=bias)}, {"dropout": 0.1}, {"want": {"weights"}}):
        with pytest.raises(Unsupported, match="linear"):
            run(tensors, **call)
    with pytest.raises(Unsupported, match="alibi"):
        create_layer("linear", 8, 2, positions="alibi")
    with pytest.raises(Unsupported, match="N = 5 and M = 4"):
        run(inputs(5, 4), "noncausal-self")


# parity


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("linear_noncausal_self", "reference"),
        ("linear_noncausal_self", "parallel"),
        ("linear_noncausal_masked", "parallel"),
        ("linear_noncausal_masked", "absorb+read"),
    ],
)
def test_parity_with_the_authors_noncausal_layer(name, form):
    arrays = load(name)
    tensors = {x: arrays[x].requires_grad_() for x in "qkv"}
    mask = None if arrays["key_mask"].all() else Mask(valid=arrays["key_mask"])
    output = run(tensors, "noncausal-cross", form=form, memory_mask=mask).output
    close(output, arrays["out"], 1e-10)  # observed 3e-16
    found = torch.autograd.grad(output, list(tensors.values()), arrays["grad_out"])
    for x, gradient in zip("qkv", found, strict=True):
        close(gradient, arrays[f"grad_{x}"], 1e-10)  # observed 4e-16


@pytest.mark.parametrize("form", ["chunked", "step"])
def test_parity_with_the_authors_recurrent_layer(form):
    arrays = load("linear_causal_recurrent")
    tensors = {x: arrays[x] for x in "qkv"}
    if form == "chunked":
        result = run(tensors, return_state=True, chunk_size=8)
        output = result.output
    else:
        state, outputs = run(cut(tensors, slice(0, 0)), return_state=True).state, []
        for t in range(tensors["q"].shape[2]):
            result = run(cut(tensors, slice(t, t + 1)), state=state, form="step")
            state = result.state
            outputs.append(result.output)
        output = torch.cat(outputs, 2)
    close(output, arrays["out"], 1e-10)  # observed 4e-16
    close(result.state.memory[..., :-1], arrays["state"], 1e-10)
    close(result.state.memory[..., -1], arrays["norm_state"], 1e-10)


@pytest.mark.parametrize("name", ["linear_causal_fla_normalized", "linear_causal_fla_chunk"])
def test_parity_with_a_third_partys_normalised_code(name):
    """Features were recorded after elu + 1, so that relu leaves them as they are; its eps is 1e-10."""
    arrays = load(name)
    options = {"feature_map": "relu", "eps": 1e-10}
    result = run({x: arrays[x] for x in "qkv"}, options=options, return_state=True)
    close(result.output, arrays["out"], 2e-5)  # observed 4e-7
    if "state" in arrays:
        close(result.state.memory[..., :-1], arrays["state"], 2e-5)
        close(result.state.memory[..., -1], arrays["norm_state"], 2e-5)


def test_parity_with_a_third_partys_unnormalised_code_from_a_state():
    arrays = load("linear_causal_fla_unnormalized_scaled")
    options = {"feature_map": "identity", "normalize": False}
    start = MatrixState(arrays["initial_state"], torch.zeros(2, dtype=torch.long))
    result = run({x: arrays[x] for x in "qkv"}, options=options, scale=8**-0.5, state=start)
    close(result.output, arrays["out"], 2e-5)  # observed 1e-5 for outputs of size 50
    close(result.state.memory, arrays["state"], 2e-5)


def test_the_function_takes_options_by_name():
    tensors = inputs(6)
    found = linear_attention(*tensors.values(), feature_map="sigmoid", eps=1e-3)
    close(found, run(tensors, options={"feature_map": "sigmoid", "eps": 1e-3}).output)
