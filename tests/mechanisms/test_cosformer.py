"""What is peculiar to cosFormer: its reach, positions of every pattern, their limit, dead features, and recorded outputs."""

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
from regard.functional import cosformer_attention, linear_attention
from regard.mechanisms.cosformer import MECHANISM, Config, cost

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
REACH = {"length": 30}


def inputs(n: int, m: int | None = None, batch: int = 2) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes = {"q": (n, 4), "k": (m, 4), "v": (m, 3)}
    return {name: torch.randn(batch, 2, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def run(tensors: dict[str, Tensor], pattern: str = "causal-self", options: dict | None = None, **call: Any) -> Any:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**(options or {})), **call)


def cut(tensors: dict[str, Tensor], part: slice | Tensor) -> dict[str, Tensor]:
    return {name: x[:, :, part] for name, x in tensors.items()}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def paired(tensors: dict[str, Tensor], causal: bool, reach: float, eps: float = 1e-6) -> Tensor:
    """One pair of tokens after the other."""
    q, k, v = (x.numpy() for x in tensors.values())
    found = np.zeros((*q.shape[:3], v.shape[3]))
    n, m = q.shape[2], k.shape[2]
    for b, h, i in np.ndindex(*q.shape[:3]):
        place = i + m - n if causal else i
        above, below = 0.0, 0.0
        for j in range(min(place + 1, m) if causal else m):
            weight = (
                np.maximum(q[b, h, i], 0) @ np.maximum(k[b, h, j], 0) * math.cos(math.pi * (place - j) / (2 * reach))
            )
            above, below = above + weight * v[b, h, j], below + weight
        found[b, h, i] = above / max(below, eps)
    return torch.from_numpy(found)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("options", [REACH, {"length": 13, "eps": 0.5}])
def test_every_form_equals_the_sum_over_pairs(options, pattern):
    tensors = inputs(11, 13 if pattern.cross else None)
    expected = paired(tensors, pattern == "causal-self", options["length"], options.get("eps", 1e-6))
    forms = {"causal-self": ("reference", "parallel", "chunked"), "noncausal-self": ("reference", "parallel")}
    for form in forms.get(pattern, ("reference", "parallel", "absorb+read")):
        close(run(tensors, pattern, options, form=form, chunk_size=4).output, expected)


@pytest.mark.parametrize(("n", "m"), [(3, 8), (8, 3), (1, 6), (5, 0)])
def test_uneven_calls_align_positions_bottom_right(n, m):
    tensors = inputs(n, m)
    for form in ("reference", "parallel"):
        close(run(tensors, options={"length": 8}, form=form).output, paired(tensors, True, 8))


def test_uneven_padded_calls_align_each_row():
    tensors, counts, key_counts = inputs(7, 9), torch.tensor([7, 3]), torch.tensor([5, 9])
    masks = {"mask": Mask(lengths=counts), "memory_mask": Mask(lengths=key_counts)}
    found = run(tensors, options=REACH, **masks).output
    for b in range(2):
        alone = {x: t[b : b + 1, :, : (counts if x == "q" else key_counts)[b]] for x, t in tensors.items()}
        close(found[b : b + 1, :, : counts[b]], paired(alone, True, 30))


def test_the_weight_of_a_token_to_itself_is_the_largest_and_weights_fall_as_a_cosine():
    one = torch.ones(1, 1, 1, 4, dtype=torch.float64)
    k = torch.ones(1, 1, 9, 4, dtype=torch.float64)
    v = torch.eye(9, dtype=torch.float64)[None, None]
    weights = run({"q": one, "k": k, "v": v}, "noncausal-cross", {"length": 9}).output[0, 0, 0]
    expected = torch.cos(math.pi / 2 * torch.arange(9, dtype=torch.float64) / 9)
    close(weights, expected / expected.sum())
    assert (weights > 0).all() and weights.argmax() == 0
    causal = run({"q": one.expand_as(k), "k": k, "v": v}, options={"length": 9}).output[0, 0, 8]
    close(causal, weights.flip(0))


def test_weights_are_never_negative_and_sum_to_one():
    tensors = inputs(20) | {"v": torch.eye(20, dtype=torch.float64).expand(2, 2, 20, 20)}
    for pattern in ("causal-self", "noncausal-self"):
        weights = run(tensors, pattern, {"length": 20}).output
        assert weights.min() > -1e-15
        seen = (tensors["q"].relu() @ tensors["k"].relu().mT).tril() if pattern == "causal-self" else weights
        close(weights.sum(-1), (seen.sum(-1) > 1e-3).double(), 1e-3)


# the reach


def test_without_a_reach_noncausal_self_takes_each_rows_own_length():
    tensors, lengths = inputs(12), torch.tensor([12, 5])
    found = run(tensors, "noncausal-self", mask=Mask(lengths=lengths)).output
    for b in range(2):
        alone = cut({x: t[b : b + 1] for x, t in tensors.items()}, slice(0, int(lengths[b])))
        close(found[b : b + 1, :, : lengths[b]], paired(alone, False, int(lengths[b])))


def test_a_far_reach_is_rectified_linear_attention():
    tensors = inputs(20)
    expected = linear_attention(*tensors.values(), feature_map="relu", eps=1e-12)
    for options in ({}, {"length": 10**6}):
        found = run(tensors, options=options).output
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (run(tensors, options={"length": 20}).output - expected).abs().max() > 0.01


@pytest.mark.parametrize("options", [{}, REACH])
def test_outputs_do_not_depend_on_how_many_tokens_follow(options):
    """With M = N of the call, as in the official code, every earlier output would change."""
    tensors = inputs(25)
    whole = run(tensors, options=options).output
    for n in (1, 9, 24):
        close(run(cut(tensors, slice(0, n)), options=options).output, whole[:, :, :n])


@pytest.mark.parametrize("pattern", ["noncausal-cross", "causal-cross"])
def test_queries_of_cross_patterns_count_on_through_a_state(pattern):
    tensors = inputs(7, 12)
    whole = run(tensors, pattern, REACH).output
    state = None
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        memory = cut({x: tensors[x] for x in "kv"}, part)
        state = absorb(MECHANISM, memory, pattern=pattern, state=state, config=Config(**REACH))
    outputs = []
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        result = run({"q": tensors["q"][:, :, part]}, pattern, REACH, state=state)
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 2), whole)
    assert state.queries.tolist() == [7, 7] and state.length.tolist() == [12, 12]
    lengths = torch.tensor([2, 0])
    more = run({"q": tensors["q"]}, pattern, REACH, state=state, mask=Mask(lengths=lengths)).state
    assert more.queries.tolist() == [9, 7]


@pytest.mark.parametrize("sizes", [[1] * 17, [5, 0, 11, 1]])
def test_split_and_resume_equals_whole(sizes):
    tensors = inputs(17)
    whole = run(tensors, options=REACH, return_state=True)
    state, outputs = None, []
    for part in torch.arange(17).split(sizes):
        result = run(cut(tensors, part), options=REACH, state=state, return_state=True)
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 2), whole.output)
    close(state.memory, whole.state.memory)


def test_positions_beyond_the_reach_are_refused():
    options = {"length": 8}
    for pattern in ("causal-self", "noncausal-self"):
        for form in ("reference", "parallel"):
            with pytest.raises(Unsupported, match="position 9"):
                run(inputs(9), pattern, options, form=form)
    for n, m in ((9, 4), (4, 9)):
        with pytest.raises(Unsupported, match="position 9"):
            run(inputs(n, m), "causal-cross", options)
    run(inputs(9), options=options, mask=Mask(lengths=torch.tensor([8, 2])))  # padding has no position
    state = run(inputs(8), options=options, return_state=True).state
    with pytest.raises(Unsupported, match="position 9"):
        run(inputs(1), options=options, state=state)


# numerics


def test_features_that_are_all_zero_give_zero_with_finite_gradients():
    tensors = {name: (-x.abs() if name != "v" else x).requires_grad_() for name, x in inputs(6).items()}
    for pattern in ("causal-self", "noncausal-self"):
        output = run(tensors, pattern).output
        assert (output == 0).all()
        output.sum().backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors.values())


def test_four_thousand_tokens_stay_precise_in_float32():
    tensors = inputs(4096, batch=1)
    for options in ({"length": 4096}, {}):
        single = run({name: x.float() for name, x in tensors.items()}, options=options).output
        expected = run(tensors, options=options).output
        assert (single - expected).abs().max() <= MECHANISM.tolerances[torch.float32] * expected.abs().max()


def test_the_state_has_the_size_that_the_card_says():
    state = run(inputs(30, batch=1), return_state=True).state
    assert state.memory.shape == (1, 2, 8, 4)
    assert state.memory.numel() == cost(Shape(1, 2, 1, 1000, 4, 3), Config()).state
    assert MECHANISM.recurrent


def test_a_layer_decodes_token_by_token_with_padded_rows():
    layer = create_layer("cosformer", 8, 2, length=20).double()
    x, lengths = torch.randn(2, 9, 8, dtype=torch.float64), torch.tensor([5, 3])
    state = layer(x[:, :5], context=Context(mask=Mask(lengths=lengths), want=frozenset({"state"}))).state
    rows = [x[:1], torch.cat([x[1:, :3], x[1:, 5:]], 1)]
    for t in range(5, 9):
        y, state = layer.step(x[:, t], state)
        for row, whole in enumerate(rows):
            close(y[row], layer(whole).output[0, int(lengths[row]) + t - 5])


# refusals


@pytest.mark.parametrize("options", [{"length": 0}, {"eps": 0.0}, {"eps": math.nan}, {"eps": math.inf}])
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


def test_what_needs_a_weight_for_each_pair_is_refused():
    for call in ({"mask": Mask(bias=torch.zeros(1, 1, 5, 5))}, {"dropout": 0.1}, {"want": {"weights"}}):
        with pytest.raises(Unsupported, match="cosformer"):
            cosformer_attention(*inputs(5).values(), **call)


# parity


@pytest.mark.parametrize(
    ("name", "pattern", "length"),
    [
        ("cosformer_noncausal", "noncausal-self", None),
        ("cosformer_cross", "noncausal-cross", 12),
        ("cosformer_causal", "causal-self", 14),
    ],
)
def test_parity_with_the_official_layer(name, pattern, length):
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        recorded = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    layer = create_layer("cosformer", 12, 3, pattern=pattern, length=length, bias=True).double()
    names = ("query", "key", "value", "output")
    layer.load_state_dict(
        {f"{x}.weight": recorded[x] for x in names} | {f"{x}.bias": recorded[f"{x}_bias"] for x in names}
    )
    leaves = {x: recorded[x].requires_grad_() for x in ("x", "memory") if x in recorded}
    output = layer(*leaves.values()).output
    close(output, recorded["out"], 1e-10)
    for x, gradient in zip(
        leaves, torch.autograd.grad(output, list(leaves.values()), recorded["grad_out"]), strict=True
    ):
        close(gradient, recorded[f"grad_{x}"], 1e-10)
