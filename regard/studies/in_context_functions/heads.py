"""What attention heads attend to in a context of examples x_1, y_1, x_2, y_2, ...

A score is a share of an input's attention: negative weights count as 0, and the weights of a query are divided by their sum
(:func:`regard.workbench.trained.attention_monitor.attention_shares`), which is not 1 for every mechanism.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from regard.contract import Context, Unsupported
from regard.models.evaluating import evaluation_mode
from regard.models.variants import read_variant
from regard.tasks.in_context_functions import InContextFunctionsTask, as_batch
from regard.tasks.protocol import EVALUATION, counter_generator
from regard.workbench.trained.attention_monitor import attention_shares

if TYPE_CHECKING:
    from jaxtyping import Float

COUNTS = 0.5
"""The score from which a head counts as one of its kind."""
REPEATS = 4
CONTEXTS = 32


def induction_scores(weights: Float[torch.Tensor, "b h n n"], repeats: int = REPEATS) -> Float[torch.Tensor, " h"]:
    """Share of an input's attention that goes to its own label in earlier copies of the context, by head; at most 1.

    The public code of arXiv 2310.03016 takes the mean over pairs of copies instead of the sum over earlier copies,
    which is this score times 2 / repeats: with its four copies a perfect induction head gets 0.5.

    Args:
        weights: attention weights of a context that repeats the same examples `repeats` times.

    Raises:
        Unsupported: if the length is not a whole number of copies.
    """
    n = weights.shape[-1]
    if repeats < 2 or n % (2 * repeats):
        raise Unsupported(f"{repeats} copies in {n} tokens", supported="two or more, of whole examples")
    shares = attention_shares(weights)
    copies = shares.unflatten(3, (repeats, -1)).unflatten(2, (repeats, -1))  # (b, h, copy, token, copy, token)
    to_label = copies[..., ::2, :, 1::2].diagonal(dim1=3, dim2=5)  # (b, h, copy, copy, example)
    earlier = torch.ones(repeats, repeats, dtype=torch.bool, device=weights.device).tril(-1)
    return (to_label * earlier[..., None]).sum(3)[:, :, 1:].mean((0, 2, 3))


def nearest_scores(
    weights: Float[torch.Tensor, "b h n n"], x: Float[torch.Tensor, "b m d"], first: int, neighbours: int = 1
) -> Float[torch.Tensor, " h"]:
    """Share of an input's attention that goes to the labels of the most similar earlier inputs, by head; at most 1.

    Args:
        weights: attention weights of the tokens x_1, y_1, ...
        x: the inputs, compared by cosine; ties go to the earliest.
        first: the first example that counts.
        neighbours: how many inputs count as the most similar; all earlier ones if there are fewer.
    """
    unit = x / x.norm(dim=-1, keepdim=True)
    before = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril(-1)
    # rounded, so that equal cosines compare equal
    similar = torch.where(before, (unit @ unit.mT * 1e6).round(), -torch.inf)
    ranks = similar.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    near = before & (ranks < neighbours)
    to_label = attention_shares(weights)[:, :, ::2, 1::2]  # (b, h, input, label)
    return (to_label * near[:, None]).sum(-1)[:, :, max(first, 1) :].mean((0, 2))


def shows_weights(mechanism: str) -> bool:
    """Return whether every layer can return its attention weights."""
    return all(card.weights == "exact" and "weights" in card.honours for card in read_variant(mechanism).cards)


@torch.no_grad()
def head_figures(model: nn.Module, task: InContextFunctionsTask, seed: int) -> dict[str, float]:
    """For both kinds of heads the best score and the number of heads that count, on new contexts of the task's length.

    Nearest-neighbour scores use the second half of the context. Contexts of fewer than `REPEATS` examples have no
    induction scores.
    """
    rng = counter_generator(seed, 1, EVALUATION)
    contexts = task.draw(rng, CONTEXTS)
    batch = as_batch(contexts.x, contexts.y)
    figures: dict[str, float] = {}

    def told(kind: str, scores: torch.Tensor) -> None:
        figures[f"{kind} heads"] = float((scores >= COUNTS).sum())
        figures[f"best {kind} score"] = float(scores.max())

    with evaluation_mode(model):
        weights = _weights(model, batch.inputs)
        told("nearest", torch.cat([nearest_scores(one, batch.inputs[:, ::2], task.points // 2) for one in weights]))
        short = task.points // REPEATS
        if short:
            x, y = (np.concatenate([each[:, :short]] * REPEATS, axis=1) for each in (contexts.x, contexts.y))
            copies = as_batch(x, y)
            told("induction", torch.cat([induction_scores(one) for one in _weights(model, copies.inputs)]))
    return figures


def _weights(model: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    return model(inputs, context=Context(want=frozenset({"weights"}))).extras["weights"]
