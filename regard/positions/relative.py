"""Learned biases for buckets of distances (T5; Raffel et al., arXiv 1910.10683, section 2.1).

Half of the buckets hold one distance each, the rest grow geometrically up to `max_distance`; all larger distances share
the last bucket. With n buckets in one direction, of which e = n // 2 are exact, bucket e + k starts at the distance
``e (max_distance / e)^(k / (n - e))``. In noncausal patterns, keys before (and at) the query use the first half of the
table and keys after it the second half; in causal patterns the whole table is for keys before the query.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.contract import Unsupported, at_least
from regard.positions.protocol import Positions, check_pair

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def check_buckets(num_buckets: int, max_distance: int) -> None:
    """Raise Unsupported for numbers that :class:`Relative` does not take."""
    at_least("num_buckets", num_buckets, 4)
    if num_buckets % 2:
        raise Unsupported(
            f"num_buckets={num_buckets}", supported="an even number", nearest=f"num_buckets={num_buckets + 1}"
        )
    at_least("max_distance", max_distance, num_buckets // 2 + 1)


def bucket_starts(buckets: int, max_distance: int) -> list[int]:
    """Return the smallest distance of each bucket except the first, in one direction."""
    exact = buckets // 2
    geometric = buckets - exact
    # The factor keeps integer starts (8, 16, 32, ...) from being rounded up.
    starts = [
        math.ceil(exact * (max_distance / exact) ** (step / geometric) * (1 - 1e-12)) for step in range(geometric)
    ]
    return [*range(1, exact), *starts]


class Relative(Positions):
    """Adds a learned bias for each head and bucket of distance to the scores.

    Args:
        heads: number of heads H.
        num_buckets: rows of the table; even, since noncausal patterns use half of them for each direction.
        max_distance: distances from this one on share the last bucket.
        std: standard deviation of the initial table (num_buckets, H).
    """

    name = "relative"

    def __init__(self, *, heads: int, num_buckets: int = 32, max_distance: int = 128, std: float = 0.02) -> None:
        super().__init__()
        at_least("heads", heads, 1)
        at_least("std", std, 0.0)
        check_buckets(num_buckets, max_distance)
        self.num_buckets, self.max_distance, self.std = num_buckets, max_distance, std
        self.table = nn.Parameter(torch.empty(num_buckets, heads))
        for way, buckets in (("causal", num_buckets), ("noncausal", num_buckets // 2)):
            starts = torch.tensor(bucket_starts(buckets, max_distance))
            self.register_buffer(f"{way}_starts", starts, persistent=False)
        self.reset_parameters()

    causal_starts: Tensor
    noncausal_starts: Tensor

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=self.std)

    def buckets(
        self, query_positions: Int[Tensor, "#b n"], key_positions: Int[Tensor, "#b m"], causal: bool
    ) -> Int[Tensor, "b n m"]:
        """Return the table row of each pair. In causal patterns a key after its query counts as distance 0."""
        return self._buckets(key_positions[:, None, :] - query_positions[:, :, None], causal)

    def _buckets(self, ahead: Int[Tensor, "..."], causal: bool) -> Int[Tensor, "..."]:
        if causal:
            return torch.bucketize((-ahead).clamp(min=0), self.causal_starts, right=True)
        return torch.bucketize(ahead.abs(), self.noncausal_starts, right=True) + (ahead > 0) * (self.num_buckets // 2)

    def bias(
        self, query_positions: Int[Tensor, "#b n"], key_positions: Int[Tensor, "#b m"], causal: bool
    ) -> Float[Tensor, "b h n m"]:
        """Return the bias of the scores, in the dtype of the table."""
        check_pair(query_positions, key_positions)
        return self.by_distance(key_positions[:, None, :] - query_positions[:, :, None], causal).transpose(0, 1)

    def by_distance(self, distances: Int[Tensor, "..."], causal: bool) -> Float[Tensor, "h ..."]:
        """Return the bias for differences key position - query position."""
        return nn.functional.embedding(self._buckets(distances, causal), self.table).movedim(-1, 0)

    def extra_repr(self) -> str:
        return f"heads={self.table.shape[1]}, num_buckets={self.num_buckets}, max_distance={self.max_distance}"
