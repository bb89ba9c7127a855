"""The fast forms of agent attention: parallel, chunked, and stepwise from a state."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    Call,
    Mask,
    Pattern,
    Result,
    Unsupported,
    valid_from_lengths,
)
from regard.core.grids import image_of
from regard.core.precision import wide, without_autocast
from regard.core.ragged import gathering, place_queries, take_queries
from regard.core.visibility import CountedRanks
from regard.engines import softmax_scan as scan
from regard.engines.attention import Visibility, attention
from regard.engines.recurrent_forms import length_after
from regard.engines.softmax_scan import ScanState
from regard.layers.grid_convolution import check_grid, leading, tokens_alone
from regard.mechanisms.agent.definition import agent_sides, check, drop, repeat_groups

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    agents: Float[Tensor, "h a d"] | None = None,
    gather_bias: Float[Tensor, "b h a m"] | None = None,
    share_bias: Float[Tensor, "b h n a"] | None = None,
    row_agents: Float[Tensor, "b h a d"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """Two softmax products; causal-self uses the chunked form."""
    if call.pattern is Pattern.CAUSAL_SELF:
        return chunked(call, q, k, v, agents, gather_bias, share_bias, row_agents).output
    a, exists = _agents(call, q, agents, row_agents)
    a = a.expand(q.shape[0], -1, -1, -1)
    gathered = _attend(call, a, _float(k), _float(v), call.scale, gather_bias, call.valid_keys(k.shape[2]))
    scale = call.scale**call.config.second_scale_exponent
    output = _attend(call, _float(q), a, gathered, scale, share_bias, exists)
    if call.config.k_shortcut:
        output = output + call.config.k_shortcut * repeat_groups(_float(v), q.shape[1])
    return output.to(v.dtype)


def _attend(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    scale: float,
    bias: Float[Tensor, "b h n m"] | None,
    visible: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n v"]:
    """Softmax attention to the visible keys, with a bias and the call's dropout of whole matrices of weights."""
    n, m = q.shape[2], k.shape[2]
    if call.dropout:
        scores = scale * q @ repeat_groups(k, q.shape[1]).mT
        weights = _softmax(scores if bias is None else scores + bias, visible)
        return drop(call, weights) @ repeat_groups(v, q.shape[1])
    if visible is not None:
        hidden = q.new_zeros(visible.shape).masked_fill(~visible, -torch.inf)[:, None, None]
        bias = hidden if bias is None else bias + hidden
    where = CountedRanks(n, m, m - n, True, q.device)
    return attention(q, k, v, where, visibility=Visibility(), scale=scale, bias=bias, backend=call.backend)[0]


def gathering_weights(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    agents: Float[Tensor, "h a d"] | None = None,
    gather_bias: Float[Tensor, "b h a m"] | None = None,
    row_agents: Float[Tensor, "b h a d"] | None = None,
) -> Float[Tensor, "b h a m"]:
    """The agents' weights over the keys. Noncausal only."""
    scores = _gather_scores(call, _agents(call, q, agents, row_agents)[0], k, gather_bias)
    return _softmax(scores, call.valid_keys(k.shape[2]))


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    agents: Float[Tensor, "h a d"] | None = None,
    gather_bias: Float[Tensor, "b h a m"] | None = None,
    share_bias: Float[Tensor, "b h n a"] | None = None,
    row_agents: Float[Tensor, "b h a d"] | None = None,
) -> Result:
    """Causal-self from state to state, for learned agents: a running softmax for each agent. Also the step."""
    check(call, agents, row_agents)
    assert agents is not None
    n, m = q.shape[2], k.shape[2]
    aligned = n == m and call.lengths is call.memory_lengths
    mix = _shares(call, q, _float(agents), share_bias)
    if not aligned:
        mix = place_queries(mix, m, call.lengths, call.memory_lengths)
    values = repeat_groups(_float(v), q.shape[1])
    output, carry = scan.softmax_scan(
        _hide_padding(call, _gather_scores(call, _float(agents), k, gather_bias)).mT,
        values,
        state=None if call.state is None else call.state.carry,
        mix=mix,
        chunk_size=call.chunk_size or 16,
        backend=call.backend,
    )
    if call.config.k_shortcut:
        output = output + call.config.k_shortcut * values
    if not aligned:
        output = take_queries(output, n, call.lengths, call.memory_lengths)
    return Result(output.to(v.dtype), ScanState(*carry, length_after(call, k)))


def absorb(
    call: Call,
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    agents: Float[Tensor, "h a d"] | None = None,
    gather_bias: Float[Tensor, "b h a m"] | None = None,
) -> ScanState:
    """Absorb memory into the running softmax of each learned agent; may be called repeatedly."""
    if agents is None:
        raise Unsupported(
            "absorbing memory with agents that are not learned, which need the queries first",
            supported="learned agents, or whole calls",
            nearest="agent_source='learned'",
        )
    check(call, agents, None)
    carry = scan.absorb(
        _hide_padding(call, _gather_scores(call, _float(agents), k, gather_bias)).mT,
        repeat_groups(v, agents.shape[0]),
        state=None if call.state is None else call.state.carry,
    )
    return ScanState(*carry, length_after(call, k))


def read(
    call: Call,
    q: Float[Tensor, "b h n d"],
    agents: Float[Tensor, "h a d"] | None = None,
    share_bias: Float[Tensor, "b h n a"] | None = None,
    row_agents: Float[Tensor, "b h a d"] | None = None,
) -> Result:
    """Read what the agents have gathered from the memory."""
    check(call, agents, row_agents)
    assert agents is not None
    gathered = scan.normalized(call.state.u, call.state.w)
    return Result((_shares(call, q, _float(agents), share_bias) @ gathered).to(q.dtype), call.state)


def _float(x: Tensor) -> Tensor:
    return wide(x)


def _softmax(scores: Float[Tensor, "b h n m"], visible: Bool[Tensor, "b m"] | None) -> Float[Tensor, "b h n m"]:
    """Softmax over the visible keys; 0 if there are none."""
    if visible is None:
        return scores.softmax(-1)
    seen = visible[:, None, None]
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.where(seen, weights, 0)


def _gather_scores(call: Call, agents: Tensor, k: Tensor, bias: Tensor | None) -> Float[Tensor, "b h a m"]:
    scores = (call.scale * agents) @ repeat_groups(_float(k), agents.shape[-3]).mT
    return scores if bias is None else scores + bias


def _hide_padding(call: Call, scores: Float[Tensor, "b h a m"]) -> Float[Tensor, "b h a m"]:
    valid = call.valid_keys(scores.shape[-1])
    return scores if valid is None else scores.masked_fill(~valid[:, None, None], -torch.inf)


def _shares(call: Call, q: Tensor, agents: Tensor, bias: Tensor | None) -> Float[Tensor, "b h n a"]:
    """Weights of learned agents, which all exist, in each query's output."""
    scores = (call.scale**call.config.second_scale_exponent * _float(q)) @ agents.mT
    return drop(call, (scores if bias is None else scores + bias).softmax(-1))


def _agents(
    call: Call, q: Tensor, agents: Tensor | None, row_agents: Tensor | None
) -> tuple[Float[Tensor, "... h a d"], Bool[Tensor, "b a"] | None]:
    """The agents, of all rows or each row, and which of them have a token (None: all)."""
    source = check(call, agents, row_agents)
    return (_float(agents), None) if agents is not None else _row_agents(call, source, q, row_agents)


def _row_agents(
    call: Call, source: str, q: Float[Tensor, "b h n d"], row_agents: Float[Tensor, "b h a d"] | None = None
) -> tuple[Float[Tensor, "b h a d"], Bool[Tensor, "b a"] | None]:
    """Agents of each row (means of its queries, unless given) and which of them have a token (None: all)."""
    number, n = call.config.num_agents if row_agents is None else row_agents.shape[2], q.shape[2]
    if source != "token_merge" and call.lengths is None and (first := leading(n, call.grid, call.roles)) is not None:
        sides = agent_sides(number, call.grid)
        return _pooled(_float(q)[:, :, first:], call.grid, sides) if row_agents is None else _float(row_agents), None
    tokens = tokens_alone(call.valid_queries(n), call.roles)
    if source == "token_merge":
        inside, all_exist = _merged(tokens, q, number), tokens is None and n >= number
    else:
        places, extents = _places(tokens, n, call.grid, q.device, padded=call.lengths is not None)
        inside, all_exist = _bins(agent_sides(number, call.grid), places, extents, tokens), tokens is None
    counts = inside.sum(-1)
    exists = None if all_exist else counts > 0
    if row_agents is not None:
        return _float(row_agents), exists
    x = _float(q)
    return (inside.to(x.dtype) / counts.clamp(min=1)[..., None])[:, None] @ x, exists


def _pooled(
    x: Float[Tensor, "b h n d"], grid: tuple[int, ...] | None, sides: tuple[int, ...]
) -> Float[Tensor, "b h a d"]:
    """Means over the bins of adaptive pooling (see :func:`_bins`), for a grid that the tokens fill."""
    # channels-last, as layers lay out their heads, is the layout in which pooling is fastest
    maps = image_of(x.transpose(1, 2).flatten(2), grid or (x.shape[2],))
    pooled = F.adaptive_avg_pool2d(maps, sides) if len(sides) == 2 else F.adaptive_avg_pool1d(maps, sides[0])
    return pooled.flatten(2).unflatten(1, (x.shape[1], x.shape[3])).mT


def _bins(
    sides: tuple[int, ...],
    places: list[Int[Tensor, "#b n"]],
    extents: list[Int[Tensor, "#b 1"]],
    tokens: Bool[Tensor, "b n"] | None,
) -> Bool[Tensor, "#b a n"]:
    """Mask of the tokens in each bin: bin i of c holds places floor(i L / c) to ceil((i + 1) L / c) - 1 of a side L."""
    inside = None
    for count, place, extent in zip(sides, places, extents, strict=True):
        i = torch.arange(count, device=place.device)
        start, stop = (i * extent) // count, -((-(i + 1) * extent) // count)
        member = (place[:, None] >= start[..., None]) & (place[:, None] < stop[..., None])
        inside = member if inside is None else (inside[:, :, None] & member[:, None]).flatten(1, 2)
    assert inside is not None
    return inside if tokens is None else inside & tokens[:, None]


@torch.no_grad()
def _merged(tokens: Bool[Tensor, "b n"] | None, q: Float[Tensor, "b h n d"], number: int) -> Bool[Tensor, "b a n"]:
    """Mask of the tokens in each agent after rounds of bipartite merging down to `number`."""
    batch, _, n, _ = q.shape
    if isinstance(n, torch.SymInt):
        raise Unsupported(
            "a program for every length of agent with agent_source='token_merge' (its rounds of merging are fixed when "
            "the program is compiled)",
            supported="one length",
            nearest="lengths=False",
        )
    layout = gathering(None if tokens is None else Mask(valid=tokens), batch, n, q.device)
    # the cosine of two means is that of their sums, so sizes need not be carried along
    sums = layout.gather(_float(q).transpose(1, 2).flatten(2), axis=1)
    left = torch.full((batch,), n, device=q.device) if layout.lengths is None else layout.lengths
    group = torch.arange(n, device=q.device).expand(batch, n)
    for width, after in itertools.pairwise(_widths(n, number)):
        there = valid_from_lengths(left, width)
        unit = F.normalize(sums, dim=-1)
        with without_autocast(q.device):
            cosines = unit[:, 0::2] @ unit[:, 1::2].mT
        best, link = cosines.masked_fill(~there[:, None, 1::2], -torch.inf).max(-1)
        order = best.masked_fill(~there[:, 0::2], -torch.inf).argsort(dim=-1, descending=True, stable=True)
        gone_now = torch.minimum(left // 2, (left - number).clamp(min=0))
        gone = order.argsort(-1) < gone_now[:, None]
        target = torch.arange(width, device=q.device).repeat(batch, 1)
        target[:, 0::2] = torch.where(gone, 2 * link + 1, target[:, 0::2])
        kept = there.clone()
        kept[:, 0::2] &= ~gone
        place = (kept.cumsum(-1) - 1).clamp(min=0).gather(1, target)
        sums = sums.new_zeros(batch, after, sums.shape[-1]).scatter_add(1, place[..., None].expand_as(sums), sums)
        group, left = place.gather(1, group), left - gone_now
    inside = group[..., None] == torch.arange(number, device=q.device)
    return layout.scatter(inside, axis=1).mT


def _widths(n: int, number: int) -> list[int]:
    """Number of tokens before each round of merging down to `number`, and after the last."""
    widths = [n]
    while widths[-1] > number:
        widths.append(max(-(-widths[-1] // 2), number))
    return widths


def _places(
    tokens: Bool[Tensor, "b n"] | None, n: int, grid: tuple[int, ...] | None, device: torch.device, *, padded: bool
) -> tuple[list[Int[Tensor, "#b n"]], list[Int[Tensor, "#b 1"]]]:
    """Each token's coordinate along each side of its grid, and the lengths of the sides; a sequence has one side."""
    if tokens is None:
        rank = torch.arange(n, device=device)[None]
        counted = torch.full((1, 1), n, device="cpu")
        total = torch.full((1, 1), n, device=device)
    else:
        rank = tokens.cumsum(-1) - 1
        counted = total = tokens.sum(-1, keepdim=True)
    if grid is None:
        return [rank], [total]
    check_grid(grid, counted, padded=padded)
    places = [rank // math.prod(grid[axis + 1 :]) % side for axis, side in enumerate(grid)]
    return places, [torch.full_like(total, side) for side in grid]
