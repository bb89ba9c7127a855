from __future__ import annotations

import dataclasses
import math
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from small_runs import (
    Repeat,
    Reverse,
    assert_same,
    build_model,
    record_gradient_norms,
    train_on,
    train_until,
)

from regard.backends import linear
from regard.backends.linear.choices import Choices
from regard.contract import Result, Unsupported
from regard.tasks.protocol import cross_entropy_by_item, mean_loss
from regard.training import PRECISIONS, History, TrainConfig, evaluate, train
from regard.training.loop import batch_context

CONFIG = TrainConfig(steps=12, batch_size=4, learning_rate=3e-3, checkpoint_every=4)


@pytest.fixture
def undisturbed(task, build):
    """A model trained without interruption."""
    model = build()
    train(model, task, CONFIG)
    return model


def test_the_same_seed_gives_the_same_weights_and_leaves_the_callers_randomness_and_mode_alone(
    task, build, undisturbed
):
    again, other = build().eval(), build()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    train(again, task, CONFIG)
    assert_same(again, undisturbed)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not again.training
    assert all(p.grad is None for p in again.parameters())
    train(other, task, dataclasses.replace(CONFIG, seed=1))
    assert not all(torch.equal(a, b) for a, b in zip(again.parameters(), other.parameters(), strict=True))


def test_draws_without_a_generator_follow_the_seed_too():
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(5, 5))

        def forward(self, inputs, *, context):
            assert context.generator is not None
            return Result(self.table[inputs] * torch.rand(()) * torch.rand((), generator=context.generator))

    models = [Noisy(), Noisy()]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        train(model, Repeat(), CONFIG)
    assert_same(*models)


@pytest.mark.parametrize("stop_after", [1, 6, 11])
def test_a_run_interrupted_at_any_step_resumes_to_the_undisturbed_one(any_task, tmp_path, stop_after):
    build, path = partial(build_model, any_task), tmp_path / "run"
    undisturbed, resumed = build(), build()
    expected = train(undisturbed, any_task, CONFIG)
    train_until(stop_after, build(), any_task, CONFIG, path)
    history, steps = train_on(resumed, any_task, CONFIG, path)
    assert steps == list(range(stop_after, CONFIG.steps))
    assert_same(resumed, undisturbed)
    curves = [[dataclasses.replace(point, seconds=0.0) for point in run.curve] for run in (history, expected)]
    assert curves[0] == curves[1]
    assert (history.tokens, history.finished) == (expected.tokens, True)
    assert history.peak_memory == expected.peak_memory


def test_a_resumed_run_goes_on_with_the_routes_of_linear_layers_that_it_began_with(task, build, tmp_path, monkeypatch):
    product = (torch.get_num_threads(), 7, 11, 10, "rows", "rows", False)
    for stop_after, known in ((3, {product: "torch"}), (4, {})):  # as in two processes
        monkeypatch.setattr(linear, "CHOICES", Choices(known=known))
        train_until(stop_after, build(), task, CONFIG, tmp_path / "run")
    assert linear.CHOICES.known[product] == "torch"


def test_an_interrupt_while_weights_change_keeps_the_last_whole_checkpoint(
    task, build, undisturbed, tmp_path, monkeypatch
):
    step, calls = torch.optim.AdamW.step, []

    def half_step(optimizer, *args):
        calls.append(step(optimizer, *args))
        if len(calls) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", half_step)
    with pytest.raises(KeyboardInterrupt):
        train(build(), task, CONFIG, checkpoint=tmp_path / "run")
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    resumed = build()
    _, steps = train_on(resumed, task, CONFIG, tmp_path / "run")
    assert steps[0] == 4
    assert_same(resumed, undisturbed)


def test_a_finished_run_is_not_trained_again_and_can_be_started_anew(task, build, undisturbed, tmp_path):
    path, again, anew = tmp_path / "run", build(), build()
    history = train(build(), task, CONFIG, checkpoint=path)
    assert train_on(again, task, CONFIG, path) == (history, [])
    assert_same(again, undisturbed)
    steps = []
    train(anew, task, CONFIG, checkpoint=path, resume=False, on_step=steps.append)
    assert len(steps) == CONFIG.steps
    assert_same(anew, undisturbed)


def test_a_deadline_stops_between_steps_and_the_run_resumes(task, build, undisturbed, tmp_path):
    path, resumed = tmp_path / "run", build()
    stopped = train(build(), task, CONFIG, checkpoint=path, deadline=time.monotonic())
    assert (stopped.finished, stopped.diverged, stopped.curve) == (False, False, [])
    assert math.isnan(stopped.final_loss) and math.isnan(stopped.tokens_per_second)
    assert train(resumed, task, CONFIG, checkpoint=path).finished
    assert_same(resumed, undisturbed)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_divergence_is_reported_and_leaves_finite_weights(task, build, tmp_path, precision):
    class Exploding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build()

        def forward(self, inputs, *, context):
            result = self.inner(inputs, context=context)
            return Result(result.output * (math.inf if context.progress == 4 else 1.0))

    model, config = Exploding(), dataclasses.replace(CONFIG, precision=precision)
    history = train(model, task, config, checkpoint=tmp_path / "run")
    assert history.diverged and not history.finished and len(history.curve) == 4
    assert all(p.isfinite().all() for p in model.parameters())
    assert train(Exploding(), task, config, checkpoint=tmp_path / "run").diverged


def test_another_run_is_not_resumed(task, build, tmp_path):
    path, short, other = tmp_path / "run", dataclasses.replace(CONFIG, steps=2), type(task)()
    train(build(), task, short, checkpoint=path)
    other.name = "another"
    for asked, config, message in ((task, CONFIG, "steps=2"), (other, short, "task=")):
        with pytest.raises(Unsupported, match=message):
            train(build(), asked, config, checkpoint=path)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_learns_in_every_precision(any_task, precision):
    model = build_model(any_task)
    config = TrainConfig(steps=30, batch_size=16, learning_rate=1e-2, precision=precision, measure_memory=False)
    before = evaluate(model, any_task, 16)
    assert not train(model, any_task, config).diverged
    after = evaluate(model, any_task, 16)
    assert after.loss < 0.8 * before.loss
    better = after.score > before.score if any_task.higher_is_better else after.score < before.score
    assert better or any_task.generates, "whole answers are right later"


def test_auxiliary_losses_are_weighted_and_reach_the_gradient():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor([[2.0]]))
            self.config = SimpleNamespace(loss_weights={"size": 0.5})

        def forward(self, inputs, *, context):
            loss = (4 * self.scale.sum(), torch.tensor(2.0))
            return Result(torch.zeros(*inputs.shape, 5) * self.scale, losses={"size": loss})

    first = train(Scaled(), Repeat(), TrainConfig(steps=1, batch_size=4)).curve[0]
    assert first.auxiliary == pytest.approx(0.5 * 4 * 2.0 / 2)
    assert first.gradient_norm == pytest.approx(0.5 * 4 / 2)
    assert first.loss == pytest.approx(math.log(5))


def test_exits_learn_and_what_they_add_to_the_loss_is_told_apart(task, build):
    config = dataclasses.replace(build().config, dropout=0.0, stack={"exits": (1,)})
    model = type(build())(config).train()
    batch = task.training_batch(0, CONFIG.seed, CONFIG.batch_size)
    result = model(batch.inputs, context=batch_context(batch))
    final, early = (mean_loss(task, x, batch).item() for x in (result.output, result.extras["exits"][0][1]))
    before = model.exits[0].norm.weight.detach().clone()
    first = train(model, task, CONFIG).curve[0]
    assert first.loss == pytest.approx(final, rel=1e-5)
    assert first.loss + first.auxiliary == pytest.approx((2 * final + early) / 3, rel=1e-5)
    assert not torch.equal(before, model.exits[0].norm.weight)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_gradients_are_unscaled_and_clipped_by_their_whole_norm(task, build, monkeypatch, precision):
    norms = record_gradient_norms(monkeypatch)
    history = train(build(), task, dataclasses.replace(CONFIG, clip=1e-3, steps=3, precision=precision))
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)
    assert all(1e-2 < point.gradient_norm < 1e2 for point in history.curve)


def test_history_counts_valid_tokens_and_keeps_memory_and_time(task, build):
    history = train(build(), task, dataclasses.replace(CONFIG, steps=5))
    batches = [task.training_batch(step, 0, 4) for step in range(5)]
    expected = sum(int(b.valid.sum()) if b.valid is not None else b.inputs.numel() for b in batches)
    assert history.tokens == expected
    assert history.peak_memory > 0 and history.memory_counted == "tensors"
    assert history.tokens_per_second > 0 and history.seconds > 0
    assert History.from_record(dataclasses.asdict(history)) == history


@pytest.mark.parametrize("batch_size", [40, 7])
def test_evaluation_is_the_same_for_every_batch_size_and_pairs_items(task, build, batch_size):
    model = build().double()
    found = evaluate(model, task, batch_size)
    whole = next(iter(task.evaluation_batches(40)))
    model.eval()
    with torch.no_grad():
        logits = model(whole.inputs, context=batch_context(whole)).output
    sums, counts = task.score(logits, whole)
    nats, targets = cross_entropy_by_item(logits, whole)
    assert found.items == list(zip(sums.tolist(), counts.tolist(), strict=True))
    assert found.score == pytest.approx(float(sums.sum() / counts.sum()))
    assert found.loss == pytest.approx(float(nats.sum() / targets.sum()))


def test_slices_of_an_evaluation_make_up_the_whole(task, build):
    model = build().double()
    slices = ({"last": 10}, {"first": 10, "last": 21}, {"first": 21})
    parts = [evaluate(model, task, 7, **places).items for places in slices]
    assert [item for part in parts for item in part] == evaluate(model, task, 7).items
    assert [len(part) for part in parts] == [10, 11, 19]
    assert math.isnan(evaluate(model, task, 7, first=40).score)


def test_generated_answers_are_scored_as_generated():
    task = Reverse()
    model = build_model(task)
    train(model, task, TrainConfig(steps=60, batch_size=16, learning_rate=1e-2, measure_memory=False))
    found = evaluate(model, task, 7)
    whole = next(iter(task.evaluation_batches(40)))
    memory_mask = batch_context(whole).memory_mask
    tokens = model.eval().generate(
        whole.inputs[:, :1], 6, memory=whole.memory, memory_mask=memory_mask, stop_tokens=task.stop_tokens
    )
    assert found.items == list(zip(*(x.tolist() for x in task.score_generated(tokens, whole)), strict=True))
    assert found.score > 0
    assert evaluate(model, task, 7, last=10).items + evaluate(model, task, 7, first=10).items == found.items


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"warmup": 2}, "share"),
        ({"clip": 0.0}, "clip=None"),
        ({"schedule": "cosin"}, "cosine"),
        ({"precision": "int8"}, "bfloat16"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(Unsupported, match=words):
        TrainConfig(**options)
