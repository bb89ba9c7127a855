"""The fast forms of universal_rpe: parallel, chunked, and reading from a state."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.contract import Call, Pattern, Result
from regard.core.draws import uniform
from regard.core.precision import wide_dtype
from regard.core.ragged import check_pairs
from regard.core.visibility import DistanceBias
from regard.engines.attention import Ranks, Visibility, has_kernel, masked_scores_bias, ranks
from regard.engines.attention_forms import attend_to_part, by_pattern
from regard.engines.cache import CountedState, extend_counted, read_on
from regard.engines.merging import merge
from regard.mechanisms.universal_rpe.definition import by_rank, only_one
from regard.positions.toeplitz import at_offsets

if TYPE_CHECKING:
    from jaxtyping import Float, Int


NUMBERS_AT_ONCE = 1 << 18
"""Number of weights computed at once: few enough to stay in a core's cache."""


ABOVE_LARGEST = 1.25
"""kappa relative to a head's largest |c|: closer to 1, differences lose fewer digits, but log p loses more."""


FEWEST_WEIGHTS = 1 << 19
"""Number of weights, over all rows and heads, from which O is assembled from attention calls. With 8 heads of 64, R of
5 and 128 and one thread, that was 1.1 to 3.4 times as fast from 2^19 weights (256 tokens), forward and training, and
0.6 to 1.6 times at 2^18."""


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    factors: Float[Tensor, "h offsets"] | None = None,
    grid_factors: Float[Tensor, "h rows columns"] | None = None,
    pair_factors: Float[Tensor, "b h n m"] | None = None,
) -> Result:
    """If a kernel runs and factors depend only on offsets, the sum of attention to the keys in the band and on either
    side of it; otherwise explicit weights."""
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    return _attend(call, q, k, v, only_one(call, factors, grid_factors, pair_factors), where)


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    factors: Float[Tensor, "h offsets"] | None = None,
    grid_factors: Float[Tensor, "h rows columns"] | None = None,
    pair_factors: Float[Tensor, "b h n m"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens; also used as the step."""
    table = only_one(call, factors, grid_factors, pair_factors, stateful=True)
    state, where = extend_counted(call, k, v, q.shape[2])
    return _attend(call, q, state.k, state.v, table, where, state)


def absorb(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]) -> CountedState:
    """Append memory to the cache; more may follow."""
    return extend_counted(call, k, v, 0)[0]


def read(
    call: Call,
    q: Float[Tensor, "b h n d"],
    factors: Float[Tensor, "h offsets"] | None = None,
    grid_factors: Float[Tensor, "h rows columns"] | None = None,
    pair_factors: Float[Tensor, "b h n m"] | None = None,
) -> Result:
    """Attend from queries to absorbed memory; their positions continue those of earlier queries."""
    table = only_one(call, factors, grid_factors, pair_factors, stateful=True)
    call, state, where = read_on(call, q.shape[2], q.device)
    return _attend(call, q, state.k, state.v, table, where, state)


def _attend(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    where: Ranks,
    state: CountedState | None = None,
) -> Result:
    batch, heads, n, _ = q.shape
    m, dtype = k.shape[2], wide_dtype(q)
    if call.bias is not None:
        check_pairs(call.bias, batch, heads, n, m)
    if q.numel() == 0 or m == 0:
        empty = {"weights": v.new_zeros(batch, heads, n, m), "softmax_weights": v.new_zeros(batch, heads, n, m)}
        return Result(v.new_zeros(batch, heads, n, v.shape[-1]), state, extras=empty if "weights" in call.want else {})
    wide = q.to(dtype)
    if _has_parts(call, wide, m, table):
        return Result(_in_parts(call, wide, k, v, table, where).to(v.dtype), state)
    return _explicitly(call, wide, k, v, table, where, state)


def _has_parts(call: Call, q: Tensor, m: int, table: Tensor | None) -> bool:
    """Return whether to assemble O from attention calls: if a kernel runs them and there are at least `FEWEST_WEIGHTS`
    weights, or its backend was requested."""
    by_offset = table is None or table.ndim == 2
    by_distance = call.position_bias is None or isinstance(call.position_bias, DistanceBias)
    by_pair = call.bias is not None or call.blocks is not None or call.dropout > 0 or "weights" in call.want
    enough = q.shape[0] * q.shape[1] * q.shape[2] * m >= FEWEST_WEIGHTS or call.backend is not None
    return by_offset and by_distance and not by_pair and enough and has_kernel(q, call.backend)


def _in_parts(call: Call, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, where: Ranks) -> Tensor:
    """Attend to keys before, after and in the band with the attention engine, see the package's docstring."""
    n, m, causal = q.shape[2], k.shape[2], call.pattern is Pattern.CAUSAL_SELF
    told = call.position_bias
    assert told is None or isinstance(told, DistanceBias)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, where: Ranks, visibility: Visibility, bias: DistanceBias | None
    ) -> tuple[Tensor, Tensor]:
        return attend_to_part(call, q, k, v, where, visibility, position_bias=bias)

    if table is None:
        return attend(q, k, v, where, by_pattern(call), told)[0]
    table, reach = table.to(q.dtype), table.shape[1] // 2
    parts = []
    most = table.detach().abs().amax(1, keepdim=True)
    kappa = ABOVE_LARGEST * torch.where(most > 0, most, 1)  # no gradient: O does not depend on kappa
    for sign in (1, -1):
        shares = (sign * table / kappa).log1p() - math.log(2)
        biased = DistanceBias(partial(_sum_by_distance, shares, told))
        output, lse = attend(q, k, v, where, Visibility(causal, reach - 1, reach - 1), biased)
        parts.append((output, lse, sign * kappa))
    far = Visibility(causal=True)
    if where.first is None or where.first + n > reach:
        # keys at or before the query's rank minus R are R or more before the query
        bias = None if told is None else DistanceBias(partial(_by_distance, told, 1, -reach))
        output, lse = attend(q, k, v, _moved_back(where, reach), far, bias)
        parts.append((output, lse, table[:, :1]))
    if not causal and m > reach:
        # the same from the other end
        bias = None if told is None else DistanceBias(partial(_by_distance, told, -1, reach))
        output, lse = attend(q.flip(2), k.flip(2), v.flip(2), _moved_back(_from_the_end(where, n, m), reach), far, bias)
        parts.append((output.flip(2), lse.flip(2), table[:, -1:]))
    return merge(*zip(*parts, strict=True))


def _sum_by_distance(
    table: Float[Tensor, "#h offsets"], told: DistanceBias | None, distances: Int[Tensor, "..."]
) -> Float[Tensor, "h ..."]:
    found = at_offsets(table, distances)
    return found if told is None else found + told.by_distance(distances)


def _by_distance(told: DistanceBias, sign: int, first: int, distances: Int[Tensor, "..."]) -> Float[Tensor, "h ..."]:
    return told.by_distance(first + sign * distances)


def _moved_back(where: Ranks, by: int) -> Ranks:
    """The ranks with query ranks reduced by `by`."""
    offset, first = (None if x is None else x - by for x in (where.offset, where.first))
    return Ranks(where.queries - by, where.keys, offset, first, where.plain)


def _from_the_end(where: Ranks, n: int, m: int) -> Ranks:
    """Ranks of reversed slots, counted down to 0 at rank m - 1, for `n` queries and `m` keys."""
    keys = torch.where(where.keys < 0, where.keys, m - 1 - where.keys)
    offset, first = (None if x is None else m - n - x for x in (where.offset, where.first))
    return Ranks((m - 1 - where.queries).flip(1), keys.flip(1), offset, first, where.plain)


def _explicitly(
    call: Call, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, where: Ranks, state: CountedState | None
) -> Result:
    """Compute explicit weights for blocks of queries, each with the keys that it may see."""
    batch, heads, n, _ = q.shape
    m, groups = k.shape[2], k.shape[1]
    queries, keys, values = call.scale * q, k.to(q.dtype), v.to(q.dtype)
    if groups < heads:
        keys, values = (x.repeat_interleave(heads // groups, 1) for x in (keys, values))
    step = min(n, max(1, NUMBERS_AT_ONCE // (batch * heads * m)))
    pieces = []
    for start in range(0, n, step):
        stop = min(start + step, n)
        last = m
        if where.offset is not None and call.pattern is Pattern.CAUSAL_SELF:
            last = max(1, min(m, stop + where.offset))
        tensors = queries[:, :, start:stop], keys[:, :, :last], values[:, :, :last]
        mix = _mixer(call, table, where, start, stop, last)
        again = step < n and torch.is_grad_enabled() and "weights" not in call.want
        output, *weights = checkpoint(mix, *tensors, use_reentrant=False) if again else mix(*tensors)
        pieces.append((output, *(F.pad(w, (0, m - last)) for w in weights)))
    output, *weights = (torch.cat(parts, 2).to(v.dtype) for parts in zip(*pieces, strict=True))
    return Result(output, state, extras=dict(zip(("weights", "softmax_weights"), weights, strict=False)))


def _mixer(
    call: Call, table: Tensor | None, where: Ranks, start: int, stop: int, last: int
) -> Callable[..., tuple[Tensor, ...]]:
    """Map queries start ... stop - 1 and the first `last` keys and values to outputs, and A' and A if requested."""
    here = Ranks(where.queries[:, start:stop], where.keys[:, :last], None, None, plain=False)
    bias = None if call.bias is None else _part(call.bias, start, stop, last)
    finite = call.bias is None and (call.position_bias is None or isinstance(call.position_bias, DistanceBias))
    everything = where.plain and call.pattern is not Pattern.CAUSAL_SELF and finite and call.blocks is None
    seed = None
    if call.generator is not None and call.dropout > 0:
        # a recomputed block must draw the same numbers
        seed = int(torch.randint(1 << 62, (), generator=call.generator, device=call.generator.device))

    def mix(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        visible, added = masked_scores_bias(here, by_pattern(call), bias, call.position_bias, call.blocks, q.dtype)
        scores = q @ k.mT
        scores = scores if added is None else scores + added
        some = visible.any(-1, keepdim=True)
        if not everything:
            scores = scores.masked_fill(~visible & some, -torch.inf)  # rows of only -inf have NaN gradients
        softmax = scores.softmax(-1)
        weights = softmax
        if table is not None:
            weights = softmax * _factors(call, table, where, here, start, stop, last).to(q.dtype)
        kept = weights
        if call.dropout > 0:
            generator = None if seed is None else torch.Generator(q.device).manual_seed(seed)
            keep = uniform(weights.shape, generator, device=q.device, dtype=q.dtype) >= call.dropout
            kept = weights * keep / (1 - call.dropout)
        output = (kept @ v).masked_fill(~some, 0)
        if "weights" not in call.want:
            return (output,)
        return output, weights.masked_fill(~some, 0), softmax.masked_fill(~some, 0)

    return mix


def _factors(
    call: Call, table: Tensor, where: Ranks, here: Ranks, start: int, stop: int, last: int
) -> Float[Tensor, "#b h n m"]:
    """C for one block of queries."""
    if table.ndim == 4:
        return _part(table, start, stop, last)
    if table.ndim == 2 and where.offset is not None:
        first = start + where.offset
        offsets = torch.arange(1 - first - (stop - start), last - first, device=table.device)
        return at_offsets(table, offsets).unfold(1, last, 1).flip(1)  # each query's row is a view
    return by_rank(call, table)(here.queries, here.keys)


def _part(x: Float[Tensor, "b h #n #m"], start: int, stop: int, last: int) -> Float[Tensor, "b h #rows #last"]:
    x = x[:, :, start:stop] if x.shape[2] > 1 else x
    return x[..., :last] if x.shape[3] > 1 else x
