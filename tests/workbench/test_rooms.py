"""A task with its own objective, model and runner is compared, trained and loaded again without changes elsewhere."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from regard import Pattern, Unsupported
from regard.measurement.budget import Budget
from regard.models import from_pretrained, register_model
from regard.models.encoder import Encoder, EncoderConfig
from regard.models.registry import MODELS, models_for
from regard.tasks import Batch, Objective, Task, check_task, counter_generator, register_objective
from regard.tasks.protocol import OBJECTIVES
from regard.training import History, Point, evaluate
from regard.training.step import batch_context, run_model
from regard.workbench.comparison.compare import compare
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.trained.run import train_model


@dataclass(frozen=True)
class OrdererConfig(EncoderConfig):
    serves: ClassVar = ((Pattern.NONCAUSAL_SELF, "ordering"),)

    @classmethod
    def for_task(cls, task, plan, **sizes):
        return cls(vocab_size=task.vocab_size, num_classes=1, plan=plan, **sizes)


class Orderer(Encoder):
    """One number for each item, by which the items of a batch are to be ordered."""


def ordering_loss(output, batch):
    """Logistic loss on which of two consecutive items is larger."""
    mine, other = output[:, 0], output[:, 0].roll(1)
    sign = torch.sign(batch.targets - batch.targets.roll(1)).to(output.dtype)
    return torch.nn.functional.softplus(-sign * (mine - other)), torch.ones_like(mine)


class Climber:
    """Hill climbing: a random change of the weights is kept unless the batch's loss rises."""

    evaluate = staticmethod(evaluate)

    def train(self, model, task, config, *, on_step=None, checkpoint=None, deadline=None):
        history = History()
        with torch.no_grad():
            while len(history.curve) < config.steps and (deadline is None or time.monotonic() < deadline):
                step, started = len(history.curve), time.perf_counter()
                batch = task.training_batch(step, config.seed, config.batch_size)
                before, kept = self._loss(model, task, batch), copy.deepcopy(model.state_dict())
                generator = torch.Generator().manual_seed(config.seed * 10_000 + step)
                for parameter in model.parameters():
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
                after = self._loss(model, task, batch)
                if after > before:
                    model.load_state_dict(kept)
                point = Point(step, min(before, after), 0.0, 0.0, 0.0, time.perf_counter() - started)
                history.curve.append(point)
                history.tokens += batch.inputs.numel()
                if on_step is not None:
                    on_step(point)
        history.finished = len(history.curve) == config.steps
        return history

    @staticmethod
    def _loss(model, task, batch):
        sums, weights = task.loss(run_model(model, batch, batch_context(batch)).output, batch)
        return float(sums.sum() / weights.sum())


class Ones(Task):
    """Order rows by their number of ones."""

    name, pattern, objective = "ones", Pattern.NONCAUSAL_SELF, "ordering"
    length, vocab_size, runner = 12, 2, Climber()

    def describe(self):
        return "which row has more ones?"

    def training_batch(self, step, seed, batch_size):
        bits = counter_generator(seed, step).integers(0, 2, (batch_size, self.length))
        return Batch(torch.from_numpy(bits), torch.from_numpy(bits.sum(1)))

    def evaluation_batches(self, batch_size):
        yield self.training_batch(0, 2**32, 16)

    def score(self, output, batch):
        losses, weights = ordering_loss(output, batch)
        return (losses < math.log(2)).double(), weights.double()


@pytest.fixture
def rooms():
    objectives, models = dict(OBJECTIVES), dict(MODELS)
    register_objective(Objective("ordering", lambda task: (), ordering_loss))
    register_model(Orderer, OrdererConfig)
    yield
    for registry, before in ((OBJECTIVES, objectives), (MODELS, models)):
        registry.clear()
        registry.update(before)


def settings(*names: str) -> CompareSettings:
    return CompareSettings(
        names,
        Budget.parse("30 steps"),
        dim=16,
        layers=1,
        heads=2,
        seeds=1,
        rates=(1e-3,),
        lengths=(12, 24),
        at_length=12,
    )


def test_mechanisms_are_compared_on_it(rooms, tmp_path, monkeypatch):
    monkeypatch.setattr("regard.training.loop.train", None)  # no gradient steps are taken
    task = check_task(Ones())
    assert models_for(task) == ["Orderer"]
    outcome = compare([task], settings("softmax", "linear"), tmp_path)
    entries = outcome.summary["ones"]
    assert {e["mechanism"] for e in entries} == {"softmax", "linear"}
    assert all(0 <= e["mean"] <= 1 for e in entries)


def test_a_model_of_it_is_trained_and_loaded_again(rooms, tmp_path):
    trained = train_model(Ones(), settings("softmax"), tmp_path / "model")
    assert trained.record["state"] == "finished"
    model, inputs = from_pretrained(tmp_path / "model"), torch.randint(2, (3, 12))
    assert isinstance(model, Orderer)
    torch.testing.assert_close(model(inputs).output, trained.model()(inputs).output)
    assert trained.score(Ones()).score == evaluate(model, Ones(), 16).score


def test_objectives_and_runners_that_are_none_are_refused(rooms):
    with pytest.raises(Unsupported, match="another objective named ordering"):
        register_objective(Objective("ordering", lambda task: (1,), ordering_loss))
    with pytest.raises(Unsupported, match=r"odering.*try ordering"):
        check_task(type("Wrong", (Ones,), {"objective": "odering"})())
    with pytest.raises(Unsupported, match="a runner of type int"):
        check_task(type("Wrong", (Ones,), {"runner": 3})())
