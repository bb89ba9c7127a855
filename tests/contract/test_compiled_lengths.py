"""One graph for sequences of several lengths."""

import pytest
import torch

from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Pattern
from regard.workbench.layer_properties import LayerSubject
from regard.workbench.subjects import Subject


@pytest.mark.parametrize("name", ["linear", "s4d"])
def test_a_graph_serves_several_lengths(name):
    """Padded, with the state after them."""
    layer = LayerSubject(Subject(get_mechanism(name), Pattern.CAUSAL_SELF), torch.float64)

    def call(x, lengths):
        result = layer.layer(x, context=Context(mask=Mask(lengths=lengths), want=frozenset({"state"})))
        return [result.output, *result.state.tensors().values()]

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for n in (10, 17):
        x = layer.x(n)
        torch._dynamo.maybe_mark_dynamic(x, 1)
        lengths = torch.tensor([n, 7])
        for found, expected in zip(compiled(x, lengths), call(x, lengths), strict=True):
            torch.testing.assert_close(found, expected)
