"""Under autocast, outputs and states keep their dtypes, so that a state can be continued without autocast and vice versa.

Sums over the sequence lose no digits to autocast.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from regard import backends, get_mechanism, list_mechanisms
from regard.workbench.verification.subjects import Subject

CELLS = [(name, pattern) for name in list_mechanisms() for pattern in get_mechanism(name).patterns]
SUMS = (
    "abc",
    "bidirectional_mamba",
    "cosformer",
    "delta_rule",
    "gated_linear",
    "kernelized_rpe",
    "linear",
    "mamba",
    "mamba2",
    "mlstm",
    "norm_linear",
)
SUMS += ("performer", "rwkv7")


@pytest.mark.parametrize(("name", "pattern"), CELLS, ids=[f"{n}-{p.value}" for n, p in CELLS])
def test_outputs_and_states_keep_their_dtypes_and_sums_their_digits_under_autocast(name, pattern):
    card = get_mechanism(name)
    subject = Subject(card, pattern)
    inputs = subject.inputs(30, dtype=torch.float32)
    memory = {key: x for key, x in inputs.items() if key in (*card.memory_inputs, *card.shared_inputs, "roles")}

    def results() -> list[torch.Tensor]:
        result = subject.run(inputs, return_state=subject.stateful)
        states = [result.state] if subject.stateful else []
        states += [subject.absorb(memory)] if subject.absorbs else []
        return [result.output, *(x for state in states for x in state.tensors().values())]

    for available in (nullcontext(), backends.only("torch")):  # without: as on other devices
        with available:
            expected = results()
            with torch.autocast("cpu", torch.bfloat16):
                found = results()
        for x, y in zip(found, expected, strict=True):
            assert x.dtype == y.dtype
            assert name not in SUMS or torch.equal(x, y)
