"""The native conserved flows against the torch form in float64: sizes, instruction sets, options, gradients, extremes."""

from __future__ import annotations

import pytest
import torch

from regard.engines.conserved_flows import Rule

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
