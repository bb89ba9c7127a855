"""A card's variants reach every option (others would be outside the matrix), and what it does not support is refused."""

from __future__ import annotations

import re

import pytest
import torch
from support import refused

from regard import Pattern, create_layer, get_mechanism, list_mechanisms
from regard.create import build_layer
from regard.workbench.verification.properties.layers import DIM, HEADS
from regard.workbench.verification.random_cases import unreached_options
from regard.workbench.verification.subjects import Subject


@pytest.mark.parametrize("name", list_mechanisms())
def test_every_option_has_another_value_in_some_variant(name):
    assert not unreached_options(get_mechanism(name))


@pytest.mark.parametrize("name", list_mechanisms())
def test_variants_are_accepted_in_their_patterns(name):
    card = get_mechanism(name)
    for variant, options in card.variants.items():
        assert set(card.patterns_of(variant)) <= set(card.patterns)
        for pattern in card.patterns_of(variant):
            build_layer(card, DIM, pattern=pattern, **{"num_heads": HEADS, **options})
            if variant not in card.layer_variants:
                subject = Subject.of(card, pattern, variant)
                subject.run(subject.inputs(12))


@pytest.mark.parametrize("name", list_mechanisms())
def test_layers_of_patterns_that_it_lacks_are_refused_with_the_reason(name):
    card = get_mechanism(name)
    for pattern in set(Pattern) - set(card.patterns):
        refused(re.escape(card.refused[pattern]), create_layer, name, DIM, HEADS, pattern=pattern)


ASKED = {
    "dropout": {"dropout": 0.1},
    "weights": {"want": {"weights"}},
    "lse": {"want": {"lse"}},
    "rotate": {"rotate": lambda x, ranks: x},
    "roles": {"roles": torch.zeros(2, 6, dtype=torch.long)},
}


@pytest.mark.parametrize("name", list_mechanisms())
def test_what_a_card_does_not_honour_is_refused(name):
    """The matrix has the same check for biases and blocks."""
    card = get_mechanism(name)
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        inputs = subject.inputs(6)
        for what in ASKED.keys() - card.honours:
            refused(name, subject.run, inputs, **ASKED[what])
