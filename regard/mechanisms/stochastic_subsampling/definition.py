"""The definition of stochastic_subsampling: its options and its reference, written to be read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    Call,
    Pattern,
    Unsupported,
    at_least,
    one_of,
)
from regard.core.draws import normal, uniform
from regard.engines.attention import (
    Ranks,
    Visibility,
    attention_reference,
    masked_scores_bias,
    ranks,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


MODES = ("unbiased", "local", "bernoulli")


NOISES = ("normal", "uniform", "laplace")


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        ratio: rho in (0, 1], the fraction of keys kept in training; 1 for dense attention.
        mode: ``unbiased``, ``local`` (self patterns) or ``bernoulli``.
        window: w of ``local``, >= 1; the side of a square on a grid of two sides. round(rho N) when None, and on a grid
            round(sqrt(rho) side) along each side.
        sigma: standard deviation of the noise of ``local``, in places, >= 0; the window when None.
        noise: ``normal``, ``uniform`` or ``laplace``.
        neighbours: with ``local``, number of windows of keys on each side that a window of queries also sees, >= 0.
        host_window: size of blocks to which attention is restricted, also in evaluation; >= 1, self patterns. None for
            no blocks.
        per_sample: whether to draw for each sequence of a batch.
        per_head: whether to draw for each head (not with ``local`` or `host_window`).
        steps: training steps of a schedule that follows ``context.progress``; None keeps `ratio` throughout.
        finetune: fraction of `steps`, in [0, 1], at the end, in which all keys are seen.
        anneal: whether the ratio grows linearly to 1 until then.
        in_evaluation: whether to subsample in evaluation too.
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
    """The definition: softmax attention over the remaining pairs, with the full weight matrix."""
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
    """The pairs of a draw as an explicit mask."""
    n, m = where.queries.shape[1], where.keys.shape[1]
    if not by_windows(call):
        draws = [draw_keys(call, ratio, where.keys, batch) for _ in range(heads if call.config.per_head else 1)]
        return torch.stack(draws, 1)[:, :, None]
    windows = draw_windows(call, ratio, where.keys, batch)
    rows, number, _ = windows.keys.shape
    pairs = torch.zeros(rows, 1, n, m + 1, dtype=torch.bool, device=where.keys.device)
    for row in range(rows):
        for window in range(number):
            queries = windows.queries[window]
            pairs[row, 0, queries[queries >= 0][:, None], windows.keys[row, window]] = True
    return pairs[..., :m]  # a missing key is -1, the last column


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
    """The fraction of keys to keep in this call."""
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


def by_windows(call: Call) -> bool:
    """Return whether keys are drawn per window of queries instead of for all queries."""
    return call.config.mode == "local" or (call.config.host_window is not None and call.config.mode == "unbiased")


def draw_keys(call: Call, ratio: float, keys: Int[Tensor, "#b m"], batch: int) -> Bool[Tensor, "#b m"]:
    """True for the key slots to keep: a fixed fraction of existing keys, or each with probability `ratio`."""
    if call.config.per_sample or call.config.mode == "bernoulli":
        keys = keys.expand(batch, -1)
    exists = keys >= 0
    draw = uniform(keys.shape, call.generator, device=keys.device, dtype=torch.float64)
    return exists & (draw < ratio) if call.config.mode == "bernoulli" else _lowest(draw, exists, ratio)


def _lowest(draw: Float[Tensor, "... m"], exists: Bool[Tensor, "... m"], ratio: float) -> Bool[Tensor, "... m"]:
    """True for the keys with the lowest draws: a fraction `ratio` of the existing keys, at least one."""
    order = torch.where(exists, draw, torch.inf).argsort(-1)
    place = torch.arange(draw.shape[-1], device=draw.device).expand_as(order)
    kept = (ratio * exists.sum(-1, keepdim=True).double()).round().clamp(min=1)
    return exists & (torch.zeros_like(order).scatter(-1, order, place) < kept)


def _slots(kept: Bool[Tensor, "... m"], ratio: float) -> Int[Tensor, "... kept"]:
    """Slots of the kept keys in order, up to their maximum number; -1 where there are fewer."""
    slots = (~kept).long().argsort(dim=-1, stable=True)[..., : max(1, round(ratio * kept.shape[-1]))]
    return torch.where(kept.gather(-1, slots), slots, -1)


@dataclass(frozen=True)
class _Windows:
    """Slots of the queries and keys of each window; -1 for none."""

    queries: Int[Tensor, "windows w"]
    keys: Int[Tensor, "#b windows c"]


def draw_windows(call: Call, ratio: float, keys: Int[Tensor, "#b m"], batch: int) -> _Windows:
    """Draw windows of queries and the keys that each of them keeps, with the call's generator; `keys` are the ranks of
    key slots (-1 for none)."""
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
        draw = uniform(windows.shape, call.generator, device=keys.device, dtype=torch.float64)
        kept = _slots(_lowest(draw, windows >= 0, ratio), ratio)
        return _Windows(queries, torch.where(kept < 0, -1, windows.gather(-1, kept.clamp(min=0))))
    if config.neighbours:
        reach = config.neighbours
        padded = F.pad(windows, (0, 0, reach, reach), value=-1)
        windows = torch.cat([padded[:, i : i + number] for i in range(2 * reach + 1)], -1)
    return _Windows(queries, windows.sort(-1).values)


def _draw_squares(call: Call, ratio: float, rows: int, device: torch.device) -> _Windows:
    """Draw windows on a grid of two sides."""
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
    """Draw noise of standard deviation sigma."""
    config: Config = call.config
    sigma = width if config.sigma is None else config.sigma
    if config.noise == "normal":
        return sigma * normal(shape, call.generator, device=device, dtype=torch.float64)
    centred = 2 * uniform(shape, call.generator, device=device, dtype=torch.float64) - 1
    if config.noise == "uniform":
        return sigma * math.sqrt(3) * centred
    size = torch.finfo(torch.float64).tiny
    return -sigma / math.sqrt(2) * centred.sign() * (1 - centred.abs()).clamp(min=size).log()
