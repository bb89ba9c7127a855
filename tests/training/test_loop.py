from __future__ import annotations

import dataclasses
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import Repeat, build_model

from regard.contract import Result, Unsupported
from regard.tasks.protocol import cross_entropy_by_item, mean_loss
from regard.training import PRECISIONS, History, TrainConfig, evaluate, train
from regard.training.loop import batch_context

CONFIG = TrainConfig(steps=12, batch_size=4, learning_rate=3e-3, checkpoint_every=4)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def without_times(history):
    return [dataclasses.replace(point, seconds=0.0) for point in history.curve]


def test_the_same_seed_gives_the_same_weights_bit_for_bit(task, build):
    first, second, other = build(), build(), build()
    torch.manual_seed(1)
    train(first, task, CONFIG)
    torch.manual_seed(2)
    train(second, task, CONFIG)
    train(other, task, dataclasses.replace(CONFIG, seed=1))
    assert_same(weights(first), weights(second))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_training_leaves_the_callers_randomness_and_mode_alone(task, build):
    model = build().eval()
    before = torch.random.get_rng_state()
    train(model, task, CONFIG)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


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
    assert_same(*(weights(model) for model in models))


@pytest.mark.parametrize("stop_after", [1, 2, 6, 11])
def test_a_run_interrupted_at_any_step_resumes_to_the_undisturbed_one(task, build, tmp_path, stop_after):
    undisturbed = build()
    expected = train(undisturbed, task, CONFIG)

    def interrupt(point):
        if point.step + 1 == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(build(), task, CONFIG, on_step=interrupt, checkpoint=tmp_path / "run")
    resumed = build()
    steps = []
    history = train(resumed, task, CONFIG, on_step=lambda p: steps.append(p.step), checkpoint=tmp_path / "run")
    assert steps == list(range(stop_after, CONFIG.steps))
    assert_same(weights(resumed), weights(undisturbed))
    assert without_times(history) == without_times(expected)
    assert (history.tokens, history.finished) == (expected.tokens, True)
    assert history.peak_memory == expected.peak_memory


def test_an_interrupt_while_weights_change_keeps_the_last_whole_checkpoint(task, build, tmp_path, monkeypatch):
    undisturbed = build()
    train(undisturbed, task, CONFIG)
    step = torch.optim.AdamW.step
    calls = []

    def half_step(optimizer, *args):
        calls.append(step(optimizer, *args))
        if len(calls) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", half_step)
    with pytest.raises(KeyboardInterrupt):
        train(build(), task, CONFIG, checkpoint=tmp_path / "run")
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    resumed, steps = build(), []
    train(resumed, task, CONFIG, on_step=lambda p: steps.append(p.step), checkpoint=tmp_path / "run")
    assert steps[0] == 4
    assert_same(weights(resumed), weights(undisturbed))


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from small_runs import Repeat, build_model
from regard.training import TrainConfig, train
torch.set_num_threads(int(sys.argv[3]))
kill = lambda point: os.kill(os.getpid(), signal.SIGKILL) if point.step == 6 else None
config = TrainConfig(steps=12, batch_size=4, learning_rate=3e-3, checkpoint_every=4)
train(build_model(Repeat()), Repeat(), config, on_step=kill, checkpoint=sys.argv[2])
"""


def test_a_killed_process_resumes_to_the_undisturbed_run(tmp_path):
    path = tmp_path / "run"
    arguments = [str(Path(__file__).parent), str(path), str(torch.get_num_threads())]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    undisturbed, resumed, steps = build_model(Repeat()), build_model(Repeat()), []
    train(undisturbed, Repeat(), CONFIG)
    train(resumed, Repeat(), CONFIG, on_step=lambda p: steps.append(p.step), checkpoint=path)
    assert steps[0] == 4
    assert_same(weights(resumed), weights(undisturbed))


def test_a_finished_run_is_not_trained_again_and_can_be_started_anew(task, build, tmp_path):
    path = tmp_path / "run"
    done = build()
    history = train(done, task, CONFIG, checkpoint=path)
    again, steps = build(), []
    assert train(again, task, CONFIG, checkpoint=path, on_step=steps.append) == history
    assert_same(weights(again), weights(done))
    assert steps == []
    anew = build()
    train(anew, task, CONFIG, checkpoint=path, resume=False, on_step=steps.append)
    assert len(steps) == CONFIG.steps
    assert_same(weights(anew), weights(done))


def test_a_deadline_stops_between_steps_and_the_run_resumes(task, build, tmp_path):
    undisturbed = build()
    train(undisturbed, task, CONFIG)
    path, model = tmp_path / "run", build()
    stopped = train(model, task, CONFIG, checkpoint=path, deadline=time.monotonic())
    assert (stopped.finished, stopped.diverged, stopped.curve) == (False, False, [])
    assert math.isnan(stopped.final_loss) and math.isnan(stopped.tokens_per_second)
    resumed = build()
    assert train(resumed, task, CONFIG, checkpoint=path).finished
    assert_same(weights(resumed), weights(undisturbed))


def test_divergence_is_reported_and_leaves_finite_weights(task, build, tmp_path):
    model = build()

    class Exploding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = model, 0

        def forward(self, inputs, *, context):
            self.calls += 1
            result = self.inner(inputs, context=context)
            return Result(result.output * (math.inf if self.calls == 5 else 1.0))

    history = train(Exploding(), task, CONFIG, checkpoint=tmp_path / "run")
    assert history.diverged and not history.finished and len(history.curve) == 4
    assert all(p.isfinite().all() for p in model.parameters())
    assert train(Exploding(), task, CONFIG, checkpoint=tmp_path / "run").diverged


def test_another_run_is_not_resumed(task, build, tmp_path):
    path = tmp_path / "run"
    train(build(), task, dataclasses.replace(CONFIG, steps=2), checkpoint=path)
    with pytest.raises(Unsupported, match="steps=2"):
        train(build(), task, CONFIG, checkpoint=path)
    other = type(task)()
    other.name = "another"
    with pytest.raises(Unsupported, match="task="):
        train(build(), other, dataclasses.replace(CONFIG, steps=2), checkpoint=path)


def test_training_learns_in_every_precision(task, build):
    for precision in PRECISIONS:
        model = build()
        config = TrainConfig(steps=60, batch_size=16, learning_rate=1e-2, precision=precision, measure_memory=False)
        before = evaluate(model, task, 16)
        history = train(model, task, config)
        after = evaluate(model, task, 16)
        assert history.final_loss < 0.8 * history.curve[0].loss
        assert after.loss < 0.8 * before.loss and after.score > before.score


def test_auxiliary_losses_are_weighted_and_reach_the_gradient(task):
    class Scaled(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor([[2.0]]))
            self.config = type("Config", (), {"loss_weights": {"size": weight}})

        def forward(self, inputs, *, context):
            shape = (*inputs.shape, 5) if task.objective == "next-token" else (len(inputs), 5)
            loss = (4 * self.scale.sum(), torch.tensor(2.0))
            return Result(torch.zeros(shape) * self.scale, losses={"size": loss})

    history = train(Scaled(0.5), task, TrainConfig(steps=1, batch_size=4))
    assert history.curve[0].auxiliary == pytest.approx(0.5 * 4 * 2.0 / 2)
    assert history.curve[0].gradient_norm == pytest.approx(0.5 * 4 / 2)
    assert history.curve[0].loss == pytest.approx(math.log(5))


def test_exits_learn_and_what_they_add_to_the_loss_is_told_apart(task, build):
    config = dataclasses.replace(build().config, dropout=0.0, stack={"exits": (1,)})
    model = type(build())(config).train()
    batch = task.training_batch(0, CONFIG.seed, CONFIG.batch_size)
    result = model(batch.inputs, context=batch_context(batch))
    final, early = (mean_loss(task, x, batch).item() for x in (result.output, result.extras["exits"][0][1]))
    before = model.exit_norms[0].weight.detach().clone()
    first = train(model, task, CONFIG).curve[0]
    assert first.loss == pytest.approx(final, rel=1e-5)
    assert first.loss + first.auxiliary == pytest.approx((2 * final + early) / 3, rel=1e-5)
    assert not torch.equal(before, model.exit_norms[0].weight)


@pytest.mark.parametrize("stack", [{"reversible": True}, {"checkpoint_layers": 1}])
def test_stacks_that_compute_twice_train_as_those_that_do_not(task, build, stack):
    """Dropout drawn from the step's generator, in a run of several steps."""
    models = []
    for _ in range(2):
        model = type(build())(dataclasses.replace(build().config, stack=stack)).double()
        model.load_state_dict(build().state_dict())
        models.append(model)
    if "checkpoint_layers" in stack:
        models[0].blocks.config = type(models[0].blocks.config)()
    else:  # a wish for extras has the same function differentiated as usual
        run = models[0].blocks.run
        models[0].blocks.run = lambda x, context, *rest: run(x, context.replace(want=frozenset({"gates"})), *rest)
    for model in models:
        train(model, task, CONFIG)
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(first, second)


def test_gradients_are_clipped_by_their_whole_norm(task, build, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def look(optimizer, *args):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt().item())
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    history = train(build(), task, dataclasses.replace(CONFIG, clip=1e-3, steps=3))
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)
    assert all(point.gradient_norm > 1e-2 for point in history.curve)


def test_history_counts_valid_tokens_and_keeps_memory_and_time(task, build):
    history = train(build(), task, dataclasses.replace(CONFIG, steps=5))
    batches = [task.training_batch(step, 0, 4) for step in range(5)]
    expected = sum(int(b.valid.sum()) if b.valid is not None else b.inputs.numel() for b in batches)
    assert history.tokens == expected
    assert history.peak_memory > 0 and history.memory_counted == "tensors"
    assert history.tokens_per_second > 0 and history.seconds > 0
    assert History.from_record(dataclasses.asdict(history)) == history


@pytest.mark.parametrize("batch_size", [40, 7, 1])
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
    whole = evaluate(model, task, 7)
    parts = [
        evaluate(model, task, 7, last=10),
        evaluate(model, task, 7, first=10, last=21),
        evaluate(model, task, 7, first=21),
    ]
    assert [item for part in parts for item in part.items] == whole.items
    assert [len(part.items) for part in parts] == [10, 11, 19]
    assert math.isnan(evaluate(model, task, 7, first=40).score)


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
