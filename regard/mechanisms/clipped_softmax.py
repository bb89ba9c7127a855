r"""Clipped softmax: attention weights are stretched past [0, 1] and clipped, so that they can be exactly 0 or 1.

When to pick it: a model that will be quantized after training. A head that should do nothing can do so at finite
scores, so it has no reason to grow the outliers that ruin 8-bit activations (`gated_softmax` is the other remedy).
When not: quality alone (plain `softmax`), speed (the normaliser must be known before the clip: 1.5 times the work of
softmax with a fused kernel, on CPUs, and far more elsewhere), or fine-tuning a model that was trained with softmax (the
paper only trains from scratch).

Definition (Bondarenko, Nagel, Blankevoort, arXiv 2306.12929, equation 4):

    P = softmax(tau Q K^T + bias),   C_ij = clip((zeta - gamma) P_ij + gamma, 0, 1),   O = C V

| paper | here |
|---|---|
| gamma <= 0 | `gamma`, or -`alpha` / `length` |
| zeta >= 1 | `zeta`, 1 by default: then only zeros are made exact |
| alpha, T (the training length) | `alpha`, `length` |
| 1 / sqrt(d_head) | `scale` |

C_ij is 0 where P_ij <= -gamma / (zeta - gamma), and 1 where P_ij >= (1 - gamma) / (zeta - gamma). A row of C sums to at
most 1 when zeta = 1. Gradients are (zeta - gamma) times those of softmax where nothing is clipped and 0 elsewhere.
gamma is a constant of the layer and never follows the keys of a call: early rows of a causal model, decoding and padding
all use the same one. An alpha that works at one length works at others: give `alpha` and `length` rather than `gamma`.

A row of equal weights over M keys is clipped to 0 when 1 / M <= -gamma / (1 - gamma), that is when alpha >= M / (M - 1)
at M = `length`, and then no gradient reaches q, k or v. With the paper's alphas (2 to 12) a newly initialised head,
with scores near 0, is dead in many rows until some scores spread, long rows first: in untrained language models (3
layers of width 64, rotary positions) on 512 random tokens, with `length` = 512, about 1% of all rows with alpha = 2,
22% with 3.2, 82% with 12, and none with 1; of the last quarter of the rows 4%, 71% and 100%. There is no warning, since
every alpha of the paper would trigger it: :class:`SilentRows` reports the share of such rows and of those that fell
silent later, and `warmup` avoids them.

:func:`regard.compression.quantize` simulates 8-bit weights and activations, the use that this is made for.

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). A query that sees no key gives 0. The
softmax, the stretch and the clip are in at least float32. Dropout comes after the clip. The native kernel passes over
the keys twice, once for the normalisers and once for the output; PyTorch computes whole blocks of weights, which is an
order of magnitude slower.
Deviations: the default gamma, -0.001, is milder than the paper's, since no length is known: rows of up to 1000 equal
weights survive. `warmup`, which is not in the paper, lets gamma grow from 0 with the call's `progress`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract import ALL_PATTERNS, Call, Cost, Kind, Mechanism, Paper, Result, Shape, Unsupported
from regard.core.sampling import attention_shapes, normals
from regard.engines import attention_forms
from regard.engines.attention import attention_cost, attention_reference, masked_scores_bias, ranks
from regard.engines.attention_forms import by_pattern
from regard.engines.cache import KeyValueState, absorb

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

MILD_GAMMA = -0.001
USUAL_ALPHA = 3.2


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        gamma: the lower end of the stretched range, finite and <= 0; -0.001 when None and there is no `length`.
        alpha: gamma = -alpha / length, finite and >= 0; only with `length`, and then 3.2 when None.
        length: the training length T, >= 1, a constant of the layer; only without `gamma`.
        zeta: the upper end, finite and >= 1.
        warmup: progress at which gamma is reached, >= 0: before it gamma is multiplied by progress / warmup. Calls
            without a progress use the full gamma.
    """

    gamma: float | None = None
    alpha: float | None = None
    length: int | None = None
    zeta: float = 1.0
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if self.gamma is not None and not -math.inf < self.gamma <= 0:
            raise Unsupported(f"gamma={self.gamma}", supported="a finite gamma <= 0", nearest="gamma=0.0")
        if self.alpha is not None and not 0 <= self.alpha < math.inf:
            raise Unsupported(f"alpha={self.alpha}", supported="a finite alpha >= 0", nearest="alpha=0.0")
        if self.length is not None and not self.length >= 1:
            raise Unsupported(f"length={self.length}", supported="length >= 1", nearest="length=1")
        if not 1 <= self.zeta < math.inf:
            raise Unsupported(f"zeta={self.zeta}", supported="a finite zeta >= 1", nearest="zeta=1.0")
        if not 0 <= self.warmup < math.inf:
            raise Unsupported(f"warmup={self.warmup}", supported="a finite warmup >= 0", nearest="warmup=0.0")
        if self.gamma is not None and (self.alpha is not None or self.length is not None):
            raise Unsupported(
                "gamma together with alpha or length", supported="gamma, or alpha and length", nearest="gamma=None"
            )
        if self.alpha is not None and self.length is None:
            raise Unsupported(
                f"alpha={self.alpha} without length", supported="alpha with the training length", nearest="gamma"
            )

    def stretch(self, progress: float | None = None) -> tuple[float, float]:
        """(gamma, zeta) at a training progress; None means after the warm-up."""
        gamma = MILD_GAMMA if self.gamma is None else self.gamma
        if self.length is not None:
            gamma = -(USUAL_ALPHA if self.alpha is None else self.alpha) / self.length
        if progress is not None and self.warmup > 0 and progress < self.warmup:
            gamma *= max(progress, 0.0) / self.warmup
        return gamma, self.zeta


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    gamma, zeta = call.config.stretch(call.progress)
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    visible, bias = masked_scores_bias(where, by_pattern(call), call.bias, call.position_bias, call.blocks, q.dtype)

    def weights(scores: Tensor) -> Tensor:
        return ((zeta - gamma) * scores.softmax(-1) + gamma).clip(0, 1)

    return attention_reference(q, k, v, visible, weights, call.scale, bias)


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Result:
    """Attention by the engine, whose native kernel reads the keys twice: a row's normaliser must be known before its
    weights are clipped."""
    return attention_forms.parallel(call, q, k, v, **_options(call))


def chunked(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Result:
    """Continue a cached sequence by any number of tokens; also the step."""
    return attention_forms.chunked(call, q, k, v, **_options(call))


def read(call: Call, q: Float[Tensor, "b h n d"]) -> Result:
    """Attend to absorbed memory."""
    return attention_forms.read(call, q, **_options(call))


def _options(call: Call) -> dict[str, Any]:
    stretch = call.config.stretch(call.progress)
    return {"stretch": None if stretch == (0, 1) else stretch}


def silent_rows(weights: Float[Tensor, "b h n m"]) -> Int[Tensor, " h"]:
    """Count the all-zero rows of attention weights, by head: there the head does nothing and learns nothing.

    Early in training such rows are dead; later they may be intended. Padded queries and those that see no key count
    too.
    """
    return (weights == 0).all(-1).sum((0, 2))


@dataclass
class SilentRows:
    """Tracks the rows of attention weights that are all 0, on one batch that is measured repeatedly during training.

    A single measurement cannot tell a dead row from one that does nothing by choice: both have evenly spread scores and
    get no gradient. Over time they differ: a row that is silent in every measurement never had weights to learn from,
    one that fell silent gave them up. In the first measurement of an untrained model, all silent rows are dead.

    Attributes:
        valid: whether each query of the batch counts, (B, N); all do when None. Queries that see no key are always
            silent.
    """

    valid: Bool[Tensor, "b n"] | None = None
    _spoke: Bool[Tensor, "b h n"] | None = None

    def measure(self, weights: Float[Tensor, "b h n m"]) -> tuple[Float[Tensor, " h"], Float[Tensor, " h"]]:
        """Return, for each head, the share of rows that have always been silent, and of those that fell silent later.

        Raises:
            Unsupported: for weights of another batch.
        """
        speaks = (weights != 0).any(-1)
        before = torch.zeros_like(speaks) if self._spoke is None else self._spoke
        if before.shape != speaks.shape:
            raise Unsupported(
                f"weights of {tuple(speaks.shape)} rows after those of {tuple(before.shape)}",
                supported="the same batch in each measurement",
                nearest="another SilentRows()",
            )
        self._spoke = before | speaks
        counted = torch.ones_like(speaks) if self.valid is None else self.valid[:, None].expand_as(speaks)
        count = counted.sum((0, 2)).clamp(min=1)
        dead, chosen = ((rows & counted).sum((0, 2)) / count for rows in (~self._spoke, self._spoke & ~speaks))
        return dead, chosen


def sample_inputs(
    generator: torch.Generator, *, batch: int, n: int, m: int, dtype: torch.dtype, sizes: dict[str, int], **_: object
) -> dict[str, Tensor]:
    """Inputs for tests and timings, with scores so far apart that many weights are clipped."""
    size = {"h": 2, "g": 2, "d": 8, "v": 6} | sizes
    shapes = attention_shapes(batch, n, m, size)
    found = normals(generator, shapes, torch.float64)
    found["q"] *= 3
    return {name: x.to(dtype) for name, x in found.items()}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of two products for each pair of query and key."""
    return attention_cost(shape)


MECHANISM = Mechanism(
    name="clipped_softmax",
    aliases=("clipped_attention", "outlier_free"),
    kind=Kind.ATTENTION,
    summary="Softmax weights are stretched and clipped, so that a head can ignore tokens exactly.",
    paper=Paper(
        "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing", "2306.12929", 2023, 8
    ),
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
        "wider": {"gamma": -0.04, "zeta": 1.2},
        "by length": {"alpha": 1.0, "length": 16, "warmup": 0.5},
        "plain": {"gamma": 0.0},
    },
    layer_defaults={"output_norm": None},  # the size of an output shows how much of the head is kept
    engine="attention",
    state=KeyValueState,
    cost=cost,
    honours=frozenset({"bias", "blocks", "dropout", "weights"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative"),
    sample_inputs=sample_inputs,
)
