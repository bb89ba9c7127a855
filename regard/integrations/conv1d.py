"""transformers' Conv1D, the linear layer of GPT-2 and its relatives, as `torch.nn.Linear` and back.

A Conv1D computes x W + b with W (in, out), and `torch.nn.Linear` x W^T + b with W (out, in). Code that reads, changes or
replaces linear layers does so within :func:`conv1d_as_linear`, and models keep the layers that transformers saves and
loads.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """A place in a model that a Conv1D was taken from.

    Attributes:
        parent, name: the module that held it, and its name there.
        conv, linear: the Conv1D, and the linear layer of the same function.
        weight: the linear layer's first weight, a view of the Conv1D's.
    """

    parent: nn.Module
    name: str
    conv: Any
    linear: nn.Linear
    weight: Tensor

    def put(self, module: nn.Module | None) -> None:
        """Put a module there."""
        self.parent._modules[self.name] = module

    def there(self) -> nn.Module | None:
        """The module that is there."""
        return self.parent._modules[self.name]


def has_conv1d(model: nn.Module) -> bool:
    """Return whether a model has a Conv1D that :func:`replace_conv1d` would replace."""
    return any(map(_is_plain, model.modules()))


def replace_conv1d(model: nn.Module) -> list[Place]:
    """Replace each Conv1D in a model by a `torch.nn.Linear` on the same numbers; return where they were.

    One with hooks or a replaced `forward` stays, as does a model that is a Conv1D itself. The result runs as before, but
    transformers cannot load its weights: it is for copies, and for :func:`conv1d_as_linear`, which turns them back.
    """
    made: dict[nn.Module, nn.Linear] = {}
    places = []
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is None or not _is_plain(child):
                continue
            if child not in made:
                made[child] = _linear(child)
            place = Place(parent, name, child, made[child], made[child].weight)
            place.put(place.linear)
            places.append(place)
    return places


@contextmanager
def conv1d_as_linear(model: nn.Module) -> Iterator[list[Callable[[], object]]]:
    """Within the context each Conv1D of a model is a `torch.nn.Linear` on the same numbers.

    Afterwards those that were not touched are the same Conv1D as before, other linear layers in their places become
    Conv1D, and modules of other classes stay. After an error the model is as it was.

    Yields:
        A list of functions that undo, last one first, what was done to the model; code within the context adds its own.
        After an error they are called.
    """
    places = replace_conv1d(model)
    undo: list[Callable[[], object]] = [lambda: _put((place, place.conv) for place in places)]
    try:
        yield undo
    except BaseException:
        for one in reversed(undo):
            one()
        raise
    made: dict[nn.Module | None, nn.Module | None] = {}
    before = [(place, place.there()) for place in places]
    for place, module in before:
        if module not in made:
            made[module] = _back(place, module)
        place.put(made[module])
    undo.append(lambda: _put(before))


def _put(modules: Any) -> None:
    for place, module in modules:
        place.put(module)


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module is a Conv1D that computes what the class does."""
    library = sys.modules.get("transformers.pytorch_utils")
    if library is None or type(module) is not library.Conv1D:
        return False
    return not (
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or hasattr(module, "parametrizations")
    )


def _linear(conv: Any) -> nn.Linear:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made = nn.Linear(conv.nx, conv.nf)
    made.weight = nn.Parameter(conv.weight.detach().T, requires_grad=conv.weight.requires_grad)
    made.bias = conv.bias
    return made.train(conv.training)


def _back(place: Place, module: nn.Module | None) -> nn.Module | None:
    """What takes the place of a module when the context ends."""
    if type(module) is not nn.Linear:
        return module
    conv = place.conv
    if module is place.linear and module.weight is place.weight and module.bias is conv.bias:
        return conv
    made: Any = copy.copy(conv)
    made._parameters = dict(conv._parameters)
    weight = module.weight
    made.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)
    made.bias = module.bias
    made.nf, made.nx = weight.shape
    return made.train(module.training)
