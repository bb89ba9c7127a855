"""Under autocast outputs and states keep the dtypes of their tensors: a state is continued without it, and the other way round."""

from __future__ import annotations

import pytest
import torch

from regard import get_mechanism, list_mechanisms
from regard.apply import memory_inputs, shared_inputs
from regard.workbench.subjects import Subject

CELLS = [(name, pattern) for name in list_mechanisms() for pattern in get_mechanism(name).patterns]


@pytest.mark.parametrize(("name", "pattern"), CELLS, ids=[f"{n}-{p.value}" for n, p in CELLS])
def test_outputs_and_states_keep_their_dtypes_under_autocast(name, pattern):
    card = get_mechanism(name)
    subject = Subject(card, pattern)
    inputs = subject.inputs(30, dtype=torch.float32)
    memory = {key: x for key, x in inputs.items() if key in (*memory_inputs(card), *shared_inputs(card), "roles")}

    def dtypes() -> list[torch.dtype]:
        result = subject.run(inputs, return_state=subject.stateful)
        states = [result.state] if subject.stateful else []
        states += [subject.absorb(memory)] if subject.absorbs else []
        return [result.output.dtype, *(x.dtype for state in states for x in state.tensors().values())]

    expected = dtypes()
    with torch.autocast("cpu", torch.bfloat16):
        assert dtypes() == expected
