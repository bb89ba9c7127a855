"""Tests specific to Linformer: matrix rows that belong to ranks, sharing, its maximum length, and recorded outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import calls, close, load, qkv, refused
from torch import Tensor

from regard.apply import absorb
from regard.contract import Mask, Shape
from regard.create import create_layer
from regard.mechanisms.linformer import MECHANISM, Config, cost
from regard.models import Encoder, EncoderConfig, from_pretrained, save_pretrained

run = calls(MECHANISM, "noncausal-self")


def inputs(n: int, m: int | None = None, longest: int = 20, heads: int = 1, groups: int = 2) -> dict[str, Tensor]:
    matrices = {name: torch.randn(heads, longest, 5, dtype=torch.float64) for name in "ef"}
    return qkv(n, m, groups=groups, value_dim=3) | matrices


def definition(tensors: dict[str, Tensor]) -> Tensor:
    """The definition, one row and head at a time."""
    q, k, v, e, f = (tensors[name].numpy() for name in "qkvef")
    found = np.empty((*q.shape[:3], v.shape[3]))
    for b, h in np.ndindex(*q.shape[:2]):
        g = h * k.shape[1] // q.shape[1]
        own, m = g % len(e), k.shape[2]
        keys, values = e[own, :m].T @ k[b, g], f[own, :m].T @ v[b, g]
        weights = np.exp(q[b, h] @ keys.T / 2)
        found[b, h] = weights / weights.sum(-1, keepdims=True) @ values
    return torch.from_numpy(found)


@pytest.mark.parametrize("pattern", ["noncausal-self", "noncausal-cross", "causal-cross"])
@pytest.mark.parametrize(("heads", "groups"), [(1, 2), (2, 2), (1, 1)])
def test_equals_the_definition_of_each_head(pattern, heads, groups):
    tensors = inputs(9, 14 if "cross" in pattern else None, heads=heads, groups=groups)
    for form in (None, "reference"):
        close(run(tensors, pattern=pattern, form=form).output, definition(tensors))


def test_without_f_values_are_mixed_as_keys_are():
    tensors = inputs(8)
    shared = run(tensors | {"f": tensors["e"]}).output
    close(run({name: x for name, x in tensors.items() if name != "f"}).output, shared)
    assert (run(tensors).output - shared).abs().max() > 0.1


def test_the_state_has_the_size_that_the_card_says_and_float32():
    memory = {name: x.bfloat16() for name, x in inputs(1, 12).items() if name != "q"}
    state = absorb(MECHANISM, memory, pattern="causal-cross")
    assert state.k.dtype == state.v.dtype == torch.float32
    assert state.k[0].numel() + state.v[0].numel() == cost(Shape(1, 2, 1, 12, 4, 3), Config(projected=5)).state
    assert MECHANISM.recurrent


@pytest.mark.parametrize(
    ("sharing", "shape"), [("headwise", (1, 30, 6)), ("none", (2, 30, 6)), ("key-value", (1, 30, 6))]
)
def test_what_a_layer_shares(sharing, shape):
    options = {"length": 30, "projected": 6, "sharing": sharing}
    layer = create_layer("linformer", 16, 4, num_kv_heads=2, pattern="noncausal-self", **options)
    assert layer.projection.e.shape == shape
    assert (layer.projection.f is None) == (sharing == "key-value")
    assert layer.projection.e.abs().max() <= 6**-0.5
    layer(torch.randn(2, 9, 16)).output.sum().backward()
    assert (layer.projection.e.grad[:, 9:] == 0).all()  # rows of ranks that did not occur
    assert (layer.projection.e.grad[:, :9] != 0).any()


@pytest.mark.parametrize(("sharing", "left"), [("headwise", 2), ("key-value", 1), ("none", 2)])
def test_a_model_that_has_one_pair_of_matrices_is_saved_and_loaded(sharing, left, tmp_path):
    plan = [("linformer", {"length": 30, "projected": 6, "sharing": sharing})] * 3
    config = EncoderConfig(num_classes=3, features=2, dim=16, plan=plan, stack={"share": "tables"})
    model = Encoder(config).double().eval()
    kept = [name for name, _ in model.named_parameters() if "mixer.projection" in name]
    assert len(kept) == left and all(name.startswith("blocks.0.") for name in kept)
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    first, *others = (block.mixer.projection for block in again.blocks)
    assert all(other.e is first.e and other.f is first.f for other in others)
    x = torch.randn(2, 9, 2, dtype=torch.float64)
    assert torch.equal(again(x).output, model(x).output)


def test_more_keys_than_rows_are_refused_but_not_more_padding():
    tensors = inputs(9, longest=8)
    for form in (None, "reference"):
        refused("at most 8", run, tensors, form=form)
    found = run(tensors, mask=Mask(lengths=torch.tensor([8, 3]))).output[0, :, :8]
    close(found, definition(tensors | {name: tensors[name][:, :, :8] for name in "qkv"})[0])
    memory = {name: tensors[name][:, :, :5] if name in "kv" else tensors[name] for name in "kvef"}
    state = absorb(MECHANISM, memory, pattern="causal-cross")
    refused("3 heads", run, inputs(6, heads=3))
    refused("10 keys", absorb, MECHANISM, memory, pattern="causal-cross", state=state)


@pytest.mark.parametrize("name", ["linformer_self", "linformer_short_shared", "linformer_cross"])
def test_parity_with_a_third_partys_layer(name):
    recorded = load(name)
    pattern = "noncausal-cross" if "memory" in recorded else "noncausal-self"
    options = {"length": 16, "projected": 5, "sharing": "key-value" if "shared" in name else "headwise"}
    layer = create_layer("linformer", 12, 3, pattern=pattern, **options).double()
    weights = {f"{x}.weight": recorded[x] for x in ("query", "key", "value", "output")}
    weights |= {"projection.e": recorded["proj_k"][None]}
    if "shared" not in name:
        weights |= {"projection.f": recorded["proj_v"][None]}
    layer.load_state_dict(weights)
    sequences = [recorded[x].requires_grad_() for x in ("x", "memory") if x in recorded]
    output = layer(*sequences).output + recorded["output_bias"]
    close(output, recorded["out"], 1e-10)
    found = torch.autograd.grad(output, [layer.projection.e, *sequences], recorded["grad_out"])
    close(found[0][0], recorded["grad_proj_k"], 1e-10)
    for sequence, gradient in zip(("x", "memory"), found[1:], strict=False):
        close(gradient, recorded[f"grad_{sequence}"], 1e-10)
