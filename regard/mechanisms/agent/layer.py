"""Modules of the agent attention layer: learned or convolved agents, agent bias, depthwise convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import (
    Context,
    LayerCall,
    LayerSpec,
    Pattern,
    Projection,
    Tensors,
    Unsupported,
)
from regard.core.grids import image_of, tokens_of
from regard.core.precision import wide, wide_dtype
from regard.layers.grid_convolution import GridConvolution, grid_tokens, leading
from regard.mechanisms.agent.definition import Config, agent_sides
from regard.mechanisms.agent.forms import _bins, _places

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def _with_one_row(places: list[Tensor], extents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Turn the coordinates of a sequence into those of a grid of one row."""
    return [torch.zeros_like(places[0]), *places], [torch.ones_like(extents[0]), *extents]


BLOCK = 7
"""Rows and columns of an agent's bias table."""


class BiasTables(nn.Module):
    """Learned tables for each head and agent, from which the bias at a place on the grid is interpolated.

    Args:
        heads, agents: number of heads and of agents.
        kind: ``block``, ``lines`` or ``all``.
        grid: rows and columns for which ``lines`` and ``all`` store a term; None for ``block``.
    """

    def __init__(self, heads: int, agents: int, kind: str, grid: tuple[int, int] | None) -> None:
        super().__init__()

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, agents, *shape), std=0.02))

        self.block = None if kind == "lines" else table(BLOCK, BLOCK)
        self.rows = None if grid is None else table(grid[0])
        self.columns = None if grid is None else table(grid[1])
        self.other = table()

    def shares(
        self, places: list[Int[Tensor, "#b n"]], extents: list[Int[Tensor, "#b 1"]], off: Bool[Tensor, "#b n"]
    ) -> Float[Tensor, "#b n f"]:
        """Weights of the table entries in each token's bias: interpolated at its place, or `other` off the grid."""
        if len(places) == 1:
            places, extents = _with_one_row(places, extents)
        shares = [off[..., None].to(self.other.dtype)]
        on = (~off[..., None]).to(self.other.dtype)
        if self.block is not None:
            down, across = (_interpolation(*axis, BLOCK, on) for axis in zip(places, extents, strict=True))
            shares.append((down[..., None] * across[..., None, :]).flatten(2))
        for line, place, extent in zip((self.rows, self.columns), places, extents, strict=True):
            if line is not None:
                shares.append(_interpolation(place, extent, line.shape[-1], on))
        return torch.cat(shares, -1)

    def forward(self, shares: Float[Tensor, "#b n f"]) -> Float[Tensor, "#b h a n"]:
        """The bias of each token; `shares` can be reused by all tables of the same kind and grid."""
        block = None if self.block is None else self.block.flatten(2)
        tables = [table for table in (self.other[..., None], block, self.rows, self.columns) if table is not None]
        return torch.einsum("haf,bnf->bhan", torch.cat(tables, -1), shares)


def biases_on_map(tables: Sequence[BiasTables], rows: int, columns: int, off: int = 0) -> Float[Tensor, "tables h a n"]:
    """The biases, in tables of the same kind, of `off` tokens outside the grid and then of each place of a map, row by
    row: equal to :meth:`BiasTables.forward` where every place has a token, at a lower cost."""

    def all_of(name: str) -> Tensor | None:
        own = [getattr(table, name) for table in tables]
        return None if own[0] is None else torch.cat(own)

    block, down, across, other = (all_of(name) for name in ("block", "rows", "columns", "other"))
    assert other is not None
    terms = []
    if down is not None and across is not None:
        terms.append(_resized(down, rows)[..., None] + _resized(across, columns)[..., None, :])
    if block is not None:
        terms.append(F.interpolate(wide(block), (rows, columns), mode="bilinear", align_corners=False))
    on = sum(terms[1:], terms[0]).flatten(2).to(other.dtype)
    if off:
        on = torch.cat([other[..., None].expand(-1, -1, off), on], -1)
    elif torch.is_grad_enabled():
        on = on + 0 * other[..., None]  # `other` gets a gradient of 0, not none
    return on.unflatten(0, (len(tables), -1))


def _resized(line: Float[Tensor, "h a old"], size: int) -> Float[Tensor, "h a size"]:
    line = wide(line)
    return line if line.shape[-1] == size else F.interpolate(line, size, mode="linear", align_corners=False)


def _interpolation(place: Tensor, extent: Tensor, size: int, on: Tensor) -> Float[Tensor, "b n size"]:
    """Linear interpolation weights, at `place`, of `size` numbers spread evenly over `extent` places; 0 off the grid.

    Equal to `torch.nn.functional.interpolate` in its linear modes with ``align_corners=False``.
    """
    place = place.to(wide_dtype(on))
    at = ((place + 0.5) * size / extent.clamp(min=1) - 0.5).clamp(min=0, max=size - 1)
    numbers = torch.arange(size, device=on.device, dtype=place.dtype)
    return on * (1 - (at[..., None] - numbers).abs()).clamp(min=0).to(on.dtype)


class ConvolvedAgents(nn.Module):
    """Computes agents from a layer's input: a depthwise convolution of kernel and stride `conv_stride` over bins, then
    a linear map.

    Args:
        spec: the layer's specification.
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
            context = context.replace(roles=None)  # the roles are the memory's; the forms refuse them
        tokens = grid_tokens(context, x, lengths)
        sides = agent_sides(self.number, context.grid)
        places, extents = _places(tokens, x.shape[1], context.grid, x.device, padded=lengths is not None)
        if len(sides) == 1:
            sides, places, extents = (1, *sides), *_with_one_row(places, extents)
        bins = tuple(self.stride * side for side in sides)
        inside = _bins(bins, places, extents, tokens).to(x.dtype)
        means = inside / inside.sum(-1, keepdim=True).clamp(min=1) @ x
        agents = self.linear(tokens_of(self.convolution(image_of(means, bins))))
        return agents.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class AgentInputs(Projection):
    """Provides the layer's learned or convolved agents (pooled and merged ones need no weights) and its agent bias.

    Args:
        spec: the layer's specification. Agents that are not learned need a noncausal pattern, an `agent_bias`
            noncausal-self.
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
        grid = _two_sides(context.grid)
        first = leading(n, grid, context.roles) if lengths is None else None
        if first is not None and grid is not None:
            rows, columns = (1, grid[0]) if len(grid) == 1 else grid
            gather, share = biases_on_map((self.gather_bias, self.share_bias), rows, columns, first)
            return {
                **heads,
                "gather_bias": gather.expand(batch, -1, -1, -1),
                "share_bias": share.mT.expand(batch, -1, -1, -1),
            }
        tokens = grid_tokens(context, x, lengths)
        places = _places(tokens, n, grid, x.device, padded=lengths is not None)
        off = torch.zeros(1, n, dtype=torch.bool, device=x.device) if tokens is None else ~tokens
        shares = self.gather_bias.shares(*places, off)
        gather = self.gather_bias(shares).expand(batch, -1, -1, -1)
        share = self.share_bias(shares).mT.expand(batch, -1, -1, -1)
        return {**heads, "gather_bias": gather, "share_bias": share}


def _two_sides(grid: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if grid is not None and len(grid) > 2:
        raise Unsupported(
            f"agent_bias on a grid {tuple(grid)}", supported="one or two sides", nearest="agent_bias='none'"
        )
    return grid


class DepthwiseConvolution(GridConvolution):
    """Adds a 3 x 3 depthwise convolution of the values (or of the layer's input) on the grid to the head outputs.

    Args:
        spec: the layer's specification; ``input`` as its `dwc` needs dim = heads * value_dim.
    """

    def __init__(self, spec: LayerSpec) -> None:
        of = spec.config.dwc
        if of == "auto":
            of = "value" if spec.pattern is Pattern.NONCAUSAL_SELF else "none"
        super().__init__(spec, 0 if of == "none" else 3, of, asked=f"dwc={of!r}", without="dwc='none'")
