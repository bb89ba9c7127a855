"""The definition of sea: its options and its reference, written to be read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract import Call, Pattern, Unsupported, at_least, one_of
from regard.engines.pixel_attention import GROUPINGS, read_regularly

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        top_k: k, the number of keys that a query reads in each head on average, >= 1. May differ from training.
        estimate_length: K, pixels of a layer's map: a multiple of 4, of 2 in noncausal-self, of 16 with the codebook.
        grouping: which probabilities are ranked together: ``row`` (all heads of a query), ``query`` (one head of a
            query), ``head`` (one head of all queries) or ``batch`` (a whole map); the last two in noncausal-self only.
        oversample: factor >= 1 for the number of kept pixels, of whose tokens only a regular subset is read.
        row_scale: whether a layer multiplies P by sigmoid(a).
        estimator: ``cnn`` or ``codebook`` (each 16 pixels are a mixture of 8 learned patches).
        joint_encoder: use one W_e over all heads instead of one for each.
        kernel: kernel of the linear attention: ``performer`` or ``cosformer`` (relu features rotated by position, arXiv
            2202.08791; self patterns only).
        feature_divisor: f > 0.
        redraw_every: number of training calls after which a layer draws new random features; 0 for never.
        length: the maximum number of keys in a sequence, >= 1: rows of the table of positions (no limit in
            noncausal-self).
        jitter: probability in [0, 1] that a training call shifts token ranks by up to 3/4 before mapping them to
            pixels.
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
    check_grouping(call)
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
                read = kept[h, t, places] & read_regularly(
                    config.top_k, config.oversample, tokens, torch.tensor(seen[t], device=q.device)
                )
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


def check_grouping(call: Call) -> None:
    """Raise Unsupported for a grouping that would make queries depend on other queries in this pattern."""
    grouping, pattern = call.config.grouping, call.pattern
    if grouping in ("head", "batch") and pattern is not Pattern.NONCAUSAL_SELF:
        raise Unsupported(
            f"grouping={grouping!r} in {pattern.value}, where queries would depend on others",
            supported="row, query",
            nearest="grouping='row'",
        )
