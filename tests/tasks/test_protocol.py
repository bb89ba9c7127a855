"""Losses, scores, generators and the checks on a user's own task."""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from task_data import made, refused

from regard.contract import Pattern
from regard.tasks import (
    IGNORED,
    Baseline,
    Batch,
    Task,
    absolute_error,
    accuracy,
    bits_per_byte,
    check_task,
    counter_generator,
    create_task,
    cross_entropy_by_item,
    mean_loss,
    squared_error_by_item,
)


class Words(Task):
    objective = "next-token"


class Numbers(Task):
    objective = "regression"


def batch_of(targets):
    return Batch(torch.zeros(targets.shape[:2]).long(), targets)


@pytest.fixture
def words():
    """Logits of 7 classes, and targets, of which the first item has only one."""
    targets = torch.randint(7, (3, 5))
    targets[0, 1:] = IGNORED
    return torch.randn(3, 5, 7, dtype=torch.float64), batch_of(targets)


def test_scores_of_words_count_the_targets_that_exist(words):
    logits, batch = words
    kept = batch.targets != IGNORED
    expected = -logits.log_softmax(-1)[kept].gather(1, batch.targets[kept][:, None]).mean()
    torch.testing.assert_close(mean_loss(Words(), logits, batch), expected)
    sums, counts = cross_entropy_by_item(logits, batch)
    torch.testing.assert_close(sums.sum() / 11, expected)
    right, asked = accuracy(torch.nn.functional.one_hot(batch.targets.clamp(min=0), 7).double(), batch)
    assert counts.tolist() == right.tolist() == asked.tolist() == [1, 5, 5]
    token_bytes = torch.randint(1, 9, (7,))
    bits, weight = bits_per_byte(logits, batch, token_bytes)
    torch.testing.assert_close(bits, sums / math.log(2))
    assert weight.tolist() == [sum(int(token_bytes[t]) for t in row if t != IGNORED) for row in batch.targets.tolist()]
    for function in (cross_entropy_by_item, accuracy):
        refused(lambda function=function: function(logits[:, 1:], batch), "supported: logits of shape")


def test_scores_of_numbers_count_the_targets_that_exist():
    output, targets = torch.randn(2, 2, 3, 2, dtype=torch.float64)
    targets[0, 1:] = math.nan
    sums, counts = squared_error_by_item(output, batch_of(targets))
    assert counts.tolist() == [2, 6]
    torch.testing.assert_close(sums[0], (output[0, 0] - targets[0, 0]).square().sum())
    torch.testing.assert_close(mean_loss(Numbers(), output, batch_of(targets)), sums.sum() / 8)
    absolute, _ = absolute_error(output, batch_of(targets))
    torch.testing.assert_close(absolute[1], (output[1] - targets[1]).abs().sum())


@pytest.mark.parametrize(
    ("task", "targets"), [(Words(), torch.full((2, 3), IGNORED)), (Numbers(), torch.full((2, 3, 4), math.nan))]
)
def test_a_loss_without_targets_is_zero_with_finite_gradient(task, targets):
    output = torch.randn(2, 3, 4, requires_grad=True)
    loss = mean_loss(task, output, batch_of(targets))
    loss.backward()
    assert loss == 0
    assert torch.equal(output.grad, torch.zeros_like(output))


def test_cross_entropy_of_classes_and_of_half_precision():
    logits = torch.randn(6, 4, dtype=torch.bfloat16)
    batch = Batch(torch.zeros(6, 2).long(), torch.randint(4, (6,)))
    loss = mean_loss(Words(), logits, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.float(), batch.targets))


def test_a_batch_is_cut_by_items_and_moves_with_all_that_belongs_to_it():
    batch = Batch(torch.arange(8).view(4, 2), torch.arange(4), None, (1, 2), torch.arange(12).view(4, 3))
    cut = batch.items(1, 3)
    assert cut.inputs.tolist() == [[2, 3], [4, 5]]
    assert cut.memory.tolist() == [[3, 4, 5], [6, 7, 8]]
    moved = cut.to("meta")
    assert {x.device.type for x in (moved.inputs, moved.targets, moved.memory)} == {"meta"}
    assert (moved.valid, moved.grid) == (None, (1, 2))


def test_generator_streams_differ_in_seed_step_and_stream():
    keys = [(0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 0, 2), (1, 1)]
    assert len({tuple(counter_generator(*key).integers(0, 1 << 62, 2)) for key in keys}) == 6
    refused(lambda: counter_generator(-1, 0), "try seed=0")


def digest_of_items(path):
    total = hashlib.sha256()
    text = {"data": path, "tokenizer": "bpe:300", "length": 8}
    for name, options in (("recall", {}), ("listops", {}), ("text", text)):
        task = create_task(name, **options)
        for batch in [task.training_batch(3, 4, 5), *task.evaluation_batches(16)]:
            total.update(batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes())
    return total.hexdigest()


def test_items_are_equal_in_another_process(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox\n\n" * 300 + "jumps over\n\n" * 200)
    program = "import hashlib\nfrom regard.tasks import create_task\n" + inspect.getsource(digest_of_items)
    program += f"\nprint(digest_of_items({str(path)!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == digest_of_items(str(path)), run.stderr


class Parity(Task):
    name, pattern, objective = "parity", Pattern.NONCAUSAL_SELF, "classification"
    length, vocab_size, num_classes, chance, solved = 16, 2, 2, 0.5, 0.95

    def describe(self):
        return "is the number of ones odd?"

    def training_batch(self, step, seed, batch_size):
        bits = counter_generator(seed, step).integers(0, 2, (batch_size, self.length))
        return Batch(torch.from_numpy(bits), torch.from_numpy(bits.sum(1) % 2))

    def evaluation_batches(self, batch_size):
        yield self.training_batch(0, 2**32, batch_size)


def test_a_task_of_ones_own_needs_a_few_members_and_its_baseline_is_scored_as_a_model_is():
    task = check_task(Parity())
    (batch,) = task.evaluation_batches(256)
    always_odd = Baseline.of("odd", task, lambda batch: torch.tensor([0.0, 1.0]).expand(batch.size, 2))
    assert always_odd.items[:, 0].tolist() == batch.targets.tolist()
    assert always_odd.score == pytest.approx(batch.targets.double().mean().item())


def test_the_majority_class_is_that_of_training():
    training, held_out = np.array([0, 2, 2, 1, 2]), np.array([1, 2, 1, 1])
    rule = Baseline.majority_class(training, held_out)
    assert rule.items.tolist() == [[0, 1], [1, 1], [0, 1], [0, 1]]
    assert (rule.name, rule.score) == ("majority class", 0.25)


@pytest.mark.parametrize("name", ["documents", "matching", "images"])
def test_classes_have_a_baseline_in_the_order_of_the_held_out_items(name, tmp_path):
    task = made(name, tmp_path, held_out=0.4)
    targets = torch.cat([batch.targets for batch in task.evaluation_batches(7)])
    right = torch.from_numpy(task.baseline.items[:, 0]).bool()
    assert len(right) == len(targets)
    assert len(targets[right].unique()) == 1 and not torch.isin(targets[~right], targets[right]).any()


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"vocab_size": None}, "vocab_size=None and features=None"),
        ({"num_classes": None}, "num_classes=None"),
        ({"objective": "ranking"}, "objective='ranking'"),
        ({"pattern": "causal"}, "try causal-self"),
        ({"vocab_size": None, "features": 3}, "inputs (2, 16, 3)"),
        ({"baseline": ("coin", 0.5)}, "baseline=('coin', 0.5)"),
    ],
)
def test_a_wrong_task_of_ones_own_is_refused(members, told):
    refused(lambda: check_task(type("Wrong", (Parity,), members)()), told)


def test_a_class_without_members_is_refused_by_name():
    refused(lambda: check_task(type("Nothing", (), {"name": "nothing"})()), "'nothing' without pattern, objective")
