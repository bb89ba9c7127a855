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
| n (agent_num) | `num_agents`; a square number on a grid of two sides, except with ``token_merge`` |
| B_1, B_2 (agent bias) | `gather_bias` (B, H, n, M), `share_bias` (B, H, N, n); `agent_bias` of the layer makes them |
| their 7 x 7 tables, row and column terms, class token's | `projection.gather_bias`, `projection.share_bias`: `block`, `rows`, `columns`, `other` |
| DWC, 3 x 3 depthwise | `dwc` of the layer: `merge.convolution`; without `grid` a sequence is a grid of one row |
| k2 = 0.3, k_shortcut = 0.075 (AgentSD) | `second_scale_exponent` (p), `k_shortcut`; 1 and 0 by default |

Layout: q (B, H, N, D), k and v (B, G, M, D), agents (H, n, D) if they are learned, row_agents (B, H, n, D) if a layer
convolves them (in a packed call, one row of them serves all documents); both set n by their shape.
Learned agents (not in the paper) exist in all four patterns. In causal-self, gathering is a running softmax over the
keys for each agent, whose state is n pairs (m, u) and n vectors per head; in cross patterns memory streams into the
same state. All other agents depend on the whole sequence of queries, so they exist in noncausal patterns only, and
cannot absorb memory before the queries are known.
With a grid, the valid tokens of a batch row fill the grid row by row; tokens whose role is not TOKEN (such as a class
token) are keys and queries but are not pooled, convolved or merged. Grid places without a token belong to no agent.

``conv``: with s the `conv_stride`, x is averaged over adaptive bins, s times as many along each side as there are
agents; a depthwise convolution of kernel and stride s, then a linear map, turns each s x s bins into an agent. So there
are exactly n agents for any length or grid, and where each side is s times the number of agents along it, this is an
ordinary strided convolution. Bins without a token count as zeros; an agent exists if any of its bins has a token. A
sequence is a grid of one row, which all s rows of bins read. Position schemes that rotate queries rotate neither these
agents nor learned ones.
``token_merge`` (bipartite matching of ToMe, Bolya et al., arXiv 2210.09461, section 3): in each round the tokens are
dealt alternately into two sets, each token of the first links to the token of the second whose query (all heads
together) has the greatest cosine similarity with its own, and the r most similar pairs merge, where r is half the
number of tokens, or less if that is enough to leave n. A merged token is the mean of all its original tokens (so a pair
is weighted by size) and takes the place of the second set's token; the order is kept. The agents are the tokens left:
fewer than n when a row has fewer tokens. The choice has no gradient, and costs N^2 / 4 cosines in the first round.
Unlike in ToMe, queries are compared, not keys, and the sizes do not enter the softmax.

For each agent, the bias of a token is a 7 x 7 table, interpolated bilinearly (pixel centres, borders repeated) at the
token's place on the grid, plus a row term and a column term; tokens off the grid share a single number. The row and
column terms are stored for `bias_grid` and interpolated linearly on other grids; a sequence without `grid` is a grid of
one row, of its own length.
Deviations: the agent bias is off unless `agent_bias` turns it on. Pooling is done after the head split, which gives the
same result, since it acts on each channel alone. Dropout applies to both weight matrices as in the paper, but a running
softmax (causal-self, absorbed memory) keeps all its weights, so only the queries' weights are dropped there. DWC exists
in noncausal-self only.
"""

from __future__ import annotations

from typing import Any

import torch

from regard.contract import (
    ALL_PATTERNS,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Shape,
    Tensors,
    Waiver,
)
from regard.core.sampling import attention_shapes, normals
from regard.engines.softmax_scan import ScanState
from regard.mechanisms.agent.definition import Config, reference
from regard.mechanisms.agent.forms import _widths, absorb, chunked, parallel, read
from regard.mechanisms.agent.layer import (
    BLOCK,
    AgentInputs,
    BiasTables,
    ConvolvedAgents,
    DepthwiseConvolution,
    biases_on_map,
)


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
    """Normal inputs for tests: agents, unless the options and the pattern pool them, and the biases of both
    softmaxes."""
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
    """Number of agents."""
    return {"a": config.num_agents}


def cost(shape: Shape, config: Any) -> Cost:
    """Cost of two softmax products with the agents, one over keys and one over queries, and of the similarities that
    merging computes."""
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
    combines="softmax",
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
            "bins divide the whole grid, masked rows included, so a mask inside it shifts nothing",
            variants=("on a grid", "block bias", "biases of lines", "all biases"),
        ),
        Waiver(
            "memory",
            "agents pooled from queries need those before the memory is read",
            patterns=(Pattern.NONCAUSAL_CROSS,),
            variants=("pooled",),
        ),
        Waiver("layer_lengths", "its rounds of merging are fixed when the program is compiled", variants=("merged",)),
    ),
)


__all__ = [
    "BLOCK",
    "MECHANISM",
    "AgentInputs",
    "BiasTables",
    "Config",
    "ConvolvedAgents",
    "DepthwiseConvolution",
    "absorb",
    "axis_sizes",
    "biases_on_map",
    "chunked",
    "cost",
    "parallel",
    "read",
    "reference",
    "sample_inputs",
]
