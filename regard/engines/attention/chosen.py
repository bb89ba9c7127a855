"""Attention in which each token is a query only in the heads that it has chosen.

Scores and weights, the part of a head's work that grows quadratically, are only computed for the tokens that chose it.
Heads that share keys are processed together, token by token, so that a tile of queries sees nearly the same keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.core.ragged import values_known
from regard.core.visibility import Ranks, Visibility

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Int

    Attend = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]


def attend_in_chosen(
    attend: Attend,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    ranks: Ranks,
    chosen: Bool[Tensor, "b h n"],
    *,
    visibility: Visibility,
    **options: Any,
) -> tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h n m"] | None, Float[Tensor, "b h n"] | None]:
    """`attend` (:func:`regard.engines.attention.attention`) with outputs of 0, and log-sum-exps of -inf, for queries
    not chosen.

    With options that differ between heads, and if weights, their dropout or the log-sum-exp are requested, all queries
    are computed and those not chosen are hidden afterwards.
    """
    if not (values_known(chosen) and _alike_in_all_heads(options)):
        output, weights, lse = attend(q, k, v, ranks, visibility=visibility, **options)
        hidden = ~chosen[..., None]
        return (
            output.masked_fill(hidden, 0),
            None if weights is None else weights.masked_fill(hidden, 0),
            None if lse is None else lse.masked_fill(hidden[..., 0], -torch.inf),
        )
    batch, heads, n, width = q.shape
    groups = k.shape[1]
    shared = heads // groups
    by_token = q.transpose(1, 2).reshape(-1, width)  # (b n h, d): the heads of a token side by side
    asked = chosen.transpose(1, 2).unflatten(2, (groups, shared))  # (b, n, g, h / g)
    places, found = [], []
    for group in range(groups):
        at = asked[:, :, group].flatten().nonzero()[:, 0]
        if not len(at):
            continue
        place = at.div(shared, rounding_mode="floor") * heads + group * shared + at % shared
        own, token, slot = _in_rows(by_token.index_select(0, place), at, asked[:, :, group].sum((1, 2)), shared * n)
        token = token.div(shared, rounding_mode="floor")
        queries = ranks.queries.expand(batch, -1).gather(1, token)
        where = Ranks(queries, ranks.keys, None, None, plain=False)
        read, _, _ = attend(own[:, None], k[:, group, None], v[:, group, None], where, visibility=visibility, **options)
        read = read[:, 0].flatten(0, 1)
        places.append(place)
        found.append(read if slot is None else read.index_select(0, slot))
    output = v.new_zeros(batch * n * heads, v.shape[3])
    if places:
        output = output.index_copy(0, torch.cat(places), torch.cat(found))
    return output.view(batch, n, heads, -1).transpose(1, 2), None, None


def _alike_in_all_heads(options: dict[str, Any]) -> bool:
    tensors = ("sink", "bias", "position_bias", "blocks")
    asked = ("dropout", "want_weights", "want_lse")
    return all(options.get(name) is None for name in tensors) and not any(options.get(name) for name in asked)


def _in_rows(
    q: Float[Tensor, "chosen d"], place: Int[Tensor, " chosen"], counts: Int[Tensor, " b"], n: int
) -> tuple[Float[Tensor, "b most d"], Int[Tensor, "b most"], Int[Tensor, " chosen"] | None]:
    """Pad the queries of each batch row to a common number; also return their indices in the row (of `n`), and the flat
    slot of each query, None if there is no padding."""
    batch = len(counts)
    most = len(place) if batch == 1 else int(counts.max())
    if batch * most == len(place):
        return q.view(batch, most, -1), (place % n).view(batch, most), None
    row = place.div(n, rounding_mode="floor")
    slot = row * most + torch.arange(len(place), device=place.device) - (counts.cumsum(0) - counts)[row]
    padded = q.new_zeros(batch * most, q.shape[-1]).index_copy(0, slot, q)
    tokens = place.new_zeros(batch * most).index_copy(0, slot, place % n)
    return padded.view(batch, most, -1), tokens.view(batch, most), slot
