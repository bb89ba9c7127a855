"""A state stores as many numbers for a sequence as the cost on its card says."""

from __future__ import annotations

import pytest

from regard import get_mechanism, list_mechanisms
from regard.contract import Pattern, Shape
from regard.mechanisms.landmark import RETRIEVING
from regard.workbench.verification.subjects import Subject, axes_of

ROUGH = {"agent", "combiner", "kernelized_rpe", "large_kernel", "mamba", "reformer", "routing", "s4d", "sea"}
"""Mechanisms whose costs are rounded, or depend on options that a function's inputs need not match."""
UNCOUNTED = {
    ("core_context", "mean query"),
    # the inputs' blocks have other sizes than the option says; see test_landmark.py
    *(("landmark", variant) for variant in RETRIEVING),
    ("latent", "narrow"),
    ("positional_attention", "content"),
}
CASES = [
    (name, variant)
    for name in list_mechanisms(pattern="causal-self")
    for card in [get_mechanism(name)]
    for variant in ("", *card.variants)
    if name not in ROUGH and (name, variant) not in UNCOUNTED and variant not in card.layer_variants
    if Pattern.CAUSAL_SELF in card.patterns_of(variant) and Subject.of(card, Pattern.CAUSAL_SELF, variant).stateful
]


@pytest.mark.parametrize(("name", "variant"), CASES, ids=[f"{n}-{v}" for n, v in CASES])
def test_a_state_keeps_as_many_numbers_as_the_card_says(name, variant):
    card, n = get_mechanism(name), 40
    subject = Subject.of(card, Pattern.CAUSAL_SELF, variant)
    inputs = subject.inputs(n, batch=1)
    sizes = {}
    for key, x in inputs.items():
        if key != "roles":
            sizes |= dict(zip(axes_of(card, key), x.shape, strict=True))
    width = sizes.get("k", sizes.get("d", 0))
    shape = Shape(1, sizes.get("h", 1), n, n, width, sizes.get("v", width))
    state = subject.run(inputs, return_state=True).state
    numbers = sum(x.numel() for x in state.tensors().values() if x.is_floating_point())
    assert card.cost(shape, subject.config).state == numbers
