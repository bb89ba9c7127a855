"""Helpers that all factorizations of combiner share: tokens in rows, pooling, and masked softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Call, lengths_after, valid_from_lengths
from regard.core.padding import pad_tokens
from regard.engines.grouped_attention import normalized
from regard.mechanisms.combiner.definition import Config

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def new_tokens(call: Call, k: Tensor) -> Int[Tensor, " b"]:
    """Number of tokens of each batch row in this call."""
    return lengths_after(None, call.memory_lengths, k.shape[0], k.shape[2], k.device)


def valid_tokens(lengths: Tensor | None, m: int, device: torch.device) -> Bool[Tensor, "#b m"]:
    """Mask of the first `lengths` of m tokens of each batch row; a single row if all are valid."""
    if lengths is None:
        return torch.ones(1, m, dtype=torch.bool, device=device)
    return valid_from_lengths(lengths, m)


def in_rows(x: Tensor, s: int, axis: int = 2) -> Tensor:
    """Split the token axis into (rows, s), with zeros (False) after the last token; at least one row."""
    count = x.shape[axis]
    after = -count % s if count else s
    return pad_tokens(x, 0, after, axis).unflatten(axis, (-1, s))


def take(x: Float[Tensor, "b h m d"], slots: Int[Tensor, "b j"]) -> Float[Tensor, "b h j d"]:
    """Gather the tokens in the given slots of each batch row."""
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def reduce_tokens(config: Config, x: Float[Tensor, "... t d"], exists: Bool[Tensor, "... t"]) -> Float[Tensor, "... d"]:
    """Maximum or sum over the tokens that exist; 0 if none does."""
    if config.reduce != "max" or x.shape[-2] == 0:
        return torch.where(exists[..., None], x, 0).sum(-2)
    largest = torch.where(exists[..., None], x, -torch.inf).amax(-2)
    return torch.where(exists.any(-1)[..., None], largest, 0)


def finish(config: Config, x: Float[Tensor, "... d"], count: Tensor) -> Float[Tensor, "... d"]:
    """The pooled values of a running reduction over `count` tokens: a mean is divided by the count."""
    return x / count.clamp(min=1)[..., None] if config.reduce == "mean" else x


def softmax_over(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over visible scores; 0 if there are none."""
    return normalized(torch.where(visible, scores, -torch.inf))
