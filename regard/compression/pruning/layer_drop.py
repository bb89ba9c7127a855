"""LayerDrop: layers that are left out at random in training, so that some can be left out for good (arXiv 1909.11556).

::

    with layer_drop(find_host(model), 0.2):
        ...                                   # train: each layer is left out of one call in five
    regard.compress(model, "structured:layers=2,layers_by=even")

A layer that is left out gives on what it was given, norms behind the sum included, and nothing is scaled for it. The published rule
for those that go is taken: they lie at even distances, every second one for half of them. regard's own stochastic depth
(:mod:`regard.models.stack`) leaves later layers out more often, and scales the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from regard.compression.pruning.anatomy import Host, Layer
from regard.compression.pruning.masks import replace_forward
from regard.compression.pruning.steps import check_share
from regard.contract import Result, Unsupported
from regard.models.blocks import Block


@contextmanager
def layer_drop(host: Host, probability: float, *, generator: torch.Generator | None = None) -> Iterator[None]:
    """Leave each layer out with this probability, drawn for each call of the model in training mode, inside the block.

    Args:
        generator: source of the draws; torch's own when None.

    Raises:
        Unsupported: for a probability outside [0, 1).
    """
    check_share("probability", probability)
    with ExitStack() as changes:
        for layer in host.layers:
            changes.callback(replace_forward(layer.module, _dropping(layer, probability, generator)))
        yield


def _dropping(layer: Layer, probability: float, generator: torch.Generator | None) -> Any:
    module: Any = layer.module
    forward = module.forward

    def run(x: Tensor, *given: Any, **named: Any) -> Any:
        if not module.training or float(torch.rand((), generator=generator)) >= probability:
            return forward(x, *given, **named)
        return Result(x, named.get("state")) if isinstance(module, Block) else x

    return run


def even_layers(count: int, gone: int) -> list[int]:
    """Numbers of `gone` of `count` layers at even distances, the first one never among them.

    Raises:
        Unsupported: where all would go.
    """
    if not 0 <= gone < count:
        raise Unsupported(f"layers={gone} of {count} layers", supported=f"fewer than {count} layers")
    return [((2 * i + 1) * count + gone) // (2 * gone) for i in range(gone)] if gone else []
