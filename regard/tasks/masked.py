"""Masked language modelling on a user's text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import Pattern
from regard.tasks.protocol import IGNORED, Baseline, Batch, check_fraction, counter_generator, with_options_of_base
from regard.tasks.text import TextTask

if TYPE_CHECKING:
    from jaxtyping import Float, Int

MASKING = 17
"""Random stream for the masked positions."""
FROM_NEIGHBOURS = 1024
"""Largest vocabulary for which token pairs are counted."""


@with_options_of_base
class MaskedTask(TextTask):
    """Predict masked tokens of text from the tokens on both sides (BERT, Devlin et al., arXiv 1810.04805).

    A share of each window's tokens is to be predicted: of these, 80 % are replaced by a mask token, 10 % by a random
    token, and 10 % stay. The score is bits per byte of these tokens alone. Windows, splits and options are those of the
    text task.

    Args:
        share: share of the tokens to predict, 0.01 to 0.5.
        **options: options of :class:`regard.tasks.text.TextTask`.
    """

    name = "masked"
    pattern = Pattern.NONCAUSAL_SELF
    objective = "masked-token"

    def __init__(self, *, share: float = 0.15, **options: Any) -> None:
        self.share = check_fraction("share", share, 0.01, 0.5)
        super().__init__(**options)
        self.mask_token = self.tokenizer.vocab_size
        self.vocab_size: int = self.tokenizer.vocab_size + 1
        self.baseline: Baseline | None = self._rule()

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        batch = super().training_batch(step, seed, batch_size)
        return self._hide(batch.inputs, counter_generator(seed, step, MASKING))

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        first = 0
        for batch in super().evaluation_batches(batch_size):
            drawn = [
                self._hide(batch.inputs[i : i + 1], counter_generator(self.seed, first + i, MASKING))
                for i in range(batch.size)
            ]
            first += batch.size
            yield Batch(torch.cat([one.inputs for one in drawn]), torch.cat([one.targets for one in drawn]))

    def describe(self) -> str:
        assert self.baseline is not None
        lines = super().describe().splitlines()
        lines[0] = lines[0].replace("text:", "masked:", 1)
        told = f"{self.share:.0%} of the tokens are to be told; {self.baseline.name}: {self.baseline.score:.3f}"
        return "\n".join([lines[0], told, *(line.replace("that predict no token twice, ", "") for line in lines[1:])])

    def _hide(self, tokens: Tensor, draws: np.random.Generator) -> Batch:
        """Mask some of the tokens (B, N), at least one in each row; the targets are the masked tokens."""
        places = torch.from_numpy(draws.random(tokens.shape))
        hidden = places <= torch.maximum(torch.tensor(self.share), places.amin(1, keepdim=True))
        fate = torch.from_numpy(draws.random(tokens.shape))
        others = torch.from_numpy(draws.integers(0, self.mask_token, tokens.shape))
        shown = torch.where(fate < 0.8, self.mask_token, torch.where(fate < 0.9, others, tokens))
        return Batch(torch.where(hidden, shown, tokens), torch.where(hidden, tokens, IGNORED))

    def _rule(self) -> Baseline:
        """The rule that predicts the commonest token between two neighbours or, for large vocabularies, the commonest
        one."""
        predict = token_between_neighbours(self._training, self.vocab_size, hidden=self.mask_token)
        told = "token frequencies" if self.vocab_size > FROM_NEIGHBOURS else "token between its two neighbours"
        return Baseline.of(told, self, lambda batch: predict(batch.inputs))


def token_between_neighbours(
    training: Int[np.ndarray, " n"], size: int, hidden: int | None = None
) -> Callable[[Int[Tensor, "b n"]], Float[Tensor, "b n v"]]:
    """A function from tokens (B, N) to the scores (B, N, `size`) of each token at each position, given its two
    neighbours: logs of counts in the training tokens. For vocabularies above `FROM_NEIGHBOURS`, logs of the token
    frequencies.

    Args:
        hidden: a token that gives no information as a neighbour, like the ends of the sequence.
    """
    tokens = torch.from_numpy(training.astype(np.int64))
    alone = (torch.bincount(tokens, minlength=size) + 1.0).log()
    if size > FROM_NEIGHBOURS:
        return lambda tokens: alone.expand(*tokens.shape, size)
    pairs = torch.bincount(tokens[:-1] * size + tokens[1:], minlength=size * size).view(size, size) + 0.1
    nothing = size
    # log counts of each token given the one before it, and given the one after it
    after, before = (torch.cat([each.log(), alone[None]]) for each in (pairs, pairs.mT))
    if hidden is not None:
        after[hidden] = before[hidden] = alone

    def predict(tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        left, right = (F.pad(tokens, pad, value=nothing) for pad in ((1, 0), (0, 1)))
        return after[left[:, :-1]] + before[right[:, 1:]] - alone

    return predict
