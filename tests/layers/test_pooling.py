"""The pools of an encoder that are no mechanisms, against their definitions in loops over single sequences."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from regard.contract import BlockMask, Context, Mask, Unsupported
from regard.layers.pooling import POOLINGS, make_pooling

DIM, N = 5, 7
OPTIONS = {"additive": {"hidden": 4}, "structured": {"slots": 3, "hidden": 4, "diversity": True}}
CASES = [(name, OPTIONS.get(name, {})) for name in POOLINGS]
WEIGHTED = [(name, options) for name, options in CASES if options]
WEIGHTS = frozenset({"weights"})


def make(name: str, options: dict):
    return make_pooling(name, DIM, 2, **options).double()


def tokens(batch: int = 4, n: int = N) -> torch.Tensor:
    return torch.randn(batch, n, DIM, dtype=torch.float64)


def weights_by_loops(layer, sequence: torch.Tensor) -> torch.Tensor:
    """A (m, n) of one sequence (n, D), a token and a slot at a time."""
    scores = torch.zeros(layer.slots, len(sequence), dtype=torch.float64)
    for t, h in enumerate(sequence):
        inner = layer.hidden.weight @ h
        if layer.name == "additive":
            inner = inner + layer.hidden.bias
        for slot in range(layer.slots):
            scores[slot, t] = sum(layer.score.weight[slot, i] * inner[i].tanh() for i in range(len(inner)))
    return torch.stack([row.exp() / row.exp().sum() for row in scores])


def pool_by_loops(layer, sequence: torch.Tensor) -> torch.Tensor:
    """(m, D) of one sequence (n, D)."""
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


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("n", [1, N])
def test_equals_its_definition(name, options, n):
    layer, x = make(name, options), tokens(n=n)
    expected = torch.stack([pool_by_loops(layer, row) for row in x])
    assert expected.shape == (4, options.get("slots", 1), DIM)
    assert_equal(layer(x).output, expected)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_padding_anywhere_plays_no_part(name, options):
    layer, x, valid = make(name, options), tokens() - 5, torch.rand(4, N) < 0.6
    valid[:, 2], valid[0, 0], valid[1, -1], valid[3] = True, False, False, False
    x = x.masked_fill(~valid[..., None], torch.nan).requires_grad_()
    found = layer(x, context=Context(mask=Mask(valid=valid)))
    assert_equal(
        found.output, torch.stack([pool_by_loops(layer, row[keep]) for row, keep in zip(x, valid, strict=True)])
    )
    assert not found.output[3].any()
    gradient = torch.autograd.grad(found.output.square().sum(), [x, *layer.parameters()])
    assert not gradient[0][~valid].any() and all(g.isfinite().all() and g.any() for g in gradient)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_lengths_equal_rows_cut_short(name, options):
    layer, x, lengths = make(name, options), tokens(), torch.tensor([N, 3, 0, 1], dtype=torch.int32)
    changed = torch.where((torch.arange(N) < lengths[:, None])[..., None], x, 1e6)
    found = layer(changed, context=Context(mask=Mask(lengths=lengths))).output
    assert_equal(found, torch.stack([pool_by_loops(layer, row[:k]) for row, k in zip(x, lengths, strict=True)]))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_packed_documents_get_a_row_each_and_empty_ones_zero(name, options):
    layer, x, borders = make(name, options), tokens(1), [0, 0, 2, 2, 3, N, N]
    found = layer(x, context=Context(mask=Mask(cu_seqlens=torch.tensor(borders)))).output
    parts = [x[0, a:b] for a, b in pairwise(borders)]
    assert_equal(found, torch.stack([pool_by_loops(layer, part) for part in parts]))
    assert not found[[0, 2, 5]].any()


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("mask", [None, Mask(lengths=torch.zeros(2, dtype=torch.long))])
@pytest.mark.parametrize("n", [0, 4])
def test_sequences_without_tokens_give_zero_with_finite_gradients(name, options, mask, n):
    if mask is None and n:
        mask = Mask(valid=torch.zeros(2, n, dtype=torch.bool))
    layer, x = make(name, options), tokens(2, n).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # finite at every step, not only where the last one selects
        found = layer(x, context=Context(mask=mask))
        total = found.output.sum() + sum(total for total, _ in found.losses.values())
        gradients = torch.autograd.grad(total, [x, *layer.parameters()], allow_unused=True)
    assert found.output.shape == (2, options.get("slots", 1), DIM) and not found.output.any()
    assert all(gradient is None or not gradient.any() for gradient in gradients)
    assert all(count == 0 and total == 0 for total, count in found.losses.values())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients_are_those_of_finite_differences(name, options):
    layer, x = make(name, options), tokens(3, 4).requires_grad_()
    context = Context(mask=Mask(lengths=torch.tensor([4, 0, 2])))

    def of(x, *parameters):
        found = torch.func.functional_call(
            layer, dict(zip(dict(layer.named_parameters()), parameters, strict=True)), (x,), {"context": context}
        )
        return found.output, *(total for total, _ in found.losses.values())

    assert torch.autograd.gradcheck(of, (x, *(p.detach().requires_grad_() for p in layer.parameters())))


@pytest.mark.parametrize(("name", "options"), WEIGHTED)
def test_weights_are_distributions_over_valid_tokens(name, options):
    layer, x, valid = make(name, options), tokens(), torch.rand(4, N) < 0.6
    valid[:, 2], valid[3] = True, False
    weights = layer(x, context=Context(mask=Mask(valid=valid), want=WEIGHTS)).extras["weights"]
    assert weights.shape == (4, layer.slots, N) and not weights[3].any()
    for row in range(3):  # right-padded
        count = int(valid[row].sum())
        assert_equal(weights[row, :, :count], weights_by_loops(layer, x[row][valid[row]]))
        assert not weights[row, :, count:].any()
    assert "weights" not in layer(x).extras


def test_diversity_is_the_overlap_of_the_slots():
    layer, x, lengths = make("structured", OPTIONS["structured"]), tokens(), [N, 0, 2, 5]
    total, count = layer(x, context=Context(mask=Mask(lengths=torch.tensor(lengths)))).losses["diversity"]
    expected = 0.0
    for row, length in zip(x, lengths, strict=True):
        a = weights_by_loops(layer, row[:length]).detach()
        for i in range(3):
            for j in range(3):
                expected += float((a[i] * a[j]).sum() - float(i == j)) ** 2 if length else 0.0
    assert count == 3 and total.requires_grad
    assert float(total.detach()) == pytest.approx(expected, abs=1e-12)
    assert not make("structured", {"slots": 3})(x).losses


def test_parameters_are_those_of_the_definitions():
    def count(name, **options):
        return sum(p.numel() for p in make_pooling(name, 300, 10, **options).parameters())

    assert [count(how) for how in ("mean", "max", "first", "last")] == [0] * 4
    assert count("structured", hidden=350) == 350 * 300 + 10 * 350
    assert count("structured", slots=4) == 300 * 300 + 4 * 300
    assert count("additive", hidden=350) == 350 * 300 + 350 + 350
    assert count("additive") == 300 * 300 + 300 + 300


@pytest.mark.parametrize(("name", "options"), CASES)
def test_half_precision_sums_in_float32(name, options):
    layer, x = make(name, options), tokens()
    context = Context(mask=Mask(lengths=torch.tensor([N, 0, 2, 5])), want=WEIGHTS if options else frozenset())
    expected, found = layer(x, context=context), layer.bfloat16()(x.bfloat16(), context=context)
    assert found.output.dtype == torch.bfloat16
    torch.testing.assert_close(found.output.double(), expected.output, rtol=0, atol=0.05)
    assert all(total.dtype == torch.float32 for total, _ in found.losses.values())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_compiles_to_one_graph(name, options):
    layer, x = make(name, options), tokens()
    context = Context(mask=Mask(lengths=torch.tensor([N, 0, 2, 5])))
    compiled = torch.compile(lambda x: layer(x, context=context).output, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(x), layer(x, context=context).output)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("structurd", {}, "supported: mean, max, first, last, additive, structured; try structured"),
        ("mean", {"hidden": 3}, "option 'hidden' of pool 'mean'; supported: no options"),
        ("additive", {"hiden": 3}, "supported: hidden; try hidden"),
        ("additive", {"slots": 3}, "supported: hidden"),
        ("structured", {"rank": 3}, "supported: slots, hidden, diversity"),
        ("structured", {"slots": 0}, "slots=0; supported: a whole number slots >= 1"),
        ("structured", {"slots": 2.5}, "slots=2.5"),
        ("structured", {"hidden": "8"}, "hidden='8'"),
        ("structured", {"hidden": True}, "hidden=True"),
        ("additive", {"hidden": -1}, "hidden=-1"),
    ],
)
def test_unknown_names_options_and_sizes_are_refused(name, options, words):
    with pytest.raises(Unsupported, match=words):
        make_pooling(name, DIM, 2, **options)
    with pytest.raises(Unsupported, match="dim=0"):
        make_pooling("mean", 0)
    with pytest.raises(Unsupported, match="slots=0"):
        make_pooling("structured", DIM, 0)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_what_a_pool_cannot_honour_is_refused(name, options):
    layer, x = make(name, options), tokens(2)
    for wrong in (torch.zeros(2, N, DIM, dtype=torch.long), x[0], x[..., 1:], x > 0):
        with pytest.raises(Unsupported, match=rf"supported: floats \(B, N, {DIM}\)"):
            layer(wrong)
    with pytest.raises(Unsupported, match="memory"):
        layer(x, x)
    with pytest.raises(Unsupported, match="whole sequences"):
        layer(x, state=object())
    blocks = Mask(blocks=BlockMask(torch.ones(1, 1, 3, 3, dtype=torch.bool), 3))
    for context, words in (
        (Context(memory_mask=Mask()), "memory"),
        (Context(want=frozenset({"state"})), "whole sequences"),
        (Context(roles=torch.zeros(2, N, dtype=torch.long)), "cu_seqlens masks"),
        (Context(mask=Mask(bias=torch.zeros(1, 1, N, N))), "cu_seqlens masks"),
        (Context(mask=blocks), "cu_seqlens masks"),
        (Context(want=frozenset({"lse"})), "want='lse' of pool"),
        (Context(want=frozenset({"weihgts"})), "try weights"),
    ):
        with pytest.raises(Unsupported, match=words):
            layer(x, context=context)
    if not options:
        with pytest.raises(Unsupported, match="try additive"):
            layer(x, context=Context(want=WEIGHTS))
