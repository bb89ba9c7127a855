"""The definition of reformer: its options and its reference, written to be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import (
    Call,
    Unsupported,
    at_least,
)
from regard.core.precision import wide, wide_dtype
from regard.engines.attention import attention_reference

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        chunk: m, tokens per chunk, >= 1.
        lookback: number of chunks seen before a token's own, >= 0.
        rounds: hashing rounds in a layer, >= 1.
        buckets: buckets per round in a layer, even and >= 2; about two for each chunk of a training sequence.
        same_bucket: whether tokens of other buckets are hidden in noncausal-self (they always are in causal-self).
        count_duplicates: whether a pair counts as often as rounds have it.
        eps: e in the norm of keys, > 0.
        fresh: whether a layer draws new rotations for each training call.
    """

    chunk: int = 64
    lookback: int = 1
    rounds: int = 4
    buckets: int = 32
    same_bucket: bool = False
    count_duplicates: bool = False
    eps: float = 1e-6
    fresh: bool = True

    def __post_init__(self) -> None:
        at_least("chunk", self.chunk, 1)
        at_least("lookback", self.lookback, 0)
        at_least("rounds", self.rounds, 1)
        at_least("buckets", self.buckets, 2)
        if self.buckets % 2:
            raise Unsupported(
                f"buckets={self.buckets}", supported="an even number", nearest=f"buckets={self.buckets + 1}"
            )
        if not self.eps > 0:
            raise Unsupported(f"eps={self.eps}", supported="eps > 0", nearest="eps=1e-6")


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n v"],
    rotations: Float[Tensor, "h r d p"],
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    config: Config = call.config
    n = q.shape[2]
    bucket = hash_tokens(q, rotations)
    i, j = torch.arange(n, device=q.device)[:, None], torch.arange(n, device=q.device)
    same = bucket[..., :, None] == bucket[..., None, :]  # (b, h, r, n, n)
    if call.pattern.causal:
        chunk = (same & (j < i)).sum(-1).div(config.chunk, rounding_mode="floor")
        seen = same & (j < i) & (chunk[..., :, None] - chunk[..., None, :] <= config.lookback)
    else:
        place = bucket.argsort(dim=-1, stable=True).argsort(-1)
        chunk = place.div(config.chunk, rounding_mode="floor")
        apart = (chunk[..., :, None] - chunk[..., None, :]) % max(-(-n // config.chunk), 1)
        seen = (apart <= config.lookback) & (i != j)
        seen = seen & same if config.same_bucket else seen
    times = seen.sum(2)  # (b, h, n, n)
    bias = times.clamp(min=1).to(q.dtype).log() if config.count_duplicates else None
    output = attention_reference(q, _keys(call, q), v, times > 0, lambda x: x.softmax(-1), call.scale, bias)
    return torch.where((times > 0).any(-1, keepdim=True), output, v)


def hash_tokens(x: Float[Tensor, "b h n d"], rotations: Float[Tensor, "h r d p"]) -> Int[Tensor, "b h r n"]:
    """The bucket of each token in each round."""
    dtype = wide_dtype(x)
    turned = x.detach().to(dtype)[:, :, None] @ rotations.detach().to(dtype)
    longest = turned.abs().argmax(-1)  # the largest of [x R; -x R] is the largest |x R|, with its sign
    opposite = turned.gather(-1, longest[..., None])[..., 0] < 0
    return longest + turned.shape[-1] * opposite


def _keys(call: Call, q: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
    """The queries scaled to unit length, in at least float32."""
    q = wide(q)
    return q * (q.square().sum(-1, keepdim=True) + q.shape[-1] * call.config.eps).rsqrt()
