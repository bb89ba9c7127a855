"""Tests specific to Synthesizer: scores by position in every form and pattern, kinds of layers, maximum length."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support import calls, close, cut, qkv, refused
from torch import Tensor

from regard.contract import ALL_PATTERNS, Context, LayerCall, Mask
from regard.create import create_layer
from regard.mechanisms.synthesizer import MECHANISM

SCORES = ("dense", "random", "products")
GIVEN = [some for size in (1, 2, 3) for some in itertools.combinations(SCORES, size)]
OF_MEMORY, OF_TOKENS = ("v", "key"), ("v", "key", "dense", "query")
run = calls(MECHANISM)


def inputs(
    given: tuple[str, ...], n: int, m: int | None = None, groups: int = 2, longest: int = 20
) -> dict[str, Tensor]:
    of_heads = qkv(n, m, groups=groups, value_dim=3)
    scores = {
        "dense": {"dense": torch.randn(2, 2, n, longest, dtype=torch.float64)},
        "random": {"random": torch.randn(2, longest, longest, dtype=torch.float64)},
        "products": {"query": of_heads["q"], "key": of_heads["k"]},
    }
    tensors = {"v": of_heads["v"], "slots": torch.zeros(2, n, dtype=torch.long)}
    for name in given:
        tensors |= scores[name]
    return tensors


def first_tokens(tensors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    return cut(tensors, slice(count), OF_TOKENS) | {"slots": tensors["slots"][:, :count]}


def definition(tensors: dict[str, Tensor], causal: bool) -> Tensor:
    """The definition, one pair of places at a time."""
    x = {name: t.numpy() for name, t in tensors.items()}
    n, m, groups = x["slots"].shape[1], x["v"].shape[2], x["v"].shape[1]
    found = np.zeros((2, 2, n, 3))
    for b, h, i in np.ndindex(2, 2, n):
        g, place = h * groups // 2, i + m - n if causal else i
        scores = []
        for j in range(min(max(place + 1, 0), m) if causal else m):
            score = 0.0
            if "dense" in x:
                score += x["dense"][b, h, i, j]
            if "random" in x:
                score += x["random"][h, place, j]
            if "query" in x:
                score += x["query"][b, h, i] @ x["key"][b, g, j] / 2
            scores.append(score)
        if scores:
            weights = np.exp(scores)
            found[b, h, i] = weights / weights.sum() @ x["v"][b, g, : len(scores)]
    return torch.from_numpy(found)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("given", GIVEN, ids="+".join)
def test_whole_calls_equal_the_definition_with_places_aligned_bottom_right(given, pattern):
    uneven = [(3, 8, 2), (8, 3, 1), (1, 6, 2), (5, 0, 2)] if pattern != "noncausal-self" else []
    for n, m, groups in [(9, 9, 1), (9, 9, 2), *uneven]:
        tensors = inputs(given, n, m, groups)
        expected = definition(tensors, pattern == "causal-self")
        for form in ("reference", "parallel"):
            close(run(tensors, pattern=pattern, form=form, scale=0.5).output, expected)


def test_weights_are_those_of_the_output():
    tensors = inputs(SCORES, 9)
    result = run(tensors, want={"weights"})
    weights = result.extras["weights"]
    close(weights @ tensors["v"], result.output)
    close(weights.sum(-1), torch.ones(2, 2, 9, dtype=torch.float64))
    assert (weights.triu(1) == 0).all()
    fixed = run(inputs(("random",), 9), want={"weights"}).extras["weights"]
    assert fixed.shape == (2, 2, 9, 9) and torch.equal(fixed[0], fixed[1])


# layers


def scores_of(layer, x: Tensor) -> dict[str, Tensor]:
    return layer.projection.inputs({}, LayerCall(x, None, Context()))


def test_dot_products_alone_are_softmax_attention():
    softmax, layer = create_layer("softmax", 16, 2).double(), create_layer("synthesizer", 16, 2, kinds="dot").double()
    names = {"query.weight": "projection.query.weight", "key.weight": "projection.key.weight"}
    layer.load_state_dict({names.get(name, name): x for name, x in softmax.state_dict().items()})
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    close(layer(x).output, softmax(x).output)


def test_a_mixture_starts_as_the_mean_of_its_kinds():
    layer = create_layer("synthesizer", 16, 2, kinds=("random", "dense"), length=9)
    x = torch.randn(2, 9, 16)
    found, projection = scores_of(layer, x), layer.projection
    close(found["random"], projection.random / 2)
    dense = projection.hidden(x).unflatten(-1, (2, 8)).transpose(1, 2).relu() @ projection.places
    close(found["dense"], dense / 2, 1e-6)


@pytest.mark.parametrize("length", [1, 2, 9, 12, 17])
def test_factorised_dense_scores_give_each_place_its_own_pair_of_factors(length):
    layer = create_layer("synthesizer", 8, 2, kinds="factorised_dense", length=length)
    first, second = layer.projection.first, layer.projection.second
    assert (first - 1) * second < length <= first * second
    scores = scores_of(layer, torch.randn(1, 3, 8))["dense"]
    assert scores.shape == (1, 2, 3, length)
    assert len(set(scores[0, 0, 0].tolist())) == length


def test_factorised_random_scores_have_the_rank_that_is_asked_for():
    layer = create_layer("synthesizer", 8, 2, kinds="factorised_random", length=12, rank=3)
    assert torch.linalg.matrix_rank(scores_of(layer, torch.randn(1, 3, 8))["random"]).tolist() == [3, 3]


@pytest.mark.parametrize("kind", ["random", "factorised_random"])
def test_fixed_random_scores_are_saved_and_not_trained(kind):
    layer, again = (create_layer("synthesizer", 8, 2, kinds=kind, length=12, train_random=False) for _ in range(2))
    assert not [n for n, p in layer.named_parameters() if p.requires_grad and "projection" in n]
    again.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7, 8)
    assert torch.equal(again(x).output, layer(x).output)


# refusals


@pytest.mark.parametrize("given", [("dense",), ("random",)])
def test_places_beyond_the_greatest_length_are_refused_but_not_more_padding(given):
    tensors = inputs(given, 9, longest=8)
    for form in ("reference", "parallel"):
        refused("at most 8", run, tensors, form=form)
    found = run(tensors, mask=Mask(lengths=torch.tensor([8, 3]))).output
    eight = first_tokens(tensors, 8)
    close(found[0, :, :8], definition(eight, True)[0])
    state = run(eight, return_state=True).state
    refused("9 tokens", run, cut(tensors, slice(8, 9), OF_TOKENS) | {"slots": tensors["slots"][:, 8:]}, state=state)
    if given == ("random",):
        refused("at most 8", run, inputs(given, 9, 4, longest=8), pattern="noncausal-cross")


def some(*names: str) -> dict[str, Tensor]:
    tensors = inputs(SCORES, 6)
    return {name: tensors[name] for name in ("v", *names)}


def test_scores_that_are_missing_or_not_whole_are_refused():
    refused("without scores", run, some())
    refused("query and key", run, some("dense", "query"))
    refused("query and key", run, some("dense", "key"))
