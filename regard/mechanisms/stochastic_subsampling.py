r"""Stochastically subsampled attention (SSA): in training each layer sees a random part of the keys, at test time all of them.

When to pick it: attention dominates the cost of training, or the model over-fits; a model that is to be its own ensemble.
When not: for inference, which is that of softmax attention, or a model that under-fits.

Definition (Hussain, Zaki and Subramanian, arXiv 2306.01705, section 4), with m = rho M of the M keys:

    O = softmax(tau Q K_{pi[:m]}^T + B_{:, pi[:m]}) V_{pi[:m]}    with pi drawn among all permutations of the keys (unbiased)

or, locally biased, with queries and permuted keys cut into windows of w, where the queries of a window attend to the keys of
the same window:

    pi = argsort(j + sigma noise_j)

The softmax runs over the keys that are left; nothing is multiplied by 1 / rho. Masks, biases and positions are those of the
original places. A draw is made anew in every layer and call; heads share it, and so do the sequences of a batch where none
is padded. sigma = 0 is attention in blocks, sigma without end makes the windows unbiased samples. In causal-self the query's own
key is always added, so that no query is left without keys.

Training (section 4.3): most of it with rho < 1, then a short part with all keys, in which the many sub-networks agree.
`steps` and `finetune` do so by `context.progress`, the training step; or use :func:`subsampled`. At test time the model
is dense, or the mean of several random passes (:func:`ensemble_predict`).

| paper | here |
|---|---|
| rho, m / M | `ratio` |
| w, window of the locally biased form | `window`; round(rho N) when None |
| sigma, in places | `sigma`; the window when None |
| B | `bias` of the mask, or a position scheme |
| pathway | what one pass of `subsampled(model)` runs |
| consolidation, fine-tuning | the last share `finetune` of `steps` |

Layout: (B, H, N, D); keys and values may have fewer heads. With padding m is rho times the valid keys of each row. On a `grid` of
two sides windows are squares of side `window`: keys are sorted by noisy rows into bands, and in a band by noisy columns.
`mode="bernoulli"` (source dropout of the authors' TGT, no saving) keeps each key of each sequence with probability rho;
`host_window` is attention in blocks, as in hosts with windows, each of which is subsampled.
State: every key and value, as in softmax attention; a subsampled step draws among the cached keys.
Deviations: the causal rule of the own key is ours. The locally biased form needs whole sequences in self patterns; kernels
for edges of graphs are left out. The noise is normal unless `noise` says otherwise. A key that is not drawn gets no
gradient in that layer. ``stack={"checkpoint_layers": n}`` of a model draws the same keys again in the backward pass, from a
`generator` too; under any other checkpointing a `generator` must be restored by the caller.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
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
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    Unsupported,
    Waiver,
    at_least,
    one_of,
)
from regard.core.precision import wide, wide_dtype
from regard.core.ragged import take_queries
from regard.core.visibility import DistanceBias, PositionBias
from regard.engines.attention import (
    Ranks,
    Visibility,
    attention,
    attention_cost,
    attention_reference,
    masked_scores_bias,
    ranks,
)
from regard.engines.cache import KeyValueState, absorb, extend
from regard.layers.attention import AttentionLayer

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

MODES = ("unbiased", "local", "bernoulli")
NOISES = ("normal", "uniform", "laplace")


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        ratio: rho in (0, 1], keys that are kept in training; 1 for dense attention.
        mode: ``unbiased``, ``local`` (self patterns) or ``bernoulli``.
        window: w of ``local``, >= 1; the side of a square on a grid of two sides. round(rho N) when None, and on a grid
            round(sqrt(rho) side) along each side.
        sigma: standard deviation of the noise of ``local``, in places, >= 0; the window when None.
        noise: ``normal``, ``uniform`` or ``laplace``.
        neighbours: windows of keys on each side that a window of queries of ``local`` sees too, >= 0.
        host_window: attention in blocks of so many tokens, in evaluation too; >= 1, self patterns. None for none.
        per_sample: a draw for each sequence of a batch.
        per_head: a draw for each head (not with ``local`` or `host_window`).
        steps: training steps of a schedule that follows ``context.progress``; None keeps `ratio` throughout.
        finetune: share of `steps`, in [0, 1], at the end of which all keys are seen.
        anneal: the ratio grows linearly to 1 until then.
        in_evaluation: subsample in evaluation too.
    """

    ratio: float = 0.25
    mode: str = "unbiased"
    window: int | None = None
    sigma: float | None = None
    noise: str = "normal"
    neighbours: int = 0
    host_window: int | None = None
    per_sample: bool = False
    per_head: bool = False
    steps: int | None = None
    finetune: float = 0.05
    anneal: bool = False
    in_evaluation: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise Unsupported(f"ratio={self.ratio}", supported="0 < ratio <= 1", nearest="ratio=0.25")
        one_of("mode", self.mode, MODES)
        one_of("noise", self.noise, NOISES)
        for name in ("window", "host_window", "steps"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        if self.sigma is not None and not 0 <= self.sigma < math.inf:
            raise Unsupported(f"sigma={self.sigma}", supported="a finite sigma >= 0", nearest="sigma=None")
        at_least("neighbours", self.neighbours, 0)
        if not 0 <= self.finetune <= 1:
            raise Unsupported(f"finetune={self.finetune}", supported="0 <= finetune <= 1", nearest="finetune=0.05")
        if self.anneal and self.steps is None:
            raise Unsupported("anneal without steps", supported="anneal with steps", nearest="anneal=False")
        if self.per_head and (self.mode == "local" or self.host_window is not None):
            raise Unsupported("per_head with windows", supported="per_head without windows", nearest="per_head=False")
        if self.host_window is not None and self.mode == "local":
            raise Unsupported(
                "mode='local' within host_window", supported="unbiased, bernoulli", nearest="mode='unbiased'"
            )


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition: softmax attention over the pairs that are left, with the whole weight matrix."""
    n, m = q.shape[2], k.shape[2]
    where = ranks(call, n, m, q.device)
    visible, bias = masked_scores_bias(where, _visibility(call), call.bias, call.position_bias, call.blocks, q.dtype)
    ratio = _ratio(call)
    if ratio < 1 and n and m:
        kept = _kept_pairs(call, ratio, where, q.shape[0], q.shape[1])
        if call.pattern is Pattern.CAUSAL_SELF:
            kept = kept | (where.queries[:, None, :, None] == where.keys[:, None, None])
        visible = visible & kept
    return attention_reference(q, k, v, visible, lambda scores: scores.softmax(-1), call.scale, bias)


def _kept_pairs(call: Call, ratio: float, where: Ranks, batch: int, heads: int) -> Bool[Tensor, "#b #h #n m"]:
    """Pairs of a draw, one by one."""
    n, m = where.queries.shape[1], where.keys.shape[1]
    if not _by_windows(call):
        draws = [_draw_keys(call, ratio, where.keys, batch) for _ in range(heads if call.config.per_head else 1)]
        return torch.stack(draws, 1)[:, :, None]
    windows = _draw_windows(call, ratio, where.keys, batch)
    rows, number, _ = windows.keys.shape
    pairs = torch.zeros(rows, 1, n, m + 1, dtype=torch.bool, device=where.keys.device)
    for row in range(rows):
        for window in range(number):
            queries = windows.queries[window]
            pairs[row, 0, queries[queries >= 0][:, None], windows.keys[row, window]] = True
    return pairs[..., :m]  # a missing key is -1, the last column


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Result:
    return _attend(call, q, k, v, ranks(call, q.shape[2], k.shape[2], q.device), k, v)


def chunked(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Result:
    """Continue a cached sequence by any number of tokens; also the step."""
    state, where = extend(call, k, v, q.shape[2])
    return _attend(call, q, state.k, state.v, where, k, v, state)


def read(call: Call, q: Float[Tensor, "b h n d"]) -> Result:
    """Queries on absorbed memory."""
    state: KeyValueState = call.state
    where = ranks(call, q.shape[2], 0, q.device, state.ranks)
    return _attend(call, q, state.k, state.v, where, state.k, state.v, state)


def _visibility(call: Call) -> Visibility:
    block = call.config.host_window
    if block is not None and call.pattern.cross:
        raise Unsupported(
            f"host_window in {call.pattern.value}, where queries have no place among the keys",
            supported="self patterns",
            nearest="host_window=None",
        )
    return Visibility(causal=call.pattern is Pattern.CAUSAL_SELF, block=block)


def _ratio(call: Call) -> float:
    """Keys to keep in this call."""
    config: Config = call.config
    if not (call.training or config.in_evaluation):
        return 1.0
    if config.steps is None or not call.training:
        return config.ratio
    if call.progress is None:
        raise Unsupported(
            f"a schedule of steps={config.steps} without context.progress",
            supported="the training step as context.progress",
            nearest="steps=None",
        )
    first = (1 - config.finetune) * config.steps
    if call.progress >= first:
        return 1.0
    return config.ratio + (1 - config.ratio) * call.progress / first if config.anneal else config.ratio


def _by_windows(call: Call) -> bool:
    return call.config.mode == "local" or (call.config.host_window is not None and call.config.mode == "unbiased")


def _attend(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Ranks,
    new_k: Tensor,
    new_v: Tensor,
    state: KeyValueState | None = None,
) -> Result:
    """Attention over the keys `k` and values `v`, of which the new ones came with the queries."""
    ratio = _ratio(call)
    if ratio == 1 or q.numel() == 0 or k.shape[2] == 0:
        output, weights, lse = _engine(
            call, q, k, v, where, want_weights="weights" in call.want, want_lse="lse" in call.want
        )
        extras = {name: value for name, value in (("weights", weights), ("lse", lse)) if value is not None}
        return Result(output, state, extras=extras)
    if call.want & {"weights", "lse"}:
        raise Unsupported(
            "weights or the log-sum-exp of subsampled attention", supported="them with ratio=1 or in evaluation"
        )
    if _by_windows(call):
        if state is not None or call.pattern.cross or q.shape[2] != k.shape[2]:
            raise Unsupported(
                f"subsampling by windows in {call.pattern.value}" + ("" if state is None else " with a state"),
                supported="whole sequences in self patterns",
                nearest="mode='unbiased'",
            )
        output, lse, member = _windowed(call, q, k, v, where, ratio)
    else:
        output, lse, member = _sampled(call, q, k, v, where, ratio)
    if call.pattern is Pattern.CAUSAL_SELF:
        assert lse is not None and member is not None
        output = _with_own_key(call, q, new_k, new_v, where, output, lse, member)
    return Result(output, state)


def _engine(
    call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, *, want_weights: bool = False, want_lse: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return attention(
        q,
        k,
        v,
        where,
        visibility=_visibility(call),
        scale=call.scale,
        bias=call.bias,
        position_bias=call.position_bias,
        blocks=call.blocks,
        dropout=call.dropout,
        generator=call.generator,
        want_weights=want_weights,
        want_lse=want_lse,
        backend=call.backend,
    )


def _draw_keys(call: Call, ratio: float, keys: Int[Tensor, "#b m"], batch: int) -> Bool[Tensor, "#b m"]:
    """Slots of keys that are kept: a fixed part of those that exist, or each with the probability `ratio`."""
    if call.config.per_sample or call.config.mode == "bernoulli":
        keys = keys.expand(batch, -1)
    exists = keys >= 0
    draw = torch.rand(keys.shape, generator=call.generator, device=keys.device, dtype=torch.float64)
    return exists & (draw < ratio) if call.config.mode == "bernoulli" else _lowest(draw, exists, ratio)


def _lowest(draw: Float[Tensor, "... m"], exists: Bool[Tensor, "... m"], ratio: float) -> Bool[Tensor, "... m"]:
    """The keys of the lowest draws, `ratio` of those that exist and at least one."""
    order = torch.where(exists, draw, torch.inf).argsort(-1)
    place = torch.arange(draw.shape[-1], device=draw.device).expand_as(order)
    kept = (ratio * exists.sum(-1, keepdim=True).double()).round().clamp(min=1)
    return exists & (torch.zeros_like(order).scatter(-1, order, place) < kept)


def _slots(kept: Bool[Tensor, "... m"], ratio: float) -> Int[Tensor, "... kept"]:
    """Slots of the kept keys in order, as many as there may be; -1 where there are fewer."""
    slots = (~kept).long().argsort(dim=-1, stable=True)[..., : max(1, round(ratio * kept.shape[-1]))]
    return torch.where(kept.gather(-1, slots), slots, -1)


def _take(x: Float[Tensor, "b g m d"], slots: Int[Tensor, "#b ..."]) -> Float[Tensor, "b g ... d"]:
    """Keys or values at slots; anything where a slot is missing."""
    rows, places = slots.shape[0], slots.clamp(min=0).flatten(1)
    if rows == 1:
        taken = x.index_select(2, places[0])
    else:
        taken = x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return taken.unflatten(2, slots.shape[1:])


def _ranks_at(keys: Int[Tensor, "#b m"], slots: Int[Tensor, "#b ..."]) -> Int[Tensor, "#b ..."]:
    batch = max(keys.shape[0], slots.shape[0])
    found = keys.expand(batch, -1).gather(1, slots.clamp(min=0).flatten(1).expand(batch, -1))
    return torch.where(slots < 0, -1, found.unflatten(1, slots.shape[1:]))


def _sampled(
    call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, ratio: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output, log-sum-exp and whether a query's own key was drawn, for draws that all queries share."""
    if call.config.per_head:
        heads, groups = q.shape[1], k.shape[1]
        shared = call.replace(config=dataclasses.replace(call.config, per_head=False))
        found = []
        for head in range(heads):
            g = head // (heads // groups)
            own = slice(head, head + 1)
            found.append(_sampled(_of_head(shared, head), q[:, own], k[:, g : g + 1], v[:, g : g + 1], where, ratio))
        outputs, lses, members = zip(*found, strict=True)
        if lses[0] is None:
            return torch.cat(outputs, 1), None, None
        batch = max(member.shape[0] for member in members)
        return torch.cat(outputs, 1), torch.cat(lses, 1), torch.cat([m.expand(batch, -1, -1) for m in members], 1)
    kept = _draw_keys(call, ratio, where.keys, q.shape[0])
    bias = call.bias
    if call.config.mode == "bernoulli":
        keys = torch.where(kept, where.keys, -1)
    else:
        slots = _slots(kept, ratio)
        keys, k, v = _ranks_at(where.keys, slots), _take(k, slots), _take(v, slots)
        if bias is not None and bias.shape[-1] > 1:
            columns = slots.clamp(min=0)[:, None, None]
            bias = bias.expand(max(len(bias), len(slots)), -1, -1, -1)
            bias = bias.gather(-1, columns.expand(len(bias), *bias.shape[1:3], -1))
    causal = call.pattern is Pattern.CAUSAL_SELF
    chosen = Ranks(where.queries, keys, None, None, plain=False)
    output, _, lse = _engine(call.replace(bias=bias), q, k, v, chosen, want_lse=causal)
    return output, lse, _member(where.queries, keys)[:, None] if causal else None


def _of_head(call: Call, head: int) -> Call:
    """The call with the biases and blocks of one head."""
    own = slice(head, head + 1)
    bias, blocks, position_bias = call.bias, call.blocks, call.position_bias
    if bias is not None and bias.shape[1] > 1:
        bias = bias[:, own]
    if blocks is not None and blocks.visible.shape[1] > 1:
        blocks = dataclasses.replace(blocks, visible=blocks.visible[:, own])
    if isinstance(position_bias, DistanceBias):
        by_distance = position_bias.by_distance
        position_bias = DistanceBias(lambda distances: by_distance(distances)[own])
    elif position_bias is not None:
        by_rank: PositionBias = position_bias
        position_bias = lambda i, j: by_rank(i, j)[:, own]  # noqa: E731
    return call.replace(bias=bias, blocks=blocks, position_bias=position_bias)


def _member(queries: Int[Tensor, "#b n"], keys: Int[Tensor, "#b m"]) -> Bool[Tensor, "#b n"]:
    """Whether the key of a query's own rank is among `keys`."""
    return (queries[..., :, None] == keys[..., None, :]).any(-1)


@dataclass(frozen=True)
class _Windows:
    """Slots of the queries and of the keys of each window; -1 where there is none."""

    queries: Int[Tensor, "windows w"]
    keys: Int[Tensor, "#b windows c"]


def _draw_windows(call: Call, ratio: float, keys: Int[Tensor, "#b m"], batch: int) -> _Windows:
    config: Config = call.config
    if config.per_sample:
        keys = keys.expand(batch, -1)
    rows, n = keys.shape
    if config.mode == "local" and call.grid is not None and len(call.grid) > 1:
        return _draw_squares(call, ratio, rows, keys.device)
    if config.mode == "local":
        width = min(n, max(1, round(ratio * n)) if config.window is None else config.window)
        place = torch.arange(n, device=keys.device) + _noise(call, (rows, n), width, keys.device)
        order = torch.where(keys >= 0, place, torch.inf).argsort(dim=-1, stable=True)
        order = torch.where(keys.gather(-1, order) >= 0, order, -1)
    else:
        assert config.host_window is not None
        width = min(n, config.host_window)
        order = torch.where(keys >= 0, torch.arange(n, device=keys.device), -1)
    number = -(-n // width)
    queries = F.pad(torch.arange(n, device=keys.device), (0, number * width - n), value=-1).view(number, width)
    windows = F.pad(order, (0, number * width - n), value=-1).view(rows, number, width)
    if config.mode != "local":
        draw = torch.rand(windows.shape, generator=call.generator, device=keys.device, dtype=torch.float64)
        kept = _slots(_lowest(draw, windows >= 0, ratio), ratio)
        return _Windows(queries, torch.where(kept < 0, -1, windows.gather(-1, kept.clamp(min=0))))
    if config.neighbours:
        reach = config.neighbours
        padded = F.pad(windows, (0, 0, reach, reach), value=-1)
        windows = torch.cat([padded[:, i : i + number] for i in range(2 * reach + 1)], -1)
    return _Windows(queries, windows.sort(-1).values)


def _draw_squares(call: Call, ratio: float, rows: int, device: torch.device) -> _Windows:
    """Windows on a grid of two sides."""
    config: Config = call.config
    assert call.grid is not None
    if len(call.grid) > 2 or call.lengths is not None or config.neighbours:
        raise Unsupported(
            f"mode='local' on a grid {tuple(call.grid)}"
            + (" with padding" if call.lengths is not None else "")
            + (f" with neighbours={config.neighbours}" if config.neighbours else ""),
            supported="grids of two sides without padding and neighbours",
            nearest="grid=None",
        )
    sides = [max(1, round(math.sqrt(ratio) * s)) if config.window is None else min(config.window, s) for s in call.grid]
    (height, width), (a, b) = call.grid, sides
    if height % a or width % b:
        raise Unsupported(
            f"windows of {a} x {b} on a grid {tuple(call.grid)}", supported="sides that divide those of the grid"
        )
    places = torch.arange(height * width, device=device)
    queries = places.view(height // a, a, width // b, b).transpose(1, 2).reshape(-1, a * b)
    shape = rows, height * width
    y = places.div(width, rounding_mode="floor") + _noise(call, shape, a, device)
    x = places % width + _noise(call, shape, b, device)
    bands = y.argsort(dim=-1, stable=True).view(rows, height // a, a * width)
    inside = x[:, None].expand(-1, height // a, -1).gather(-1, bands).argsort(dim=-1, stable=True)
    keys = bands.gather(-1, inside).view(rows, -1, a * b)
    return _Windows(queries, keys.sort(-1).values)


def _noise(call: Call, shape: tuple[int, ...], width: int, device: torch.device) -> Float[Tensor, "..."]:
    """Noise of standard deviation sigma."""
    config: Config = call.config
    sigma = width if config.sigma is None else config.sigma
    where: Any = {"generator": call.generator, "device": device, "dtype": torch.float64}
    if config.noise == "normal":
        return sigma * torch.randn(shape, **where)
    centred = 2 * torch.rand(shape, **where) - 1
    if config.noise == "uniform":
        return sigma * math.sqrt(3) * centred
    size = torch.finfo(torch.float64).tiny
    return -sigma / math.sqrt(2) * centred.sign() * (1 - centred.abs()).clamp(min=size).log()


def _windowed(
    call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, ratio: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As :func:`_sampled`, by windows: each is a row of a batch of small attentions."""
    batch, n = q.shape[0], q.shape[2]
    windows = _draw_windows(call, ratio, where.keys, batch)
    number, width = windows.queries.shape
    own = windows.queries[None].clamp(min=0)

    def rows(x: Tensor) -> Tensor:
        return x.movedim(2, 1).flatten(0, 1)  # (b * windows, h, w, d)

    key_ranks = _ranks_at(where.keys, windows.keys)
    query_ranks = _ranks_at(where.queries, windows.queries[None])
    bias, blocks = call.bias, call.blocks
    if bias is not None:
        bias = bias.expand(batch, -1, n, k.shape[2])[:, :, own[0]]  # (b, h, windows, w, m)
        columns = windows.keys.clamp(min=0)[:, None, :, None].expand(batch, bias.shape[1], -1, width, -1)
        bias = rows(bias.gather(-1, columns))
    if blocks is not None and blocks.visible.shape[0] > 1:
        blocks = dataclasses.replace(blocks, visible=blocks.visible.repeat_interleave(number, 0))
    causal = call.pattern is Pattern.CAUSAL_SELF
    inner = Ranks(
        query_ranks.expand(batch, -1, -1).flatten(0, 1),
        key_ranks.expand(batch, -1, -1).flatten(0, 1),
        None,
        None,
        plain=False,
    )
    output, _, lse = _engine(
        call.replace(bias=bias, blocks=blocks),
        rows(_take(q, own)),
        rows(_take(k, windows.keys)),
        rows(_take(v, windows.keys)),
        inner,
        want_lse=causal,
    )
    back = windows.queries.flatten()
    back = torch.where(back < 0, n, back).argsort(stable=True)[:n]  # place of each query among the windows

    def whole(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, number)).movedim(1, 2).flatten(2, 3)[:, :, back]

    if lse is None:
        return whole(output), None, None
    member = _member(query_ranks, key_ranks).flatten(1)[:, back]
    return whole(output), whole(lse), member[:, None]


def _with_own_key(
    call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, output: Tensor, lse: Tensor, member: Tensor
) -> Float[Tensor, "b h n v"]:
    """The output once each query's own key, from the new keys `k`, has joined those that it was given without it."""
    n, heads = q.shape[2], q.shape[1]
    if n != k.shape[2] or call.lengths is not call.memory_lengths:
        k, v = (take_queries(x, n, call.lengths, call.memory_lengths) for x in (k, v))
    dtype = wide_dtype(q)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    score = call.scale * (q * k).sum(-1)
    own = where.queries
    if call.bias is not None:
        columns = own if call.bias.shape[-1] > 1 else torch.zeros_like(own)
        bias = call.bias.expand(max(len(call.bias), len(own)), -1, n, -1)
        columns = columns.clamp(0, bias.shape[-1] - 1)[:, None, :, None].expand(len(bias), bias.shape[1], -1, 1)
        score = score + bias.gather(-1, columns)[..., 0].to(dtype)
    if call.position_bias is not None:
        alone = own.reshape(-1, 1)
        by_rank = call.position_bias(alone, alone)[..., 0, 0]  # (b * n or 1, h)
        score = score + by_rank.expand(alone.shape[0], -1).unflatten(0, own.shape).transpose(1, 2).to(dtype)
    joins = (own >= 0)[:, None] & ~member
    if call.blocks is not None:
        diagonal = call.blocks.visible.diagonal(dim1=-2, dim2=-1)
        block = own.clamp(min=0).div(call.blocks.block_size, rounding_mode="floor")
        inside = block < diagonal.shape[-1]
        diagonal = diagonal.expand(max(len(diagonal), len(own)), -1, -1)
        block = block.clamp(max=diagonal.shape[-1] - 1)[:, None].expand(len(diagonal), diagonal.shape[1], -1)
        joins = joins & inside[:, None] & diagonal.gather(-1, block)
    joins = joins & (score != -torch.inf)
    share = torch.where(joins, torch.sigmoid(torch.where(joins, score, 0) - lse.to(dtype)), 0)[..., None]
    if call.dropout:
        draw = torch.rand(share.shape, generator=call.generator, device=share.device)
        v = torch.where(draw < call.dropout, 0, v / (1 - call.dropout))
    return ((1 - share) * output.to(dtype) + share * v).to(output.dtype)


def subsample(
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    *,
    ratio: float = 0.25,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "b g kept d"], Float[Tensor, "b g kept v"], Int[Tensor, " kept"]]:
    """An unbiased sample of keys and values, shared by sequences and heads, in order, and their places."""
    config = Config(ratio=ratio)
    call = Call(Pattern.NONCAUSAL_CROSS, config, generator=generator)
    if k.shape[2] == 0:
        return k, v, torch.zeros(0, dtype=torch.long, device=k.device)
    places = torch.arange(k.shape[2], device=k.device)[None]
    slots = _slots(_draw_keys(call, ratio, places, 1), ratio)
    return _take(k, slots), _take(v, slots), slots[0]


@contextmanager
def subsampled(model: nn.Module, ratio: float | None = None, **options: Any) -> Iterator[nn.Module]:
    """Inside the block the model's subsampled layers subsample in evaluation too, or are dense with ``ratio=1``.

    Args:
        model: has layers of this mechanism.
        ratio: of all of them; each layer's own when None.
        options: other options of :class:`Config` to change, such as ``mode``. A schedule is left off.

    Raises:
        Unsupported: for a model without such layers.
    """
    layers = [m for m in model.modules() if isinstance(m, AttentionLayer) and m.card.name == MECHANISM.name]
    if not layers:
        raise Unsupported(
            f"subsampling a {type(model).__name__} without layers of {MECHANISM.name}",
            supported=f'create_layer("{MECHANISM.name}", ...) or a plan with it',
        )
    changes = {"in_evaluation": True, "steps": None, "anneal": False, **options}
    if ratio is not None:
        changes["ratio"] = ratio
    before = [layer.config for layer in layers]
    after = [dataclasses.replace(config, **changes) for config in before]
    for layer, config in zip(layers, after, strict=True):
        layer.config = config
    try:
        yield model
    finally:
        for layer, config in zip(layers, before, strict=True):
            layer.config = config


@torch.no_grad()
def ensemble_predict(
    model: nn.Module,
    *inputs: Tensor,
    passes: int = 8,
    ratio: float | None = None,
    average: str = "probabilities",
    context: Context | None = None,
    **options: Any,
) -> Float[Tensor, "... classes"]:
    """Mean of the predictions of several subsampled passes, in evaluation mode.

    Args:
        model: called as ``model(*inputs, context=context)``, whose output are logits.
        passes: random passes, each of which draws anew in every layer, from ``context.generator`` when there is one.
        ratio, options: as of :func:`subsampled`.
        average: ``probabilities``, or ``logits``.

    Returns:
        Mean probabilities, or mean logits, in at least float32.
    """
    at_least("passes", passes, 1)
    one_of("average", average, ("probabilities", "logits"))
    training = [module for module in model.modules() if module.training]
    model.eval()
    total: Tensor | None = None
    try:
        with subsampled(model, ratio, **options):
            for _ in range(passes):
                logits = model(*inputs, context=Context() if context is None else context).output
                logits = wide(logits)
                found = logits.softmax(-1) if average == "probabilities" else logits
                total = found if total is None else total + found
    finally:
        for module in training:
            module.training = True
    assert total is not None
    return total / passes


def cost(shape: Shape, config: Config) -> Cost:
    """The cost of evaluation, which is dense unless `in_evaluation` says otherwise: then it costs what training does."""
    keys: float = shape.m if config.host_window is None else config.host_window
    if config.in_evaluation and config.mode == "local":
        keys = (2 * config.neighbours + 1) * (config.ratio * shape.n if config.window is None else config.window)
    elif config.in_evaluation and config.mode == "unbiased":
        keys = config.ratio * keys
    return attention_cost(shape, max(1, round(keys)))


DRAWING = (
    "half",
    "Bernoulli",
    "a draw for each sequence",
    "local",
    "local, uniform",
    "local, laplace",
    "in windows",
)
"""Variants that draw keys in evaluation too."""

MECHANISM = Mechanism(
    name="stochastic_subsampling",
    aliases=("ssa", "ssa_sub", "stochastically_subsampled_attention", "information_pathways"),
    kind=Kind.ATTENTION,
    summary="In training each layer sees a random part of the keys, at test time all of them.",
    paper=Paper("The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles", "2306.01705", 2023, 39),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv"},
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
        "half": {"ratio": 0.5, "in_evaluation": True},
        "Bernoulli": {"mode": "bernoulli", "ratio": 0.5, "in_evaluation": True, "per_head": True},
        "a draw for each sequence": {"ratio": 0.5, "in_evaluation": True, "per_sample": True},
        "local": {"mode": "local", "window": 3, "sigma": 2.0, "neighbours": 1, "in_evaluation": True},
        "local, uniform": {"mode": "local", "noise": "uniform", "in_evaluation": True},
        "local, laplace": {"mode": "local", "noise": "laplace", "in_evaluation": True},
        "in windows": {"host_window": 5, "ratio": 0.5, "in_evaluation": True},
        "scheduled": {"steps": 100, "finetune": 0.2, "anneal": True},
    },
    variant_patterns={
        "local": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
        "local, uniform": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
        "local, laplace": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
        "in windows": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    },
    engine="attention",
    state=KeyValueState,
    cost=cost,
    honours=frozenset({"bias", "blocks", "dropout", "weights", "lse"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative"),
    waivers=(
        *(
            Waiver(name, "keys are drawn for one call, of the length and the rows that it has", variants=DRAWING)
            for name in ("padding", "packing", "row_alone", "alignment", "pair_masks", "state", "memory")
        ),
    ),
)
