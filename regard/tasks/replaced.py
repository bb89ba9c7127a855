"""Detection of replaced tokens in a user's text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import Pattern, Unsupported
from regard.core.precision import wide
from regard.tasks.masked import FROM_NEIGHBOURS, token_between_neighbours
from regard.tasks.protocol import (
    IGNORED,
    Baseline,
    Batch,
    Objective,
    check_fraction,
    counter_generator,
    register_objective,
    with_options_of_base,
)
from regard.tasks.text import TextTask

if TYPE_CHECKING:
    from jaxtyping import Float, Int

REPLACING = 18
"""Random stream for the replacements in held-out windows."""


@with_options_of_base
class ReplacedTask(TextTask):
    """Detect which tokens of a text replace others (ELECTRA, Clark et al., arXiv 2003.10555).

    In training, a batch is the unchanged text, and the model replaces tokens itself, by those of a small generator that
    is trained with it (:class:`regard.models.ReplacedTokenModel`). So that models can be compared, replacements in
    held-out windows are fixed: a share of the tokens gives way to draws from the tokens that commonly occur between the
    same two neighbours (for large vocabularies, from the token frequencies), so that the neighbours alone do not reveal
    them. The score is bits per token of whether it was replaced. Windows, splits and options are those of the text
    task.

    Args:
        share: share of the tokens of held-out windows that give way, 0.01 to 0.5; tokens drawn as they were do not
            count as replaced.
        **options: options of :class:`regard.tasks.text.TextTask`.
    """

    name = "replaced"
    pattern = Pattern.NONCAUSAL_SELF
    objective = "replaced-token"
    metric = "bits per token"
    chance = 1.0

    def __init__(self, *, share: float = 0.15, **options: Any) -> None:
        self.share = check_fraction("share", share, 0.01, 0.5)
        super().__init__(**options)
        self.vocab_size: int = self.tokenizer.vocab_size + 1  # includes a mask token, for the generator
        self._between = token_between_neighbours(self._training, self.tokenizer.vocab_size)
        replaced = torch.cat([batch.targets for batch in self.evaluation_batches(64)]).double()
        rate = replaced.mean().clamp(1e-6, 1 - 1e-6)
        bits = -(replaced * rate.log2() + (1 - replaced) * (1 - rate).log2())
        items = torch.stack([bits.sum(1), torch.full((len(bits),), float(self.length))], -1)
        self.baseline: Baseline | None = Baseline("how often tokens are replaced", items.numpy())

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        batch = super().training_batch(step, seed, batch_size)
        return Batch(batch.inputs, torch.zeros_like(batch.inputs))

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        first = 0
        for batch in super().evaluation_batches(batch_size):
            rows = [self._replace(row[None], first + i) for i, row in enumerate(batch.inputs)]
            first += batch.size
            inputs = torch.cat(rows)
            yield Batch(inputs, (inputs != batch.inputs).long())

    def score(self, logits: Float[Tensor, "b n 1"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Bits and number of tokens, for each window."""
        nats, tokens = replaced_by_item(logits.double(), batch)
        return nats / math.log(2), tokens

    def figures(
        self, output: Float[Tensor, "b n 1"], batch: Batch
    ) -> Mapping[str, tuple[Float[Tensor, " b"], Float[Tensor, " b"]]]:
        """The share of replaced tokens that are found, and the share of found tokens that were replaced."""
        said, true = output[..., 0] > 0, batch.targets == 1
        both = (said & true).sum(1).double()
        return {"found": (both, true.sum(1).double()), "rightly": (both, said.sum(1).double())}

    def describe(self) -> str:
        assert self.baseline is not None
        lines = super().describe().splitlines()
        lines[0] = lines[0].replace("text:", "replaced:", 1)
        told = (
            f"in held-out windows {self.share:.0%} of the tokens give way to draws from "
            f"{'the common ones between their neighbours' if self.vocab_size <= FROM_NEIGHBOURS + 1 else 'the common ones'}; "
            f"{self.baseline.name}: {self.baseline.score:.3f}"
        )
        rest = [
            line.replace("that predict no token twice, in bits per byte", "in bits per token") for line in lines[1:]
        ]
        return "\n".join([lines[0], told, *rest])

    def _replace(self, tokens: Int[Tensor, "1 n"], item: int) -> Int[Tensor, "1 n"]:
        draws = counter_generator(self.seed, item, REPLACING)
        chosen = torch.from_numpy(draws.random(tokens.shape)) < self.share
        scores = self._between(tokens)[chosen]
        noise = torch.from_numpy(draws.gumbel(size=tuple(scores.shape)))
        replaced = tokens.clone()
        replaced[chosen] = (scores + noise).argmax(-1)  # a draw from the softmax of the scores
        return replaced


def replaced_by_item(output: Float[Tensor, "b n 1"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Sum of cross entropies (nats) of whether tokens were replaced, and number of tokens, for each item."""
    if output.shape != (*batch.targets.shape, 1):
        raise Unsupported(
            f"outputs of shape {tuple(output.shape)} for targets of shape {tuple(batch.targets.shape)}",
            supported="one logit for each token",
        )
    logits, counted = wide(output)[..., 0], batch.targets != IGNORED
    labels = torch.where(counted, batch.targets, 0).to(logits.dtype)
    nats = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return nats.where(counted, 0).sum(1), counted.sum(1).to(logits.dtype)


register_objective(Objective("replaced-token", lambda task: (task.length,), replaced_by_item))
