"""Four small tasks, a model for each, and helpers for runs that are interrupted and resumed."""

from __future__ import annotations

import pytest
import torch

from regard import models
from regard.contract import Pattern
from regard.tasks.protocol import IGNORED, Batch, Task, absolute_error, counter_generator
from regard.training import train


class Small(Task):
    """A task with forty items to evaluate on."""

    def evaluation_batches(self, batch_size):
        whole = self.training_batch(0, 99, 40)
        for start in range(0, 40, batch_size):
            yield whole.items(start, min(start + batch_size, 40))


class LastToken(Small):
    """Which token came last? Inputs are padded; the answer is the token at the last valid place."""

    name, pattern, objective = "last token", Pattern.NONCAUSAL_SELF, "classification"
    length, vocab_size, num_classes = 6, 5, 5

    def training_batch(self, step, seed, batch_size):
        rng = counter_generator(seed, step)
        ids = torch.from_numpy(rng.integers(0, 5, (batch_size, self.length)))
        lengths = torch.from_numpy(rng.integers(1, self.length + 1, batch_size))
        valid = torch.arange(self.length) < lengths[:, None]
        return Batch(ids, ids[torch.arange(batch_size), lengths - 1], valid)


class Repeat(Small):
    """Predict at each place the token from two places before."""

    name, pattern, objective = "repeat", Pattern.CAUSAL_SELF, "next-token"
    length, vocab_size = 8, 5

    def training_batch(self, step, seed, batch_size):
        ids = torch.from_numpy(counter_generator(seed, step).integers(0, 5, (batch_size, self.length)))
        targets = torch.cat([torch.full((batch_size, 2), -100), ids[:, :-2]], 1)
        return Batch(ids, targets)


class Reverse(Small):
    """Write the memory's tokens in reverse order, starting from a 0 and followed by a 1."""

    name, pattern, objective = "reverse", Pattern.CAUSAL_CROSS, "next-token"
    length, memory_length, vocab_size, memory_vocab_size = 6, 5, 8, 8
    generates, stop_tokens, metric = 6, (1,), "exact match"

    def training_batch(self, step, seed, batch_size):
        rng = counter_generator(seed, step)
        memory = torch.from_numpy(rng.integers(2, 8, (batch_size, 5)))
        lengths = torch.from_numpy(rng.integers(1, 6, batch_size))[:, None]
        place = torch.arange(6)
        answer = memory.gather(1, (lengths - 1 - place).clamp(min=0))
        answer = torch.where(place < lengths, answer, torch.where(place == lengths, 1, IGNORED))
        inputs = torch.nn.functional.pad(answer[:, :-1].clamp(min=0), (1, 0))
        return Batch(inputs, answer, place <= lengths, None, memory, torch.arange(5) < lengths)

    def score_generated(self, tokens, batch):
        width = min(tokens.shape[1], 6)
        wrong = (tokens[:, :width] != batch.targets[:, :width]) & (batch.targets[:, :width] != IGNORED)
        return 1 - wrong.any(1).double(), torch.ones(len(tokens)).double()


class Continue(Small):
    """Forecast the next points of a wave, whose past is sometimes short."""

    name, pattern, objective = "continue", Pattern.NONCAUSAL_CROSS, "regression"
    length, memory_length, features, memory_features, num_targets = 4, 12, 1, 2, 1
    target_features, metric, higher_is_better = (1,), "MAE", False

    def training_batch(self, step, seed, batch_size):
        rng = counter_generator(seed, step)
        phase = torch.from_numpy(rng.random((batch_size, 1))).float() * 6.28
        time = torch.arange(-12, 4)
        wave = 50 + 10 * torch.sin(0.7 * time + phase)
        known = (time / 4.0).expand(batch_size, -1)
        lengths = torch.from_numpy(rng.integers(6, 13, batch_size))[:, None]
        memory = torch.stack([known, wave], -1)[:, :12]
        return Batch(known[:, 12:, None], wave[:, 12:, None], None, None, memory, torch.arange(12) >= 12 - lengths)

    def score(self, output, batch):
        return absolute_error(output, batch)


def build_model(task):
    """Build a small model with dropout for a task, the same each time."""
    torch.manual_seed(7)
    plan = ["linear"] if task.memory_length else ["softmax", "linear"]
    sizes = {"dim": 16, "num_heads": 2, "num_layers": len(plan), "dropout": 0.1}
    return models.build_model(models.config_for(task, plan, positions="auto", max_length=16, **sizes))


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first, second):
    """Assert that two models, or their weights, are the same to the last bit."""
    first, second = (x if isinstance(x, dict) else x.state_dict() for x in (first, second))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def train_until(stop_after, model, task, config, path):
    """Run training that is interrupted after `stop_after` steps."""

    def interrupt(point):
        if point.step + 1 == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, task, config, on_step=interrupt, checkpoint=path)


def train_on(model, task, config, path):
    """Resume a run from its checkpoint; returns its history and the steps taken."""
    steps = []
    return train(model, task, config, on_step=lambda point: steps.append(point.step), checkpoint=path), steps


def record_gradient_norms(monkeypatch):
    """A list to which every optimizer step appends the norm of all gradients."""
    norms, step = [], torch.optim.AdamW.step

    def look(optimizer, *args):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt().item())
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    return norms
