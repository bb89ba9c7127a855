"""The training loop on models that read a memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from regard.contract import Pattern
from regard.models import EncoderDecoder, EncoderDecoderConfig, Forecaster, ForecasterConfig
from regard.tasks.protocol import IGNORED, Batch, Task, absolute_error, check_task, counter_generator
from regard.training import PRECISIONS, TrainConfig, evaluate, train
from regard.training.loop import batch_context

CONFIG = TrainConfig(steps=12, batch_size=4, learning_rate=3e-3, checkpoint_every=4)
START, STOP = 0, 1


class Reverse(Task):
    """The tokens of the memory, last one first."""

    name, pattern, objective = "reverse", Pattern.CAUSAL_CROSS, "next-token"
    length, memory_length, vocab_size, memory_vocab_size = 6, 5, 8, 8
    generates, stop_tokens, metric = 6, (STOP,), "exact match"

    def training_batch(self, step, seed, batch_size):
        rng = counter_generator(seed, step)
        memory = torch.from_numpy(rng.integers(2, 8, (batch_size, 5)))
        lengths = torch.from_numpy(rng.integers(1, 6, batch_size))[:, None]
        place = torch.arange(6)
        answer = memory.gather(1, (lengths - 1 - place).clamp(min=0))
        answer = torch.where(place < lengths, answer, torch.where(place == lengths, STOP, IGNORED))
        inputs = torch.cat([torch.full((batch_size, 1), START), answer[:, :-1].clamp(min=0)], 1)
        return Batch(inputs, answer, place <= lengths, None, memory, torch.arange(5) < lengths)

    def evaluation_batches(self, batch_size):
        whole = self.training_batch(0, 99, 40)
        for start in range(0, 40, batch_size):
            yield whole.items(start, min(start + batch_size, 40))

    def score_generated(self, tokens, batch):
        right = []
        for row, target in zip(tokens.tolist(), batch.targets.tolist(), strict=True):
            wanted = [token for token in target if token != IGNORED]
            right.append(float(row[: len(wanted)] == wanted))
        return torch.tensor(right).double(), torch.ones(len(right)).double()


class Continue(Task):
    """The next points of a wave, whose past is sometimes short."""

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

    def evaluation_batches(self, batch_size):
        yield self.training_batch(0, 99, 40)

    def score(self, output, batch):
        return absolute_error(output, batch)


def build_model(task):
    """The same small model each time, with dropout."""
    torch.manual_seed(7)
    sizes = {"dim": 16, "num_heads": 2, "num_layers": 1, "dropout": 0.1}
    if task.objective == "regression":
        config = ForecasterConfig(1, 2, target_features=task.target_features, cross_plan="linear", patch=2, **sizes)
        return Forecaster(config)
    return EncoderDecoder(EncoderDecoderConfig(8, memory_vocab_size=8, cross_plan="linear", **sizes))


@pytest.fixture(params=[Reverse, Continue])
def task(request):
    return check_task(request.param())


@pytest.fixture
def build(task):
    return partial(build_model, task)


@pytest.mark.parametrize("stop_after", [1, 6])
def test_a_run_interrupted_at_any_step_resumes_to_the_undisturbed_one(task, build, tmp_path, stop_after):
    undisturbed, resumed, steps = build(), build(), []
    expected = train(undisturbed, task, CONFIG)

    def interrupt(point):
        if point.step + 1 == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(build(), task, CONFIG, on_step=interrupt, checkpoint=tmp_path / "run")
    history = train(resumed, task, CONFIG, on_step=lambda p: steps.append(p.step), checkpoint=tmp_path / "run")
    assert steps == list(range(stop_after, CONFIG.steps))
    assert (history.tokens, history.finished) == (expected.tokens, True)
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_training_learns_in_every_precision(task, build):
    for precision in PRECISIONS:
        model = build()
        config = TrainConfig(steps=80, batch_size=16, learning_rate=1e-2, precision=precision, measure_memory=False)
        before = evaluate(model, task, 16)
        assert not train(model, task, config).diverged
        assert evaluate(model, task, 16).loss < 0.8 * before.loss


def test_generated_answers_are_scored_as_generated():
    task = Reverse()
    model = build_model(task)
    train(model, task, TrainConfig(steps=150, batch_size=16, learning_rate=1e-2, measure_memory=False))
    found = evaluate(model, task, 7)
    whole = next(iter(task.evaluation_batches(40)))
    context = batch_context(whole)
    tokens = model.eval().generate(
        whole.inputs[:, :1], 6, memory=whole.memory, memory_mask=context.memory_mask, stop_tokens=(STOP,)
    )
    assert found.items == list(zip(*(x.tolist() for x in task.score_generated(tokens, whole)), strict=True))
    assert found.score > 0
    parts = [evaluate(model, task, 7, last=10), evaluate(model, task, 7, first=10)]
    assert [item for part in parts for item in part.items] == found.items
