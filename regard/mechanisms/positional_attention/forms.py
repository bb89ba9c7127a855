"""The fast forms of positional_attention: parallel, chunked, and reading from a state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Call, Pattern, Result
from regard.core.precision import wide, wide_dtype, without_autocast
from regard.engines.attention import Ranks, ranks
from regard.engines.attention_forms import attend
from regard.engines.cache import CountedState, extend_counted, read_on
from regard.mechanisms.positional_attention.definition import (
    _outputs,
    _split,
    encoded,
    of_heads,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


def parallel(
    call: Call,
    query_map: Float[Tensor, "t f d"],
    key_map: Float[Tensor, "t f d"],
    v: Float[Tensor, "b h m v"],
    query_bias: Float[Tensor, "t d"] | None = None,
    encodings: Float[Tensor, "s f"] | None = None,
    slots: Shaped[Tensor, "b n"] | None = None,
    content_query: Float[Tensor, "b c n e"] | None = None,
    content_key: Float[Tensor, "b c m e"] | None = None,
) -> Result:
    """One weight matrix per head, shared by all rows if it is small and no row differs."""
    where = ranks(call, _outputs(call, slots, content_query, v.shape[2]), v.shape[2], v.device)
    positions = Positions(query_map, key_map, query_bias, encodings)
    return _attend(call, positions, v, content_query, content_key, where)


def chunked(
    call: Call,
    query_map: Float[Tensor, "t f d"],
    key_map: Float[Tensor, "t f d"],
    v: Float[Tensor, "b h m v"],
    query_bias: Float[Tensor, "t d"] | None = None,
    encodings: Float[Tensor, "s f"] | None = None,
    slots: Shaped[Tensor, "b n"] | None = None,
    content_query: Float[Tensor, "b c n e"] | None = None,
    content_key: Float[Tensor, "b c m e"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens; also used as the step."""
    n = _outputs(call, slots, content_query, v.shape[2])
    state, where = extend_counted(call, v[:, :0] if content_key is None else content_key, v, n)
    positions = Positions(query_map, key_map, query_bias, encodings)
    return _attend(call, positions, state.v, content_query, state.k, where, state)


def absorb(
    call: Call, v: Float[Tensor, "b h m v"], content_key: Float[Tensor, "b c m e"] | None = None
) -> CountedState:
    """Append memory to the cache; more may follow."""
    return extend_counted(call, v[:, :0] if content_key is None else content_key, v, 0)[0]


def read(
    call: Call,
    query_map: Float[Tensor, "t f d"],
    key_map: Float[Tensor, "t f d"],
    query_bias: Float[Tensor, "t d"] | None = None,
    encodings: Float[Tensor, "s f"] | None = None,
    slots: Shaped[Tensor, "b n"] | None = None,
    content_query: Float[Tensor, "b c n e"] | None = None,
) -> Result:
    """Attend from queries to absorbed memory; their positions continue those of earlier queries."""
    call, state, where = read_on(call, _outputs(call, slots, content_query, 1), call.state.v.device)
    positions = Positions(query_map, key_map, query_bias, encodings)
    return _attend(call, positions, state.v, content_query, state.k, where, state)


SHARED_PAIRS = 1 << 15
"""Maximum number of queries times keys for which weights are stored for all rows. From 256 tokens the kernels were
faster in most measured cases, 1.0 to 1.9 times at 256 tokens and 1 to 32 rows, 5 to 13 times at 2048 and one row; below
128 they were slower."""


@dataclass(frozen=True)
class Positions:
    """The sources of the weights, in place of queries and keys."""

    query_map: Float[Tensor, "t f d"]
    key_map: Float[Tensor, "t f d"]
    query_bias: Float[Tensor, "t d"] | None
    encodings: Float[Tensor, "s f"] | None

    def queries(self, at: Int[Tensor, "#b n"]) -> Float[Tensor, "#b t n f"]:
        """(Q W_K^T) / sqrt(D), in at least float32."""
        dtype = wide_dtype(self.query_map)
        q = self.keys(at) @ self.query_map.to(dtype)
        q = q if self.query_bias is None else q + self.query_bias[:, None].to(dtype)
        return q.shape[-1] ** -0.5 * q @ self.key_map.to(dtype).mT

    def keys(self, at: Int[Tensor, "#b n"]) -> Float[Tensor, "#b 1 n f"]:
        """P, shared by all heads."""
        found = encoded(self.encodings, at, self.query_map[0])
        return wide(found)[:, None]


def _attend(
    call: Call,
    positions: Positions,
    v: Tensor,
    content_query: Tensor | None,
    content_key: Tensor | None,
    where: Ranks,
    state: CountedState | None = None,
) -> Result:
    t = _split(positions.query_map, v, content_query)
    with without_autocast(v.device):
        pairs = where.queries.shape[1] * v.shape[2]
        if state is None and pairs <= SHARED_PAIRS and _same_for_all_rows(call, where):
            parts = [_shared(call, positions, v[:, :t], where)]
        else:
            valid = call.valid_queries(where.queries.shape[1])
            asked = where.queries if valid is None else where.queries.where(valid, 0)
            queries, keys = (
                x.expand(v.shape[0], t, -1, -1) for x in (positions.queries(asked), positions.keys(where.keys))
            )
            parts = [_engine(of_heads(call, slice(0, t)), queries, keys, v[:, :t], where, call.scale)]
    if content_query is not None and content_key is not None:
        scale = call.scale * content_query.shape[-1] ** -0.5
        parts.append(_engine(of_heads(call, slice(t, None)), content_query, content_key, v[:, t:], where, scale))
    output = torch.cat([part[0] for part in parts], 1)
    found = [part[1] for part in parts if part[1] is not None]
    return Result(output, state, extras={"weights": torch.cat(found, 1)} if found else {})


def _same_for_all_rows(call: Call, where: Ranks) -> bool:
    """Return whether all rows have the same weights; padding only matters where it would be counted."""
    pairs = call.bias is not None or call.position_bias is not None or call.blocks is not None
    if pairs or call.dropout > 0:
        return False
    return where.offset is not None if call.pattern is Pattern.CAUSAL_SELF else call.memory_lengths is None


def _shared(
    call: Call, positions: Positions, v: Float[Tensor, "b t m v"], where: Ranks
) -> tuple[Float[Tensor, "b t n v"], Float[Tensor, "b t n m"] | None]:
    """One matrix per head, multiplied once with the values of all rows."""
    batch, n, m = v.shape[0], where.queries.shape[1], v.shape[2]
    i = torch.arange(n, device=v.device) + (m - n if call.pattern is Pattern.CAUSAL_SELF else 0)
    j = torch.arange(m, device=v.device)  # also for shorter rows
    if n == 0 or m == 0:
        none = v.new_zeros(*v.shape[:2], n, m)
        return v.new_zeros(*none.shape[:3], v.shape[-1]), none if "weights" in call.want else None
    asked, found = _within(i, call.lengths), _within(j, call.memory_lengths)
    a = (call.scale * positions.queries(asked[None]) @ positions.keys(found[None]).mT)[0]
    if call.pattern is Pattern.CAUSAL_SELF:
        # only queries beyond a padded row's tokens see its padding
        i = i[:, None]
        a = a.masked_fill((j > i) & (i >= 0), -torch.inf).softmax(-1).masked_fill(i < 0, 0)
    else:
        a = a.softmax(-1)
    columns = v.to(torch.promote_types(v.dtype, a.dtype)).permute(1, 2, 0, 3).flatten(2)  # (t, m, b v)
    output = (a.to(columns.dtype) @ columns).unflatten(-1, (batch, v.shape[-1])).permute(2, 0, 1, 3)
    return output.to(v.dtype), a.to(v.dtype).expand(batch, -1, -1, -1) if "weights" in call.want else None


def _within(positions: Int[Tensor, " n"], lengths: Int[Tensor, " b"] | None) -> Int[Tensor, " n"]:
    """The positions; those that are padding in every row are replaced by that of the last token."""
    if lengths is None or lengths.shape[0] == 0:
        return positions
    return torch.minimum(positions, lengths.amax() - 1)


def _engine(
    call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, scale: float
) -> tuple[Float[Tensor, "b t n v"], Float[Tensor, "b t n m"] | None]:
    result = attend(call, q.to(torch.promote_types(v.dtype, q.dtype)), k, v, where, scale=scale)
    return result.output.to(v.dtype), result.extras.get("weights")
