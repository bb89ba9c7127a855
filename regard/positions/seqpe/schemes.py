"""Schemes for the places where encoded positions are used: the input, the queries and keys, or the scores."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import Unsupported, one_of
from regard.positions.protocol import Positions
from regard.positions.seqpe.encoding import PARTS, PROJECTIONS, SequentialEncoding

if TYPE_CHECKING:
    from jaxtyping import Float


class Seqpe(SequentialEncoding):
    """Adds the position vectors to the model's input.

    Args:
        dim: width C of the embedding, here the width of the vectors.
        heads: number of heads of the model.
        options: options of :class:`SequentialEncoding`.
    """

    name = "seqpe"

    def __init__(self, *, dim: int, heads: int, **options: Any) -> None:
        super().__init__(dim, heads if dim % heads == 0 else 1, **options)

    def embed(self, x: Float[Tensor, "b n c"], positions: Tensor) -> Float[Tensor, "b n c"]:
        """Add to `x` the vectors of its positions; `positions` may also be vectors made by :meth:`encode`."""
        e = self._encoded(positions, x.shape[0], x.shape[1])
        if x.shape[-1] != e.shape[-1]:
            raise Unsupported(f"{self.name} positions on a width of {x.shape[-1]}", supported=f"dim={e.shape[-1]}")
        return x + e.to(x.dtype)


class SeqpeInside(SequentialEncoding):
    """The base class of schemes that act on queries and keys; see the package's table.

    Args:
        heads, head_dim, kv_heads: sizes of the layers.
        per_head: whether each head has its own part of the vectors, of heads * head_dim features; otherwise all heads
            share vectors of head_dim features.
        projection: the matrix W: ``single`` for one shared by all layers, ``layers`` for one in each layer, or ``none``
            (e^q = e^k).
        part: ``whole`` for a stand-alone layer; a model has one ``encoder``, and the rest is in each ``layer``.
        options: options of :class:`SequentialEncoding`.
    """

    def __init__(
        self,
        *,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        per_head: bool = True,
        projection: str = "single",
        part: str = "whole",
        **options: Any,
    ) -> None:
        one_of("projection", projection, PROJECTIONS)
        one_of("part", part, PARTS)
        kv_heads = heads if kv_heads is None else kv_heads
        if projection == "none" and per_head and kv_heads != heads:
            raise Unsupported(
                f"projection='none' for {heads} heads of queries and {kv_heads} of keys",
                supported="as many, or per_head=False",
                nearest="projection='single'",
            )
        width = heads * head_dim if per_head else head_dim
        if part == "layer":
            Positions.__init__(self)
            self.axes = options.get("axes", 1)
        else:
            super().__init__(width, heads if per_head else 1, **options)
        self.part, self.per_head, self.head_dim = part, per_head, head_dim
        self.shared = part == "layer"
        here = projection != "none" and (part == "whole" or (part == "encoder") == (projection == "single"))
        self.joined = projection == "single" or (projection == "layers" and part == "whole")
        key_width = kv_heads * head_dim if per_head else head_dim
        self.query_width = width
        self.query_projection = nn.Linear(width, width) if here else None
        self.key_projection = nn.Linear(width, key_width) if here else None
        for module in (self.query_projection, self.key_projection):
            if module is not None:
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def encode(self, positions: Tensor, generator: torch.Generator | None = None) -> Float[Tensor, "*b width"]:
        """Return the tensor that `rotate` and `rotate_keys` take instead of positions: [e^q, e^k], or E(p)."""
        self._check_encoder()
        return super().encode(positions, generator)

    def project(self, e: Float[Tensor, "*b width"]) -> Float[Tensor, "*b width2"]:
        """Return [e^q, e^k], or the vectors where each layer projects them, or nothing does."""
        if self.query_projection is None or self.key_projection is None:
            return e
        return torch.cat([self.query_projection(e), self.key_projection(e)], -1)

    def rotate(self, x: Float[Tensor, "b h n d"], positions: Tensor) -> Float[Tensor, "b h n d"]:
        """Encode positions (or the result of `encode`) into queries, in the dtype of `x`."""
        e = self._encoded(positions, x.shape[0], x.shape[2])
        if self.joined:
            e = e[..., : self.query_width]
        elif self.part == "layer" and self.query_projection is not None:
            e = self.query_projection(e)
        return self.place_queries(x, self._by_head(e, x))

    def rotate_keys(self, x: Float[Tensor, "b g m d"], positions: Tensor) -> Float[Tensor, "b g m d"]:
        """Like :meth:`rotate`, for keys."""
        e = self._encoded(positions, x.shape[0], x.shape[2])
        if self.joined:
            e = e[..., self.query_width :]
        elif self.part == "layer" and self.key_projection is not None:
            e = self.key_projection(e)
        return self.place_keys(x, self._by_head(e, x))

    def place_queries(self, q: Tensor, e: Tensor) -> Tensor:
        """Combine q with e^q, both (B, H, N, D); e^q may have a single row or head for all."""
        raise NotImplementedError

    def place_keys(self, k: Tensor, e: Tensor) -> Tensor:
        """Combine k with e^k, by default in the same way as queries."""
        return self.place_queries(k, e)

    def _by_head(self, e: Float[Tensor, "#b n width"], x: Float[Tensor, "b h n d"]) -> Float[Tensor, "#b #h n d"]:
        heads = x.shape[1] if self.per_head else 1
        if x.shape[-1] != self.head_dim or e.shape[-1] != heads * self.head_dim or e.shape[-2] != x.shape[2]:
            raise Unsupported(
                f"{self.name} positions {tuple(e.shape)} on heads {tuple(x.shape)}",
                supported=f"head_dim={self.head_dim}, and equal heads in all layers that share positions",
            )
        return e.unflatten(-1, (heads, -1)).transpose(1, 2).to(x.dtype)


class SeqpeMul(SeqpeInside):
    """Multiplies queries and keys by their position vectors."""

    name = "seqpe_mul"

    def place_queries(self, q: Tensor, e: Tensor) -> Tensor:
        return q * e


class SeqpeAdd(SeqpeInside):
    """Adds their position vectors to queries and keys."""

    name = "seqpe_add"

    def place_queries(self, q: Tensor, e: Tensor) -> Tensor:
        return q + e


class SeqpeScalar(SeqpeInside):
    """Adds products of position vectors to the scores, by queries and keys of twice the width.

    Args:
        scale: s > 0, the weight of these products.
        options: options of :class:`SeqpeInside`.
    """

    name = "seqpe_scalar"

    def __init__(self, *, scale: float = 1.0, **options: Any) -> None:
        if not scale > 0:
            raise Unsupported(f"scale={scale} of seqpe_scalar", supported="scale > 0", nearest="scale=1.0")
        super().__init__(**options)
        self.scale = scale

    def place_queries(self, q: Tensor, e: Tensor) -> Tensor:
        return math.sqrt(2) * self.place_keys(q, e)  # twice the width changes the usual scale

    def place_keys(self, k: Tensor, e: Tensor) -> Tensor:
        return torch.cat([k, (math.sqrt(self.scale) * e).expand(*k.shape[:3], -1)], -1)
