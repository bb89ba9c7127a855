"""The native conserved flows against the torch form in float64: sizes, instruction sets, options, gradients, extremes."""

from __future__ import annotations

import pytest
import torch

from regard.engines.conserved_flows import Rule, empty_sums

from .kernels import FLOWS, flows

RULES = [
    Rule(True, True, (-1.0, 1.0), 1.0, 1e-3),
    Rule(True, True, None, 0.3, 1e-3),
    Rule(False, True, (-1.0, 1.0), 1.0, 1e-3),
    Rule(True, False, (-10.0, 10.0), 2.0, 1e-6),
    Rule(False, False, None, 1.0, 1e-6),
]


@pytest.mark.parametrize("rule", RULES)
def test_outputs_and_gradients_equal_float64(instruction_set, rule):
    for n, width, padded in ((1, 3, 0), (31, 64, 0), (32, 17, 1), (33, 8, 0), (97, 130, 1), (257, 16, 0), (0, 5, 0)):
        valid = torch.randint(0, n + 1, (2,)).tolist() if padded else None
        FLOWS.check(flows(n, 2, 2, width, valid), rule=rule)


def test_nothing_seen_gives_finite_numbers_and_zero_competition():
    nothing = torch.zeros(1, 2, 20, 4)
    x = {"sinks": nothing, "sources": nothing, **empty_sums(nothing)._asdict(), "valid": torch.tensor([0])}
    weights = {"acceptance": torch.zeros(1, 2, 20), "totals": torch.zeros(4, 1, 2, 4)}
    found = FLOWS.gradients(x, weights, rule=Rule(True, True, None, 1.0, 1e-6))
    assert (found["competition"] == 0).all()
    assert torch.isfinite(found["acceptance"]).all()
    assert (found["maximum"] == -torch.inf).all()
    assert (found["grad sinks"] == 0).all() and (found["grad sources"] == 0).all()
