"""Quantizable transformers (Bondarenko et al., arXiv 2306.12929): heads that can do nothing with finite scores.

The paper (abstract): outliers come from heads that try to leave the residual unchanged; to get exact zeros from a
softmax, they push its input further and further. With clipped softmax or gated attention, models learn significantly
smaller outliers with the same or better floating-point performance, and their activations can be quantized to INT8
without further effort.

Here: the mechanism alone, as a regression. 32 tokens hold a payload of 16 normals, a type and one of four groups.
Readers add the mean payload of their group to themselves, no-op tokens stay unchanged; separators hold no payload and
no group. One attention layer with one head of 32 features, y = x + layer(x), 4,000 steps of Adam. With separators,
softmax has a place for a no-op's weights, at the price of ever larger scores; without them it has none. Outliers
themselves need long training and are not tested, nor is quantization.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard import create_layer
from regard.reproductions.framework.judging import Check, Seed, measured, number, over
from regard.reproductions.framework.protocol import Reproduction, Setting

TOKENS, PAYLOAD, DIM, GROUPS = 32, 16, 32, 4
READER, NO_OP, SEPARATOR = 0, 1, 2
FIRST_RATE, LAST_RATE = 3e-3, 1e-4


def draw(generator: torch.Generator, batch: int, separators: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens (B, N, DIM), their targets, and their types (B, N)."""
    kind = torch.randint(3 if separators else 2, (batch, TOKENS), generator=generator)
    group = F.one_hot(torch.randint(GROUPS, (batch, TOKENS), generator=generator), GROUPS).float()
    holds = (kind != SEPARATOR)[..., None]
    payload = torch.randn(batch, TOKENS, PAYLOAD, generator=generator) * holds
    group = group * holds
    x = F.pad(torch.cat([payload, F.one_hot(kind, 3), group], -1), (0, DIM - PAYLOAD - 3 - GROUPS))
    same = group @ group.mT
    mean = (same @ payload) / same.sum(-1, keepdim=True).clamp(min=1)
    return x, x + F.pad(mean, (0, DIM - PAYLOAD)) * (kind == READER)[..., None], kind


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure score range and errors of one head that must leave no-op tokens unchanged, early and late in training."""
    torch.manual_seed(seed)
    layer: Any = create_layer(setting["mixer"], DIM, 1, pattern="noncausal-self", **setting["options"])
    optimizer = torch.optim.Adam(layer.parameters())
    batches = torch.Generator().manual_seed(seed)
    x_test, y_test, kind_test = draw(torch.Generator().manual_seed(1 << 40), 256, setting["separators"])
    still = kind_test == NO_OP

    @torch.no_grad()
    def score_range() -> float:
        scores = layer.query(x_test) @ layer.key(x_test).mT / math.sqrt(DIM)
        return float((scores.amax(-1) - scores.amin(-1))[still].mean())

    steps = setting["steps"]
    found = {}
    for step in range(1, steps + 1):
        x, target, _ = draw(batches, 64, setting["separators"])
        rate = LAST_RATE + (FIRST_RATE - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        optimizer.zero_grad()
        F.mse_loss(x + layer(x).output, target).backward()
        optimizer.step()
        for name, share in (("early", 8), ("middle", 4)):
            if step == max(1, steps // share):
                found[f"{name}_range"] = score_range()
    with torch.no_grad():
        error = (x_test + layer(x_test).output - y_test).square().mean(-1)
    return found | {
        "range": score_range(),
        "error": float(error.mean()),
        "no_op_error": float(error[still].mean()),
    }


def growth(setting: str, first: str, second: str) -> Any:
    """Return the factor by which the mean score range of no-op tokens grows from one time to another."""

    def value(seed: Seed) -> float:
        return number(seed, setting, second) / number(seed, setting, first)

    return value


MIXERS: dict[str, Any] = {
    "softmax": {"mixer": "softmax", "options": {}},
    "clipped": {"mixer": "clipped_softmax", "options": {"alpha": 2.0, "length": TOKENS}},
    "gated": {"mixer": "gated_softmax", "options": {}},
}
SETTINGS = {
    f"{name}{suffix}": mixer | {"separators": separators, "steps": 4000}
    for suffix, separators in ((", separators", True), ("", False))
    for name, mixer in MIXERS.items()
}

REPRODUCTION = Reproduction(
    name="clipped_softmax",
    mechanisms=("clipped_softmax", "gated_softmax"),
    claim=(
        "Heads that should do nothing push softmax's input ever further; clipped softmax and gated attention let them do "
        "nothing without, and so outliers stay small at the same or a better score (abstract)."
    ),
    instead=(
        "A regression in which half or a third of the tokens must stay as they are: ranges of their scores during training, "
        "and their error, one layer with one head, 32 tokens, 4,000 steps. No outliers in activations, no quantization."
    ),
    settings=SETTINGS,
    run_cell=run_cell,
    checks=(
        Check(
            "separators: softmax's range grows by 5 % after a quarter of the training",
            growth("softmax, separators", "middle_range", "range"),
            above=1.05,
        ),
        Check(
            "separators: clipped softmax's does not",
            growth("clipped, separators", "middle_range", "range"),
            below=1.05,
        ),
        Check(
            "no separators: softmax's no-op error at least 5 times clipped's",
            over("softmax", "clipped", "no_op_error"),
            above=5.0,
        ),
        Check(
            "no separators: softmax's no-op error at least 5 times gated's",
            over("softmax", "gated", "no_op_error"),
            above=5.0,
        ),
    ),
    needs=(
        Check(
            "gated attention solves it with separators (error below 0.01)",
            measured("gated, separators", "error"),
            below=0.01,
        ),
    ),
    left_out=(
        "smaller outliers in activations: they need long training of large models",
        "INT8 activations without work-arounds: without outliers nothing is lost by quantizing",
        "floating-point scores kept in BERT, OPT and ViT: the error of a regression stands for them",
    ),
    more_seeds={"clipped, separators": 10},
    smoke={"steps": 8},
    seconds=20,
)
