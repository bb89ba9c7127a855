"""What new layers learn from the original's attention besides its outputs: its weights, and the outputs of its heads.

Few mechanisms do (sea). The weights are those of :attr:`regard.retrofit.hosts.Host.by_regard`, whose softmax returns
them; only the layers that are asked for keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regard.integrations.collecting import collect_losses
from regard.integrations.swap import mechanism_in
from regard.retrofit.hosts import Host

Made = TypeVar("Made")
Taught = Mapping[str, Tensor]
"""``weights`` (B, H, N, N) and ``output`` (B, H, N, V), the teacher that a layer takes in its context."""


def learns_from_attention(module: nn.Module) -> bool:
    """Whether the mechanism in an attention module learns from a teacher's weights."""
    placed = mechanism_in(module)
    return placed is not None and "teacher" in placed.card.honours


def learning_layers(host: Host, student: nn.Module) -> list[int]:
    """Numbers of the layers of a student that learn from a teacher's weights."""
    numbers = {layer.path: layer.number for layer in host.layers}
    return [numbers[path] for path, part in student.named_modules() if path in numbers and learns_from_attention(part)]


@torch.no_grad()
def with_attention_of(host: Host, numbers: Sequence[int], call: Callable[[], Made]) -> tuple[Made, dict[int, Taught]]:
    """The result of a call that runs layers of `host.by_regard`, and what these layers, by number, teach in it."""
    layers = nn.ModuleDict({str(n): host.by_regard.get_submodule(host.layers[n].path) for n in numbers})
    with collect_losses(layers, want=frozenset({"weights"})) as collected:
        made = call()
    return made, {n: collected.extras[str(n)] for n in numbers}


def original_attention(host: Host, number: int) -> Callable[[tuple[Any, ...], dict[str, Any]], Taught]:
    """A function from the arguments of a call of a layer's attention module to what its original teaches in that call."""
    module = host.by_regard.get_submodule(host.layers[number].path)
    return lambda args, given: with_attention_of(host, [number], lambda: module(*args, **given))[1][number]


__all__ = ["learning_layers", "learns_from_attention", "original_attention", "with_attention_of"]
