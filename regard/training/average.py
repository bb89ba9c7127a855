"""A running mean of a model's weights, which often scores better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regard.contract import Unsupported
from regard.models.weights import distinct_tensors, load_tensors


def check_decay(decay: float) -> float:
    """The decay of a mean; raises Unsupported for what is none."""
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay < 1:
        raise Unsupported(f"ema={decay!r}", supported="a number between 0 and 1", nearest="ema=0.999")
    return float(decay)


class WeightAverage:
    """The exponential moving average of a model's weights and buffers; whole numbers among these are the last ones.

    After n updates the old mean counts min(`decay`, (1 + n) / (10 + n)), so that it forgets the initial weights early.

    Args:
        model: whose weights are the mean to begin with.
        decay: share of the old mean in the new one, between 0 and 1.

    Raises:
        Unsupported: for another decay.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = check_decay(decay)
        self.updates = 0
        self.tensors = {name: tensor.clone() for name, tensor in distinct_tensors(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights of `model` in."""
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
        """`model` with the mean as its weights, and afterwards with its own."""
        own = {name: tensor.clone() for name, tensor in distinct_tensors(model).items()}
        load_tensors(model, self.tensors, source="an average of weights")
        try:
            yield
        finally:
            load_tensors(model, own, source="the weights before")

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Go on from a mean after so many updates; raises Unsupported for tensors of another model."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise Unsupported("an average of another model's weights", supported="the same parameters")
        self.updates = updates
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
