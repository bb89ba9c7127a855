r"""ProbSparse attention: only the queries whose scores stand out attend; the others get the mean of the values.

When to pick it: long noncausal inputs, as in forecasting, where only a few queries need to look something up.
When not: causal models (who attends depends on later queries), short inputs (nearly all queries are chosen), or where
every token must look something up.

Definition (Zhou et al., arXiv 2012.07436, equations 2-4 and algorithm 1; benchmark arXiv 2210.07661, CAB), for factor f
and scale s, with u = min(m, f ceil(ln m)) keys sampled out of m, and t = min(n, f ceil(ln n)) of n queries, at least
one each:

    M_i = max over sampled j of q_i . k_j - 1 / m sum over sampled j of q_i . k_j
    o_i = softmax_j(s q_i . k_j) v_j over all keys    for the t queries of largest M_i
        = mean_j v_j                                  for the others

| paper | here |
|---|---|
| c, the sampling factor | `factor` (f) |
| U = L_K ln L_Q sampled pairs | u keys, the same for all queries of a row |
| M-bar, the max-mean measurement | M_i |

Layout: q (B, H, N, D), k and v (B, G, M, D). m and n are counted per row, and padding is neither sampled nor averaged
(the benchmark's code does both). Each head chooses separately. The choice has no gradient.
Deviations: the original draws u keys for each query, with repetition and at every call, even in evaluation. Here
queries share the sample, so that M is one small matrix product, and it is spread evenly over the row: key floor((i +
r_i) m / u) for i < u, with r_i = 1/2, or drawn from [0, 1) in training with `jitter`. The masked form of the original
is refused: which queries it chooses depends on later ones. Dropout is applied to the layer's output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Call, Cost, Kind, Mechanism, Paper, Pattern, Shape, Waiver, at_least
from regard.core.draws import uniform
from regard.core.precision import wide_dtype, without_autocast
from regard.engines.attention import Visibility, attention, ranks

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        factor: f, >= 1: keys sampled and queries chosen per unit of ceil(ln length).
        jitter: whether sampled keys move randomly within their strata in training.
    """

    factor: int = 5
    jitter: bool = True

    def __post_init__(self) -> None:
        at_least("factor", self.factor, 1)

    def count(self, length: int) -> int:
        """How many of `length` tokens are sampled or chosen."""
        return min(length, max(1, self.factor * math.ceil(math.log(length)))) if length else 0


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    config: Config = call.config
    n, m, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if n == 0 or m == 0:
        return v.new_zeros(*q.shape[:3], v.shape[3])
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    u = config.count(m)
    sampled = ((torch.arange(u, device=q.device) + _places(call, u, q.device)) * m / u).long()
    scores = q @ k[:, :, sampled].mT
    measure = scores.amax(-1) - scores.sum(-1) / m
    chosen = torch.zeros_like(measure, dtype=torch.bool)
    chosen.scatter_(2, measure.topk(config.count(n), -1).indices, True)
    full = (call.scale * q @ k.mT).softmax(-1) @ v
    return torch.where(chosen[..., None], full, v.mean(2, keepdim=True))


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Float[Tensor, "b h n v"]:
    """Attention for the chosen queries only."""
    n, m = q.shape[2], k.shape[2]
    if n == 0 or m == 0:
        return v.new_zeros(*q.shape[:3], v.shape[3])
    dtype, groups = wide_dtype(q), q.shape[1] // k.shape[1]
    keys, values = k.to(dtype), v.to(dtype)
    chosen, among = _choose(call, q.to(dtype), keys)
    queries = q.to(dtype).gather(2, chosen[..., None].expand(-1, -1, -1, q.shape[3]))
    cross = call.replace(pattern=Pattern.NONCAUSAL_CROSS, lengths=None)
    where = ranks(cross, queries.shape[2], m, q.device)
    found, _, _ = attention(
        queries, keys, values, where, visibility=Visibility(), scale=call.scale, backend=call.backend
    )
    count = m if call.memory_lengths is None else call.memory_lengths.clamp(min=1)[:, None, None, None]
    mean = (values.sum(2, keepdim=True) / count).repeat_interleave(groups, 1)
    if among is not None:
        found = torch.where(among, found, mean)
    output = mean.expand(-1, -1, n, -1).scatter(2, chosen[..., None].expand_as(found), found)
    return output.to(v.dtype)


@torch.no_grad()
def _choose(call: Call, q: Tensor, k: Tensor) -> tuple[Int[Tensor, "b h t"], Tensor | None]:
    """The queries of largest M, as many as the longest row chooses, and a mask of each row's choices (None: all)."""
    config: Config = call.config
    n, m, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    total = call.memory_lengths
    if total is None:
        total = torch.full((q.shape[0],), m, device=q.device)
    u, own, total = config.count(m), _counts(config, total)[:, None], total[:, None]
    index = torch.arange(u, device=q.device)
    sampled = ((index + _places(call, u, q.device)) * total / own).long().clamp(max=m - 1)[:, None, :, None]
    sample = k.gather(2, sampled.expand(-1, k.shape[1], -1, k.shape[3]))
    with without_autocast(q.device):
        scores = q @ sample.repeat_interleave(groups, 1).mT
    beyond = (index >= own)[:, None, None]
    largest = scores.masked_fill(beyond, torch.finfo(scores.dtype).min).amax(-1)
    measure = largest - scores.masked_fill(beyond, 0).sum(-1) / total.clamp(min=1)[:, None]
    valid = call.valid_queries(n)
    if valid is not None:
        measure = measure.masked_fill(~valid[:, None], -torch.inf)
    chosen = measure.topk(config.count(n), -1).indices
    if call.lengths is None:
        return chosen, None
    order = torch.arange(chosen.shape[-1], device=q.device)
    return chosen, (order < _counts(config, call.lengths)[:, None])[:, None, :, None]


def _counts(config: Config, lengths: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """:meth:`Config.count` for each row; 1 for an empty row."""
    logarithm = lengths.clamp(min=1).double().log().ceil().long()
    return torch.minimum((config.factor * logarithm).clamp(min=1), lengths.clamp(min=1))


def _places(call: Call, u: int, device: torch.device) -> Float[Tensor, " u"]:
    """The position of each sampled key within its stratum, from 0 to 1."""
    if not (call.training and call.config.jitter):
        return torch.full((u,), 0.5, device=device, dtype=torch.float64)
    return uniform((u,), call.generator, device=device, dtype=torch.float64)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of every query's sampled scores, and of softmax attention for the chosen queries."""
    heads, width = shape.batch * shape.heads, shape.dim_key + shape.dim_value
    keys, queries = config.count(shape.m), config.count(shape.n)
    return Cost(
        flops=2.0 * heads * (shape.n * keys * shape.dim_key + queries * shape.m * width),
        memory=float(heads * (shape.n * (keys + shape.dim_value) + queries * width)),
        state=0.0,
        step_flops=0.0,
    )


LATER = "which queries attend depends on later queries"

MECHANISM = Mechanism(
    name="probsparse",
    aliases=("prob_sparse", "informer"),
    kind=Kind.ATTENTION,
    summary="Only the queries whose scores stand out attend; the others get the mean of the values.",
    paper=Paper(
        "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting", "2012.07436", 2020, 34
    ),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv"},
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS),
    refused={Pattern.CAUSAL_SELF: LATER, Pattern.CAUSAL_CROSS: LATER},
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    variants={
        "few keys": {"factor": 1, "jitter": False},
    },
    engine="attention",
    cost=cost,
    weights="implicit",
    waivers=(Waiver("layer_lengths", "its number of sampled queries is fixed when the program is compiled"),),
)
