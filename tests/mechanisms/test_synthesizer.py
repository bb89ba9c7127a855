"""What is peculiar to Synthesizer: scores of places in every form and pattern, the kinds of a layer, its greatest length."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import absorb, apply
from regard.contract import ALL_PATTERNS, Context, Mask, Unsupported
from regard.create import create_layer
from regard.functional import synthesizer_attention
from regard.layers.parts import LayerCall
from regard.mechanisms.synthesizer import KINDS, MECHANISM, Config

SCORES = ("dense", "random", "products")
GIVEN = [some for size in (1, 2, 3) for some in itertools.combinations(SCORES, size)]


def inputs(
    given: tuple[str, ...], n: int, m: int | None = None, groups: int = 2, longest: int = 20
) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes: dict[str, tuple[int, ...]] = {"v": (2, groups, m, 3)}
    if "dense" in given:
        shapes["dense"] = (2, 2, n, longest)
    if "random" in given:
        shapes["random"] = (2, longest, longest)
    if "products" in given:
        shapes |= {"query": (2, 2, n, 4), "key": (2, groups, m, 4)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return tensors | {"slots": torch.zeros(2, n, dtype=torch.long)}


def run(tensors: dict[str, Tensor], pattern: str = "causal-self", **call: Any) -> Any:
    return apply(MECHANISM, tensors, pattern=pattern, **call)


def cut(tensors: dict[str, Tensor], n: slice | Tensor, m: slice | Tensor) -> dict[str, Tensor]:
    parts = {"v": m, "key": m, "dense": n, "query": n}
    cut = {name: x[:, :, parts[name]] if name in parts else x for name, x in tensors.items()}
    return cut | ({"slots": tensors["slots"][:, n]} if "slots" in tensors else {})


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def definition(tensors: dict[str, Tensor], causal: bool, first: int = 0) -> Tensor:
    """One pair of places after the other; `first` is the place of the first query of a cross pattern."""
    x = {name: t.numpy() for name, t in tensors.items()}
    n, m, groups = x["slots"].shape[1], x["v"].shape[2], x["v"].shape[1]
    found = np.zeros((2, 2, n, 3))
    for b, h, i in np.ndindex(2, 2, n):
        g, place = h * groups // 2, i + m - n if causal else i + first
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
@pytest.mark.parametrize("groups", [1, 2])
def test_every_form_equals_the_definition(given, pattern, groups):
    tensors = inputs(given, 9, 7 if pattern.cross else None, groups)
    expected = definition(tensors, pattern == "causal-self")
    forms = {"causal-self": ("reference", "parallel", "chunked"), "noncausal-self": ("reference", "parallel")}
    for form in forms.get(pattern, ("reference", "parallel", "absorb+read")):
        close(run(tensors, pattern, form=form, scale=0.5).output, expected)


@pytest.mark.parametrize(("n", "m"), [(3, 8), (8, 3), (1, 6), (5, 0)])
def test_uneven_calls_align_places_bottom_right(n, m):
    tensors = inputs(SCORES, n, m)
    for form in ("reference", "parallel"):
        close(run(tensors, form=form, scale=0.5).output, definition(tensors, True))


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_places_are_ranks_so_padding_anywhere_enters_nothing(pattern):
    tensors = inputs(SCORES, 10)
    valid = torch.rand(2, 10) > 0.4
    names = ("v", "dense", "query", "key")
    padded = {x: tensors[x].masked_fill(~valid[:, None, :, None], torch.nan) for x in names}
    found = run(tensors | padded, pattern, mask=Mask(valid=valid), scale=0.5).output
    for b in range(2):
        alone = cut(tensors, valid[b], valid[b])
        close(found[b, :, valid[b]], definition(alone, pattern == "causal-self")[b])


@pytest.mark.parametrize("given", GIVEN, ids="+".join)
@pytest.mark.parametrize("sizes", [[1] * 11, [4, 0, 6, 1]])
def test_split_and_resume_equals_whole(given, sizes):
    tensors, state, outputs = inputs(given, 11), None, []
    for part in torch.arange(11).split(sizes):
        result = run(cut(tensors, part, part), state=state, return_state=True, scale=0.5)
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 2), definition(tensors, True))


@pytest.mark.parametrize("given", GIVEN, ids="+".join)
def test_rows_that_continue_from_unequal_lengths_keep_their_places(given):
    """A cache has empty slots then, so that slots are not places."""
    tensors, first, second = inputs(given, 10), torch.tensor([4, 1]), torch.tensor([3, 6])
    state = run(tensors, mask=Mask(lengths=first), return_state=True, scale=0.5).state
    names = [name for name in tensors if name in ("v", "dense", "query", "key")]
    rest = {x: torch.stack([tensors[x][b].roll(-int(first[b]), 1) for b in range(2)]) for x in names}
    found = run(tensors | rest, mask=Mask(lengths=second), state=state, scale=0.5).output
    for b in range(2):
        start, stop = int(first[b]), int(first[b] + second[b])
        whole = definition(cut(tensors, slice(stop), slice(stop)), True)[b, :, start:]
        close(found[b, :, : stop - start], whole)


@pytest.mark.parametrize("pattern", ["noncausal-cross", "causal-cross"])
@pytest.mark.parametrize("given", GIVEN, ids="+".join)
def test_queries_and_memory_of_cross_patterns_count_on_through_a_state(given, pattern):
    tensors, state, outputs = inputs(given, 7, 12), None, []
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        memory = {name: x for name, x in cut(tensors, slice(0), part).items() if name in ("v", "key")}
        state = absorb(MECHANISM, memory, pattern=pattern, state=state)
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        queries = {name: x for name, x in cut(tensors, part, slice(0)).items() if name not in ("v", "key")}
        result = run(queries, pattern, state=state, scale=0.5)
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 2), definition(tensors, False))


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


@pytest.mark.parametrize("kinds", [*KINDS, ("dense", "dot"), KINDS])
@pytest.mark.parametrize("pattern", ["causal-self", "causal-cross"])
def test_a_layer_of_every_kind_decodes_as_it_reads(kinds, pattern):
    cross = "cross" in pattern
    layer = create_layer("synthesizer", 8, 2, pattern=pattern, kinds=kinds, length=20).double()
    x, memory = torch.randn(2, 7, 8, dtype=torch.float64), torch.randn(2, 9, 8, dtype=torch.float64)
    whole = layer(x, memory).output if cross else layer(x).output
    if cross:
        state, outputs = layer.encode_memory(memory), []
    else:
        first = layer(x[:, :2], context=Context(want=frozenset({"state"})))
        state, outputs = first.state, [*first.output.unbind(1)]
    for t in range(len(outputs), 7):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
    close(torch.stack(outputs, 1), whole)
    whole.square().sum().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in layer.parameters())


def test_dot_products_alone_are_softmax_attention():
    softmax = create_layer("softmax", 16, 2).double()
    layer = create_layer("synthesizer", 16, 2, kinds="dot").double()
    weights = softmax.state_dict()
    names = {"query.weight": "projection.query.weight", "key.weight": "projection.key.weight"}
    layer.load_state_dict({names.get(name, name): x for name, x in weights.items()})
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    close(layer(x).output, softmax(x).output)


def test_a_mixture_starts_as_the_mean_of_its_kinds():
    layer = create_layer("synthesizer", 16, 2, kinds=("random", "dense"), length=9)
    x = torch.randn(2, 9, 16)
    heads = layer.projection.inputs({"v": torch.zeros(2, 2, 9, 8)}, LayerCall(x, x, Context()))
    close(heads["random"], layer.projection.random / 2)
    dense = layer.projection.hidden(x).unflatten(-1, (2, 8)).transpose(1, 2).relu() @ layer.projection.places
    close(heads["dense"], dense / 2, 1e-6)


@pytest.mark.parametrize("length", [1, 2, 9, 12, 17])
def test_factorised_dense_scores_give_each_place_its_own_pair_of_factors(length):
    layer = create_layer("synthesizer", 8, 2, kinds="factorised_dense", length=length).projection
    assert (layer.first - 1) * layer.second < length <= layer.first * layer.second
    scores = layer.inputs({}, LayerCall(torch.randn(1, 3, 8), None, Context()))["dense"]
    assert scores.shape == (1, 2, 3, length)
    assert len(set(scores[0, 0, 0].tolist())) == length


def test_factorised_random_scores_have_the_rank_that_is_asked_for():
    layer = create_layer("synthesizer", 8, 2, kinds="factorised_random", length=12, rank=3).projection
    assert torch.linalg.matrix_rank(
        layer.inputs({}, LayerCall(torch.randn(1, 3, 8), None, Context()))["random"]
    ).tolist() == [3, 3]


@pytest.mark.parametrize("kind", ["random", "factorised_random"])
def test_fixed_random_scores_are_saved_and_not_trained(kind):
    layer = create_layer("synthesizer", 8, 2, kinds=kind, length=12, train_random=False)
    assert not [n for n, p in layer.named_parameters() if p.requires_grad and "projection" in n]
    again = create_layer("synthesizer", 8, 2, kinds=kind, length=12, train_random=False)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7, 8)
    assert torch.equal(again(x).output, layer(x).output)


# refusals


@pytest.mark.parametrize(
    "options",
    [{"kinds": ()}, {"kinds": "fourier"}, {"kinds": ("dense", "dense")}, {"length": 0}, {"rank": 0}],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


def test_places_beyond_the_greatest_length_are_refused_but_not_more_padding():
    for given in (("dense",), ("random",)):
        tensors = inputs(given, 9, longest=8)
        for form in ("reference", "parallel"):
            with pytest.raises(Unsupported, match="at most 8"):
                run(tensors, form=form)
        found = run(tensors, mask=Mask(lengths=torch.tensor([8, 3]))).output
        close(found[0, :, :8], definition(cut(tensors, slice(8), slice(8)), True)[0])
        state = run(cut(tensors, slice(8), slice(8)), return_state=True).state
        with pytest.raises(Unsupported, match="9 tokens"):
            run(cut(tensors, slice(8, 9), slice(8, 9)), state=state)
    with pytest.raises(Unsupported, match="at most 8"):
        run(inputs(("random",), 9, 4, longest=8), "noncausal-cross")


def test_calls_without_scores_or_with_half_of_a_product_are_refused():
    tensors = inputs(SCORES, 6)
    with pytest.raises(Unsupported, match="without scores"):
        run({"v": tensors["v"]})
    for one in ("query", "key"):
        with pytest.raises(Unsupported, match="query and key"):
            run({"v": tensors["v"], "dense": tensors["dense"], one: tensors[one]})
    with pytest.raises(Unsupported, match="synthesizer"):
        synthesizer_attention(tensors["v"], tensors["dense"], mask=Mask(bias=torch.zeros(1, 1, 6, 6)))
