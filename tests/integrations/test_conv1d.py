"""transformers' Conv1D as linear layers for a while: the same function, and the same modules or weights afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close
from torch import Tensor, nn

from regard.integrations.conv1d import conv1d_as_linear, has_conv1d

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402


def model() -> Any:
    """Four layers of one class, of which the third is the second."""
    made = nn.Sequential(Conv1D(6, 4), Conv1D(6, 6), nn.Identity(), Conv1D(3, 6)).double()
    made[2] = made[1]
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def x() -> Tensor:
    return torch.randn(2, 5, 4, dtype=torch.float64)


def test_layers_that_nobody_touches_compute_the_same_and_come_back_as_they_were():
    made, given = model(), x()
    expected, layers, parameters = made(given), list(made), list(made.parameters())
    with conv1d_as_linear(made):
        assert [type(layer) for layer in made] == [nn.Linear] * 4 and made[1] is made[2] and not has_conv1d(made)
        close(made(given), expected)
        close(made[0].weight.T, layers[0].weight, 0.0)
    assert all(now is layer for now, layer in zip(made, layers, strict=True))
    assert all(now is before for now, before in zip(made.parameters(), parameters, strict=True))


def test_other_weights_and_sizes_become_conv1d_and_other_classes_stay():
    made, given = model(), x()
    before, first = made(given), made[0]
    with conv1d_as_linear(made) as undo:
        made[1].weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64), requires_grad=False)
        made[0], made[3] = nn.Linear(4, 6).double(), nn.Tanh()
        expected = made(given)
    assert [type(layer) for layer in made] == [Conv1D, Conv1D, Conv1D, nn.Tanh] and made[1] is made[2]
    close(made(given), expected)
    assert made[0] is not first and made[0].weight.is_contiguous() and not made[1].weight.requires_grad
    for one in reversed(undo):
        one()
    assert made[0] is first
    close(made(given), before, 0.0)
    single, narrow = nn.Sequential(Conv1D(6, 4)).double(), nn.Linear(4, 2).double()
    with conv1d_as_linear(single):
        single[0] = narrow
    assert (single[0].nx, single[0].nf) == (4, 2)
    close(single(given), narrow(given))


def test_an_error_leaves_the_model_as_it_was():
    made, given = model(), x()
    expected, layers = made(given), list(made)

    def fail() -> None:
        with conv1d_as_linear(made) as undo:
            first = made[0]
            made[0] = nn.Linear(4, 6).double()
            undo.append(lambda: made.__setitem__(0, first))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(now is layer for now, layer in zip(made, layers, strict=True))
    close(made(given), expected, 0.0)


def test_a_layer_that_may_compute_something_else_stays():
    made = model()
    made[0].register_forward_hook(lambda *given: None)
    made[3].forward = lambda x: x
    with conv1d_as_linear(made):
        assert [type(layer) for layer in made] == [Conv1D, nn.Linear, nn.Linear, Conv1D]
    alone = Conv1D(2, 3)
    with conv1d_as_linear(alone):
        assert type(alone) is Conv1D
