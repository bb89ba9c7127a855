"""Dropout of a mechanism's weights, wherever a card honours it: drawn from the generator, and without bias."""

from __future__ import annotations

import pytest
import torch

from regard import get_mechanism, list_mechanisms
from regard.workbench.subjects import Subject, axes_of

ROWS = 100
CELLS = [
    (n, p) for n in list_mechanisms(where=lambda card: "dropout" in card.honours) for p in get_mechanism(n).patterns
]


@pytest.mark.parametrize(("name", "pattern"), CELLS, ids=[f"{n}-{p.value}" for n, p in CELLS])
def test_dropout_follows_the_generator_and_keeps_the_mean(name, pattern):
    card = get_mechanism(name)
    subject = Subject(card, pattern)
    inputs = subject.inputs(8, batch=1)
    repeated = {
        key: x.expand(ROWS, *x.shape[1:]) if key == "roles" or axes_of(card, key)[0] == "b" else x
        for key, x in inputs.items()
    }
    exact = subject.run(inputs).output[0]
    found, again, other = (
        subject.run(repeated, dropout=0.3, generator=torch.Generator().manual_seed(seed)).output for seed in (1, 1, 2)
    )
    assert torch.equal(found, again)
    assert not torch.equal(found, other) and not torch.equal(found[0], found[1])
    deviation = found.std(0) / ROWS**0.5
    assert ((found.mean(0) - exact).abs() <= 5 * deviation + 1e-9).all()
    assert ((found.mean(0) - 0.7 * exact).abs() > 5 * deviation).any()  # it would be seen if nothing made up for it
