"""Encoder pools that are not mechanisms, against definitions in loops over single sequences."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support import close

from regard.contract import BlockMask, Context, Mask, Unsupported
from regard.layers.pooling import POOLINGS, make_pooling

DIM, N = 5, 7
OPTIONS = {"additive": {"hidden": 4}, "structured": {"slots": 3, "hidden": 4, "diversity": True}}
CASES = [(name, OPTIONS.get(name, {})) for name in POOLINGS]
WEIGHTED = [(name, options) for name, options in CASES if options]


def make(name: str, options: dict):
    return make_pooling(name, DIM, 2, **options).double()


def tokens(batch: int = 4, n: int = N) -> torch.Tensor:
    return torch.randn(batch, n, DIM, dtype=torch.float64)


def weights_by_loops(layer, sequence: torch.Tensor) -> torch.Tensor:
    """The weights A (m, n) of one sequence (n, D), one token and slot at a time."""
    scores = torch.zeros(layer.slots, len(sequence), dtype=torch.float64)
    for t, h in enumerate(sequence):
        inner = layer.hidden.weight @ h
        if layer.name == "additive":
            inner = inner + layer.hidden.bias
        for slot in range(layer.slots):
            scores[slot, t] = sum(layer.score.weight[slot, i] * inner[i].tanh() for i in range(len(inner)))
    return torch.stack([row.exp() / row.exp().sum() for row in scores])


def pool_by_loops(layer, sequence: torch.Tensor) -> torch.Tensor:
    """The pooled tokens (m, D) of one sequence (n, D)."""
    if not len(sequence):
        return torch.zeros(layer.slots, DIM, dtype=torch.float64)
    if layer.name in ("first", "last"):
        return sequence[[0 if layer.name == "first" else -1]]
    if layer.name in ("mean", "max"):
        columns = [[float(h[i]) for h in sequence.detach()] for i in range(DIM)]
        found = [max(c) if layer.name == "max" else sum(c) / len(c) for c in columns]
        return torch.tensor([found], dtype=torch.float64)
    weights = weights_by_loops(layer, sequence)
    return torch.stack([sum(a * h for a, h in zip(row, sequence, strict=True)) for row in weights])


PADDED = torch.tensor(
    [[0, 1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]]
).bool()
LENGTHS = torch.tensor([N, 3, 0, 1], dtype=torch.int32)
BORDERS = [0, 0, 2, 2, 3, N, N]
LAYOUTS = {  # a mask, and its sequences as (row, columns)
    "whole": (None, [(row, list(range(N))) for row in range(4)]),
    "padded anywhere": (Mask(valid=PADDED), [(row, PADDED[row].nonzero()[:, 0].tolist()) for row in range(4)]),
    "padded right": (
        Mask(lengths=LENGTHS),
        [(row, list(range(length))) for row, length in enumerate(LENGTHS.tolist())],
    ),
    "packed": (Mask(cu_seqlens=torch.tensor(BORDERS)), [(0, list(range(a, b))) for a, b in pairwise(BORDERS)]),
}
RIGHT = Context(mask=LAYOUTS["padded right"][0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_each_sequence_is_pooled_by_the_definition_and_padding_plays_no_part(name, options, layout):
    layer, (mask, places) = make(name, options), LAYOUTS[layout]
    x = tokens(1 if layout == "packed" else 4) - 5
    padding = torch.ones(x.shape[:2], dtype=torch.bool)
    for row, columns in places:
        padding[row, columns] = False
    x = x.masked_fill(padding[..., None], torch.nan).requires_grad_()
    found = layer(x, context=Context(mask=mask)).output
    expected = torch.stack([pool_by_loops(layer, x[row, columns]) for row, columns in places])
    assert expected.shape[1:] == (options.get("slots", 1), DIM)
    close(found, expected)
    assert not any(pooled.any() for pooled, (_, columns) in zip(found, places, strict=True) if not columns)
    gradient = torch.autograd.grad(found.square().sum(), [x, *layer.parameters()])
    assert not gradient[0][padding].any() and all(g.isfinite().all() and g.any() for g in gradient)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(
    ("n", "mask"),
    [
        (0, None),
        (0, Mask(lengths=torch.zeros(2, dtype=torch.long))),
        (4, Mask(valid=torch.zeros(2, 4, dtype=torch.bool))),
    ],
)
def test_sequences_without_tokens_give_zero_with_finite_gradients(name, options, n, mask):
    layer, x = make(name, options), tokens(2, n).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # gradients are finite at every step
        found = layer(x, context=Context(mask=mask))
        total = found.output.sum() + sum(total for total, _ in found.losses.values())
        gradients = torch.autograd.grad(total, [x, *layer.parameters()], allow_unused=True)
    assert found.output.shape == (2, options.get("slots", 1), DIM) and not found.output.any()
    assert all(gradient is None or not gradient.any() for gradient in gradients)
    assert all(count == 0 and total == 0 for total, count in found.losses.values())


@pytest.mark.parametrize(("name", "options"), WEIGHTED)
def test_weights_are_distributions_over_valid_tokens(name, options):
    layer, x = make(name, options), tokens()
    weights = layer(x, context=Context(mask=Mask(valid=PADDED), want=frozenset({"weights"}))).extras["weights"]
    expected = torch.zeros(4, layer.slots, N, dtype=torch.float64)
    for row in range(3):  # weights are right-padded
        expected[row, :, : int(PADDED[row].sum())] = weights_by_loops(layer, x[row][PADDED[row]])
    close(weights, expected)
    assert "weights" not in layer(x).extras


def test_diversity_is_the_overlap_of_the_slots():
    layer, x = make("structured", OPTIONS["structured"]), tokens()
    total, count = layer(x, context=RIGHT).losses["diversity"]
    maps = [weights_by_loops(layer, row[:length]) for row, length in zip(x, LENGTHS, strict=True) if length]
    close(total, sum((a @ a.T - torch.eye(3, dtype=torch.float64)).square().sum() for a in maps))
    assert count == 3 and total.requires_grad
    assert not make("structured", {"slots": 3})(x).losses


@pytest.mark.parametrize(("name", "options"), CASES)
def test_half_precision_sums_in_float32(name, options):
    layer, x = make(name, options), tokens()
    expected, found = layer(x, context=RIGHT), layer.bfloat16()(x.bfloat16(), context=RIGHT)
    assert found.output.dtype == torch.bfloat16
    torch.testing.assert_close(found.output.double(), expected.output, rtol=0, atol=0.05)
    assert all(total.dtype == torch.float32 for total, _ in found.losses.values())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_compiles_to_one_graph(name, options):
    layer, x = make(name, options), tokens()
    compiled = torch.compile(lambda x: layer(x, context=RIGHT).output, fullgraph=True, backend="aot_eager")
    close(compiled(x), layer(x, context=RIGHT).output)


@pytest.mark.parametrize(
    ("name", "dim", "options", "words"),
    [
        ("structurd", DIM, {}, "supported: mean, max, first, last, additive, structured; try structured"),
        ("mean", DIM, {"hidden": 3}, "option 'hidden' of pool 'mean'; supported: no options"),
        ("additive", DIM, {"hiden": 3}, "supported: hidden; try hidden"),
        ("structured", DIM, {"rank": 3}, "supported: slots, hidden, diversity"),
        ("structured", DIM, {"slots": 0}, "slots=0; supported: a whole number slots >= 1"),
        ("structured", DIM, {"slots": 2.5}, "slots=2.5"),
        ("structured", DIM, {"hidden": True}, "hidden=True"),
        ("additive", DIM, {"hidden": -1}, "hidden=-1"),
        ("mean", 0, {}, "dim=0"),
    ],
)
def test_unknown_names_options_and_sizes_are_refused(name, dim, options, words):
    with pytest.raises(Unsupported, match=words):
        make_pooling(name, dim, 2, **options)


X = tokens(2)
TOKENS = rf"supported: floats \(B, N, {DIM}\)"
BLOCKS = BlockMask(torch.ones(1, 1, 3, 3, dtype=torch.bool), 3)
CALLS = [
    (lambda layer: layer(X.long()), TOKENS),
    (lambda layer: layer(X[0]), TOKENS),
    (lambda layer: layer(X[..., 1:]), TOKENS),
    (lambda layer: layer(X, X), "memory"),
    (lambda layer: layer(X, state=object()), "whole sequences"),
    (lambda layer: layer(X, context=Context(memory_mask=Mask())), "memory"),
    (lambda layer: layer(X, context=Context(want=frozenset({"state"}))), "whole sequences"),
    (lambda layer: layer(X, context=Context(roles=torch.zeros(2, N, dtype=torch.long))), "cu_seqlens masks"),
    (lambda layer: layer(X, context=Context(mask=Mask(bias=torch.zeros(1, 1, N, N)))), "cu_seqlens masks"),
    (lambda layer: layer(X, context=Context(mask=Mask(blocks=BLOCKS))), "cu_seqlens masks"),
    (lambda layer: layer(X, context=Context(want=frozenset({"lse"}))), "want='lse' of pool"),
    (lambda layer: layer(X, context=Context(want=frozenset({"weihgts"}))), "try weights"),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_what_a_pool_cannot_honour_is_refused(name, options):
    layer = make(name, options)
    unweighted = (lambda layer: layer(X, context=Context(want=frozenset({"weights"}))), "try additive")
    for call, words in CALLS if options else [*CALLS, unweighted]:
        with pytest.raises(Unsupported, match=words):
            call(layer)
