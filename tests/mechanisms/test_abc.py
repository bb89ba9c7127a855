"""What is peculiar to bounded-memory control: its slots, their running softmax, its limits, and recorded outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import absorb, apply
from regard.contract import ALL_PATTERNS, Mask, Shape, Unsupported
from regard.create import create_layer
from regard.functional import abc_attention, softmax_attention
from regard.mechanisms import abc
from regard.mechanisms.abc import MECHANISM, Config, cost

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


def inputs(n: int, m: int | None = None, groups: int = 2, slots: int = 5) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes = {
        "q": (2, 2, n, 4),
        "k": (2, groups, m, 4),
        "v": (2, groups, m, 3),
        "slots_k": (4, slots),
        "slots_v": (3, slots),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def run(tensors: dict[str, Tensor], pattern: str = "causal-self", **call: Any) -> Any:
    return apply(MECHANISM, tensors, pattern=pattern, **call)


def cut(tensors: dict[str, Tensor], part: slice | Tensor) -> dict[str, Tensor]:
    return {name: x if "slots" in name else x[:, :, part] for name, x in tensors.items()}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    weights = np.exp(x - x.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def definition(tensors: dict[str, Tensor], causal: bool) -> Tensor:
    """One query after the other; it forgets the queries that see no key."""
    q, k, v, slots_k, slots_v = (x.numpy() for x in tensors.values())
    found = np.zeros((*q.shape[:3], v.shape[3]))
    n, m = q.shape[2], k.shape[2]
    for b, h, i in np.ndindex(*q.shape[:3]):
        g, seen = h * k.shape[1] // q.shape[1], i + m - n + 1 if causal else m
        if seen > 0:
            keys, values = k[b, g, :seen], v[b, g, :seen]
            slot_keys, slot_values = softmax(keys @ slots_k, 0).T @ keys, softmax(values @ slots_v, 0).T @ values
            found[b, h, i] = softmax(slot_keys @ q[b, h, i] / 2, 0) @ slot_values
    return torch.from_numpy(found)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_form_equals_the_definition(pattern, groups):
    tensors = inputs(9, 7 if pattern.cross else None, groups)
    expected = definition(tensors, pattern == "causal-self")
    forms = {"causal-self": ("reference", "parallel", "chunked"), "noncausal-self": ("reference", "parallel")}
    for form in forms.get(pattern, ("reference", "parallel", "absorb+read")):
        close(run(tensors, pattern, form=form, chunk_size=4).output, expected)


@pytest.mark.parametrize(("n", "m"), [(3, 8), (8, 3), (1, 6), (5, 0)])
def test_uneven_calls_align_bottom_right(n, m):
    tensors = inputs(n, m, 1)
    for form in ("reference", "parallel"):
        close(run(tensors, form=form).output, definition(tensors, True))


def test_slots_accumulate_over_the_past():
    """The benchmark's causal code has the current token's share of each slot alone."""
    tensors = inputs(6)
    k, v = tensors["k"], tensors["v"]

    def shares(x: Tensor, slots: Tensor) -> Tensor:
        return (x @ slots - (x @ slots).logcumsumexp(2)).exp()

    slot_keys = shares(k, tensors["slots_k"])[..., None] * k[:, :, :, None]
    slot_values = shares(v, tensors["slots_v"])[..., None] * v[:, :, :, None]
    alone = (torch.einsum("bhnd,bhncd->bhnc", tensors["q"], slot_keys) / 2).softmax(-1)
    alone = torch.einsum("bhnc,bhncv->bhnv", alone, slot_values)
    found = run(tensors).output
    close(found[:, :, 0], alone[:, :, 0])
    assert ((found - alone)[:, :, 1:].abs().amax((0, 1, 3)) > 0.05).all()


# limits


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_controls_of_zero_give_means_of_the_values_seen(pattern):
    tensors = inputs(8)
    tensors |= {name: torch.zeros_like(tensors[name]) for name in ("slots_k", "slots_v")}
    v, count = tensors["v"], torch.arange(1.0, 9, dtype=torch.float64)[:, None]
    expected = v.cumsum(2) / count if pattern == "causal-self" else v.mean(2, keepdim=True).expand_as(v)
    close(run(tensors, pattern).output, expected)


def test_a_slot_for_each_token_gives_softmax_attention():
    """Keys and values that are unit vectors, and controls so large that each slot holds one token alone."""
    tensors = inputs(6, 4)
    basis = torch.eye(4, dtype=torch.float64).expand(2, 2, 4, 4)
    tensors |= {"k": basis, "v": basis[:, :, [2, 0, 1, 3]]}
    sharp = 1000 * torch.eye(4, dtype=torch.float64)
    tensors |= {"slots_k": sharp, "slots_v": sharp[:, [2, 0, 1, 3]]}
    expected = softmax_attention(tensors["q"], tensors["k"], tensors["v"], pattern="noncausal-cross")
    close(run(tensors, "noncausal-cross").output, expected)


def test_one_slot_reads_the_same_whatever_the_query_asks():
    tensors = inputs(7, slots=1)
    other = tensors | {"q": torch.randn_like(tensors["q"])}
    close(run(tensors).output, run(other).output)


@pytest.mark.parametrize("size", [30.0, 3000.0])
def test_scores_of_any_size_stay_exact(size):
    """A running maximum, so that neither early tokens nor late ones overflow."""
    tensors = inputs(40)
    tensors |= {name: size * tensors[name] for name in ("slots_k", "slots_v")}
    close(run(tensors).output, definition(tensors, True))
    leaves = {name: x.float().requires_grad_() for name, x in tensors.items()}
    output = run(leaves).output
    output.sum().backward()
    assert output.isfinite().all()
    assert all(x.grad.isfinite().all() for x in leaves.values())


# state


@pytest.mark.parametrize("sizes", [[1] * 13, [4, 0, 8, 1]])
def test_split_and_resume_equals_whole_across_blocks(sizes, monkeypatch):
    monkeypatch.setattr(abc, "BLOCK", 3)
    tensors = inputs(13, groups=1)
    whole = run(tensors, return_state=True)
    close(whole.output, definition(tensors, True))
    state, outputs = None, []
    for part in torch.arange(13).split(sizes):
        result = run(cut(tensors, part), state=state, return_state=True)
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 2), whole.output)
    for name, x in whole.state.tensors().items():
        close(state.tensors()[name], x)


@pytest.mark.parametrize("pattern", ["noncausal-cross", "causal-cross"])
def test_memory_may_come_in_any_order_and_in_pieces(pattern):
    tensors, order = inputs(4, 15), torch.randperm(15)
    whole, state = run(tensors, pattern).output, None
    for part in order.split([2, 9, 4]):
        memory = {name: tensors[name][:, :, part] for name in "kv"} | {n: tensors[n] for n in ("slots_k", "slots_v")}
        state = absorb(MECHANISM, memory, pattern=pattern, state=state)
    close(run({"q": tensors["q"]}, pattern, state=state).output, whole)


def test_the_state_has_the_size_that_the_card_says():
    state = run({name: x[:1] if "slots" not in name else x for name, x in inputs(30).items()}, return_state=True).state
    numbers = sum(x.numel() for name, x in state.tensors().items() if name != "length")
    assert numbers == cost(Shape(1, 2, 1, 1000, 4, 3), Config(slots=5)).state
    assert MECHANISM.recurrent


# layers and refusals


def test_heads_of_a_layer_share_their_controls():
    layer = create_layer("abc", 16, 4, value_dim=6, slots=7)
    assert layer.projection.slots_k.shape == (4, 7)
    assert layer.projection.slots_v.shape == (6, 7)
    layer(torch.randn(2, 9, 16)).output.sum().backward()
    assert all((p.grad != 0).any() for p in layer.parameters())


def test_bad_options_and_pairs_are_refused():
    with pytest.raises(Unsupported):
        Config(slots=0)
    for call in ({"mask": Mask(bias=torch.zeros(1, 1, 5, 5))}, {"dropout": 0.1}, {"want": {"weights"}}):
        with pytest.raises(Unsupported, match="abc"):
            run(inputs(5), **call)
    with pytest.raises(Unsupported, match="slots_v"):
        abc_attention(*(x[..., :2] if name == "slots_v" else x for name, x in inputs(5).items()))


# parity


@pytest.mark.parametrize(
    ("name", "pattern"), [("abc_noncausal_cab", "noncausal-self"), ("abc_cross_cab", "causal-cross")]
)
def test_parity_with_the_benchmarks_code(name, pattern):
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        recorded = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    tensors = {x: recorded[x].requires_grad_(len(x) == 1) for x in ("q", "k", "v", "slots_k", "slots_v")}
    output = run(tensors, pattern).output
    close(output, recorded["out"], 1e-10)
    found = torch.autograd.grad(output, [tensors[x] for x in "qkv"], recorded["grad_out"])
    for x, gradient in zip("qkv", found, strict=True):
        close(gradient, recorded[f"grad_{x}"], 1e-10)
