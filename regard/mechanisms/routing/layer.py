"""Modules of routing's layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import (
    LayerCall,
    LayerSpec,
    Mask,
    Projection,
    Tensors,
    valid_from_lengths,
)
from regard.mechanisms.routing.definition import Config, _scores

if TYPE_CHECKING:
    from jaxtyping import Int


class Centroids(Projection):
    """Supplies a layer's heads with centroids and null memories, and moves the centroids in training.

    A call uses the centroids from before the call. Centroids do not move while a graph is being compiled.

    Args:
        spec: the layer's specification.
    """

    centroids: Tensor

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.config: Config = spec.config
        shape = (spec.heads, self.config.clusters)
        self.register_buffer("centroids", F.normalize(torch.randn(*shape, spec.head_dim), dim=-1))
        null = self.config.null_memory and self.config.local_heads < spec.heads
        self.null_k = nn.Parameter(torch.randn(*shape, spec.head_dim)) if null else None
        self.null_v = nn.Parameter(torch.randn(*shape, spec.value_dim)) if null else None

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        x, memory, context = call.x, call.memory, call.context
        found = {**heads, "centroids": self.centroids}
        if self.null_k is not None and self.null_v is not None:
            found |= {"null_k": self.null_k, "null_v": self.null_v}
        if self.training and self.config.decay < 1 and not torch.compiler.is_compiling():
            own = None if x is None else context.mask
            with torch.no_grad():
                self._move({"q": own, "k": own if memory is x else context.memory_mask}, heads)
        return found

    def _move(self, masks: dict[str, Mask | None], heads: Tensors) -> None:
        old = self.centroids
        total, count = torch.zeros_like(old), old.new_zeros(old.shape[:2])
        for name, mask in masks.items():
            if name not in heads:
                continue
            tokens = heads[name]
            tokens = tokens.repeat_interleave(old.shape[0] // tokens.shape[1], 1)
            nearest = _scores(tokens, old).argmax(2)
            member = F.one_hot(nearest, old.shape[1]).to(old.dtype)  # (b, h, n, c)
            lengths = _lengths(mask)
            if lengths is not None:
                member = member * valid_from_lengths(lengths, member.shape[2])[:, None, :, None]
            total += (member.mT @ F.normalize(tokens.to(old.dtype), dim=-1)).sum(0)
            count += member.sum((0, 2))
        decay = self.config.decay
        moved = F.normalize(decay * old + (1 - decay) * F.normalize(total, dim=-1), dim=-1)
        self.centroids = torch.where(count[..., None] > 0, moved, old)


def _lengths(mask: Mask | None) -> Int[Tensor, " b"] | None:
    """The number of tokens in each row of the dense layout; None when all are valid."""
    if mask is None or not mask.ragged:
        return None
    if mask.cu_seqlens is not None:
        return mask.cu_seqlens.diff()
    return mask.lengths if mask.valid is None else mask.valid.sum(-1)
