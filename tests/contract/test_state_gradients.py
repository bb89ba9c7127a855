"""Gradients flow through a state: a sequence read in two parts has the same gradients as when read whole."""

from __future__ import annotations

import pytest
import torch
from support import close

from regard import get_mechanism, list_mechanisms
from regard.contract import Pattern
from regard.workbench.verification.subjects import Subject

CASES = [
    (name, variant)
    for name in list_mechanisms(pattern="causal-self")
    for card in [get_mechanism(name)]
    for variant in ("", *card.variants)
    if Pattern.CAUSAL_SELF in card.patterns_of(variant) and variant not in card.layer_variants
    for subject in [Subject.of(card, Pattern.CAUSAL_SELF, variant)]
    if subject.stateful and not subject.waives("split_resume") and not subject.waives("gradient")
]


@pytest.mark.parametrize(("name", "variant"), CASES, ids=[f"{n}-{v}" for n, v in CASES])
def test_gradients_through_a_state_are_those_of_the_whole(name, variant):
    subject = Subject.of(get_mechanism(name), Pattern.CAUSAL_SELF, variant)
    leaves = {key: x.requires_grad_() if x.is_floating_point() else x for key, x in subject.inputs(9).items()}
    first = subject.run(subject.cut(leaves, slice(0, 5)), return_state=True)
    rest = subject.run(subject.cut(leaves, slice(5, 9)), state=first.state)
    joined, whole = torch.cat([first.output, rest.output], subject.output_axis()), subject.run(leaves).output
    weight, tensors = torch.randn_like(whole), [x for x in leaves.values() if x.requires_grad]
    gradients = (
        torch.cat([g.flatten() for g in torch.autograd.grad(y, tensors, weight, materialize_grads=True)])
        for y in (joined, whole)
    )
    close(*gradients, tolerance=1e-10)
