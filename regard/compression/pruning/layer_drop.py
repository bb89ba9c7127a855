"""LayerDrop: skip layers at random in training, so that some can be removed for good later (arXiv 1909.11556).

::

    with layer_drop(find_host(model), 0.2):
        ...                                   # train: each layer is skipped in one of five calls
    regard.compress(model, "structured:layers=2,layers_by=even")

A skipped layer, including the norms after its sums, returns its input, and nothing is rescaled. The layers to remove
are chosen by the published rule: they are evenly spaced, every second one for half of them. regard's own stochastic
depth (:mod:`regard.models.stack`) skips later layers more often, and rescales the others.
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
    """Skip each layer with this probability, drawn for each call of the model in training mode, within the context.

    Args:
        generator: source of random draws; torch's own when None.

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
    """Numbers of `gone` of `count` layers, evenly spaced and never including the first.

    Raises:
        Unsupported: if all layers would be removed.
    """
    if not 0 <= gone < count:
        raise Unsupported(f"layers={gone} of {count} layers", supported=f"fewer than {count} layers")
    return [((2 * i + 1) * count + gone) // (2 * gone) for i in range(gone)] if gone else []
