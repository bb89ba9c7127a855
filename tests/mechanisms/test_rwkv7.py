"""Tests specific to RWKV-7: transitions that erase and read at different keys, and the official time mixing."""

from __future__ import annotations

import math

import pytest
import torch
from support import calls, close, in_steps, load, refused
from torch import Tensor, nn

from regard.contract import ALL_PATTERNS, Context
from regard.create import create_layer
from regard.functional import delta_rule_attention
from regard.mechanisms.rwkv7 import MECHANISM, MatrixState, sample_inputs

run = calls(MECHANISM)


def inputs(n: int, m: int | None = None, **sizes: int) -> dict[str, Tensor]:
    m = n if m is None else m
    return sample_inputs(torch.Generator().manual_seed(n), batch=2, n=n, m=m, dtype=torch.float64, sizes=sizes)


def state_of(memory: Tensor) -> MatrixState:
    return MatrixState(memory, torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("decay", ["none", "scalar", "strong"])
@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_chunks_of_any_size_and_any_decay_equal_the_recurrence(pattern, decay):
    tensors = inputs(21, 26 if pattern.cross else None, l=1 if decay == "scalar" else 8)
    if decay == "none":
        del tensors["log_decay"]
    if decay == "strong":
        tensors["log_decay"][:, :, ::3] = -50.0
        tensors["log_decay"][:, :, 5, ::2] = -math.inf
    expected = run(tensors, pattern=pattern, form="reference").output
    for chunk_size in (1, 8, 64):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        found = run(leaves, pattern=pattern, chunk_size=chunk_size).output
        close(found, expected)
        found.sum().backward()
        assert all(x.grad.isfinite().all() for x in leaves.values())


def test_transitions_are_those_of_the_paper():
    """In the paper, S_t = S_{t-1} (diag(w) - kappa^T (a * kappa)) on row vectors; here it is transposed."""
    x = inputs(13)
    kappa = x["removal_key"] / x["removal_key"].norm(dim=-1, keepdim=True)
    start = torch.randn(2, 2, 8, 6, dtype=torch.float64)
    expected = start.mT
    for t in range(13):
        w, a, key = x["log_decay"][:, :, t].exp(), x["rate"][:, :, t], kappa[:, :, t]
        transition = torch.diag_embed(w) - key[..., None] * (a * key)[..., None, :]
        expected = expected @ transition + x["v"][:, :, t, :, None] * x["k"][:, :, t, None, :]
    close(run(x, state=state_of(start), chunk_size=5).state.memory, expected.mT)


def test_erasing_where_it_writes_is_the_delta_rule():
    x = inputs(30)
    beta = x["rate"][..., 0]
    key = x["k"] / x["k"].norm(dim=-1, keepdim=True)
    plain = {"scale": 1.0, "normalize_queries": False, "normalize_keys": False, "form": "reference"}
    expected = delta_rule_attention(x["q"], key, x["v"], beta, **plain)
    same = {"q": x["q"], "k": beta[..., None] * key, "v": x["v"], "removal_key": key}
    close(run({**same, "rate": beta[..., None].expand_as(key)}).output, expected, 1e-11)


def official_layer(found: dict[str, Tensor]) -> nn.Module:
    """A layer with the recorded weights of the official time mixing."""
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
    return layer


def test_parity_with_the_recorded_official_time_mixing():
    recorded = load("rwkv7_time_mixing")
    layer = official_layer(recorded)
    whole = layer(recorded["x"], context=Context(want=frozenset({"state"})))
    for found, after in ((whole.output, whole.state), in_steps(layer, recorded["x"])):
        close(found, recorded["out"])  # observed 2e-15
        close(after.mechanism.memory, recorded["state"].mT)


def test_what_it_lacks_is_refused():
    x = inputs(3)
    refused("chunk_size=0", run, x, chunk_size=0)
    refused("log_decay with 4 features", run, x | {"log_decay": x["log_decay"][..., :4]})
    refused("short_convolution", create_layer, "rwkv7", 16, 2, short_convolution=4)
    layer, memory = create_layer("rwkv7", 16, 2, pattern="noncausal-cross"), torch.randn(2, 9, 16)
    refused("memory in pieces", layer.encode_memory, memory, state=layer.encode_memory(memory))
