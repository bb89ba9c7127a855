"""Recurrent mechanisms on a sequence split over virtual ranks that pass on the state: equal to the whole."""

from __future__ import annotations

import pytest
import torch
from support import close, refused

from regard import get_mechanism, list_mechanisms
from regard.apply import apply
from regard.contract import Pattern
from regard.distributed import DistributedRecurrence
from regard.workbench.verification.subjects import Subject

RECURRENT = list_mechanisms(pattern="causal-self", recurrent=True)


def cases():
    for name in RECURRENT:
        card = get_mechanism(name)
        for hand_over in ("order", "scan") if card.combines_with(card.config()) else ("order",):
            yield name, hand_over, ""
    for name, variant in (
        ("gated_linear", "gates of values"),
        ("delta_rule", "diagonal gate"),
        ("delta_rule", "a beta for each feature"),
        ("mamba2", "grouped"),
        ("mamba", "scalar"),
        ("linear", "silu"),
        ("aaren", "forgetting"),
    ):
        config = Subject.of(get_mechanism(name), Pattern.CAUSAL_SELF, variant).config
        yield name, "scan" if get_mechanism(name).combines_with(config) else "order", variant


@pytest.mark.parametrize(("name", "hand_over", "variant"), list(cases()))
def test_pieces_equal_the_whole_with_gradients(name, hand_over, variant):
    subject = Subject.of(get_mechanism(name), Pattern.CAUSAL_SELF, variant)
    same(subject, DistributedRecurrence(name, ranks=4, hand_over=hand_over, **vars(subject.config)), 19)


def same(subject, mechanism, length):
    inputs = {n: x.requires_grad_(x.is_floating_point()) for n, x in subject.inputs(length).items()}
    found, expected = mechanism(inputs), apply(subject.card, inputs, config=subject.config).output
    close(found, expected, 1e-10)
    leaves, cotangent = [x for x in inputs.values() if x.requires_grad], torch.randn_like(expected)
    one, other = (
        torch.autograd.grad(x, leaves, cotangent, allow_unused=True, materialize_grads=True) for x in (found, expected)
    )
    size = max(float(x.abs().max()) for x in other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * size)


@pytest.mark.parametrize(
    ("hand_over", "ranks", "length"), [("scan", 1, 6), ("scan", 8, 5), ("scan", 3, 12), ("order", 8, 5)]
)
def test_any_number_of_ranks_computes_the_same_and_sends_what_the_closed_form_says(hand_over, ranks, length):
    subject = Subject(get_mechanism("delta_rule"), Pattern.CAUSAL_SELF)
    mechanism = DistributedRecurrence("delta_rule", ranks=ranks, hand_over=hand_over)
    same(subject, mechanism, length)
    width, value = (subject.inputs(length)[name].shape[-1] for name in "kv")
    state, moved = 2 * 2 * 8 * width * value, 2 * 2 * 8 * width * width
    forward, backward = mechanism.forward_traffic, mechanism.backward_traffic
    if hand_over == "scan":
        distances = [2**i for i in range(ranks) if 2**i < ranks]
        hops = [sum(rank + d < ranks for d in distances) + (rank + 1 < ranks) for rank in range(ranks)]
        assert [t.bytes for t in forward] == [n * (state + moved) for n in hops]
        assert sum(t.bytes for t in backward) == sum(t.bytes for t in forward)
        return
    assert [t.bytes for t in forward] == [state + 2 * 8] * (ranks - 1) + [0]  # 2 * 8: lengths of two rows
    assert [t.bytes for t in backward] == [0] + [state] * (ranks - 1)


def test_what_cannot_be_is_refused_in_words():
    refused("grows with the sequence", DistributedRecurrence, "softmax", ranks=2)
    refused("do not combine", DistributedRecurrence, "mlstm", ranks=2, hand_over="scan")
    refused("do not combine", DistributedRecurrence, "delta_rule", ranks=2, hand_over="scan", vector_beta=True)
    refused("hand_over='tree'", DistributedRecurrence, "linear", ranks=2, hand_over="tree")
    x = torch.randn(1, 2, 6, 4)
    refused("keys of linear|key", DistributedRecurrence("linear", ranks=2), {"q": x, "key": x, "v": x})
    refused("5, 6", DistributedRecurrence("linear", ranks=2), {"q": x[:, :, :5], "k": x, "v": x})
    refused("6 tokens of 7", DistributedRecurrence("linear", ranks=2), {"q": x, "k": x, "v": x}, length=7)
    given = {"q": x, "k": x, "v": x, "value_beta": x.sigmoid()}
    refused("value_beta, whose columns differ", DistributedRecurrence("delta_rule", ranks=2), given)
