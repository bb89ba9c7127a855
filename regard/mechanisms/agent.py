r"""Agent attention: a few agent tokens gather from all keys by softmax, and every query reads from the agents by softmax.

When to pick it: images and other long noncausal inputs, for a global view at linear cost with softmax weights in both
steps.
When not: exact recall through few agents (the weight matrix has at most the rank of their number), or very short inputs.

Definition (Han et al., arXiv 2312.08874, equations 4-7), s the scale, A the n agents:

    V_A = softmax(s A K^T + B1) V,   O = softmax(s^p Q A^T + B2) V_A + k_shortcut V,   layer: W_o (O + DWC(V))

| paper | here |
|---|---|
| A: average pooling of Q | `agent_source="pool_q"`: adaptive pooling over valid ranks, or over `grid`, per row |
| n (agent_num) | `num_agents`; on a grid of two sides a square |
| B1, B2 (agent bias) | `gather_bias` (B, H, n, M), `share_bias` (B, H, N, n); `agent_bias` of the layer makes them |
| their 7 x 7 tables, row and column terms, class token's | `projection.gather_bias`, `projection.share_bias`: `block`, `rows`, `columns`, `other` |
| DWC, 3 x 3 depthwise | `dwc` of the layer: `merge.convolution`; without `grid` a sequence is a grid of one row |
| k2 = 0.3, k_shortcut = 0.075 (AgentSD) | `second_scale_exponent` (p), `k_shortcut`; 1 and 0 by default |

Layout: q (B, H, N, D), k and v (B, G, M, D), agents (H, n, D) for learned agents, which then have their own number.
Learned agents (not in the paper) exist in all four patterns. In causal-self step 1 is a running softmax over the keys for
each agent, with a state of n (m, u) and n vectors a head; in cross patterns memory streams into the same state. Pooled
agents look at all queries, so they exist in noncausal patterns only, and cannot absorb memory before the queries come.
With a grid the valid tokens of a row fill it row by row; tokens whose role is not TOKEN (a class token) are keys and
queries but are neither pooled nor convolved. Places of a grid without a token belong to no agent.
The bias of a token is the 7 x 7 table of each agent, read bilinearly (pixel centres, borders repeated) at its place on the
grid, plus a term of its row and one of its column; a token off the grid has one number. The row and column terms are
stored for `bias_grid` and read linearly on other grids; a sequence without `grid` is a grid of one row, of its own length.
Deviations: the agent bias is off unless `agent_bias` says so. Pooling is done after the head split, which is the same, since it is linear in
every channel. Dropout is applied to the layer's output, not to the two weight matrices. DWC exists in noncausal-self only.
"""

from __future__ import annotations

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
    at_least,
    one_of,
    valid_from_lengths,
)
from regard.engines import softmax_scan as scan
from regard.engines.recurrent_forms import length_after
from regard.engines.softmax_scan import ScanState
from regard.ragged import gathering, place_queries, take_queries
from regard.sampling import attention_shapes, normals

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        num_agents: agents that are pooled, or that the layer learns; >= 1. Learned agents given as a tensor count
            themselves.
        agent_source: ``pool_q``, ``learned``, or ``auto``: as a function learned when `agents` are given, else pooled;
            in a layer pooled in noncausal-self, learned elsewhere (where they keep a state).
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
    second_scale_exponent: float = 1.0
    k_shortcut: float = 0.0
    dwc: str = "auto"
    agent_bias: str = "none"
    bias_grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        at_least("num_agents", self.num_agents, 1)
        one_of("agent_source", self.agent_source, ("auto", "pool_q", "learned"))
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
) -> Float[Tensor, "b h n v"]:
    """The definition; in causal-self every query reads agents that have gathered from its own prefix."""
    _check(call, agents)
    k, v, n, m = _repeat_groups(k, q.shape[1]), _repeat_groups(v, q.shape[1]), q.shape[2], k.shape[2]
    a = _pool_reference(call, q) if agents is None else agents
    first = (call.scale * a) @ k.mT
    second = (call.scale**call.config.second_scale_exponent * q) @ a.mT
    first = first if gather_bias is None else first + gather_bias
    second = second if share_bias is None else second + share_bias
    outputs = []
    for t in range(n):
        seen = max(t + m - n + 1, 0) if call.pattern is Pattern.CAUSAL_SELF else m
        gathered = first[..., :seen].softmax(-1) @ v[:, :, :seen]
        output = second[:, :, t, None].softmax(-1) @ gathered
        if call.config.k_shortcut and seen:
            output = output + call.config.k_shortcut * v[:, :, t + m - n, None]
        outputs.append(output)
    return torch.cat(outputs, 2) if outputs else v.new_zeros(*q.shape[:3], v.shape[-1])


def _pool_reference(call: Call, q: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h a d"]:
    rows = []
    for row in range(q.shape[0]):
        tokens = q[row] if call.roles is None else q[row][:, call.roles[row] == Role.TOKEN]
        if tokens.shape[1] == 0:
            rows.append(q.new_zeros(q.shape[1], call.config.num_agents, q.shape[-1]))
        elif call.grid is None:
            rows.append(F.adaptive_avg_pool1d(tokens.mT, call.config.num_agents).mT)
        else:
            sides = _agent_sides(call)
            pooled = F.adaptive_avg_pool2d(tokens.mT.unflatten(-1, call.grid), sides[0])
            rows.append(pooled.flatten(2).mT)
    return torch.stack(rows) if rows else q.new_zeros(0, q.shape[1], call.config.num_agents, q.shape[-1])


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    agents: Float[Tensor, "h a d"] | None = None,
    gather_bias: Float[Tensor, "b h a m"] | None = None,
    share_bias: Float[Tensor, "b h n a"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """Two softmax products; causal-self: the chunked form."""
    if call.pattern is Pattern.CAUSAL_SELF:
        return chunked(call, q, k, v, agents, gather_bias, share_bias).output
    _check(call, agents)
    a, exists = _pool(call, q) if agents is None else (_float(agents), None)
    valid = call.valid_keys(k.shape[2])
    weights = _softmax(_gather_scores(call, a, k, gather_bias), None if valid is None else valid[:, None, None])
    values = _repeat_groups(_float(v), q.shape[1])
    output = _shares(call, q, a, exists, share_bias) @ (weights @ values)
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
) -> Result:
    """Causal-self with state in and out, for learned agents: a running softmax for each agent. Also the step."""
    _check(call, agents)
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
            "absorbing memory with pooled agents, which need the queries first",
            supported="learned agents, or whole calls",
            nearest="agent_source='learned'",
        )
    _check(call, agents)
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
) -> Result:
    """Queries on what the agents have gathered."""
    _check(call, agents)
    assert agents is not None
    gathered = scan.normalized(call.state.u, call.state.w)
    return Result((_shares(call, q, _float(agents), None, share_bias) @ gathered).to(q.dtype), call.state)


def _check(call: Call, agents: Tensor | None) -> None:
    """Refuse what the source of the agents cannot do in this pattern."""
    config, pattern = call.config, call.pattern
    pooled = config.agent_source == "pool_q" or (config.agent_source == "auto" and agents is None)
    if pooled and (pattern.causal or call.state is not None):
        raise Unsupported(
            f"pooled agents in {pattern.value}" + ("" if pattern.causal else " with a state"),
            supported="learned agents (H, n, D) there; pooled agents in noncausal patterns, without a state",
            nearest="agent_source='learned' and agents=...",
        )
    if pooled and agents is not None:
        raise Unsupported(
            "agents beside agent_source='pool_q'", supported="one of them", nearest="agent_source='learned'"
        )
    if not pooled and agents is None:
        raise Unsupported("agent_source='learned' without agents", supported="agents (H, n, D)", nearest="pool_q")
    if call.scale <= 0 and config.second_scale_exponent != 1.0:
        raise Unsupported(
            f"a power of the scale {call.scale}", supported="scale > 0", nearest="second_scale_exponent=1.0"
        )
    if config.k_shortcut and pattern.cross:
        raise Unsupported(f"k_shortcut in {pattern.value}", supported="self patterns", nearest="k_shortcut=0.0")
    if call.roles is not None and pattern is not Pattern.NONCAUSAL_SELF:
        raise Unsupported(f"agent with roles in {pattern.value}", supported="noncausal-self", nearest="roles=None")


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
    return _softmax(scores, None if exists is None else exists[:, None, None])


def _agent_sides(call: Call) -> tuple[int, ...]:
    """Agents along each side of the grid."""
    assert call.grid is not None
    number, axes = call.config.num_agents, len(call.grid)
    side = round(number ** (1 / axes))
    if axes > 2 or side**axes != number:
        raise Unsupported(
            f"{number} pooled agents on a grid {tuple(call.grid)}",
            supported="a square number on a grid of two sides",
            nearest=f"num_agents={side**2}",
        )
    return (side,) * axes


def _pool(call: Call, q: Float[Tensor, "b h n d"]) -> tuple[Float[Tensor, "b h a d"], Bool[Tensor, "b a"] | None]:
    """Agents as means of queries over adaptive bins, and which bins hold a token (None when all do)."""
    inside, ragged = _bins(call, q.shape[2], q.device)
    x = _float(q)
    counts = inside.sum(-1, keepdim=True)
    weights = inside.to(x.dtype) / counts.clamp(min=1)
    return weights[:, None] @ x, (counts[..., 0] > 0) if ragged else None


def _bins(call: Call, n: int, device: torch.device) -> tuple[Bool[Tensor, "#b a n"], bool]:
    """Which tokens each agent averages: bin i of c holds ranks floor(i L / c) to ceil((i + 1) L / c) - 1 of a side L."""
    tokens = _tokens(call.valid_queries(n), call.roles)
    sides: tuple[int, ...] = (call.config.num_agents,) if call.grid is None else _agent_sides(call)
    places, extents = _places(tokens, n, call.grid, device, padded=call.lengths is not None)
    inside = None
    for count, place, extent in zip(sides, places, extents, strict=True):
        i = torch.arange(count, device=device)
        start, stop = (i * extent) // count, -((-(i + 1) * extent) // count)
        member = (place[:, None] >= start[..., None]) & (place[:, None] < stop[..., None])
        inside = member if inside is None else (inside[:, :, None] & member[:, None]).flatten(1, 2)
    assert inside is not None
    return (inside if tokens is None else inside & tokens[:, None]), tokens is not None


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
            places, extents = [torch.zeros_like(places[0]), *places], [torch.ones_like(extents[0]), *extents]
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


class AgentInputs(nn.Module):
    """Learned agents where the layer has them (pooled ones need nothing), and its agent bias.

    Args:
        spec: of the layer; its config's `agent_source` may ask for pooled agents in noncausal patterns only, its
            `agent_bias` for one in noncausal-self only.
    """

    keeps_state = True  # it keeps none: so it is told the lengths

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        source = config.agent_source
        if source == "auto":
            source = "pool_q" if spec.pattern is Pattern.NONCAUSAL_SELF else "learned"
        if source == "pool_q" and spec.pattern.causal:
            raise Unsupported(
                f"pooled agents in {spec.pattern.value}", supported="learned", nearest="agent_source='learned'"
            )
        self.agents = None
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

    def forward(
        self,
        heads: Tensors,
        x: Tensor | None,
        source: Tensor | None,
        context: Context,
        *,
        lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        state: None = None,
    ) -> tuple[Tensors, None]:
        if self.agents is not None:
            heads = {**heads, "agents": self.agents}
        if self.gather_bias is None or self.share_bias is None or x is None:
            return heads, None
        batch, n = x.shape[:2]
        tokens = _grid_tokens(context, x, lengths)
        places = _places(tokens, n, _two_sides(context.grid), x.device, padded=lengths is not None)
        off = torch.zeros(1, n, dtype=torch.bool, device=x.device) if tokens is None else ~tokens
        gather = self.gather_bias(*places, off).expand(batch, -1, -1, -1)
        share = self.share_bias(*places, off).mT.expand(batch, -1, -1, -1)
        return {**heads, "gather_bias": gather, "share_bias": share}, None


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


class DepthwiseConvolution(nn.Module):
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

    def forward(
        self, output: Tensor, heads: Tensors, x: Tensor, context: Context, lengths: Tensor | None, result: Result
    ) -> Tensor:
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
) -> Tensors:
    widths = {"h": 2, "g": 2, "d": 8, "v": 6, "a": 5, **(sizes or {})}
    shapes = attention_shapes(batch, n, m, widths)
    if config.agent_source == "learned" or (config.agent_source == "auto" and pattern is not Pattern.NONCAUSAL_SELF):
        shapes["agents"] = (widths["h"], widths["a"], widths["d"])
    else:
        widths["a"] = config.num_agents
    shapes["gather_bias"] = (batch, widths["h"], widths["a"], m)
    shapes["share_bias"] = (batch, widths["h"], n, widths["a"])
    return normals(generator, shapes, dtype)


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    return {"a": config.num_agents}


def cost(shape: Shape, config: Any) -> Cost:
    heads, width = shape.batch * shape.heads, shape.dim_key + shape.dim_value
    return Cost(
        flops=2.0 * heads * config.num_agents * (shape.n + shape.m) * width,
        memory=float(heads * config.num_agents * (shape.n + shape.m)),
        state=float(shape.heads * config.num_agents * (2 + shape.dim_value)),
        step_flops=4.0 * heads * config.num_agents * width,
    )


MECHANISM = Mechanism(
    name="agent",
    aliases=("agent_attention",),
    kind=Kind.ATTENTION,
    summary=("A few agent tokens gather from all keys by softmax, and every query reads from the agents by softmax."),
    paper=Paper("Agent Attention: On the Integration of Softmax and Linear Attention", "2312.08874", 2023, 19),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv", "agents?": "had", "gather_bias?": "bham", "share_bias?": "bhna"},
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
    engine="softmax_scan",
    state=ScanState,
    cost=cost,
    axis_sizes=axis_sizes,
    honours=frozenset({"roles"}),
    weights="implicit",
    sample_inputs=sample_inputs,
    projection=AgentInputs,
    merge=DepthwiseConvolution,
)
