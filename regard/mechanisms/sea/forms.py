"""The fast forms of sea: attention to the keys of chosen pixels, the state, and the distillation loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Call, Loss, Pattern, Result, State, Unsupported, lengths_after, state_field
from regard.core.draws import uniform
from regard.core.precision import wide
from regard.core.visibility import Ranks, ranks
from regard.engines.cache import append
from regard.engines.map_distance import Problem as Compared
from regard.engines.map_distance import map_distance
from regard.engines.pixel_attention import Mean, Mix, Problem, pixel_attention, pixels_of_keys
from regard.engines.recomputed import recomputed
from regard.mechanisms.sea.definition import Config, check_grouping

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class SeaState(State):
    """Every key and value so far, as in :class:`regard.engines.cache.KeyValueState`, and the sum of the values."""

    k: Float[Tensor, "b g past d"] = state_field()
    v: Float[Tensor, "b g past v"] = state_field()
    ranks: Int[Tensor, "b past"] = state_field(fill=-1)
    total: Float[Tensor, "b g v"] = state_field()
    length: Int[Tensor, " b"] = state_field()


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    estimate: Float[Tensor, "b h n c"],
    row_logit: Float[Tensor, "b h n"] | None = None,
    mix_logit: Float[Tensor, "b h n"] | None = None,
) -> Result:
    """Softmax over the keys of each row's chosen pixels, without an N x M matrix."""
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
    """Continue a cached sequence by any number of tokens; also used as the step."""
    return _attend(call, _Keys.of_call(call, q.shape[2], k, v), q, estimate, row_logit, mix_logit)


def absorb(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]) -> SeaState:
    """Append memory to the cache; more may follow."""
    return _Keys.of_call(call, 0, k, v).state


def read(
    call: Call,
    q: Float[Tensor, "b h n d"],
    estimate: Float[Tensor, "b h n c"],
    row_logit: Float[Tensor, "b h n"] | None = None,
    mix_logit: Float[Tensor, "b h n"] | None = None,
) -> Result:
    """Attend from queries to absorbed memory."""
    state: SeaState = call.state
    where = ranks(call, q.shape[2], 0, q.device, state.ranks, state.length)
    return _attend(call, _Keys(state, where, None), q, estimate, row_logit, mix_logit)


@dataclass(frozen=True)
class _Keys:
    """The keys that the queries of a call may read.

    Attributes:
        state: the keys and values, cached ones first, and the sum of the values.
        where: ranks of the queries and of the key slots.
        before: the sum and the number of the values before this call's; None at the start of a sequence.
        new: number of keys of this call.
    """

    state: SeaState
    where: Ranks
    before: tuple[Float[Tensor, "b g v"], Int[Tensor, " b"]] | None = None
    new: int = 0

    @staticmethod
    def of_call(call: Call, n: int, k: Tensor, v: Tensor) -> _Keys:
        past: SeaState | None = call.state
        batch, m = k.shape[0], k.shape[2]
        before = None if past is None else past.length
        length = lengths_after(before, call.memory_lengths, batch, m, k.device)
        total = wide(v).sum(2)
        if past is None:
            where = ranks(call, n, m, k.device)
            return _Keys(SeaState(k, v, where.keys.expand(batch, -1), total, length), where, None, m)
        if n > m:
            raise Unsupported(
                f"sea continuing with {n} queries and {m} keys, of which the first precede the state's end",
                supported="at most as many queries as new keys",
            )
        where = ranks(call, n, m, k.device, past.ranks, past.length)
        k, v = append(past.k, k.to(past.k.dtype), 2), append(past.v, v.to(past.v.dtype), 2)
        state = SeaState(k, v, where.keys, past.total + total, length)
        return _Keys(state, where, (past.total, past.length), m)

    def totals(self, call: Call) -> Int[Tensor, "#b #n"]:
        """n_t, the number of keys that each query may see."""
        if call.pattern is Pattern.CAUSAL_SELF:
            return (self.where.queries + 1).clamp(min=0)
        return (self.where.keys >= 0).sum(-1, keepdim=True)

    def mean(self, call: Call, totals: Int[Tensor, "#b #n"]) -> Mean:
        """The mean of the values that each query may see."""
        total = self.state.total
        if call.pattern is not Pattern.CAUSAL_SELF:
            return Mean(total / totals.clamp(min=1)[..., None])
        if self.before is None:
            return Mean(torch.zeros_like(total), torch.zeros_like(self.state.length), self.new)
        return Mean(*self.before, self.new)


def _attend(
    call: Call, keys: _Keys, q: Tensor, estimate: Tensor, row_logit: Tensor | None, mix_logit: Tensor | None
) -> Result:
    check_grouping(call)
    config: Config = call.config
    batch, heads, n, _ = q.shape
    k, v, m = keys.state.k, keys.state.v, keys.state.k.shape[2]
    totals = keys.totals(call)
    if estimate.shape[-1] == 0:
        raise Unsupported("sea with an estimate of no pixels", supported="at least one")
    if n == 0 or m == 0:
        return Result(v.new_zeros(batch, heads, n, v.shape[-1]), keys.state)
    jitter = _draw_jitter(call, batch, m, q.device)
    problem = Problem(
        estimate,
        totals.expand(-1, n),
        keys.where,
        config.top_k,
        config.oversample,
        config.grouping,
        call.scale,
        _fewest_keys(call, n, m),
        call.valid_queries(n),
        jitter,
        "weights" in call.want,
    )
    mix = Mix(row_logit, mix_logit, None if mix_logit is None else _mean(call, keys, estimate, totals))
    output, weights = pixel_attention(q, k, v, problem, mix, call.backend)
    result = Result(output.to(v.dtype), keys.state)
    if weights is not None:
        result.extras["weights"] = weights.to(v.dtype)
    if call.teacher is not None or (call.training and config.self_teacher):
        result.losses["distillation"] = _distillation(call, keys, q, estimate, output, totals, jitter)
    return result


def _mean(call: Call, keys: _Keys, estimate: Tensor, totals: Tensor) -> Mean:
    """mean_t, the average value that is mixed with the attention output."""
    if call.pattern is not Pattern.NONCAUSAL_SELF:
        return keys.mean(call, totals)
    p = recomputed(_mean_map, estimate, call.valid_queries(estimate.shape[2]))
    pixel, visible = pixels_of_keys(keys.where.keys, totals, p.shape[-1])  # (b, 1, m)
    weights = p.gather(-1, pixel.expand(p.shape[0], p.shape[1], -1))
    v = wide(keys.state.v).repeat_interleave(p.shape[1] // keys.state.v.shape[1], 1)
    return Mean((torch.where(visible, weights, 0)[:, :, None] @ v)[:, :, 0])


def _mean_map(estimate: Float[Tensor, "b h n c"], valid: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b h c"]:
    """The mean of the pixels' probabilities over the valid queries."""
    p = wide(estimate).softmax(-1)
    if valid is None:
        return p.mean(2)
    return torch.where(valid[:, None, :, None], p, 0).sum(2) / valid.sum(-1).clamp(min=1)[:, None, None]


def _draw_jitter(call: Call, batch: int, m: int, device: torch.device) -> Float[Tensor, "b m"] | None:
    """Random shifts of the tokens' ranks in training; None outside training."""
    config: Config = call.config
    if not call.training or config.jitter == 0:
        return None
    draw = uniform((batch, m + 1), call.generator, device=device, dtype=torch.float64)
    return (1.5 * draw[:, 1:] - 0.75) * (draw[:1, :1] < config.jitter)


def _fewest_keys(call: Call, n: int, m: int) -> int:
    """A lower bound of the number of keys that any query may see, from the sizes alone."""
    if call.lengths is not None or call.memory_lengths is not None or call.state is not None:
        return 1
    return max(1, m - n + 1) if call.pattern is Pattern.CAUSAL_SELF else m


def _distillation(
    call: Call,
    keys: _Keys,
    q: Float[Tensor, "b h n d"],
    estimate: Float[Tensor, "b h n c"],
    output: Float[Tensor, "b h n v"],
    totals: Int[Tensor, "#b #n"],
    jitter: Tensor | None,
) -> Loss:
    """The distillation loss of a layer, with count 1 (0 if no query sees a key)."""
    batch, heads, n, _ = q.shape
    slots, k = keys.where.keys, keys.state.k
    given = _teacher(call, (batch, heads, n, k.shape[2]), output.shape)
    totals = totals.expand(batch, n)
    counted = totals > 0
    valid = call.valid_queries(n)
    if valid is not None:
        counted = counted & valid
    compared = Compared(totals, keys.where, call.scale, jitter, given.get("weights"))
    kl, squares = map_distance(q, k, estimate, compared, call.backend)
    rows, counted_heads = counted.sum(), counted[:, None].expand(-1, heads, -1)
    pairs = (counted.sum(-1) * (slots >= 0).sum(-1)).sum()
    averaged = rows if call.pattern is Pattern.NONCAUSAL_SELF else heads * rows
    loss = 0.1 * torch.where(counted_heads, kl, 0).sum() / averaged.clamp(min=1)
    loss = loss + torch.where(counted_heads, squares, 0).sum() / (heads * pairs).clamp(min=1)
    if "output" in given:
        difference = (wide(output) - wide(given["output"])).square().mean(-1)
        loss = loss + torch.where(counted_heads, difference, 0).sum() / (heads * rows).clamp(min=1)
    return loss, (rows > 0).to(torch.int64)


def _teacher(call: Call, pairs: tuple[int, ...], output: tuple[int, ...]) -> Mapping[str, Tensor]:
    """The teacher's tensors by name, with shapes checked; empty if the layer is its own teacher."""
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
