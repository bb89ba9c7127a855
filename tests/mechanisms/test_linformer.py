"""What is peculiar to Linformer: its matrices' rows belong to ranks, what is shared, its greatest length, recorded outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import absorb, apply
from regard.contract import Context, Mask, Shape, Unsupported
from regard.create import create_layer
from regard.functional import linformer_attention, softmax_attention
from regard.mechanisms.linformer import MECHANISM, Config, cost
from regard.models import Encoder, EncoderConfig, from_pretrained, save_pretrained

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
PATTERNS = ["noncausal-self", "noncausal-cross", "causal-cross"]


def inputs(n: int, m: int | None = None, longest: int = 20, heads: int = 1, groups: int = 2) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes = {
        "q": (2, 2, n, 4),
        "k": (2, groups, m, 4),
        "v": (2, groups, m, 3),
        "e": (heads, longest, 5),
        "f": (heads, longest, 5),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def run(tensors: dict[str, Tensor], pattern: str = "noncausal-self", **call: Any) -> Any:
    return apply(MECHANISM, tensors, pattern=pattern, **call)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def definition(tensors: dict[str, Tensor]) -> Tensor:
    """One row and head after the other."""
    q, k, v, e, f = (tensors[name].numpy() for name in "qkvef")
    found = np.empty((*q.shape[:3], v.shape[3]))
    for b, h in np.ndindex(*q.shape[:2]):
        g = h * k.shape[1] // q.shape[1]
        own, m = g % len(e), k.shape[2]
        keys, values = e[own, :m].T @ k[b, g], f[own, :m].T @ v[b, g]
        weights = np.exp(q[b, h] @ keys.T / 2)
        found[b, h] = weights / weights.sum(-1, keepdims=True) @ values
    return torch.from_numpy(found)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("heads", "groups"), [(1, 2), (2, 2), (1, 1)])
def test_every_form_equals_the_definition_of_each_head(pattern, heads, groups):
    tensors = inputs(9, 14 if "cross" in pattern else None, heads=heads, groups=groups)
    for form in ("reference", "parallel", *(["absorb+read"] if "cross" in pattern else [])):
        close(run(tensors, pattern, form=form).output, definition(tensors))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_identity_matrices_give_softmax_attention(pattern):
    tensors = inputs(12, 12)
    tensors |= {name: torch.eye(12, dtype=torch.float64)[None] for name in "ef"}
    expected = softmax_attention(*(tensors[x] for x in "qkv"), pattern=pattern)
    close(run(tensors, pattern).output, expected)


def test_without_f_values_are_mixed_as_keys_are():
    tensors = inputs(8)
    shared = run(tensors | {"f": tensors["e"]}).output
    close(run({name: x for name, x in tensors.items() if name != "f"}).output, shared)
    assert (run(tensors).output - shared).abs().max() > 0.1


def test_rows_of_the_matrices_belong_to_ranks_so_padding_enters_nothing():
    tensors = inputs(10)
    valid = torch.rand(2, 10) > 0.4
    padded = {x: tensors[x].masked_fill(~valid[:, None, :, None], torch.nan) for x in "qkv"}
    found = run(tensors | padded, mask=Mask(valid=valid)).output
    for b in range(2):
        alone = {x: tensors[x][b : b + 1, :, valid[b]] for x in "qkv"}
        close(found[b : b + 1, :, valid[b]], definition(tensors | alone))


@pytest.mark.parametrize("lengths", [[15, 15], [15, 6]])
def test_memory_in_pieces_takes_the_rows_that_follow(lengths):
    """Rows that have read different numbers of tokens are at different rows of E."""
    tensors, whole = inputs(4, 15), torch.tensor(lengths)
    expected = run(tensors, "causal-cross", memory_mask=Mask(lengths=whole)).output
    state, before = None, torch.zeros(2, dtype=torch.long)
    for after in ([2, 5], [9, 6], [15, 15]):
        stop = torch.minimum(torch.tensor(after), whole)
        piece, counts = {x: torch.zeros_like(tensors[x]) for x in "kv"}, stop - before
        for b in range(2):
            for x in "kv":
                piece[x][b, :, : counts[b]] = tensors[x][b, :, before[b] : stop[b]]
        mask = Mask(lengths=counts)
        state = absorb(
            MECHANISM, piece | {x: tensors[x] for x in "ef"}, pattern="causal-cross", memory_mask=mask, state=state
        )
        before = stop
    assert state.length.tolist() == lengths
    close(run({"q": tensors["q"]}, "causal-cross", state=state).output, expected)


def test_the_state_has_the_size_that_the_card_says_and_float32():
    tensors = {name: x.bfloat16() for name, x in inputs(1, 12).items()}
    state = absorb(MECHANISM, {x: tensors[x][:1] if x in "kv" else tensors[x] for x in "kvef"}, pattern="causal-cross")
    assert state.k.dtype == state.v.dtype == torch.float32
    assert state.k.numel() + state.v.numel() == cost(Shape(1, 2, 1, 12, 4, 3), Config(projected=5)).state
    assert MECHANISM.recurrent


# layers


@pytest.mark.parametrize(
    ("sharing", "shape"), [("headwise", (1, 30, 6)), ("none", (2, 30, 6)), ("key-value", (1, 30, 6))]
)
def test_what_a_layer_shares(sharing, shape):
    layer = create_layer(
        "linformer", 16, 4, num_kv_heads=2, pattern="noncausal-self", length=30, projected=6, sharing=sharing
    )
    assert layer.projection.e.shape == shape
    assert (layer.projection.f is None) == (sharing == "key-value")
    assert layer.projection.e.abs().max() <= 6**-0.5
    layer(torch.randn(2, 9, 16)).output.sum().backward()
    assert (layer.projection.e.grad[:, 9:] == 0).all()  # rows of ranks that were not there
    assert (layer.projection.e.grad[:, :9] != 0).any()


def test_layers_may_share_one_module():
    first, second = (
        create_layer("linformer", 16, 4, pattern="noncausal-self", length=30, projected=6) for _ in range(2)
    )
    second.projection = first.projection
    x = torch.randn(2, 9, 16)
    second(first(x).output).output.sum().backward()
    names = [name for name, _ in torch.nn.ModuleList([first, second]).named_parameters() if "projection" in name]
    assert names == ["0.projection.e", "0.projection.f"]


@pytest.mark.parametrize(("sharing", "left"), [("headwise", 2), ("key-value", 1), ("none", 2)])
def test_a_model_that_has_one_pair_of_matrices_is_saved_and_loaded(sharing, left, tmp_path):
    options = {"length": 30, "projected": 6, "sharing": sharing}
    plan, stack = [("linformer", options)] * 3, {"share": "tables"}
    model = Encoder(EncoderConfig(num_classes=3, features=2, dim=16, plan=plan, stack=stack)).double().eval()
    kept = [name for name, _ in model.named_parameters() if "mixer.projection" in name]
    assert len(kept) == left and all(name.startswith("blocks.0.") for name in kept)
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    first, *others = (block.mixer.projection for block in again.blocks)
    assert all(other.e is first.e and other.f is first.f for other in others)
    x = torch.randn(2, 9, 2, dtype=torch.float64)
    assert torch.equal(again(x).output, model(x).output)


def test_a_layer_decodes_on_memory_that_it_has_absorbed():
    layer = create_layer("linformer", 16, 4, pattern="causal-cross", length=30, projected=6).double()
    x, memory = torch.randn(2, 5, 16).double(), torch.randn(2, 11, 16).double()
    state, outputs = layer.encode_memory(memory, context=Context(memory_mask=Mask(lengths=torch.tensor([11, 4])))), []
    for t in range(5):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
    expected = layer(x, memory, context=Context(memory_mask=Mask(lengths=torch.tensor([11, 4])))).output
    close(torch.stack(outputs, 1), expected)


# refusals


@pytest.mark.parametrize("options", [{"length": 0}, {"projected": 0}, {"sharing": "layerwise"}])
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


def test_more_keys_than_rows_are_refused_but_not_more_padding():
    tensors = inputs(9, longest=8)
    with pytest.raises(Unsupported, match="at most 8"):
        run(tensors)
    with pytest.raises(Unsupported, match="at most 8"):
        run(tensors, form="reference")
    close(
        run(tensors, mask=Mask(lengths=torch.tensor([8, 3]))).output[0, :, :8],
        definition(tensors | {x: tensors[x][:, :, :8] for x in "qkv"})[0],
    )
    memory = {x: inputs(1, 5, longest=8)[x] for x in "kvef"}
    state = absorb(MECHANISM, memory, pattern="causal-cross")
    with pytest.raises(Unsupported, match="10 keys"):
        absorb(MECHANISM, memory, pattern="causal-cross", state=state)


def test_causal_self_and_matrices_of_other_heads_are_refused():
    with pytest.raises(Unsupported, match="later"):
        run(inputs(6), "causal-self")
    with pytest.raises(Unsupported, match="3 heads"):
        run(inputs(6, heads=3))
    with pytest.raises(Unsupported, match="linformer"):
        linformer_attention(*inputs(6).values(), pattern="noncausal-self", mask=Mask(bias=torch.zeros(1, 1, 6, 6)))


# parity


@pytest.mark.parametrize("name", ["linformer_self", "linformer_short_shared", "linformer_cross"])
def test_parity_with_a_third_partys_layer(name):
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        recorded = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    cross, shared = "memory" in recorded, "shared" in name
    layer = create_layer(
        "linformer",
        12,
        3,
        pattern="noncausal-cross" if cross else "noncausal-self",
        length=16,
        projected=5,
        sharing="key-value" if shared else "headwise",
    ).double()
    weights = {f"{x}.weight": recorded[x] for x in ("query", "key", "value", "output")}
    weights |= {"projection.e": recorded["proj_k"][None]} | (
        {} if shared else {"projection.f": recorded["proj_v"][None]}
    )
    layer.load_state_dict(weights)
    x = recorded["x"].requires_grad_()
    leaves = [x, layer.projection.e] + ([recorded["memory"].requires_grad_()] if cross else [])
    output = layer(x, recorded["memory"] if cross else None).output + recorded["output_bias"]
    close(output, recorded["out"], 1e-10)
    found = torch.autograd.grad(output, leaves, recorded["grad_out"])
    close(found[0], recorded["grad_x"], 1e-10)
    close(found[1][0], recorded["grad_proj_k"], 1e-10)
    if cross:
        close(found[2], recorded["grad_memory"], 1e-10)
