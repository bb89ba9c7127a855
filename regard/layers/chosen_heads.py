"""Softmax attention of which each token is a query only in the heads that it chose.

Of a head's work the scores and weights, which grow with the square of the tokens, are computed for the tokens that chose it.
Queries are projected for all heads at once and outputs back at once: one large product takes less time than a small one for
each head, of tokens that have to be gathered first. Keys and values are of all tokens, since any query may read them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.contract import Context, Pattern, Result, Unsupported
from regard.engines.attention import Ranks, Visibility, attention
from regard.layers.attention import AttentionLayer
from regard.layers.checks import check_memory, check_tokens

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Gates = Callable[["Tensor | None", "Tensor", "Tensor | None", Result], Tensor]
"""``gates(q, x, lengths, result) -> (B, N, H)``, 0 where a head is not chosen; q (B, H, N, D) when it asks for queries."""


def check_choosable(layer: AttentionLayer) -> None:
    """Raise Unsupported for a layer whose heads cannot be computed for some of the tokens alone."""
    dense = isinstance(layer.query, nn.Linear) and isinstance(layer.output, nn.Linear)
    for what, found in (
        (layer.card.name, layer.card.name != "softmax"),
        ("options of softmax", layer.config != layer.card.options()),
        ("positions that bias scores", layer.positions.bias is not None),
        ("short convolutions", bool(layer.convolutions)),
        ("an output norm or gate", layer.output_norm is not None or layer.gate is not None),
        ("projections that are not dense", not dense),
        ("dropout of weights", layer.dropout > 0),
    ):
        if found:
            raise Unsupported(
                f'compute="gather" with {what}', supported="plain softmax attention", nearest='compute="dense"'
            )


def attend_in_chosen_heads(
    layer: AttentionLayer, x: Tensor, memory: Tensor | None, context: Context, gates_of: Gates, *, needs_queries: bool
) -> Result:
    """As `layer` with its head outputs times gates; arguments as of its call without a state.

    Args:
        gates_of: makes the gates, and adds losses and extras to the result.
        needs_queries: whether it is given the queries of all heads.

    Raises:
        Unsupported: for a bias or a block mask.
    """
    check_memory(layer.pattern, memory, context, None)
    check_tokens(x, layer.dim)
    mask = context.mask
    if mask is not None and (mask.bias is not None or mask.blocks is not None):
        raise Unsupported('a bias or a block mask with compute="gather"', supported='compute="dense"')
    side = layer.side(x, mask, context.positions, context)
    x, layout, where, losses = side
    source, source_layout, source_where, _ = side if memory is None else layer.memory_side(memory, context)
    assert layer.query is not None
    queries = layer._norm(layer.query_norm, layer._heads(layer.query, x, 0, layer.num_heads, None, []))
    heads = {"q": queries}
    layer._memory_heads(heads, source, source_layout.lengths, [])
    heads = layer._rotate(heads, where, source_where)
    result = Result(x, losses=dict(losses))
    gates = gates_of(queries if needs_queries else None, x, layout.lengths, result)  # (B, N, H)
    chosen = gates != 0
    if layout.lengths is not None:
        chosen = chosen & (torch.arange(x.shape[1], device=x.device) < layout.lengths[:, None])[..., None]
    slots = torch.arange(source.shape[1], device=x.device)[None]
    keys = slots if source_layout.lengths is None else torch.where(slots < source_layout.lengths[:, None], slots, -1)
    batch, n, _ = x.shape
    shares, parts = gates.flatten(0, 1), []  # all tokens of the batch in one row
    counts = chosen.sum(1)  # (B, H)
    places = chosen.flatten(0, 1).mT.nonzero()[:, 1].split(counts.sum(0).tolist())
    for head, place in enumerate(places):
        nothing = shares.new_zeros(batch * n, layer.value_dim, dtype=x.dtype)
        if not len(place):
            parts.append(nothing)
            continue
        own = heads["q"][:, head].flatten(0, 1)
        q, tokens, slot = _in_rows(own.index_select(0, place), place, counts[:, head], n)
        group = head // (layer.num_heads // layer.kv_heads)
        found, _, _ = attention(
            q[:, None],
            heads["k"][:, group, None],
            heads["v"][:, group, None],
            Ranks(tokens, keys, None, None, plain=False),
            visibility=Visibility(causal=layer.pattern is Pattern.CAUSAL_SELF),
            scale=layer.head_dim**-0.5,
        )
        found = found[:, 0].flatten(0, 1)
        found = found if slot is None else found.index_select(0, slot)
        found = found * shares[:, head].index_select(0, place)[:, None].to(found.dtype)
        parts.append(nothing.index_copy(0, place, found.to(x.dtype)))
    result.output = layout.scatter(layer.output(torch.cat(parts, -1).view(batch, n, -1)), axis=1)
    return result


def _in_rows(
    q: Float[Tensor, "chosen d"], place: Int[Tensor, " chosen"], counts: Int[Tensor, " b"], n: int
) -> tuple[Float[Tensor, "b most d"], Int[Tensor, "b most"], Int[Tensor, " chosen"] | None]:
    """Queries of a batch in a row each, right-padded; their tokens' numbers; and where each is in the flat result, None
    where there is no padding."""
    batch, most = len(counts), int(counts.max())
    if batch * most == len(place):
        return q.view(batch, most, -1), (place % n).view(batch, most), None
    row = place // n
    slot = row * most + torch.arange(len(place), device=place.device) - (counts.cumsum(0) - counts)[row]
    padded = q.new_zeros(batch * most, q.shape[-1]).index_copy(0, slot, q)
    tokens = place.new_zeros(batch * most).index_copy(0, slot, place % n)
    return padded.view(batch, most, -1), tokens.view(batch, most), slot
