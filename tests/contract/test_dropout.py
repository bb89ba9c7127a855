"""Dropout of a mechanism's weights, wherever a card honours it: drawn from the generator, and unbiased."""

from __future__ import annotations

import pytest
import torch

from regard import get_mechanism, list_mechanisms
from regard.workbench.verification.subjects import Subject, axes_of

ROWS = 100
NOT_LINEAR = {("combiner", v) for v in ("rows", "rows, weighted sums", "rows, projected sums")}
NOT_LINEAR |= {("diagonal", v) for v in ("relu", "relu window", "window", "normed")}
NOT_LINEAR |= {("ninformer", v) for v in ("", *get_mechanism("ninformer").variants)}
NOT_LINEAR |= {("hard_softmax", v) for v in ("", *get_mechanism("hard_softmax").variants)}
"""Cases with a network, a norm or a choice of the largest after the dropout, which changes the mean of the outputs."""
CELLS = [
    (n, v, p)
    for n in list_mechanisms(where=lambda card: "dropout" in card.honours)
    for card in [get_mechanism(n)]
    for v in ("", *card.variants)
    for p in (card.patterns_of(v)[:1] if v else card.patterns)
    if v not in card.layer_variants and not Subject.of(card, p, v).waives("row_alone")
]


@pytest.mark.parametrize(("name", "variant", "pattern"), CELLS, ids=[f"{n}-{v}-{p.value}" for n, v, p in CELLS])
def test_dropout_follows_the_generator_and_keeps_the_mean(name, variant, pattern):
    card = get_mechanism(name)
    subject = Subject.of(card, pattern, variant)
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
    if (name, variant) in NOT_LINEAR:
        return
    deviation = found.std(0) / ROWS**0.5
    assert ((found.mean(0) - exact).abs() <= 5 * deviation + 1e-9).all()
    assert ((found.mean(0) - 0.7 * exact).abs() > 5 * deviation).any()  # what it would be without rescaling
