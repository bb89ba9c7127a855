"""What is peculiar to RWKV-7: its transitions, which erase elsewhere than they read, and the official time mixing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from regard.apply import apply
from regard.contract import ALL_PATTERNS, Context, Mask, Unsupported
from regard.create import create_layer
from regard.engines.generalized_delta import generalized_delta
from regard.engines.recurrent_forms import MatrixState
from regard.functional import delta_rule_attention
from regard.mechanisms.rwkv7 import MECHANISM, sample_inputs

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
WANT_STATE = Context(want=frozenset({"state"}))


def inputs_of(n: int = 21, m: int | None = None, **sizes: int):
    m = n if m is None else m
    return sample_inputs(torch.Generator().manual_seed(n), batch=2, n=n, m=m, dtype=torch.float64, sizes=sizes)


def run(tensors, pattern="causal-self", **call):
    return apply(MECHANISM, tensors, pattern=pattern, **call)


def assert_close(found, expected, tolerance=1e-12):
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("decay", ["none", "scalar", "strong"])
@pytest.mark.parametrize("pattern", [p.value for p in ALL_PATTERNS])
def test_chunks_of_any_size_and_any_decay_equal_the_recurrence(pattern, decay):
    tensors = inputs_of(21, 26 if "cross" in pattern else None, l=1 if decay == "scalar" else 8)
    if decay == "none":
        del tensors["log_decay"]
    if decay == "strong":
        tensors["log_decay"][:, :, ::3] = -50.0
        tensors["log_decay"][:, :, 5, ::2] = -math.inf
    expected = run(tensors, pattern, form="reference").output
    for chunk_size in (1, 8, 64):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        found = run(leaves, pattern, chunk_size=chunk_size).output
        assert_close(found, expected)
        found.sum().backward()
        assert all(torch.isfinite(x.grad).all() for x in leaves.values())


def test_transitions_are_those_of_the_paper():
    """S_t = S_{t-1} (diag(w) - kappa^T (a * kappa)) on row vectors, here transposed."""
    x = inputs_of(13)
    kappa = x["removal_key"] / x["removal_key"].norm(dim=-1, keepdim=True)
    start = torch.randn(2, 2, 8, 6, dtype=torch.float64)
    expected = start.mT
    for t in range(13):
        w, a, key = x["log_decay"][:, :, t].exp(), x["rate"][:, :, t], kappa[:, :, t]
        transition = torch.diag_embed(w) - key[..., None] * (a * key)[..., None, :]
        expected = expected @ transition + x["v"][:, :, t, :, None] * x["k"][:, :, t, None, :]
    state = MatrixState(start, torch.zeros(2, dtype=torch.long))
    assert_close(run(x, state=state, chunk_size=5).state.memory, expected.mT)


def test_a_rate_on_one_feature_copies_another_into_it():
    """No symmetric transition, and so no delta rule, leaves the second feature where it is."""
    stored = torch.tensor([[3.0, 1.0], [5.0, 7.0], [0.5, 2.0]], dtype=torch.float64)
    state = MatrixState(stored[None, None], torch.zeros(1, dtype=torch.long))
    nothing, key, rate = torch.zeros(1, 1, 1, 3).double(), torch.tensor([1.0, -1, 0]), torch.tensor([2.0, 0, 0])
    token = {"q": nothing, "k": nothing, "v": nothing[..., :2]}
    token |= {name: x.double().view(1, 1, 1, 3) for name, x in (("removal_key", key), ("rate", rate))}
    for form in ("step", "chunked"):
        memory = run(token, state=state, form=form).state.memory[0, 0]
        assert_close(memory, stored[[1, 1, 2]], 1e-11)  # the length of the key has eps 1e-12 in its root


def test_erasing_where_it_writes_is_the_delta_rule():
    x = inputs_of(30)
    beta = x["rate"][..., 0]
    key = x["k"] / x["k"].norm(dim=-1, keepdim=True)
    expected = delta_rule_attention(
        x["q"], key, x["v"], beta, scale=1.0, normalize_queries=False, normalize_keys=False, form="reference"
    )
    same = {"q": x["q"], "k": beta[..., None] * key, "v": x["v"], "removal_key": key}
    assert_close(run({**same, "rate": beta[..., None].expand_as(key)}).output, expected, 1e-11)


def test_gradcheck_through_states():
    x = inputs_of(5, h=1, k=3, v=2)
    start = torch.randn(2, 1, 3, 2, dtype=torch.float64)

    def function(memory, *tensors):
        state = MatrixState(memory, torch.zeros(2, dtype=torch.long))
        result = run(dict(zip(x, tensors, strict=True)), state=state, chunk_size=3)
        return result.output, result.state.memory

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (start, *x.values())])


def test_sizes_of_chunks_are_checked():
    q, k, v, key, rate, g = inputs_of(3).values()
    with pytest.raises(Unsupported, match="chunk_size=0"):
        generalized_delta(q, k, v, key, rate, g, chunk_size=0)
    with pytest.raises(Unsupported, match="log_decay with 4 features"):
        run({**inputs_of(3), "log_decay": g[..., :4]})
    for options in ({"eps": 0.0}, {"gate_rank": 0}):
        with pytest.raises(Unsupported):
            MECHANISM.options(**options)


def official_layer():
    """The recorded time mixing, as a layer."""
    with np.load(FIXTURES / "rwkv7_time_mixing.npz") as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    layer = create_layer("rwkv7", 16, 2, gate_rank=5).double()
    heads = {name: found[name].view(2, 1, 8) for name in ("ln_w", "ln_b", "r_k")}
    weights = {
        **{f"{ours}.weight": found[theirs] for ours, theirs in (("query", "receptance"), ("key", "key"))},
        **{f"{name}.weight": found[name] for name in ("value", "output")},
        **{f"convolutions.{i}.mix": found[name] for i, name in enumerate(("x_r", "x_k", "x_v"))},
        "projection.decay_shift.mix": found["x_w"],
        "projection.rate_shift.mix": found["x_a"],
        **{f"projection.{name}_bias": found[bias] for name, bias in (("decay", "w0"), ("rate", "a0"))},
        "projection.removal": found["k_k"],
        "projection.replacement": found["k_a"],
        **{f"merge.{ours}": heads[name] for ours, name in (("weight", "ln_w"), ("bias", "ln_b"), ("bonus", "r_k"))},
    }
    for ours, letter in (("projection.decay", "w"), ("projection.rate", "a"), ("merge.gate", "g")):
        weights |= {f"{ours}.0.weight": found[f"{letter}1"].mT, f"{ours}.2.weight": found[f"{letter}2"].mT}
    layer.load_state_dict(weights)
    return layer, found


def test_parity_with_the_recorded_official_time_mixing():
    layer, recorded = official_layer()
    whole = layer(recorded["x"], context=WANT_STATE)
    assert_close(whole.output, recorded["out"])  # observed 2e-15
    assert_close(whole.state.mechanism.memory, recorded["state"].mT)
    outputs, state = [], None
    for token in recorded["x"].unbind(1):
        output, state = layer.step(token, state)
        outputs.append(output)
    assert_close(torch.stack(outputs, 1), recorded["out"])
    assert_close(state.mechanism.memory, recorded["state"].mT)


def test_a_token_is_mixed_with_the_valid_token_before_it():
    layer, recorded = official_layer()
    valid = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)).argsort(-1) < 19
    x = torch.full((2, 30, 16), torch.nan, dtype=torch.float64)
    x[valid] = recorded["x"].flatten(0, 1)
    found = layer(x, context=Context(mask=Mask(valid=valid))).output
    assert_close(found[valid], recorded["out"].flatten(0, 1))


def test_layer_shares_keys_between_heads_and_refuses_memory_in_pieces():
    layer = create_layer("rwkv7", 16, 4, num_kv_heads=2, pattern="noncausal-self").double()
    assert layer(torch.randn(2, 5, 16).double()).output.shape == (2, 5, 16)
    layer = create_layer("rwkv7", 16, 2, pattern="noncausal-cross", memory_dim=12).double()
    x, memory = torch.randn(2, 5, 16).double(), torch.randn(2, 9, 12).double()
    state = layer.encode_memory(memory)
    assert_close(layer(x, state=state).output, layer(x, memory).output)
    with pytest.raises(Unsupported, match="memory in pieces"):
        layer.encode_memory(memory, state=state)
    with pytest.raises(Unsupported, match="short_convolution"):
        create_layer("rwkv7", 16, 2, short_convolution=4)
