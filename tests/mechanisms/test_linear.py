"""Tests specific to linear attention: its sum over pairs, its recurrence, its state's precision, and recorded outputs."""

from __future__ import annotations

import pytest
import torch
from support import calls, check_recorded, close, cut, load, qkv, refused
from torch import Tensor

from regard.apply import absorb
from regard.contract import ALL_PATTERNS, Mask
from regard.create import create_layer
from regard.engines.feature_maps import FEATURE_MAPS, NONNEGATIVE
from regard.engines.recurrent_forms import MatrixState
from regard.mechanisms.linear import MECHANISM, Config

run = calls(MECHANISM)
OPTIONS = [{"feature_map": name} for name in NONNEGATIVE]
OPTIONS += [{"feature_map": name, "normalize": False} for name in FEATURE_MAPS] + [{"eps": 0.5}]
PHI = {
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "relu": lambda x: x.clamp(min=0),
    "relu_squared": lambda x: x.clamp(min=0) ** 2,
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "exp": lambda x: x.exp(),
    "silu": lambda x: x / (1 + (-x).exp()),
    "identity": lambda x: x,
}


def paired(inputs: dict[str, Tensor], pattern: str, options: dict, scale: float = 1.0) -> Tensor:
    """The sum over visible pairs, one query and one key at a time."""
    config, (q, k, v) = Config(**options), inputs.values()
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
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_sum_over_pairs_at_scale_one_unless_another_is_given(options, pattern):
    sizes = [(8, 8)] if pattern == "noncausal-self" else [(8, 11), (9, 4)]
    for n, m in sizes:
        inputs = qkv(n, m, value_dim=3)
        for form in (None, "reference"):
            found = run(inputs, options, pattern=pattern, form=form).output
            close(found, paired(inputs, pattern, options))
            found = run(inputs, options, pattern=pattern, form=form, scale=0.5).output
            close(found, paired(inputs, pattern, options, 0.5))


def test_the_recurrence_of_the_paper_step_by_step():
    inputs = qkv(9, value_dim=3)
    q, k, v = inputs.values()
    s, z, state = torch.zeros(2, 2, 4, 3).double(), torch.zeros(2, 2, 4).double(), None
    for i in range(9):
        key, query = PHI["elu"](k[:, :, i]), PHI["elu"](q[:, :, i])
        s, z = s + key[..., None] * v[:, :, i, None], z + key
        expected = (query[..., None] * s).sum(-2) / ((query * z).sum(-1, keepdim=True) + 1e-6)
        result = run(cut(inputs, slice(i, i + 1)), state=state, return_state=True)
        state = result.state
        close(result.output[:, :, 0], expected)
        close(state.memory, torch.cat([s, z[..., None]], -1))
        assert state.length.tolist() == [i + 1, i + 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_accumulates_in_float32(dtype):
    inputs = qkv(600, dtype=dtype)
    inputs["k"] = torch.zeros_like(inputs["k"])
    absorbed = absorb(MECHANISM, {name: inputs[name] for name in "kv"}, pattern="noncausal-cross")
    for state in (run(inputs, return_state=True).state, absorbed):
        assert state.memory.dtype == torch.float32
        assert (state.memory[..., -1] == 600).all()  # a count in bfloat16 stops at 256


def test_a_layer_does_not_scale_its_queries():
    layer = create_layer("linear", 8, 2).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (layer.query, layer.key, layer.value))
    expected = layer.output(paired({"q": q, "k": k, "v": v}, "causal-self", {}).transpose(1, 2).flatten(2))
    close(layer(x).output, expected)


def test_what_it_cannot_do_is_refused():
    refused("alibi", create_layer, "linear", 8, 2, positions="alibi")
    refused("N = 5 and M = 4", run, qkv(5, 4), pattern="noncausal-self")


@pytest.mark.parametrize("name", ["linear_noncausal_self", "linear_noncausal_masked"])
def test_parity_with_the_authors_noncausal_layer(name):
    arrays = load(name)
    inputs = {x: arrays[x].requires_grad_() for x in "qkv"}
    mask = None if arrays["key_mask"].all() else Mask(valid=arrays["key_mask"])
    output = run(inputs, pattern="noncausal-cross", memory_mask=mask).output
    check_recorded(arrays, output, inputs, 1e-10)  # observed 3e-16


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("linear_causal_recurrent", {}, 1e-10),  # the authors' code; observed 4e-16
        # Third-party code: features were recorded after elu + 1, so that relu does not change them; its eps is 1e-10.
        ("linear_causal_fla_normalized", {"feature_map": "relu", "eps": 1e-10}, 2e-5),  # observed 4e-7
        ("linear_causal_fla_chunk", {"feature_map": "relu", "eps": 1e-10}, 2e-5),
    ],
)
def test_parity_with_causal_code_and_its_state(name, options, tolerance):
    arrays = load(name)
    result = run({x: arrays[x] for x in "qkv"}, options, return_state=True, chunk_size=8)
    close(result.output, arrays["out"], tolerance)
    if "state" in arrays:
        close(result.state.memory[..., :-1], arrays["state"], tolerance)
        close(result.state.memory[..., -1], arrays["norm_state"], tolerance)


def test_parity_with_a_third_partys_unnormalised_code_from_a_state():
    arrays = load("linear_causal_fla_unnormalized_scaled")
    options = {"feature_map": "identity", "normalize": False}
    start = MatrixState(arrays["initial_state"], torch.zeros(2, dtype=torch.long))
    result = run({x: arrays[x] for x in "qkv"}, options, scale=8**-0.5, state=start)
    close(result.output, arrays["out"], 2e-6)  # observed 2e-7
    close(result.state.memory, arrays["state"], 2e-6)
