"""The definition of positional_attention: its options and its reference, written to be read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import BlockMask, Call, Unsupported, at_least, one_of
from regard.core.precision import wide_dtype
from regard.core.visibility import DistanceBias, PositionBias
from regard.engines.attention import attention_reference, masked_scores_bias, ranks
from regard.engines.attention_forms import by_pattern
from regard.positions.sinusoidal import Sinusoidal

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


@dataclass(frozen=True)
class Config:
    """Options, all for the layer.

    Attributes:
        encoding: P: ``sinusoidal`` (`encoding_dim` features, any position), ``one_hot`` (`max_length` features),
            ``binary`` (the bits of the position as -1 and 1) or ``learned`` (`encoding_dim` features).
        max_length: number of positions with one-hot, binary and learned encodings, >= 1.
        encoding_dim: features of sinusoidal and learned encodings, >= 1.
        key_width: D: ``encoding`` (the number of P's features, in each head) or ``split`` (divided among the heads).
        content_heads: number of heads whose weights come from content, at most all but one.
    """

    encoding: str = "sinusoidal"
    max_length: int = 128
    encoding_dim: int = 64
    key_width: str = "encoding"
    content_heads: int = 0

    def __post_init__(self) -> None:
        one_of("encoding", self.encoding, ("one_hot", "binary", "sinusoidal", "learned"))
        one_of("key_width", self.key_width, ("encoding", "split"))
        at_least("max_length", self.max_length, 1)
        at_least("encoding_dim", self.encoding_dim, 1)
        at_least("content_heads", self.content_heads, 0)

    @property
    def features(self) -> int:
        """The number of features of P."""
        if self.encoding == "one_hot":
            return self.max_length
        return max(1, (self.max_length - 1).bit_length()) if self.encoding == "binary" else self.encoding_dim


def reference(
    call: Call,
    query_map: Float[Tensor, "t f d"],
    key_map: Float[Tensor, "t f d"],
    v: Float[Tensor, "b h m v"],
    query_bias: Float[Tensor, "t d"] | None = None,
    encodings: Float[Tensor, "s f"] | None = None,
    slots: Shaped[Tensor, "b n"] | None = None,
    content_query: Float[Tensor, "b c n e"] | None = None,
    content_key: Float[Tensor, "b c m e"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with a weight matrix for each row."""
    t, m = _split(query_map, v, content_query), v.shape[2]
    where = ranks(call, _outputs(call, slots, content_query, m), m, v.device)

    def attend(heads: slice, q: Tensor, k: Tensor) -> Tensor:
        own = of_heads(call, heads)
        visible, added = masked_scores_bias(where, by_pattern(own), own.bias, own.position_bias, own.blocks, q.dtype)
        scale = call.scale * q.shape[-1] ** -0.5
        return attention_reference(q, k, v[:, heads], visible, lambda scores: scores.softmax(-1), scale, added)

    like = query_map[0]
    bias = 0 if query_bias is None else query_bias[:, None]
    queries = encoded(encodings, where.queries, like)[:, None] @ query_map + bias
    keys = encoded(encodings, where.keys, like)[:, None] @ key_map
    output = attend(slice(0, t), *(x.expand(v.shape[0], -1, -1, -1) for x in (queries, keys)))
    if content_query is None or content_key is None:
        return output
    return torch.cat([output, attend(slice(t, None), content_query, content_key)], 1)


def _outputs(call: Call, slots: Tensor | None, content_query: Tensor | None, keys: int) -> int:
    if content_query is not None:
        return content_query.shape[2]
    if slots is not None:
        return slots.shape[1]
    return 1 if call.pattern.cross else keys


def _split(query_map: Tensor, v: Tensor, content_query: Tensor | None) -> int:
    """The number of positional heads."""
    content = 0 if content_query is None else content_query.shape[1]
    if query_map.shape[0] + content != v.shape[1]:
        raise Unsupported(
            f"positional_attention with {query_map.shape[0]} positional heads, {content} of content and {v.shape[1]} of values",
            supported="as many heads of values as of both others together",
        )
    return query_map.shape[0]


def of_heads(call: Call, heads: slice) -> Call:
    """The call restricted to some of its heads."""
    bias, blocks, told = call.bias, call.blocks, call.position_bias
    if bias is not None and bias.shape[1] > 1:
        bias = bias[:, heads]
    if blocks is not None and blocks.visible.shape[1] > 1:
        blocks = BlockMask(blocks.visible[:, heads], blocks.block_size)
    if isinstance(told, DistanceBias):
        told = DistanceBias(partial(_by_distance, told, heads))
    elif told is not None:
        told = partial(_by_rank, told, heads)
    return call.replace(bias=bias, blocks=blocks, position_bias=told)


def _by_distance(told: DistanceBias, heads: slice, distances: Int[Tensor, "..."]) -> Float[Tensor, "h ..."]:
    return told.by_distance(distances)[heads]


def _by_rank(
    told: PositionBias, heads: slice, i: Int[Tensor, "b n"], j: Int[Tensor, "b m"]
) -> Float[Tensor, "#b #h n m"]:
    found = told(i, j)
    return found[:, heads] if found.shape[1] > 1 else found


def encoded(
    encodings: Float[Tensor, "s f"] | None, positions: Int[Tensor, "#b n"], like: Float[Tensor, "f d"]
) -> Float[Tensor, "#b n f"]:
    """P at the positions; arbitrary at negative ones, whose tokens do not exist or see nothing."""
    positions = positions.clamp(min=0)
    if encodings is None:
        dtype = wide_dtype(like)
        zeros = torch.zeros(*positions.shape, like.shape[0], dtype=dtype, device=like.device)
        return Sinusoidal(dim=like.shape[0]).embed(zeros, positions)
    if not torch.compiler.is_compiling() and positions.numel():
        last = int(positions.max())
        if last >= encodings.shape[0]:
            raise Unsupported(
                f"positional_attention at position {last} with {encodings.shape[0]} encodings",
                supported=f"positions 0 to {encodings.shape[0] - 1}",
                nearest=f"max_length={last + 1}, or encoding='sinusoidal'",
            )
    return encodings[positions]
