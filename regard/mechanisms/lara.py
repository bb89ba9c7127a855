r"""Linear randomised attention (LARA): several proposals of random features, each centred near different tokens; every
query mixes the proposals by how well they suit it.

When to pick it: long noncausal inputs at linear cost, with a closer approximation of softmax than the same number of
features drawn from one distribution for all queries (`performer`).
When not: causal models (a proposal depends on later tokens), or lookups of single tokens through few proposals.

Definition (Zheng et al., arXiv 2204.04667; benchmark arXiv 2210.07661, CAB), t the scale, c proposals:

    mu_c = mean of segment c of the queries + mean of segment c of the keys,     w_c = mu_c + noise in training, else mu_c
    log phi_w(x) = t w . x - t |x|^2 / 2
    o_i = sum_c softmax_c( t mu_c . q_i + log phi_{w_c}(q_i) + logsumexp_j log phi_{w_c}(k_j) - log phi_{w_c}(mu_c) )
          softmax_j( log phi_{w_c}(k_j) ) v_j

The term |q_i|^2 is the same for all proposals of a query and cancels.

| paper | here |
|---|---|
| C proposals N(mu_c, I), one sample each | `landmarks` (c); a row with fewer tokens has one per token |
| omega_c | w: drawn in training with standard deviation `noise`; equal to mu otherwise |
| alpha, the share of a proposal | the outer softmax |

Layout: q (B, H, N, D), k and v (B, G, M, D). A row's valid tokens are split into segments whose sizes differ by at most
one token, the shorter ones first. In noncausal-cross (not in the paper) queries and keys are segmented separately, into
equally many segments. Padding enters neither segments nor sums; the benchmark's code averages padded tokens.
Deviations: one sample per proposal, without its antithetic twin; segment means without learned projections. Each
proposal's weights over the keys sum to 1, so outputs are means of values, but the implied weights are not those of
softmax attention however many proposals there are. Dropout is applied to the layer's output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Call, Cost, Kind, Mechanism, Paper, Pattern, Shape, Unsupported, Waiver, at_least
from regard.core.draws import normal
from regard.core.precision import wide_dtype, without_autocast
from regard.engines.segments import segment_means

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        landmarks: c, the number of proposals, >= 1.
        noise: standard deviation of w around mu in training, >= 0 and finite; 0 for none.
    """

    landmarks: int = 16
    noise: float = 1.0

    def __post_init__(self) -> None:
        at_least("landmarks", self.landmarks, 1)
        if not 0 <= self.noise < math.inf:
            raise Unsupported(f"noise={self.noise}", supported="0 <= noise < inf", nearest="noise=1.0")


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, one proposal at a time."""
    _check(call)
    groups, t = q.shape[1] // k.shape[1], call.scale
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    count = min(call.config.landmarks, q.shape[2], k.shape[2])
    noise = _noise(call, q)

    def segment(x: Tensor, c: int) -> Tensor:
        size, longer = divmod(x.shape[2], count)
        start = c * size + max(c - (count - longer), 0)
        return x[:, :, start : start + size + (c >= count - longer)]

    def log_phi(w: Tensor, x: Tensor) -> Tensor:
        return t * (w[:, :, None] * x).sum(-1) - t / 2 * x.square().sum(-1)

    scores, gathered = [], []
    for c in range(count):
        mu = segment(q, c).mean(2) + segment(k, c).mean(2)
        w = mu if noise is None else mu + noise[:, :, c]
        keys = log_phi(w, k)
        own = log_phi(w, mu[:, :, None])
        scores.append(t * (mu[:, :, None] * q).sum(-1) + log_phi(w, q) + keys.logsumexp(-1, keepdim=True) - own)
        gathered.append((keys.softmax(-1)[..., None] * v).sum(2))
    if not gathered:
        return v.new_zeros(*q.shape[:3], v.shape[3])
    return torch.stack(scores, -1).softmax(-1) @ torch.stack(gathered, 2)


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Float[Tensor, "b h n v"]:
    """Each proposal averages the values over all keys, then queries mix the proposals."""
    _check(call)
    dtype, t, groups = wide_dtype(q), call.scale, q.shape[1] // k.shape[1]
    q, k, values = q.to(dtype), k.to(dtype), v.to(dtype)
    mu, exists = _proposals(call, q, k)
    k, values = k.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    noise = _noise(call, q)
    w = mu if noise is None else mu + noise[:, :, : mu.shape[2]]
    with without_autocast(q.device):
        keys = t * (w @ k.mT) - t / 2 * k.square().sum(-1)[:, :, None]
        valid = call.valid_keys(k.shape[2])
        if valid is not None:
            keys = keys.masked_fill(~valid[:, None, None], torch.finfo(dtype).min)
        own = t * (w * mu).sum(-1) - t / 2 * mu.square().sum(-1)
        offset = keys.logsumexp(-1) - own
        shares = _softmax(t * (q @ (mu + w).mT) + offset[:, :, None], exists)
        return (shares @ (keys.softmax(-1) @ values)).to(v.dtype)


def _proposals(call: Call, q: Tensor, k: Tensor) -> tuple[Float[Tensor, "b h c d"], Bool[Tensor, "b c"] | None]:
    """mu, and which proposals each row has (None when every row has all of them)."""
    most, groups = min(call.config.landmarks, q.shape[2], k.shape[2]), q.shape[1] // k.shape[1]
    if call.lengths is None and call.memory_lengths is None:
        return segment_means(q, most) + segment_means(k, most).repeat_interleave(groups, 1), None
    lengths, memory_lengths = (
        torch.full((x.shape[0],), x.shape[2], device=x.device) if given is None else given
        for x, given in ((q, call.lengths), (k, call.memory_lengths))
    )
    counts = torch.minimum(lengths, memory_lengths).clamp(max=most)
    queries, keys = segment_means(q, most, lengths, counts), segment_means(k, most, memory_lengths, counts)
    exists = torch.arange(most, device=q.device) < counts[:, None]
    return queries + keys.repeat_interleave(groups, 1), exists


def _noise(call: Call, q: Tensor) -> Float[Tensor, "b h c d"] | None:
    """The noise on mu in training, or None outside it; the draws do not depend on the lengths."""
    config: Config = call.config
    if not (call.training and config.noise):
        return None
    shape = (*q.shape[:2], config.landmarks, q.shape[3])
    drawn = normal(shape, call.generator, device=q.device, dtype=torch.float32)
    return config.noise * drawn.to(wide_dtype(q))


def _softmax(scores: Float[Tensor, "b h n c"], exists: Bool[Tensor, "b c"] | None) -> Float[Tensor, "b h n c"]:
    """Softmax over the proposals that a row has; the others get 0."""
    if exists is None:
        return scores.softmax(-1)
    exists = exists[:, None, None]
    return torch.where(exists, scores.masked_fill(~exists, torch.finfo(scores.dtype).min).softmax(-1), 0)


def _check(call: Call) -> None:
    if call.scale < 0:
        raise Unsupported(f"lara with scale={call.scale}", supported="scale >= 0", nearest="-q and scale >= 0")


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of pairing each of the c landmarks with every query and every key."""
    heads, width = shape.batch * shape.heads, shape.dim_key + shape.dim_value
    c = min(config.landmarks, shape.n, shape.m)
    return Cost(
        flops=2.0 * heads * c * (shape.n + shape.m) * width,
        memory=float(heads * (2 * c * (shape.n + shape.m) + c * width)),
        state=0.0,
        step_flops=0.0,
    )


LATER = "a proposal is computed from segments that hold later tokens"

MECHANISM = Mechanism(
    name="lara",
    aliases=("linear_randomized_attention",),
    kind=Kind.ATTENTION,
    summary="Several proposals of random features, each near different tokens, which every query weights by how well they fit it.",
    paper=Paper("Linear Complexity Randomized Self-attention Mechanism", "2204.04667", 2022, 34),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv"},
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS),
    refused={Pattern.CAUSAL_SELF: LATER, Pattern.CAUSAL_CROSS: LATER},
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    variants={
        "few landmarks": {"landmarks": 3, "noise": 0.5},
    },
    cost=cost,
    weights="implicit",
    waivers=(Waiver("layer_lengths", "the borders of its landmarks are fixed when the program is compiled"),),
)
