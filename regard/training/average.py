"""An exponential moving average of a model's weights, which often scores better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regard.contract import Unsupported
from regard.models.weights import distinct_tensors, load_tensors


def check_decay(decay: float) -> float:
    """Return the decay of an average as a float; raises Unsupported for an invalid one."""
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay < 1:
        raise Unsupported(f"ema={decay!r}", supported="a number between 0 and 1", nearest="ema=0.999")
    return float(decay)


class WeightAverage:
    """The exponential moving average of a model's weights and buffers; integer tensors are the latest ones.

    After n updates the decay is min(`decay`, (1 + n) / (10 + n)), so that the initial weights are forgotten early.

    Args:
        model: the model whose weights are the initial average.
        decay: weight of the old average in the new one, between 0 and 1.

    Raises:
        Unsupported: for an invalid decay.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = check_decay(decay)
        self.updates = 0
        self.tensors = {name: tensor.clone() for name, tensor in distinct_tensors(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the weights of `model`."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        current = distinct_tensors(model)
        floating = [name for name, tensor in self.tensors.items() if tensor.dtype.is_floating_point]
        torch._foreach_lerp_([self.tensors[name] for name in floating], [current[name] for name in floating], 1 - decay)
        for name, tensor in self.tensors.items():
            if not tensor.dtype.is_floating_point:
                tensor.copy_(current[name])

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Replace the weights of `model` by the average inside the block; its own weights are restored afterwards."""
        own = {name: tensor.clone() for name, tensor in distinct_tensors(model).items()}
        load_tensors(model, self.tensors, source="an average of weights")
        try:
            yield
        finally:
            load_tensors(model, own, source="the weights before")

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Restore an average after a number of updates; raises Unsupported for tensors of another model."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise Unsupported("an average of another model's weights", supported="the same parameters")
        self.updates = updates
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
