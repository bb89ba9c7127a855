r"""Agent attention: a few agent tokens gather from all keys by softmax, and every query reads from the agents by softmax.

When to pick it: images and other long noncausal inputs, for a global view at linear cost with softmax weights in both
steps.
When not: exact recall through few agents (the weight matrix has at most the rank of their number), or very short inputs.

Definition (Han et al., arXiv 2312.08874, equations 4-7), s the scale, A the n agents:

    V_A = softmax(s A K^T + B_1) V,   O = softmax(s^p Q A^T + B_2) V_A + k_shortcut V,   layer: W_o (O + DWC(V))

| paper | here |
|---|---|
| A: average pooling of Q | `agent_source="pool_q"`: adaptive pooling over valid ranks, or over `grid`, per row |
| any other down-sampling of the tokens | `agent_source`: ``conv`` (strided convolution of x), ``token_merge`` (of Q) |
| n (agent_num) | `num_agents`; on a grid of two sides a square, but for ``token_merge`` |
| B_1, B_2 (agent bias) | `gather_bias` (B, H, n, M), `share_bias` (B, H, N, n); `agent_bias` of the layer makes them |
| their 7 x 7 tables, row and column terms, class token's | `projection.gather_bias`, `projection.share_bias`: `block`, `rows`, `columns`, `other` |
| DWC, 3 x 3 depthwise | `dwc` of the layer: `merge.convolution`; without `grid` a sequence is a grid of one row |
| k2 = 0.3, k_shortcut = 0.075 (AgentSD) | `second_scale_exponent` (p), `k_shortcut`; 1 and 0 by default |

Layout: q (B, H, N, D), k and v (B, G, M, D), agents (H, n, D) for learned agents and row_agents (B, H, n, D) for those that
a layer convolves (one row of them for all packed documents), both of which then have their own number.
Learned agents (not in the paper) exist in all four patterns. In causal-self step 1 is a running softmax over the keys for
each agent, with a state of n (m, u) and n vectors a head; in cross patterns memory streams into the same state. All
others look at the whole sequence of the queries, so they exist in noncausal patterns only, and cannot absorb memory before
the queries come.
With a grid the valid tokens of a row fill it row by row; tokens whose role is not TOKEN (a class token) are keys and
queries but are neither pooled, convolved nor merged. Places of a grid without a token belong to no agent.

``conv``: for s the `conv_stride`, x is averaged over s times as many adaptive bins along each side as there are agents, and
a depthwise convolution of kernel and stride s, then a linear map, makes an agent of each s x s bins. So there are exactly n
on any length or grid, and where the sides are s times the agents' it is an ordinary strided convolution. Bins without a
token count as zeros; an agent exists where one of its bins has a token. A sequence is a grid of one row, which all s rows
of bins then read. Position schemes that rotate queries do not rotate these agents, nor learned ones.
``token_merge`` (bipartite matching of ToMe, Bolya et al., arXiv 2210.09461, section 3): in each round the tokens go by turns
into two sets, each of the first links to the one of the second with the greatest cosine of their queries (of all heads
together), and the r links of greatest cosine merge theirs, r such that no more than n are left and at most half go. A merged
token is the mean of all its tokens (so two are weighed by their sizes) and takes the place of the one linked to; the order
is kept. The agents are those left: fewer than n when a row has fewer tokens. Choosing has no gradient, and costs a quarter
of N^2 cosines in the first round. Unlike ToMe's own, it compares queries, not keys, and the sizes do not enter the softmax.

The bias of a token is the 7 x 7 table of each agent, read bilinearly (pixel centres, borders repeated) at its place on the
grid, plus a term of its row and one of its column; a token off the grid has one number. The row and column terms are
stored for `bias_grid` and read linearly on other grids; a sequence without `grid` is a grid of one row, of its own length.
Deviations: the agent bias is off unless `agent_bias` says so. Pooling is done after the head split, which is the same, since it is linear in
every channel. Dropout falls on both weight matrices as in the paper, but a running softmax (causal-self, absorbed memory)
keeps all its weights, and there only those of the queries are dropped. DWC exists in noncausal-self only.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Context,
    Cost,
    Kind,
    LayerSpec,
    Mask,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Role,
    Shape,
    Tensors,
    Unsupported,
    Waiver,
    at_least,
    one_of,
    valid_from_lengths,
)
from regard.core.precision import wide, without_autocast
from regard.core.ragged import gathering, place_queries, take_queries
from regard.core.sampling import attention_shapes, normals
from regard.engines import softmax_scan as scan
from regard.engines.grouped_attention import Dropout
from regard.engines.recurrent_forms import length_after
from regard.engines.softmax_scan import ScanState
from regard.layers.parts import LayerCall, Merge, Projection

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        num_agents: agents that are pooled, convolved or left by merging, or that the layer learns; >= 1. Agents given as a
            tensor count themselves.
        agent_source: ``pool_q`` (means of queries over bins), ``learned``, ``conv`` (a strided convolution of the layer's
            input; a function is given its `row_agents`), ``token_merge`` (means of similar queries), or ``auto``: as a
            function learned when `agents` are given, of ``conv`` when `row_agents` are, else pooled; in a layer pooled in
            noncausal-self, learned elsewhere (where they keep a state). Causal patterns have learned agents only.
        conv_stride: of the layer, of ``conv``: kernel and stride, in bins along each side; >= 1.
        second_scale_exponent: p, the power of the scale that multiplies the queries; > 0.
        k_shortcut: weight of each token's own value added to its output; 0 in cross patterns.
        agent_bias: of the layer, in noncausal-self: ``none``, ``block`` (the 7 x 7 tables), ``lines`` (rows and columns) or
            ``all``.
        bias_grid: rows and columns that ``lines`` and ``all`` have a number for.
        dwc: of the layer: depthwise convolution on ``value`` or ``input``, ``none``, or ``auto``: on the values in
            noncausal-self, none elsewhere.
    """

    num_agents: int = 49
    agent_source: str = "auto"
    conv_stride: int = 2
    second_scale_exponent: float = 1.0
    k_shortcut: float = 0.0
    dwc: str = "auto"
    agent_bias: str = "none"
    bias_grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        at_least("num_agents", self.num_agents, 1)
        one_of("agent_source", self.agent_source, ("auto", "pool_q", "learned", "conv", "token_merge"))
        at_least("conv_stride", self.conv_stride, 1)
        if self.conv_stride != 2 and self.agent_source != "conv":
            raise Unsupported(
                f"conv_stride={self.conv_stride} with agent_source={self.agent_source!r}",
                supported="agent_source='conv'",
                nearest="conv_stride=2",
            )
        one_of("dwc", self.dwc, ("auto", "value", "input", "none"))
        one_of("agent_bias", self.agent_bias, ("none", "block", "lines", "all"))
        if self.bias_grid is not None:
            object.__setattr__(self, "bias_grid", tuple(self.bias_grid))
        lines = self.agent_bias in ("lines", "all")
        if lines != (self.bias_grid is not None) or (
            lines and (len(self.bias_grid or ()) != 2 or min(self.bias_grid or (0,)) < 1)
        ):
            raise Unsupported(
                f"bias_grid={self.bias_grid} with agent_bias={self.agent_bias!r}",
                supported="(rows, columns) with agent_bias lines or all, None without",
                nearest="bias_grid=(14, 14)" if lines else "bias_grid=None",
            )
        if not self.second_scale_exponent > 0:
            raise Unsupported(
                f"second_scale_exponent={self.second_scale_exponent}",
                supported="> 0",
                nearest="second_scale_exponent=1.0",
            )


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    agents: Float[Tensor, "h a d"] | None = None,
    gather_bias: Float[Tensor, "b h a m"] | None = None,
    share_bias: Float[Tensor, "b h n a"] | None = None,
    row_agents: Float[Tensor, "b h a d"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition; in causal-self every query reads agents that have gathered from its own prefix."""
    source = _check(call, agents, row_agents)
    k, v, n, m = _repeat_groups(k, q.shape[1]), _repeat_groups(v, q.shape[1]), q.shape[2], k.shape[2]
    given = agents if row_agents is None else row_agents
    number = call.config.num_agents if given is None else given.shape[-2]
    running = call.pattern is Pattern.CAUSAL_SELF
    gather_kept = _drop(call, q.new_ones(*q.shape[:2], number, 0 if running else m))
    share_kept = _drop(call, q.new_ones(*q.shape[:3], number))
    rows = []
    for row in range(q.shape[0]):
        a = _agents_of_row(call, source, q[row], row, row_agents) if agents is None else agents
        count = a.shape[1]
        first = (call.scale * a) @ k[row].mT
        second = (call.scale**call.config.second_scale_exponent * q[row]) @ a.mT
        first = first if gather_bias is None else first + gather_bias[row, :, :count]
        second = second if share_bias is None else second + share_bias[row, ..., :count]
        outputs = []
        for t in range(n):
            seen = max(t + m - n + 1, 0) if running else m
            weights = first[..., :seen].softmax(-1)
            weights = weights if running else weights * gather_kept[row, :, :count]
            shares = second[:, t, None].softmax(-1) * share_kept[row, :, t, None, :count]
            output = shares @ (weights @ v[row, :, :seen])
            if call.config.k_shortcut and seen:
                output = output + call.config.k_shortcut * v[row, :, t + m - n, None]
            outputs.append(output)
        rows.append(torch.cat(outputs, 1) if outputs else v.new_zeros(q.shape[1], 0, v.shape[-1]))
    return torch.stack(rows) if rows else v.new_zeros(*q.shape[:3], v.shape[-1])


def _agents_of_row(
    call: Call, source: str, q: Float[Tensor, "h n d"], row: int, row_agents: Float[Tensor, "b h a d"] | None
) -> Float[Tensor, "h a d"]:
    """Agents of one row's tokens; none when it has no token."""
    tokens, number = q if call.roles is None else q[:, call.roles[row] == Role.TOKEN], call.config.num_agents
    if tokens.shape[1] == 0:
        return tokens
    if row_agents is not None:
        return row_agents[row]
    if source == "token_merge":
        return _merge_reference(tokens, number)
    if call.grid is None or len(call.grid) == 1:
        return F.adaptive_avg_pool1d(tokens.mT, number).mT
    sides = _agent_sides(number, call.grid)
    return F.adaptive_avg_pool2d(tokens.mT.unflatten(-1, call.grid), sides[0]).flatten(2).mT


def _merge_reference(tokens: Float[Tensor, "h l d"], number: int) -> Float[Tensor, "h a d"]:
    groups = [[token] for token in range(tokens.shape[1])]
    while len(groups) > number:
        means = [tokens.detach()[:, group].mean(1).flatten() for group in groups]
        links = []
        for i in range(0, len(groups), 2):
            cosines = {j: float(F.cosine_similarity(means[i], means[j], 0)) for j in range(1, len(groups), 2)}
            j = max(cosines, key=cosines.__getitem__)
            links.append((cosines[j], i, j))
        links.sort(key=lambda link: -link[0])
        gone = links[: min(len(groups) // 2, len(groups) - number)]
        for _, i, j in gone:
            groups[j] += groups[i]
        groups = [group for i, group in enumerate(groups) if i not in {i for _, i, _ in gone}]
    return torch.stack([tokens[:, group].mean(1) for group in groups], 1)


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
    """Two softmax products; causal-self: the chunked form."""
    if call.pattern is Pattern.CAUSAL_SELF:
        return chunked(call, q, k, v, agents, gather_bias, share_bias, row_agents).output
    source = _check(call, agents, row_agents)
    a, exists = (_float(agents), None) if agents is not None else _row_agents(call, source, q, row_agents)
    valid = call.valid_keys(k.shape[2])
    weights = _softmax(_gather_scores(call, a, k, gather_bias), None if valid is None else valid[:, None, None])
    values = _repeat_groups(_float(v), q.shape[1])
    gathered = _drop(call, weights) @ values
    output = _shares(call, q, a, exists, share_bias) @ gathered
    if call.config.k_shortcut:
        output = output + call.config.k_shortcut * values
    return output.to(v.dtype)


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
    """Causal-self with state in and out, for learned agents: a running softmax for each agent. Also the step."""
    _check(call, agents, row_agents)
    assert agents is not None
    n, m = q.shape[2], k.shape[2]
    aligned = n == m and call.lengths is call.memory_lengths
    mix = _shares(call, q, _float(agents), None, share_bias)
    if not aligned:
        mix = place_queries(mix, m, call.lengths, call.memory_lengths)
    values = _repeat_groups(_float(v), q.shape[1])
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
    """Memory into the running softmax of each learned agent; more may follow."""
    if agents is None:
        raise Unsupported(
            "absorbing memory with agents that are not learned, which need the queries first",
            supported="learned agents, or whole calls",
            nearest="agent_source='learned'",
        )
    _check(call, agents, None)
    carry = scan.absorb(
        _hide_padding(call, _gather_scores(call, _float(agents), k, gather_bias)).mT,
        _repeat_groups(v, agents.shape[0]),
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
    """Queries on what the agents have gathered."""
    _check(call, agents, row_agents)
    assert agents is not None
    gathered = scan.normalized(call.state.u, call.state.w)
    return Result((_shares(call, q, _float(agents), None, share_bias) @ gathered).to(q.dtype), call.state)


def _check(call: Call, agents: Tensor | None, row_agents: Tensor | None) -> str:
    """The source of the agents; refuses what it cannot do in this pattern."""
    config, pattern, source = call.config, call.pattern, call.config.agent_source
    if source == "auto":
        source = "learned" if agents is not None else "pool_q" if row_agents is None else "conv"
    if source != "learned" and (pattern.causal or call.state is not None):
        raise Unsupported(
            f"{source} agents in {pattern.value}" + ("" if pattern.causal else " with a state"),
            supported="learned agents (H, n, D) there; all others in noncausal patterns, without a state",
            nearest="agent_source='learned' and agents=...",
        )
    for name, given, of in (("agents", agents, "learned"), ("row_agents", row_agents, "conv")):
        if given is not None and source != of:
            raise Unsupported(
                f"{name} beside agent_source={source!r}", supported="one of them", nearest=f"agent_source={of!r}"
            )
        if given is None and source == of:
            axes = "(H, n, D)" if of == "learned" else "(B, H, n, D), which the layer makes"
            raise Unsupported(f"agent_source={of!r} without {name}", supported=f"{name} {axes}", nearest="pool_q")
    if call.scale <= 0 and config.second_scale_exponent != 1.0:
        raise Unsupported(
            f"a power of the scale {call.scale}", supported="scale > 0", nearest="second_scale_exponent=1.0"
        )
    if config.k_shortcut and pattern.cross:
        raise Unsupported(f"k_shortcut in {pattern.value}", supported="self patterns", nearest="k_shortcut=0.0")
    if call.roles is not None and pattern is not Pattern.NONCAUSAL_SELF:
        raise Unsupported(f"agent with roles in {pattern.value}", supported="noncausal-self", nearest="roles=None")
    return source


def _drop(call: Call, weights: Tensor) -> Tensor:
    return Dropout(call.dropout, generator=call.generator).of_weights(weights)


def _float(x: Tensor) -> Tensor:
    return wide(x)


def _repeat_groups(x: Float[Tensor, "b g m d"], heads: int) -> Float[Tensor, "b h m d"]:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _softmax(scores: Tensor, visible: Bool[Tensor, "..."] | None) -> Tensor:
    """Over visible entries of the last axis; 0 where there are none."""
    if visible is None:
        return scores.softmax(-1)
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.where(visible, weights, 0)


def _gather_scores(call: Call, agents: Tensor, k: Tensor, bias: Tensor | None) -> Float[Tensor, "b h a m"]:
    scores = (call.scale * agents) @ _repeat_groups(_float(k), agents.shape[-3]).mT
    return scores if bias is None else scores + bias


def _hide_padding(call: Call, scores: Float[Tensor, "b h a m"]) -> Float[Tensor, "b h a m"]:
    valid = call.valid_keys(scores.shape[-1])
    return scores if valid is None else scores.masked_fill(~valid[:, None, None], -torch.inf)


def _shares(
    call: Call, q: Tensor, agents: Tensor, exists: Bool[Tensor, "b a"] | None, bias: Tensor | None
) -> Float[Tensor, "b h n a"]:
    """Weights of the agents in each query's output."""
    scores = (call.scale**call.config.second_scale_exponent * _float(q)) @ agents.mT
    scores = scores if bias is None else scores + bias
    return _drop(call, _softmax(scores, None if exists is None else exists[:, None, None]))


def _agent_sides(number: int, grid: tuple[int, ...] | None) -> tuple[int, ...]:
    """Agents along each side of the grid; a sequence is a grid of one side."""
    axes = 1 if grid is None else len(grid)
    side = round(number ** (1 / axes))
    if axes > 2 or side**axes != number:
        raise Unsupported(
            f"{number} pooled or convolved agents on a grid {tuple(grid or ())}",
            supported="a square number on a grid of two sides",
            nearest=f"num_agents={side**2}",
        )
    return (side,) * axes


def _row_agents(
    call: Call, source: str, q: Float[Tensor, "b h n d"], row_agents: Float[Tensor, "b h a d"] | None = None
) -> tuple[Float[Tensor, "b h a d"], Bool[Tensor, "b a"] | None]:
    """Agents of each row, which are means of its queries unless given, and which of them have a token (None: all)."""
    number, n = call.config.num_agents if row_agents is None else row_agents.shape[2], q.shape[2]
    tokens = _tokens(call.valid_queries(n), call.roles)
    if source == "token_merge":
        inside, all_exist = _merged(tokens, q, number), tokens is None and n >= number
    else:
        places, extents = _places(tokens, n, call.grid, q.device, padded=call.lengths is not None)
        inside, all_exist = _bins(_agent_sides(number, call.grid), places, extents, tokens), tokens is None
    counts = inside.sum(-1)
    exists = None if all_exist else counts > 0
    if row_agents is not None:
        return _float(row_agents), exists
    x = _float(q)
    return (inside.to(x.dtype) / counts.clamp(min=1)[..., None])[:, None] @ x, exists


def _bins(
    sides: tuple[int, ...],
    places: list[Int[Tensor, "#b n"]],
    extents: list[Int[Tensor, "#b 1"]],
    tokens: Bool[Tensor, "b n"] | None,
) -> Bool[Tensor, "#b a n"]:
    """Which tokens each bin holds: bin i of c holds places floor(i L / c) to ceil((i + 1) L / c) - 1 of a side L."""
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
    """Which tokens each agent holds after rounds of bipartite merging down to `number`."""
    batch, _, n, _ = q.shape
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
    """Tokens before each round of merging down to `number`, and after the last."""
    widths = [n]
    while widths[-1] > number:
        widths.append(max(-(-widths[-1] // 2), number))
    return widths


def _places(
    tokens: Bool[Tensor, "b n"] | None, n: int, grid: tuple[int, ...] | None, device: torch.device, *, padded: bool
) -> tuple[list[Int[Tensor, "#b n"]], list[Int[Tensor, "#b 1"]]]:
    """Where each token lies along each side of its grid, and how long the sides are; a sequence is a grid of one side."""
    if tokens is None:
        rank = torch.arange(n, device=device)[None]
        total = torch.full((1, 1), n, device=device)
    else:
        rank, total = tokens.cumsum(-1) - 1, tokens.sum(-1, keepdim=True)
    if grid is None:
        return [rank], [total]
    _check_grid(grid, total, padded=padded)
    places = [rank // math.prod(grid[axis + 1 :]) % side for axis, side in enumerate(grid)]
    return places, [torch.full_like(total, side) for side in grid]


def _with_one_row(places: list[Tensor], extents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """A sequence as a grid of one row."""
    return [torch.zeros_like(places[0]), *places], [torch.ones_like(extents[0]), *extents]


def _tokens(valid: Bool[Tensor, "b n"] | None, roles: Int[Tensor, "b n"] | None) -> Bool[Tensor, "b n"] | None:
    """Tokens that lie on the grid; None when all do."""
    if roles is None:
        return valid
    return roles == Role.TOKEN if valid is None else valid & (roles == Role.TOKEN)


def _check_grid(grid: tuple[int, ...], total: Int[Tensor, "#b 1"], *, padded: bool) -> None:
    """Raise Unsupported unless each row's tokens fill the grid (a padded row: at most fill it). Not checked in a graph."""
    if torch.compiler.is_compiling() or total.numel() == 0:
        return
    least, most, places = int(total.min()), int(total.max()), math.prod(grid)
    if most > places or (least < places and not padded):
        raise Unsupported(
            f"a grid {tuple(grid)} of {least if most <= places else most} tokens", supported=f"{places} tokens"
        )


BLOCK = 7
"""Rows and columns of an agent's table of biases."""


class BiasTables(nn.Module):
    """Numbers of each head and agent, from which the bias of a place on the grid is read.

    Args:
        heads, agents: how many.
        kind: ``block``, ``lines`` or ``all``.
        grid: rows and columns of ``lines``.
    """

    def __init__(self, heads: int, agents: int, kind: str, grid: tuple[int, int] | None) -> None:
        super().__init__()

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, agents, *shape), std=0.02))

        self.block = None if kind == "lines" else table(BLOCK, BLOCK)
        self.rows = None if grid is None else table(grid[0])
        self.columns = None if grid is None else table(grid[1])
        self.other = table()

    def forward(
        self, places: list[Int[Tensor, "#b n"]], extents: list[Int[Tensor, "#b 1"]], off: Bool[Tensor, "#b n"]
    ) -> Float[Tensor, "b h a n"]:
        """The bias of each token: at its place, and for one off the grid its own number."""
        if len(places) == 1:
            places, extents = _with_one_row(places, extents)
        tables, shares = [self.other[..., None]], [off[..., None].to(self.other.dtype)]
        on = (~off[..., None]).to(self.other.dtype)
        if self.block is not None:
            down, across = (_interpolation(*axis, BLOCK, on) for axis in zip(places, extents, strict=True))
            tables.append(self.block.flatten(2))
            shares.append((down[..., None] * across[..., None, :]).flatten(2))
        for line, place, extent in zip((self.rows, self.columns), places, extents, strict=True):
            if line is not None:
                tables.append(line)
                shares.append(_interpolation(place, extent, line.shape[-1], on))
        return torch.einsum("haf,bnf->bhan", torch.cat(tables, -1), torch.cat(shares, -1))


def _interpolation(place: Tensor, extent: Tensor, size: int, on: Tensor) -> Float[Tensor, "b n size"]:
    """Shares of `size` numbers, spread evenly over `extent` places, in the one at `place`; 0 off the grid.

    As `torch.nn.functional.interpolate` resizes in its linear modes, without aligned corners.
    """
    at = ((place.to(on.dtype) + 0.5) * size / extent.clamp(min=1) - 0.5).clamp(min=0, max=size - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=size - 1)
    above = (at - low)[..., None]
    return on * (F.one_hot(low, size) * (1 - above) + F.one_hot(high, size) * above)


class ConvolvedAgents(nn.Module):
    """Agents of a layer's input: a depthwise convolution of kernel and stride `conv_stride` over bins, then a linear map.

    Args:
        spec: of the layer.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.cross = spec.pattern.cross
        self.heads, self.number, self.stride = spec.heads, spec.config.num_agents, spec.config.conv_stride
        self.convolution = nn.Conv2d(spec.dim, spec.dim, self.stride, self.stride, groups=spec.dim, bias=False)
        self.linear = spec.linear(spec.dim, spec.heads * spec.head_dim)

    def forward(
        self, x: Float[Tensor, "b n c"], context: Context, lengths: Int[Tensor, " b"] | None
    ) -> Float[Tensor, "b h a d"]:
        """Agents of each row of a right-padded `x`, on the grid of the context, if there is one."""
        if self.cross:
            context = context.replace(roles=None)  # they are the memory's, and refused where it is read
        tokens = _grid_tokens(context, x, lengths)
        sides = _agent_sides(self.number, context.grid)
        places, extents = _places(tokens, x.shape[1], context.grid, x.device, padded=lengths is not None)
        if len(sides) == 1:
            sides, places, extents = (1, *sides), *_with_one_row(places, extents)
        bins = tuple(self.stride * side for side in sides)
        inside = _bins(bins, places, extents, tokens).to(x.dtype)
        means = inside / inside.sum(-1, keepdim=True).clamp(min=1) @ x
        agents = self.linear(self.convolution(means.mT.unflatten(-1, bins)).flatten(2).mT)
        return agents.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class AgentInputs(Projection):
    """Learned or convolved agents where the layer has them (agents of queries need nothing), and its agent bias.

    Args:
        spec: of the layer; its config's `agent_source` may ask for agents that are not learned in noncausal patterns only,
            its `agent_bias` for one in noncausal-self only.
    """

    mixes_tokens = True

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        source = config.agent_source
        if source == "auto":
            source = "pool_q" if spec.pattern is Pattern.NONCAUSAL_SELF else "learned"
        if source != "learned" and spec.pattern.causal:
            raise Unsupported(
                f"{source} agents in {spec.pattern.value}", supported="learned", nearest="agent_source='learned'"
            )
        self.agents = None
        self.convolved = ConvolvedAgents(spec) if source == "conv" else None
        if source == "learned":
            self.agents = nn.Parameter(torch.randn(spec.heads, config.num_agents, spec.head_dim))
        self.gather_bias, self.share_bias = None, None
        if config.agent_bias != "none":
            if spec.pattern is not Pattern.NONCAUSAL_SELF:
                raise Unsupported(
                    f"agent_bias={config.agent_bias!r} in {spec.pattern.value}",
                    supported="noncausal-self",
                    nearest="agent_bias='none'",
                )
            sizes = (spec.heads, config.num_agents, config.agent_bias, config.bias_grid)
            self.gather_bias, self.share_bias = BiasTables(*sizes), BiasTables(*sizes)

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        x, context, lengths = call.x, call.context, call.lengths
        if self.agents is not None:
            heads = {**heads, "agents": self.agents}
        if self.convolved is not None and x is not None:
            heads = {**heads, "row_agents": self.convolved(x, context, lengths)}
        if self.gather_bias is None or self.share_bias is None or x is None:
            return heads
        batch, n = x.shape[:2]
        tokens = _grid_tokens(context, x, lengths)
        places = _places(tokens, n, _two_sides(context.grid), x.device, padded=lengths is not None)
        off = torch.zeros(1, n, dtype=torch.bool, device=x.device) if tokens is None else ~tokens
        gather = self.gather_bias(*places, off).expand(batch, -1, -1, -1)
        share = self.share_bias(*places, off).mT.expand(batch, -1, -1, -1)
        return {**heads, "gather_bias": gather, "share_bias": share}


def _two_sides(grid: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if grid is not None and len(grid) > 2:
        raise Unsupported(
            f"agent_bias on a grid {tuple(grid)}", supported="one or two sides", nearest="agent_bias='none'"
        )
    return grid


def _grid_tokens(context: Context, x: Tensor, lengths: Tensor | None) -> Bool[Tensor, "b n"] | None:
    """Tokens of a layer's right-padded `x` that lie on the grid; None when all do."""
    roles = context.roles
    if roles is not None:
        roles = gathering(context.mask, roles.shape[0], roles.shape[1], roles.device).gather(roles, axis=1)
    return _tokens(None if lengths is None else valid_from_lengths(lengths, x.shape[1]), roles)


class DepthwiseConvolution(Merge):
    """Adds a 3 x 3 depthwise convolution of the values (or of the layer's input) on the grid to the head outputs.

    Args:
        spec: of the layer; its config's `dwc` says of what, and `input` needs dim = heads * value_dim.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.heads, width, of = spec.heads, spec.heads * spec.value_dim, spec.config.dwc
        noncausal = spec.pattern is Pattern.NONCAUSAL_SELF
        if of in ("value", "input") and not noncausal:
            raise Unsupported(f"dwc={of!r} in {spec.pattern.value}", supported="noncausal-self", nearest="dwc='none'")
        if of == "input" and spec.dim != width:
            raise Unsupported(
                f"dwc='input' with dim={spec.dim} and values of {width}",
                supported="equal widths",
                nearest="dwc='value'",
            )
        self.of = ("value" if noncausal else "none") if of == "auto" else of
        self.convolution = None if self.of == "none" else nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, output: Tensor, heads: Tensors, call: LayerCall, result: Result) -> Tensor:
        x, context, lengths = call.x, call.context, call.lengths
        if self.convolution is None or x.shape[1] == 0:
            return output
        source = x if self.of == "input" else _repeat_groups(heads["v"], self.heads).transpose(1, 2).flatten(2)
        n = x.shape[1]
        tokens = _grid_tokens(context, x, lengths)
        layout = gathering(None if tokens is None else Mask(valid=tokens), x.shape[0], n, x.device)
        on_grid = layout.gather(source, axis=1)
        total = torch.full((1, 1), n, device=x.device) if layout.lengths is None else layout.lengths[:, None]
        height, width = self._sides(context.grid, n, total, padded=lengths is not None)
        placed = F.pad(on_grid, (0, 0, 0, height * width - n))  # a negative pad cuts slots that hold no token
        convolved = self.convolution(placed.mT.unflatten(-1, (height, width))).flatten(2).mT
        local = layout.scatter(F.pad(convolved, (0, 0, 0, n - height * width)), axis=1)
        return output + local.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @staticmethod
    def _sides(grid: tuple[int, ...] | None, n: int, total: Tensor, *, padded: bool) -> tuple[int, int]:
        if grid is None:
            return 1, n
        if len(grid) > 2:
            raise Unsupported(f"dwc on a grid {tuple(grid)}", supported="one or two sides", nearest="dwc='none'")
        _check_grid(grid, total, padded=padded)
        return (1, grid[0]) if len(grid) == 1 else (grid[0], grid[1])


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    pattern: Pattern,
    config: Config,
    sizes: dict[str, int] | None = None,
    **_: Any,
) -> Tensors:
    widths = {"h": 2, "g": 2, "d": 8, "v": 6, "a": 5, **(sizes or {})}
    shapes = attention_shapes(batch, n, m, widths)
    if config.agent_source == "learned" or (config.agent_source == "auto" and pattern is not Pattern.NONCAUSAL_SELF):
        shapes["agents"] = (widths["h"], widths["a"], widths["d"])
    else:
        widths["a"] = config.num_agents
    if config.agent_source == "conv":
        shapes["row_agents"] = (batch, widths["h"], widths["a"], widths["d"])
    shapes["gather_bias"] = (batch, widths["h"], widths["a"], m)
    shapes["share_bias"] = (batch, widths["h"], n, widths["a"])
    return normals(generator, shapes, dtype)


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    return {"a": config.num_agents}


def cost(shape: Shape, config: Any) -> Cost:
    heads, width = shape.batch * shape.heads, shape.dim_key + shape.dim_value
    merging = config.agent_source == "token_merge"
    pairs = [width**2 / 4 for width in _widths(shape.n, config.num_agents)[:-1]] if merging else []
    return Cost(
        flops=2.0 * heads * (config.num_agents * (shape.n + shape.m) * width + sum(pairs) * shape.dim_key),
        memory=float(heads * config.num_agents * (shape.n + shape.m) + shape.batch * max(pairs, default=0.0)),
        state=float(shape.heads * config.num_agents * (2 + shape.dim_value)),
        step_flops=4.0 * heads * config.num_agents * width,
    )


MECHANISM = Mechanism(
    name="agent",
    aliases=("agent_attention",),
    kind=Kind.ATTENTION,
    summary=("A few agent tokens gather from all keys by softmax, and every query reads from the agents by softmax."),
    paper=Paper("Agent Attention: On the Integration of Softmax and Linear Attention", "2312.08874", 2023, 19),
    inputs={
        "q": "bhnd",
        "k": "bgmd",
        "v": "bgmv",
        "agents?": "had",
        "gather_bias?": "bham",
        "share_bias?": "bhna",
        "row_agents?": "bhad",
    },
    patterns=ALL_PATTERNS,
    forms={
        "reference": reference,
        "parallel": parallel,
        "chunked": chunked,
        "step": chunked,
        "absorb": absorb,
        "read": read,
    },
    config=Config,
    variants={
        "pooled": {"agent_source": "pool_q", "num_agents": 5, "second_scale_exponent": 2.0, "dwc": "none"},
        "learned": {"agent_source": "learned", "num_agents": 3, "dwc": "none"},
        "learned, with a shortcut": {"agent_source": "learned", "num_agents": 3, "k_shortcut": 0.5},
        "convolved": {"agent_source": "conv", "num_agents": 4, "conv_stride": 3, "dwc": "value"},
        "merged": {"agent_source": "token_merge", "num_agents": 3, "dwc": "input"},
        "on a grid": {"num_agents": 4},
        "block bias": {"num_agents": 4, "agent_bias": "block"},
        "biases of lines": {"num_agents": 4, "agent_bias": "lines", "bias_grid": (8, 16)},
        "all biases": {"num_agents": 4, "agent_bias": "all", "bias_grid": (8, 16)},
    },
    variant_patterns={
        "pooled": (Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS),
        "learned, with a shortcut": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
        "convolved": (Pattern.NONCAUSAL_SELF,),
        "merged": (Pattern.NONCAUSAL_SELF,),
        "on a grid": (Pattern.NONCAUSAL_SELF,),
        "block bias": (Pattern.NONCAUSAL_SELF,),
        "biases of lines": (Pattern.NONCAUSAL_SELF,),
        "all biases": (Pattern.NONCAUSAL_SELF,),
    },
    grid_variants=frozenset({"on a grid", "block bias", "biases of lines", "all biases"}),
    engine="softmax_scan",
    state=ScanState,
    cost=cost,
    axis_sizes=axis_sizes,
    honours=frozenset({"dropout", "roles"}),
    weights="implicit",
    sample_inputs=sample_inputs,
    projection=AgentInputs,
    merge=DepthwiseConvolution,
    waivers=(
        Waiver(
            "padding",
            "bins divide the whole grid, masked rows too, so that a mask inside it moves nothing",
            variants=("on a grid", "block bias", "biases of lines", "all biases"),
        ),
        Waiver(
            "memory",
            "agents pooled from queries need those before the memory is read",
            patterns=(Pattern.NONCAUSAL_CROSS,),
            variants=("pooled",),
        ),
    ),
)
