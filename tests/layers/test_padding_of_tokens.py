"""Zeros around tokens: what eager code gives, and a compiled program where there turns out to be nothing to add."""

import pytest
import torch
from support import ALL, close

from regard.core.padding import pad_tokens
from regard.create import create_layer


@pytest.mark.parametrize("axis", [1, 2])
def test_zeros_are_added_in_front_of_the_axis_and_behind_it(axis):
    x = torch.randn(2, 3, 5, 4)
    shape = list(x.shape)
    shape[axis] += 5
    found = pad_tokens(x, 2, 3, axis)
    assert list(found.shape) == shape
    assert torch.equal(found.narrow(axis, 2, x.shape[axis]), x)
    assert found.abs().sum() == x.abs().sum()


def test_a_program_for_any_length_splits_a_length_that_needs_no_zeros():
    def blocks(x):
        n = x.shape[1]
        return pad_tokens(x.transpose(1, 2), 0, -n % 5).unflatten(2, (-1, 5)).flatten(1, 2) * 2

    torch.compiler.reset()
    compiled = torch.compile(blocks, dynamic=True, fullgraph=True, backend="aot_eager")
    for n in (7, 10):
        x = torch.randn(2, n, 3, 4, requires_grad=True)
        assert torch.equal(compiled(x), blocks(x))


LAYERS = [("core_context", {"pool": "mean", "group": 4}), ("routing", {"window": 4, "clusters": 2})]


@pytest.mark.parametrize(("name", "options"), LAYERS if ALL else LAYERS[:1])
def test_a_layer_compiled_for_any_length_takes_a_memory_that_needs_no_zeros(name, options):
    layer = create_layer(name, 8, 2, pattern="causal-cross", **options).double().eval()
    torch.compiler.reset()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="aot_eager")
    for n, m in ((5, 3), (3, 8)):
        x, memory = (torch.randn(2, length, 8, dtype=torch.float64) for length in (n, m))
        with torch.no_grad():
            close(compiled(x, memory).output, layer(x, memory).output)
