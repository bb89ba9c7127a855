"""Checks and embedding of a model's inputs, and the masks of its layers' right-padded layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.contract import Mask, Unsupported
from regard.core.ragged import Gathering, inner_mask
from regard.layers.embedding import FactorisedEmbedding

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def check_ids(ids: Int[Tensor, "b n"]) -> None:
    """Raise Unsupported unless `ids` are integers (B, N)."""
    if not isinstance(ids, Tensor):
        raise Unsupported(f"ids of type {type(ids).__name__}", supported="a tensor of integers (B, N)")
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise Unsupported(f"ids of dtype {ids.dtype} and shape {tuple(ids.shape)}", supported="integers (B, N)")


def embed_tokens(table: nn.Module, tokens: Tensor) -> Float[Tensor, "b n c"]:
    """Embed tokens or project features; an id out of range raises Unsupported (on a CPU, outside a compiled graph)."""
    if torch.compiler.is_compiling():
        return table(tokens)
    try:
        return table(tokens)
    except IndexError as error:
        raise Unsupported(
            f"token ids from {int(tokens.min())} to {int(tokens.max())}",
            supported=f"0 to {table.num_embeddings - 1}"
            if isinstance(table, nn.Embedding | FactorisedEmbedding)
            else "ids of the vocabulary",
        ) from error


def right_padded_mask(mask: Mask | None, layout: Gathering) -> Mask | None:
    """Return the mask for the layers after tokens are gathered into the right-padded layout."""
    bias = None if mask is None else mask.bias
    blocks = None if mask is None else mask.blocks
    if bias is not None and layout.lengths is not None:
        rows = bias.expand(layout.source_batch, -1, -1, -1)
        for axis in (-2, -1):
            rows = layout.gather(rows, axis=axis) if rows.shape[axis] > 1 else rows
        bias = rows
    return inner_mask(layout, bias=bias, blocks=blocks)
