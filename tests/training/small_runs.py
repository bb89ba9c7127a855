"""Two small tasks and a model for each."""

from __future__ import annotations

import torch

from regard.contract import Pattern
from regard.models import Encoder, EncoderConfig, LanguageModel, LanguageModelConfig
from regard.tasks.protocol import Batch, Task, counter_generator


class LastToken(Task):
    """Which token came last? Padded; the answer is copied from the last valid place."""

    name, pattern, objective = "last token", Pattern.NONCAUSAL_SELF, "classification"
    length, vocab_size, num_classes = 6, 5, 5

    def training_batch(self, step, seed, batch_size):
        rng = counter_generator(seed, step)
        ids = torch.from_numpy(rng.integers(0, 5, (batch_size, self.length)))
        lengths = torch.from_numpy(rng.integers(1, self.length + 1, batch_size))
        valid = torch.arange(self.length) < lengths[:, None]
        return Batch(ids, ids[torch.arange(batch_size), lengths - 1], valid)

    def evaluation_batches(self, batch_size):
        whole = self.training_batch(0, 99, 40)
        for start in range(0, 40, batch_size):
            rows = slice(start, start + batch_size)
            yield Batch(whole.inputs[rows], whole.targets[rows], whole.valid[rows])


class Repeat(Task):
    """The token of two places before, at each place."""

    name, pattern, objective = "repeat", Pattern.CAUSAL_SELF, "next-token"
    length, vocab_size = 8, 5

    def training_batch(self, step, seed, batch_size):
        ids = torch.from_numpy(counter_generator(seed, step).integers(0, 5, (batch_size, self.length)))
        targets = torch.cat([torch.full((batch_size, 2), -100), ids[:, :-2]], 1)
        return Batch(ids, targets)

    def evaluation_batches(self, batch_size):
        yield self.training_batch(0, 99, 40)


def build_model(task):
    """The same small model each time, with dropout."""
    torch.manual_seed(7)
    sizes = {"vocab_size": 5, "dim": 16, "num_heads": 2, "plan": ["softmax", "linear"], "dropout": 0.1}
    if task.objective == "classification":
        return Encoder(EncoderConfig(num_classes=5, **sizes))
    return LanguageModel(LanguageModelConfig(**sizes))
