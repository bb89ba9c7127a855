r"""SEA: a linear-cost estimate of the attention map says which few keys each query reads exactly.

When to pick it: to turn a pretrained transformer into one of linear cost by distillation, keeping attention weights that
can be looked at; the number of keys a query reads may be changed later without training.
When not: without a teacher and at training time, where the map is learned from dense scores at quadratic cost; for a state
of constant size (exact attention needs every key).

Definition (Lee et al., arXiv 2310.01777, section 3; what the paper leaves open is as in its code). For each head and
query t with n_t visible keys, an estimated map of K scores e_t, and k keys to read on average:

    p_t = softmax(e_t),   m_t = round(H k K / n_t), from 1 to H K
    kept_t = the m_t largest of the H K numbers p_t of all heads together
    pixel(t, j) = floor((j + 1/2) K / n_t - 10^-4), at least 0, for the key of rank j
    P_t = softmax over { j : pixel(t, j) in kept_t } of tau q_t . k_j,   0 if there are none
    o_t = sigmoid(b_t) sigmoid(a_t) P_t V + (1 - sigmoid(b_t)) mean_t
    mean_t = (sum_{j<=t} v_j) / (t + 1),   in noncausal-self sum_j v_j (mean over queries s of p_s)_{pixel(j)}

A layer makes e, a and b of the tokens (`Estimator`). With [pos, v] the values beside codes of their positions and c linear
attention over them by random features (FAVOR+, arXiv 2009.14794),

    z = gelu(norm(W_e [c, v])),   e = CNN(W_r z) over (query, pixel) with heads as channels,   (a, b) = W_s z

Causal: positions are a learned table; phi(x) = relu(W x d^-1/4) + 10^-3; two dilated convolutions that see queries up to t, on
K / 4 pixels, a 1 x 1 convolution, and norms before and after. Noncausal-self: positions are the identity matrix, stretched
over the row; phi is the softmax kernel; three convolutions of which the first halves the queries, on K / 2 pixels.

Distillation (`losses["distillation"]`, the mean over layers), A the teacher's weights, o^A its head outputs, R(e) the map of
scores e_{pixel(t, j)}, KL the mean over heads and queries (in noncausal-self the sum over heads) and MSE the mean over pairs or
features:

    loss = 0.1 KL(A, softmax R(e)) + MSE + 0.1 KL(A, softmax of all exact scores) + MSE + MSE(o^A, o)

The teacher is `teacher={"weights": (B, H, N, M), "output": (B, H, N, V)}`, right-padded, "output" optional. In training without
one, the layer's own exact weights, without gradient, stand for A, and only the first two terms remain (`self_teacher`).
:func:`regard.training.distillation_loss` distils a whole model.

| paper | here |
|---|---|
| T_M, predictor length K | `estimate_length` of a layer; the last axis of `estimate` |
| k | `top_k`; the code's default 7, its language models use 64 |
| a, b (scaler) | `row_logit`, `mix_logit` (B, H, N); left out: o_t = P_t V |
| nb_factor f | `feature_divisor`: d ln d / f random features |
| k_oversample | `oversample`: more pixels, of whose tokens a regular part is read |
| causal_batch, k_flatten_dim | `grouping="row"` as above; `query`, `head`, `batch` rank other sets together |

Layout: (B, H, N, D), `estimate` (B, H, N, K); keys and values may have fewer heads. n_t is the query's own number of keys,
never N. Nothing of the selection is differentiated: e learns from the distillation and, in noncausal-self, from the mean.
Cost: tokens are gathered (about 2 H k a query) once that is less work than masked products over all keys, which go block by
block of queries; neither keeps an N x M matrix. In training all exact scores are computed. If n_t is beyond H k K, the one
pixel that is kept grows with n_t.
State: every key and value and the sum of the values; of a layer also the sums of the linear attention and the last four
rows of each convolution.
Deviations: cross patterns are not in the paper: their estimator is the causal one over the whole memory, with q in place of v
beside c, and their mean is that of the memory. Keys of padding take no part in the linear attention, nor padded queries in the
CNN; in the code they do. Equal probabilities, frequent in the causal map, go to the first pixel. A layer estimates for every
query, since its convolutions and their state go over consecutive queries; functions read one estimate for several queries where
`estimate` repeats its rows. LoRA, with which the code may train the projections, is not of this mechanism but of any
layer's projections.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Cost,
    Kind,
    LayerSpec,
    Loss,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    State,
    Tensors,
    Unsupported,
    Waiver,
    at_least,
    lengths_after,
    one_of,
    state_field,
)
from regard.core.precision import wide, without_autocast
from regard.core.visibility import Ranks, ranks
from regard.engines.cache import append
from regard.engines.linear_attention import Rule, divide, linear_attention, map_memory
from regard.layers.attention_map import CausalMap, CodebookMap, NoncausalMap, orthogonal_features, softmax_features
from regard.layers.parts import LayerCall, Projection

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

NUMBERS_AT_ONCE = 1 << 22
"""Scores or gathered features above which queries are taken block by block."""

DENSE_ADVANTAGE = 32
"""How much cheaper a masked product over all keys is than the gathering of one key, a pair."""

GROUPINGS = ("row", "query", "head", "batch")


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        top_k: k, keys that a query reads in each head on average, >= 1. May differ from that in training.
        estimate_length: K, pixels of a layer's map: a multiple of 4, of 2 in noncausal-self, of 16 with the codebook.
        grouping: which probabilities are ranked together: ``row`` (all heads of a query), ``query`` (one head of a query),
            ``head`` (one head of all queries) or ``batch`` (a whole map); the last two in noncausal-self only.
        oversample: >= 1; keeps that many times the pixels, and of their tokens a regular part.
        row_scale: a layer multiplies P by sigmoid(a).
        estimator: ``cnn`` or ``codebook`` (each 16 pixels are a mixture of 8 learned patches).
        joint_encoder: one W_e over all heads instead of one for each.
        kernel: of the linear attention: ``performer`` or ``cosformer`` (relu features turned by position, arXiv
            2202.08791; self patterns only).
        feature_divisor: f > 0.
        redraw_every: a layer draws new random features after so many calls in training; 0 for never.
        length: the most keys that a sequence may have, >= 1: rows of the table of positions (no limit in noncausal-self).
        jitter: probability in [0, 1] that a call in training moves token ranks by up to 3/4 before the pixels.
        self_teacher: in training without a teacher, learn the map from the layer's own exact scores.
    """

    top_k: int = 7
    estimate_length: int = 128
    grouping: str = "row"
    oversample: float = 1.0
    row_scale: bool = True
    estimator: str = "cnn"
    joint_encoder: bool = False
    kernel: str = "performer"
    feature_divisor: float = 1.0
    redraw_every: int = 1000
    length: int = 2048
    jitter: float = 0.1
    self_teacher: bool = True

    def __post_init__(self) -> None:
        at_least("top_k", self.top_k, 1)
        at_least("estimate_length", self.estimate_length, 1)
        at_least("length", self.length, 1)
        at_least("redraw_every", self.redraw_every, 0)
        one_of("grouping", self.grouping, GROUPINGS)
        one_of("estimator", self.estimator, ("cnn", "codebook"))
        one_of("kernel", self.kernel, ("performer", "cosformer"))
        if not 1 <= self.oversample < math.inf:
            raise Unsupported(f"oversample={self.oversample}", supported="a finite oversample >= 1", nearest="1.0")
        if not 0 < self.feature_divisor < math.inf:
            raise Unsupported(f"feature_divisor={self.feature_divisor}", supported="a finite number > 0", nearest="1.0")
        if not 0 <= self.jitter <= 1:
            raise Unsupported(f"jitter={self.jitter}", supported="0 <= jitter <= 1", nearest="jitter=0.1")


@dataclass(frozen=True)
class SeaState(State):
    """Every key and value so far, as in :class:`regard.engines.cache.KeyValueState`, and the sum of the values."""

    k: Float[Tensor, "b g past d"] = state_field()
    v: Float[Tensor, "b g past v"] = state_field()
    ranks: Int[Tensor, "b past"] = state_field(fill=-1)
    total: Float[Tensor, "b g v"] = state_field()
    length: Int[Tensor, " b"] = state_field()


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    estimate: Float[Tensor, "b h n c"],
    row_logit: Float[Tensor, "b h n"] | None = None,
    mix_logit: Float[Tensor, "b h n"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, query by query and head by head."""
    config: Config = call.config
    _check(call)
    batch, heads, n, _ = q.shape
    m, pixels = k.shape[2], estimate.shape[-1]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    seen = [max(t + m - n + 1, 0) if call.pattern is Pattern.CAUSAL_SELF else m for t in range(n)]
    p = estimate.softmax(-1)
    wanted = [config.top_k * config.oversample * pixels / max(total, 1) for total in seen]
    output = q.new_zeros(batch, heads, n, v.shape[-1])
    for b in range(batch):
        kept: Any = torch.zeros(heads, n, pixels, dtype=torch.bool, device=q.device)
        groups: Any = {
            "row": [(slice(None), t, heads * wanted[t]) for t in range(n)],
            "query": [(h, t, wanted[t]) for h in range(heads) for t in range(n)],
            "head": [(h, slice(None), sum(wanted)) for h in range(heads)],
            "batch": [(slice(None), slice(None), heads * sum(wanted))],
        }[config.grouping]
        for h, t, budget in groups if n else ():
            flat = p[b, h, t].detach().reshape(-1)
            first = flat.argsort(descending=True, stable=True)[: max(1, round(budget))]
            chosen = torch.zeros(len(flat), dtype=torch.bool, device=q.device).index_fill(0, first, True)
            kept[h, t] = chosen.view(kept[h, t].shape)
        for t in range(n):
            places = [min(max(math.floor((j + 0.5) / seen[t] * pixels - 1e-4), 0), pixels - 1) for j in range(seen[t])]
            tokens = torch.arange(seen[t], device=q.device)
            for h in range(heads):
                read = kept[h, t, places] & _read_regularly(config, tokens, torch.tensor(seen[t], device=q.device))
                scores = call.scale * k[b, h, : seen[t]] @ q[b, h, t]
                o = scores[read].softmax(0) @ v[b, h, : seen[t]][read]
                o = o if row_logit is None else row_logit[b, h, t].sigmoid() * o
                if mix_logit is not None and seen[t]:
                    mean = v[b, h, : seen[t]].mean(0)
                    if call.pattern is Pattern.NONCAUSAL_SELF:
                        mean = p[b, h].mean(0)[places] @ v[b, h]
                    share = mix_logit[b, h, t].sigmoid()
                    o = share * o + (1 - share) * mean
                output[b, h, t] = o
    return output


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    estimate: Float[Tensor, "b h n c"],
    row_logit: Float[Tensor, "b h n"] | None = None,
    mix_logit: Float[Tensor, "b h n"] | None = None,
) -> Result:
    return _attend(call, _Keys.of_call(call, q.shape[2], k, v), q, estimate, row_logit, mix_logit)


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    estimate: Float[Tensor, "b h n c"],
    row_logit: Float[Tensor, "b h n"] | None = None,
    mix_logit: Float[Tensor, "b h n"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens; also the step."""
    return _attend(call, _Keys.of_call(call, q.shape[2], k, v), q, estimate, row_logit, mix_logit)


def absorb(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]) -> SeaState:
    """Memory into a cache; more may follow."""
    return _Keys.of_call(call, 0, k, v).state


def read(
    call: Call,
    q: Float[Tensor, "b h n d"],
    estimate: Float[Tensor, "b h n c"],
    row_logit: Float[Tensor, "b h n"] | None = None,
    mix_logit: Float[Tensor, "b h n"] | None = None,
) -> Result:
    """Queries on absorbed memory."""
    state: SeaState = call.state
    where = ranks(call, q.shape[2], 0, q.device, state.ranks, state.length)
    return _attend(call, _Keys(state, where, None), q, estimate, row_logit, mix_logit)


def _check(call: Call) -> None:
    grouping, pattern = call.config.grouping, call.pattern
    if grouping in ("head", "batch") and pattern is not Pattern.NONCAUSAL_SELF:
        raise Unsupported(
            f"grouping={grouping!r} in {pattern.value}, where queries would depend on others",
            supported="row, query",
            nearest="grouping='row'",
        )


@dataclass(frozen=True)
class _Keys:
    """The keys that the queries of a call may read.

    Attributes:
        state: the keys and values, cached ones first, and the sum of the values.
        where: ranks of the queries and of the key slots.
        sums: running sums of the new values on top of those before, (B, G, M + 1, V), from none of them to all; None where
            the queries see all of the memory.
    """

    state: SeaState
    where: Ranks
    sums: Float[Tensor, "b g m1 v"] | None

    @staticmethod
    def of_call(call: Call, n: int, k: Tensor, v: Tensor) -> _Keys:
        past: SeaState | None = call.state
        batch, m = k.shape[0], k.shape[2]
        before = None if past is None else past.length
        length = lengths_after(before, call.memory_lengths, batch, m, k.device)
        precise = wide(v)
        sums = F.pad(precise, (0, 0, 1, 0))
        if past is not None:
            sums = torch.cat([past.total[:, :, None], precise], 2)
        sums = sums.cumsum(2)
        if past is None:
            where = ranks(call, n, m, k.device)
            return _Keys(SeaState(k, v, where.keys.expand(batch, -1), sums[:, :, -1], length), where, sums)
        if n > m:
            raise Unsupported(
                f"sea continuing with {n} queries and {m} keys, of which the first precede the state's end",
                supported="at most as many queries as new keys",
            )
        where = ranks(call, n, m, k.device, past.ranks, past.length)
        k, v = append(past.k, k.to(past.k.dtype), 2), append(past.v, v.to(past.v.dtype), 2)
        return _Keys(SeaState(k, v, where.keys, sums[:, :, -1], length), where, sums)

    def totals(self, call: Call) -> Int[Tensor, "#b #n"]:
        """n_t: keys that each query may see."""
        if call.pattern is Pattern.CAUSAL_SELF:
            return (self.where.queries + 1).clamp(min=0)
        return (self.where.keys >= 0).sum(-1, keepdim=True)

    def mean(self, call: Call, totals: Int[Tensor, "#b #n"]) -> Float[Tensor, "b g #n v"]:
        """Mean of the values that each query may see."""
        count = totals.clamp(min=1)[:, None, :, None]
        if call.pattern is not Pattern.CAUSAL_SELF:
            return self.state.total[:, :, None] / count
        assert self.sums is not None
        before = 0 if call.state is None else call.state.length[:, None]
        index = (totals - before).clamp(0, self.sums.shape[2] - 1).expand(self.sums.shape[0], -1)
        taken = self.sums.gather(2, index[:, None, :, None].expand(-1, self.sums.shape[1], -1, self.sums.shape[3]))
        return taken / count

    def slots(self) -> Int[Tensor, "b m"] | None:
        """Slot of the key of each rank; None where it is the rank."""
        keys = self.where.keys
        if self.where.offset is not None or keys.shape[0] == 1:
            return None
        m = keys.shape[1]
        named = torch.where(keys < 0, m, keys)
        slots = torch.arange(m, device=keys.device).expand_as(keys)
        return keys.new_zeros(keys.shape[0], m + 1).scatter(1, named, slots)[:, :m]


def _attend(
    call: Call, keys: _Keys, q: Tensor, estimate: Tensor, row_logit: Tensor | None, mix_logit: Tensor | None
) -> Result:
    _check(call)
    config: Config = call.config
    batch, heads, n, _ = q.shape
    k, v, m = keys.state.k, keys.state.v, keys.state.k.shape[2]
    totals, pixels = keys.totals(call), estimate.shape[-1]
    result = Result(v.new_zeros(batch, heads, n, v.shape[-1]), keys.state)
    if pixels == 0:
        raise Unsupported("sea with an estimate of no pixels", supported="at least one")
    if n == 0 or m == 0:
        return result
    kept = _kept(config, estimate, totals, call.valid_queries(n))
    jitter = _draw_jitter(call, batch, m, q.device)
    want_weights = "weights" in call.want
    most = _most_read(config, heads, pixels, _fewest_keys(call, n, m), m)
    scaled = call.scale * wide(q)
    if jitter is not None or want_weights or DENSE_ADVANTAGE * most >= heads * m:
        compute, numbers = _dense_rows(config, keys.where.keys, jitter, want_weights), heads * m
    else:
        compute, numbers = _gathered_rows(config, keys.slots(), most), most * (q.shape[-1] + v.shape[-1])
    output, *more = _by_rows(compute, batch * numbers, totals.expand(-1, n), (k, v), (kept, scaled))
    weights = more[0] if more else None
    if row_logit is not None:
        scale = wide(row_logit).sigmoid()[..., None]
        output, weights = scale * output, None if weights is None else scale * weights
    if mix_logit is not None:
        share = wide(mix_logit).sigmoid()[..., None]
        mean = _mean(call, keys, estimate, totals)
        output = share * output + (1 - share) * mean.repeat_interleave(heads // mean.shape[1], 1)
    output = torch.where(totals[:, None, :, None] > 0, output, 0)
    result.output = output.to(v.dtype)
    if weights is not None:
        result.extras["weights"] = weights.to(v.dtype)
    if call.teacher is not None or (call.training and config.self_teacher):
        result.losses["distillation"] = _distillation(call, keys, scaled, estimate, output, totals, jitter)
    return result


def _mean(call: Call, keys: _Keys, estimate: Tensor, totals: Tensor) -> Float[Tensor, "b #h #n v"]:
    """The value that a query gets where it does not attend."""
    if call.pattern is not Pattern.NONCAUSAL_SELF:
        return keys.mean(call, totals)
    p = wide(estimate).softmax(-1)
    valid = call.valid_queries(p.shape[2])
    if valid is None:
        p = p.mean(2)
    else:
        p = torch.where(valid[:, None, :, None], p, 0).sum(2) / valid.sum(-1).clamp(min=1)[:, None, None]
    pixel, visible = _pixels(keys.where.keys, totals, p.shape[-1])  # (b, 1, m)
    weights = p.gather(-1, pixel.expand(p.shape[0], p.shape[1], -1))
    v = wide(keys.state.v).repeat_interleave(p.shape[1] // keys.state.v.shape[1], 1)
    return (torch.where(visible, weights, 0)[:, :, None] @ v).to(v.dtype)


def _kept(
    config: Config, estimate: Float[Tensor, "b h n c"], totals: Int[Tensor, "#b #n"], valid: Bool[Tensor, "b n"] | None
) -> Bool[Tensor, "b h n c"]:
    """The pixels of highest probability; the first of equal ones. In float64, so that all forms keep the same."""
    batch, heads, n, pixels = estimate.shape
    scores = estimate.detach().double()
    scores = scores - scores.logsumexp(-1, keepdim=True)
    wanted = config.top_k * config.oversample * pixels / totals.clamp(min=1).double()
    if config.grouping == "row":
        scores, budget = scores.transpose(1, 2).flatten(2), heads * wanted  # (b, n, h * c)
    elif config.grouping == "query":
        budget = wanted[:, None]
    else:
        rows = torch.tensor(n, device=scores.device) if valid is None else valid.sum(-1)
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, :, None], -torch.inf)
        budget = wanted[:, 0] * rows  # (b,)
        scores = scores.flatten(2)
        if config.grouping == "batch":
            scores, budget = scores.flatten(1), heads * budget
        else:
            budget = budget[:, None]
    budget = budget.round().clamp(min=1).long()[..., None]
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    kept = torch.zeros_like(order).scatter(-1, order, place) < budget
    if config.grouping == "row":
        return kept.unflatten(-1, (heads, pixels)).transpose(1, 2)
    return kept.reshape(batch, heads, n, pixels)


def _draw_jitter(call: Call, batch: int, m: int, device: torch.device) -> Float[Tensor, "b m"] | None:
    """The shift of the tokens' ranks in training; None outside training."""
    config: Config = call.config
    if not call.training or config.jitter == 0:
        return None
    draw = torch.rand(batch, m + 1, generator=call.generator, device=device, dtype=torch.float64)
    return (1.5 * draw[:, 1:] - 0.75) * (draw[:1, :1] < config.jitter)


def _pixels(
    keys: Int[Tensor, "#b m"], totals: Int[Tensor, "#b #n"], pixels: int, jitter: Float[Tensor, "b m"] | None = None
) -> tuple[Int[Tensor, "#b #n m"], Bool[Tensor, "#b #n m"]]:
    """Pixel of each key in the map of each query, and whether the query sees the key."""
    j, total = keys[:, None, :], totals[:, :, None]
    visible = (j >= 0) & (j < total)
    if jitter is None:
        # floor((j + 1/2) K / n - 1e-4) in whole numbers
        pixel = ((2 * j + 1) * (5000 * pixels) - total).div(10000 * total.clamp(min=1), rounding_mode="floor")
    else:
        pixel = (((j + jitter[:, None] + 0.5) / total.clamp(min=1)) * pixels - 1e-4).floor().long()
    return pixel.clamp(0, pixels - 1), visible


def _first_tokens(totals: Int[Tensor, "b n"], pixels: int) -> Int[Tensor, "b n c1"]:
    """Rank of the first token of each pixel, and the number of tokens after the last."""
    total = totals[..., None]
    pixel = torch.arange(pixels + 1, device=totals.device)
    first = -((5000 * pixels - total * (10000 * pixel + 1)).div(10000 * pixels, rounding_mode="floor"))
    return torch.where(pixel == 0, 0, torch.where(pixel == pixels, total, torch.minimum(first, total)))


def _read_regularly(config: Config, tokens: Tensor, totals: Tensor) -> Bool[Tensor, "..."]:
    """With oversampling, which of the tokens of kept pixels are read: about one in `oversample`, evenly."""
    if config.oversample == 1:
        return torch.ones_like(tokens, dtype=torch.bool)
    total = totals.double()
    parts = (total / config.oversample).round().clamp(min=1)
    scaled = (tokens + 1) / total.clamp(min=1) * parts
    step = total.clamp(config.top_k, config.top_k * config.oversample) / config.top_k
    return (scaled - scaled.round()).abs() <= 0.5 / step + 1e-4


def _fewest_keys(call: Call, n: int, m: int) -> int:
    """Fewest keys that any query may see, as far as the sizes tell."""
    if call.lengths is not None or call.memory_lengths is not None or call.state is not None:
        return 1
    return max(1, m - n + 1) if call.pattern is Pattern.CAUSAL_SELF else m


def _most_read(config: Config, heads: int, pixels: int, fewest: int, most: int) -> int:
    """A bound on the tokens that all heads of a query read together, for `fewest` to `most` visible keys."""
    groups = heads if config.grouping == "query" else 1
    wanted = heads * config.top_k * config.oversample
    bound = wanted + most / pixels * groups + wanted * pixels / max(fewest, pixels) + groups
    if fewest < pixels:  # a pixel has one token or none
        bound = max(bound, heads * math.sqrt(config.top_k * config.oversample * pixels) + groups)
    every = heads * most
    return every if config.grouping in ("head", "batch") else min(every, math.ceil(bound))


Compute = Callable[..., tuple[Tensor, ...]]


def _by_rows(
    compute: Compute, numbers: int, totals: Tensor, whole: tuple[Tensor, ...], by_query: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """``compute(totals, *whole, *by_query)``, where a query has about so many numbers of temporary storage.

    It is done on blocks of queries when there are many numbers, and then what lies in between is computed again for
    gradients.
    """
    n = totals.shape[1]
    size = max(1, NUMBERS_AT_ONCE // max(numbers, 1))
    with without_autocast(totals.device):  # all of it is in float32 at least
        if size >= n:
            return compute(totals, *whole, *by_query)
        parts = []
        for start in range(0, n, size):
            rows = slice(start, start + size)
            inputs = (totals[:, rows], *whole, *(x[:, :, rows] for x in by_query))
            if torch.is_grad_enabled():
                parts.append(checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(compute(*inputs))
    return tuple(torch.cat(found, 2) for found in zip(*parts, strict=True))


def _dense_rows(config: Config, keys: Tensor, jitter: Tensor | None, want_weights: bool) -> Compute:
    """Products with all keys, of which only the kept ones count."""

    def compute(totals: Tensor, k: Tensor, v: Tensor, kept: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        heads = q.shape[1]
        pixel, visible = _pixels(keys, totals, kept.shape[-1], jitter)
        if config.oversample > 1:
            visible = visible & _read_regularly(config, keys[:, None], totals[:, :, None])
        pixel = pixel[:, None].expand(*kept.shape[:3], -1)
        allowed = kept.gather(-1, pixel) & visible[:, None]
        scores = q @ wide(k).repeat_interleave(heads // k.shape[1], 1).mT
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
        weights = torch.where(allowed, weights, 0)
        output = weights @ wide(v).repeat_interleave(heads // v.shape[1], 1)
        return (output, weights) if want_weights else (output,)

    return compute


def _gathered_rows(config: Config, slots: Tensor | None, most: int) -> Compute:
    """Products with the kept keys alone: at most `most` for each query, those of one head after those of another."""

    def compute(totals: Tensor, k: Tensor, v: Tensor, kept: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        batch, heads, n, _ = q.shape
        pixels, m = kept.shape[-1], k.shape[2]
        first = _first_tokens(totals, pixels)
        counts = (first.diff(dim=-1)[:, :, None] * kept.transpose(1, 2)).flatten(2)  # (b, n, h * c)
        ends = counts.cumsum(-1)
        entry = torch.arange(most, device=q.device).expand(batch, n, -1).contiguous()
        place = torch.searchsorted(ends, entry, right=True)
        inside = place < heads * pixels
        place = place.clamp(max=heads * pixels - 1)
        head = place.div(pixels, rounding_mode="floor")
        token = entry - (ends - counts).gather(-1, place) + first.expand(batch, -1, -1).gather(-1, place % pixels)
        token = token.clamp(0, m - 1)
        if config.oversample > 1:
            inside = inside & _read_regularly(config, token, totals[..., None])
        slot = token if slots is None else slots.gather(1, token.flatten(1)).view_as(token)
        row = torch.arange(batch, device=q.device)[:, None, None]
        query = torch.arange(n, device=q.device)[:, None]
        group = head.div(heads // k.shape[1], rounding_mode="floor")
        scores = (wide(k[row, group, slot]) * q[row, head, query]).sum(-1)
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~inside, lowest)
        top = scores.new_full((batch, n, heads), lowest).scatter_reduce(-1, head, scores.detach(), "amax")
        weights = torch.where(inside, (scores - top.gather(-1, head)).exp(), 0)
        weighted = weights[..., None] * wide(v[row, group, slot])
        sums = weights.new_zeros(batch, n, heads).scatter_add(-1, head, weights)
        output = weighted.new_zeros(batch, n, heads, v.shape[-1])
        output = output.scatter_add(2, head[..., None].expand_as(weighted), weighted)
        output = output / torch.where(sums > 0, sums, 1)[..., None]
        return (output.transpose(1, 2),)

    return compute


def _distillation(
    call: Call,
    keys: _Keys,
    q: Float[Tensor, "b h n d"],
    estimate: Float[Tensor, "b h n c"],
    output: Float[Tensor, "b h n v"],
    totals: Int[Tensor, "#b #n"],
    jitter: Tensor | None,
) -> Loss:
    """The loss of a layer, counted once (not at all where no query sees a key)."""
    batch, heads, n, _ = q.shape
    slots, k = keys.where.keys, keys.state.k
    given = _teacher(call, (batch, heads, n, k.shape[2]), output.shape)
    totals = totals.expand(batch, n)
    counted = totals > 0
    valid = call.valid_queries(n)
    if valid is not None:
        counted = counted & valid

    def compute(totals: Tensor, k: Tensor, q: Tensor, e: Tensor, target: Tensor | None = None) -> tuple[Tensor, ...]:
        pixel, visible = (x.expand(batch, -1, -1) for x in _pixels(slots, totals, e.shape[-1], jitter))
        seen = visible[:, None]
        scores = q @ wide(k).repeat_interleave(heads // k.shape[1], 1).mT
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        if target is None:
            return _map_distances(torch.where(seen, scores.detach().softmax(-1), 0), e, pixel, visible)
        p = torch.where(seen, wide(target), 0)
        kl, squares = _map_distances(p, e, pixel, visible)
        own = scores.log_softmax(-1)
        kl = kl + torch.xlogy(p, p).sum(-1) - (p * torch.where(seen, own, 0)).sum(-1)
        return kl, squares + (p - torch.where(seen, own.exp(), 0)).square().sum(-1)

    by_query = (q, wide(estimate)) if "weights" not in given else (q, wide(estimate), given["weights"])
    kl, squares = _by_rows(compute, batch * heads * k.shape[2], totals, (k,), by_query)
    rows, counted_heads = counted.sum(), counted[:, None].expand(-1, heads, -1)
    pairs = (counted.sum(-1) * (slots >= 0).sum(-1)).sum()
    averaged = rows if call.pattern is Pattern.NONCAUSAL_SELF else heads * rows
    loss = 0.1 * torch.where(counted_heads, kl, 0).sum() / averaged.clamp(min=1)
    loss = loss + torch.where(counted_heads, squares, 0).sum() / (heads * pairs).clamp(min=1)
    if "output" in given:
        difference = (output - wide(given["output"])).square().mean(-1)
        loss = loss + torch.where(counted_heads, difference, 0).sum() / (heads * rows).clamp(min=1)
    return loss, (rows > 0).to(torch.int64)


def _teacher(call: Call, pairs: tuple[int, ...], output: tuple[int, ...]) -> Mapping[str, Tensor]:
    """The teacher's tensors by name, checked; none where the layer is its own teacher."""
    if call.teacher is None:
        return {}
    expected = {"weights": tuple(pairs), "output": tuple(output)}
    found = {name: tuple(x.shape) for name, x in call.teacher.items()} if isinstance(call.teacher, Mapping) else {}
    if "weights" not in found or any(expected.get(name) != shape for name, shape in found.items()):
        raise Unsupported(
            f"a teacher with {found or type(call.teacher).__name__}",
            supported=f"weights of {expected['weights']}, and if wanted output of {expected['output']}",
        )
    return call.teacher


def _map_distances(
    p: Float[Tensor, "b h n m"],
    estimate: Float[Tensor, "b h n c"],
    pixel: Int[Tensor, "b n m"],
    visible: Bool[Tensor, "b n m"],
) -> tuple[Float[Tensor, "b h n"], Float[Tensor, "b h n"]]:
    """KL(p, r) and sum (p - r)^2 of each row, for r the softmax over visible tokens of the score of their pixel.

    All tokens of a pixel have the same r, so sums over pixels do, and nothing as wide as the tokens needs a gradient.
    """
    counts = torch.zeros_like(estimate[:, 0]).scatter_add(-1, pixel, visible.to(estimate.dtype))[:, None]
    mass = torch.zeros_like(estimate).scatter_add(-1, pixel[:, None].expand_as(p), p)
    some = counts > 0
    scores = estimate.masked_fill(~some, torch.finfo(estimate.dtype).min)
    top = scores.detach().amax(-1, keepdim=True)
    exponentials = torch.where(some, (scores - top).exp(), 0)
    total = (counts * exponentials).sum(-1, keepdim=True)
    total = torch.where(total > 0, total, 1)
    logs = torch.where(some, scores - top - total.log(), 0)
    r = exponentials / total
    kl = torch.xlogy(p, p).sum(-1) - (mass * logs).sum(-1)
    return kl, p.square().sum(-1) - 2 * (mass * r).sum(-1) + (counts * r.square()).sum(-1)


@dataclass(frozen=True)
class EstimatorState(State):
    """The state of an estimator for each sequence.

    Attributes:
        memory: sums of the linear attention and its normaliser, in at least float32.
        rows: the last rows that went into each of the two convolutions.
        length: keys in the sums.
    """

    memory: Float[Tensor, "b h r c"] = state_field()
    length: Int[Tensor, " b"] = state_field()
    rows: tuple[Tensor, ...] = ()


class Estimator(Projection):
    """Makes the estimated map and the gates of a layer's queries: a projection of the attention shell, with a state."""

    random_features: Tensor | None
    mixes_tokens = True
    reads_unrotated = ("queries and keys", "")
    # In these the map does no more than choose what is read, which has no gradient.
    learns_from_losses = (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS)
    EPS = 1e-6
    RULE = Rule("identity", 1.0, EPS)

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config, d, v, heads = spec.config, spec.head_dim, spec.value_dim, spec.heads
        self.config, self.pattern, self.heads = config, spec.pattern, heads
        self.whole = spec.pattern is Pattern.NONCAUSAL_SELF
        self.check(config, spec.pattern)
        features = max(1, int(d * math.log(d) / config.feature_divisor)) if config.kernel == "performer" else 0
        self.register_buffer("random_features", orthogonal_features(features, d) if features else None)
        self.positions = None if self.whole else nn.Parameter(torch.randn(config.length, d))
        if self.positions is not None:
            self.positions._no_weight_decay = True  # type: ignore[attr-defined]
        width = d + v + (d if spec.pattern.cross else v)
        joint = heads if config.joint_encoder else 1
        self.encode = nn.Sequential(nn.Linear(joint * width, joint * 2 * d), nn.LayerNorm(joint * 2 * d), nn.GELU())
        maps = {"codebook": CodebookMap, "cnn": NoncausalMap if self.whole else CausalMap}
        self.map = maps[config.estimator](2 * d, heads, config.estimate_length)
        self.gates = nn.Linear(2 * d, 1 + config.row_scale)
        self.training_calls = 0

    @staticmethod
    def check(config: Config, pattern: Pattern) -> None:
        """Raise Unsupported for options that the pattern's estimator does not have."""
        factor = 2 if pattern is Pattern.NONCAUSAL_SELF else 4
        factor = CodebookMap.PATCH if config.estimator == "codebook" else factor
        if config.estimate_length % factor:
            raise Unsupported(
                f"estimate_length={config.estimate_length} of a layer in {pattern.value}",
                supported=f"a multiple of {factor}",
                nearest=f"estimate_length={config.estimate_length + -config.estimate_length % factor}",
            )
        if config.kernel == "cosformer" and pattern.cross:
            raise Unsupported(
                f"kernel='cosformer' in {pattern.value}, where queries have no place among the keys",
                supported="performer",
                nearest="kernel='performer'",
            )

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """New random features."""
        if self.random_features is not None:
            number, width = self.random_features.shape
            drawn = orthogonal_features(number, width, generator)
            self.random_features = drawn.to(self.random_features)

    def forward(self, heads: Tensors, call: LayerCall) -> tuple[Tensors, EstimatorState | None]:
        """The heads with the estimate and the gates of the queries, and the state after them."""
        x, memory, context, lengths, memory_lengths, state = (
            call.x,
            call.memory,
            call.context,
            call.lengths,
            call.memory_lengths,
            call.state,
        )
        config: Config = self.config
        if self.training and config.redraw_every and not torch.compiler.is_compiling():
            self.training_calls += 1
            if self.training_calls % config.redraw_every == 0:
                self.redraw(context.generator)
        c = None
        with without_autocast(next(iter(heads.values())).device):
            if self.pattern.cross:
                if memory is not None:
                    state = self._absorb(heads, memory_lengths, state)
                if x is not None and state is not None:
                    c = divide(self._map(wide(heads["q"])) @ state.memory, self.RULE)
            elif self.whole:
                c = self._attend_all(heads, lengths)
            else:
                c, state = self._attend_causal(heads, lengths, state)
        if c is None:
            return heads, state
        own = heads["q"] if self.pattern.cross else self._repeat(heads["v"])
        features = torch.cat([c.to(own.dtype), own], -1)  # (b, h, n, 3 d)
        if config.joint_encoder:
            joint = self.encode(features.transpose(1, 2).flatten(2))
            z = joint.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        else:
            z = self.encode(features)
        gates = self.gates(z)
        found = heads | {"mix_logit": gates[..., 0]}
        if config.row_scale:
            found["row_logit"] = gates[..., 1]
        rows = self.map.start(z) if state is None else state.rows
        if z.shape[2] == 0:
            found["estimate"] = z.new_zeros(*z.shape[:3], config.estimate_length)
        else:
            found["estimate"], rows = self.map(z, lengths, rows)
        return found, None if state is None else dataclasses.replace(state, rows=rows)

    def _repeat(self, x: Float[Tensor, "b g n d"]) -> Float[Tensor, "b h n d"]:
        return x.repeat_interleave(self.heads // x.shape[1], 1)

    def _map(self, x: Float[Tensor, "b h n d"], turn: Float[Tensor, "#b 1 n 1"] | None = None) -> Tensor:
        """phi in causal and cross patterns; `turn` is the angle of each token in cosFormer."""
        if self.random_features is None:
            assert turn is not None
            return torch.cat([x.relu() * turn.cos(), x.relu() * turn.sin()], -1)
        return (x.shape[-1] ** -0.25 * x @ self.random_features.to(x.dtype).mT).relu() + 1e-3

    def _turn(
        self, places: Int[Tensor, "#b n"], longest: int | Tensor, dtype: torch.dtype
    ) -> Float[Tensor, "#b 1 n 1"]:
        return (math.pi / 2 * places.to(dtype) / longest)[:, None, :, None]

    def _keys(
        self, heads: Tensors, state: EstimatorState | None
    ) -> tuple[Float[Tensor, "b h n r"], Float[Tensor, "b h n d+v"], Int[Tensor, "#b n"]]:
        """Mapped keys, values beside the learned codes of their positions, and the positions."""
        assert self.positions is not None
        k, v = (wide(self._repeat(heads[name])) for name in ("k", "v"))
        places = torch.arange(k.shape[2], device=k.device)[None]
        if state is not None:
            places = state.length[:, None] + places
        table = self.positions.to(v.dtype)
        codes = table[places.clamp(max=table.shape[0] - 1)][:, None]
        values = torch.cat([codes.expand(*v.shape[:3], -1), v], -1)
        return self._map(k, self._turn(places, table.shape[0], k.dtype)), values, places

    def _after(self, heads: Tensors, lengths: Tensor | None, state: EstimatorState | None) -> Int[Tensor, " b"]:
        """Keys of each row with those of this call; refused beyond the table of positions."""
        assert self.positions is not None
        k, most = heads["k"], self.positions.shape[0]
        length = lengths_after(None if state is None else state.length, lengths, k.shape[0], k.shape[2], k.device)
        longest = k.shape[2] if lengths is None and state is None else 0
        if (lengths is not None or state is not None) and not torch.compiler.is_compiling() and length.numel():
            longest = int(length.max())
        if longest > most:
            raise Unsupported(
                f"sea with a sequence of {longest} keys",
                supported=f"up to length={most}",
                nearest=f"length={longest}",
            )
        return length

    def _absorb(self, heads: Tensors, lengths: Tensor | None, state: EstimatorState | None) -> EstimatorState:
        length = self._after(heads, lengths, state)
        k, values, _ = self._keys(heads, state)
        k, values = map_memory(k, values, self.RULE, lengths)
        memory = k.mT @ values
        if state is None:
            return EstimatorState(memory, length, self.map.start(heads["k"]))
        return dataclasses.replace(state, memory=state.memory + memory, length=length)

    def _attend_causal(
        self, heads: Tensors, lengths: Tensor | None, state: EstimatorState | None
    ) -> tuple[Float[Tensor, "b h n d+v"], EstimatorState]:
        length = self._after(heads, lengths, state)
        k, values, places = self._keys(heads, state)
        assert self.positions is not None
        q = self._map(wide(heads["q"]), self._turn(places, self.positions.shape[0], values.dtype))
        before = None if state is None else state.memory
        c, memory = linear_attention(q, k, values, self.RULE, state=before, valid=lengths)
        rows = self.map.start(heads["v"]) if state is None else state.rows
        return c, EstimatorState(memory, length, rows)

    def _attend_all(self, heads: Tensors, lengths: Tensor | None) -> Float[Tensor, "b h n d+v"]:
        """Noncausal-self: the softmax kernel, and the identity matrix stretched over the valid tokens."""
        q, k, v = (wide(self._repeat(heads[name])) for name in ("q", "k", "v"))
        n, d = q.shape[2:]
        if n == 0:
            return v.new_zeros(*v.shape[:3], d + v.shape[3])
        count = torch.full((1,), n, device=q.device) if lengths is None else lengths
        places = torch.arange(n, device=q.device)[None]
        at = (places.to(q.dtype) / (count[:, None] - 1).clamp(min=1) * (d - 1))[..., None]
        codes = (1 - (at - torch.arange(d, device=q.device)).abs()).clamp(min=0)[:, None]
        valid = (places < count[:, None])[:, None, :, None]
        values = torch.cat([codes.expand(*v.shape[:3], -1), v], -1)
        if self.random_features is None:
            turn = self._turn(places, count.clamp(min=1)[:, None], q.dtype)
            q, k = self._map(q, turn), self._map(k, turn)
        else:
            q, k = softmax_features(q, k, self.random_features.to(q.dtype), valid)
        k = torch.where(valid, k, 0)
        return (q @ (k.mT @ values)) / (q @ k.sum(2)[..., None] + self.EPS)


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    return {"c": config.estimate_length}


def cost(shape: Shape, config: Config) -> Cost:
    """With the estimator of a causal layer."""
    d, v, pixels = shape.dim_key, shape.dim_value, config.estimate_length
    heads, rows = shape.batch * shape.heads, shape.batch * shape.heads * shape.n
    features = max(1.0, d * math.log(d) / config.feature_divisor)
    ranked = shape.heads * pixels
    read = _most_read(config, shape.heads, pixels, max(1, shape.m - shape.n + 1), shape.m) / shape.heads
    encoder = 4 * d * (d + 2 * v) + 4 * d * pixels / 2
    convolutions = 2 * 2 * 9 * pixels / 4 * 4 * shape.heads + 4 * pixels * shape.heads
    query = encoder + convolutions + 2 * features * (d + 2 * (d + v)) + pixels * math.log2(ranked) + 2 * read * (d + v)
    dense = DENSE_ADVANTAGE * read >= shape.m
    width = float(shape.m) if dense else read * (d + v)
    return Cost(
        flops=rows * query + (2.0 * rows * max(shape.m - read, 0.0) * (d + v) if dense else 0.0),
        memory=rows * 6.0 * pixels + min(rows * width, float(NUMBERS_AT_ONCE)),
        state=shape.heads * (shape.m * (d + v) + v + features * (d + v + 1) + 4.0 * pixels),
        step_flops=heads * query,
    )


MECHANISM = Mechanism(
    name="sea",
    aliases=("sea_attention", "perlin", "estimated_attention_mask"),
    kind=Kind.ATTENTION,
    summary="A linear-cost estimate of the attention map says which few keys each query reads exactly.",
    paper=Paper("SEA: Sparse Linear Attention with Estimated Attention Mask", "2310.01777", 2023, 21),
    inputs={
        "q": "bhnd",
        "k": "bgmd",
        "v": "bgmv",
        "estimate": "bhnc",
        "row_logit?": "bhn",
        "mix_logit?": "bhn",
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
        "few keys": {"top_k": 3, "estimate_length": 16, "oversample": 2.0, "row_scale": False},
        "codebook": {"estimator": "codebook", "estimate_length": 32, "jitter": 0.5},
        "joint encoder": {
            "joint_encoder": True,
            "estimate_length": 16,
            "length": 300,
            "feature_divisor": 2.0,
            "redraw_every": 0,
        },
        "cosines": {"kernel": "cosformer", "top_k": 3, "self_teacher": False},
        "by queries": {"grouping": "query", "top_k": 3, "estimate_length": 16},
        "by heads": {"grouping": "head", "top_k": 3, "estimate_length": 16},
        "by maps": {"grouping": "batch", "top_k": 3, "estimate_length": 16},
    },
    variant_patterns={
        "cosines": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
        "by heads": (Pattern.NONCAUSAL_SELF,),
        "by maps": (Pattern.NONCAUSAL_SELF,),
    },
    state=SeaState,
    cost=cost,
    axis_sizes=axis_sizes,
    honours=frozenset({"weights", "teacher"}),
    length="max",
    weights="exact",
    projection=Estimator,
    waivers=(
        Waiver("layer_lengths", "the size of its estimated map is a constant of the program"),
        Waiver("layer_onnx", "ONNX has no stable sort"),
        Waiver("layer_gradient", "without a teacher of its own the map learns from none", variants=("cosines",)),
    ),
)
