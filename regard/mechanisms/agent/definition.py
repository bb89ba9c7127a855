"""The definition of agent attention: its options and a reference implementation written for readability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    Call,
    Pattern,
    Role,
    Unsupported,
    at_least,
    one_of,
)
from regard.engines.grouped_attention import Dropout

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        num_agents: number of agents that are pooled, convolved, left by merging or learned by the layer; >= 1. Agents
            given as a tensor set it by their shape.
        agent_source: ``pool_q`` (means of queries over bins), ``learned``, ``conv`` (a strided convolution of the layer's
            input; a function is given its `row_agents`), ``token_merge`` (means of similar queries), or ``auto``: in a
            function, learned if `agents` are given, ``conv`` if `row_agents` are, else pooled; in a layer, pooled in
            noncausal-self and learned elsewhere (where they keep a state). Causal patterns have learned agents only.
        conv_stride: kernel and stride of the layer's ``conv``, in bins along each side; >= 1.
        second_scale_exponent: p, the exponent of the scale by which queries are multiplied to read the agents; > 0.
        k_shortcut: weight of each token's own value added to its output; 0 in cross patterns.
        agent_bias: the layer's agent bias, in noncausal-self only: ``none``, ``block`` (the 7 x 7 tables), ``lines``
            (rows and columns) or ``all``.
        bias_grid: rows and columns for which ``lines`` and ``all`` store a term.
        dwc: the layer's depthwise convolution: of ``value`` or ``input``, ``none``, or ``auto``: of the values in
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
    """The definition; in causal-self every query reads agents that have gathered from its prefix only."""
    source = check(call, agents, row_agents)
    k, v, n, m = repeat_groups(k, q.shape[1]), repeat_groups(v, q.shape[1]), q.shape[2], k.shape[2]
    given = agents if row_agents is None else row_agents
    number = call.config.num_agents if given is None else given.shape[-2]
    running = call.pattern is Pattern.CAUSAL_SELF
    gather_kept = drop(call, q.new_ones(*q.shape[:2], number, 0 if running else m))
    share_kept = drop(call, q.new_ones(*q.shape[:3], number))
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
    """Agents of one batch row; none if it has no tokens."""
    tokens, number = q if call.roles is None else q[:, call.roles[row] == Role.TOKEN], call.config.num_agents
    if tokens.shape[1] == 0:
        return tokens
    if row_agents is not None:
        return row_agents[row]
    if source == "token_merge":
        return _merge_reference(tokens, number)
    if call.grid is None or len(call.grid) == 1:
        return F.adaptive_avg_pool1d(tokens.mT, number).mT
    sides = agent_sides(number, call.grid)
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


def check(call: Call, agents: Tensor | None, row_agents: Tensor | None) -> str:
    """Return the source of the agents; raises Unsupported where the call's pattern or options do not allow it."""
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
                f"{name} together with agent_source={source!r}", supported="one of them", nearest=f"agent_source={of!r}"
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


def drop(call: Call, weights: Tensor) -> Tensor:
    """Attention weights after the call's dropout."""
    return Dropout(call.dropout, generator=call.generator).of_weights(weights)


def repeat_groups(x: Float[Tensor, "b g m d"], heads: int) -> Float[Tensor, "b h m d"]:
    """Keys or values of G key/value heads, repeated for each of `heads` query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def agent_sides(number: int, grid: tuple[int, ...] | None) -> tuple[int, ...]:
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
