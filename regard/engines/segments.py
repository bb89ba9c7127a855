"""Means of consecutive tokens: the landmarks of Nystrom attention and the proposals of randomised attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def segment_means(
    x: Float[Tensor, "b h n d"],
    most: int,
    lengths: Int[Tensor, " b"] | None = None,
    segments: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b h s d"]:
    """Mean of the tokens in each segment. Segments differ by at most one token; the shorter ones come first.

    Args:
        x: right-padded.
        most: number of segments in a row; a row with fewer tokens has one segment per token.
        lengths: number of valid tokens in each row; None when all are valid.
        segments: number of segments in each row, from 1 to its number of tokens, instead of `most`; with `lengths`.

    Returns:
        min(most, n) segments without `lengths`, else `most`, where those that a row lacks are zero.
    """
    if lengths is None:
        most = min(most, x.shape[2])
    if most == 0:
        return x[:, :, :0]
    if lengths is None:
        return _of_whole_rows(x, most)
    count = (lengths if segments is None else segments).clamp(1, most)[:, None]
    length, rank = lengths[:, None], torch.arange(x.shape[2], device=x.device)
    size = (length // count).clamp(min=1)
    border = (count - length % count) * size
    segment = torch.where(rank < border, rank // size, (rank - border) // (size + 1) + count - length % count)
    inside = (segment[:, None] == torch.arange(most, device=x.device)[:, None]) & (rank < length)[:, None]
    weights = inside.to(x.dtype) / inside.sum(-1, keepdim=True).clamp(min=1)
    return weights[:, None] @ x


def _of_whole_rows(x: Float[Tensor, "b h n d"], count: int) -> Float[Tensor, "b h s d"]:
    size, longer = x.shape[2] // count, x.shape[2] % count  # `divmod` does not support symbolic sizes
    border = (count - longer) * size
    means = [x[:, :, :border].unflatten(2, (count - longer, size)).mean(3)]
    if longer:
        means.append(x[:, :, border:].unflatten(2, (longer, size + 1)).mean(3))
    return torch.cat(means, 2) if longer else means[0]
