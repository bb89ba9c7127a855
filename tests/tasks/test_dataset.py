"""Users' own data sets: epochs, padding, custom metrics, and items that do not fit."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SMALL_COMPARISON, answer
from task_data import refused
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from regard.contract import Pattern
from regard.tasks import IGNORED, DatasetTask, check_task

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "my_task.py"


class Growing(Dataset):
    """Item i has i + 1 tokens, all of them i, and its class is the parity of i."""

    def __init__(self, count=6):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return np.full(i + 1, i), i % 2


def numbers(count=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 5, 3, generator=generator), torch.arange(count) % 4)


def growing(**options):
    given = {"name": "growing", "objective": "classification", "length": 6, "vocab_size": 6, "num_classes": 2}
    return DatasetTask(Growing(), Growing(), **(given | options))


def test_shorter_items_are_padded_and_the_padding_is_not_valid():
    task = check_task(growing())
    batch = task.training_batch(0, 0, 6)
    for inputs, valid, target in zip(batch.inputs, batch.valid, batch.targets, strict=True):
        i = int(inputs[0])
        assert inputs.tolist() == [i] * (i + 1) + [0] * (5 - i)
        assert valid.tolist() == [True] * (i + 1) + [False] * (5 - i)
        assert target == i % 2


def test_items_come_in_epochs_and_held_out_ones_in_order_or_evenly_spread():
    options = {"name": "n", "objective": "classification", "num_classes": 4}
    training, other = numbers(), numbers(9, 1)
    task = check_task(DatasetTask(training, other, **options))
    assert (task.length, task.features, task.vocab_size) == (5, 3, None)
    rows = [x.tolist() for step in range(2) for x in task.training_batch(step, 4, 5).inputs]
    assert sorted(rows) == sorted(x.tolist() for x, _ in training)
    assert torch.equal(torch.cat([b.inputs for b in task.evaluation_batches(4)]), other.tensors[0])
    assert task.training_batch(0, 0, 2).valid is None
    (batch,) = DatasetTask(training, other, evaluation_items=3, **options).evaluation_batches(8)
    assert torch.equal(batch.inputs, other.tensors[0][[0, 3, 6]])


class Noisy(Growing):
    def __getitem__(self, i):
        return torch.randn(4, 1), i % 2


def test_random_items_depend_on_step_and_seed_alone_and_leave_the_generator_as_it_was():
    task = DatasetTask(Noisy(), Noisy(), name="n", objective="classification", num_classes=2)
    before = torch.random.get_rng_state()
    one = task.training_batch(3, 1, 4).inputs
    torch.manual_seed(5)
    assert torch.equal(one, task.training_batch(3, 1, 4).inputs)
    assert not torch.equal(one, task.training_batch(4, 1, 4).inputs)
    assert not torch.equal(one, task.training_batch(3, 2, 4).inputs)
    held_out = [b.inputs for b in task.evaluation_batches(4)]
    assert all(torch.equal(a, b.inputs) for a, b in zip(held_out, task.evaluation_batches(4), strict=True))
    torch.random.set_rng_state(before)
    task.training_batch(0, 0, 2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_metric_of_ones_own_is_used_and_needs_its_name():
    def score(output, batch):
        return output[..., 0].double(), torch.ones(batch.size, dtype=torch.float64)

    task = growing(score=score, metric="first", higher_is_better=False)
    batch = task.training_batch(0, 0, 3)
    output = torch.randn(3, 2)
    assert torch.equal(task.score(output, batch)[0], output[:, 0].double())
    assert (task.metric, task.higher_is_better) == ("first", False)
    refused(lambda: growing(score=score), "with a score but metric=None")


def test_regression_and_memory_from_mappings():
    items = [{"inputs": np.ones((n, 2)), "targets": np.arange(n), "memory": np.full((n + 1, 1), n)} for n in (3, 4, 2)]
    options = {"objective": "regression", "pattern": "noncausal-cross", "length": 4, "memory_length": 6}
    task = check_task(DatasetTask(items, items, name="r", **options))
    assert (task.features, task.num_targets, task.memory_features) == (2, 1, 1)
    assert (task.metric, task.higher_is_better) == ("squared error", False)
    (batch,) = task.evaluation_batches(8)
    assert batch.targets[2, :, 0].tolist()[:2] == [0, 1]
    assert all(math.isnan(x) for x in batch.targets[2, 2:, 0].tolist())
    assert batch.memory_valid.sum(1).tolist() == [4, 5, 3]
    assert batch.valid.sum(1).tolist() == [3, 4, 2]
    sums, weights = task.score(torch.zeros(3, 4, 1), batch)
    assert sums.tolist() == [5, 14, 1]
    assert weights.tolist() == [3, 4, 2]
    assert sums.dtype == torch.float64


def test_next_token_padding_has_no_target():
    items = [(torch.arange(3), torch.arange(1, 4)), (torch.arange(2), torch.tensor([1, IGNORED]))]
    options = {"objective": "next-token", "pattern": Pattern.CAUSAL_SELF, "vocab_size": 4, "length": 3}
    (batch,) = check_task(DatasetTask(items, items, name="t", **options)).evaluation_batches(2)
    assert batch.targets.tolist() == [[1, 2, 3], [1, IGNORED, IGNORED]]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def items_with(second):
    return [(torch.arange(3), 0), second]


CLASSES = {"name": "c", "objective": "classification", "num_classes": 2}
TOKENS = CLASSES | {"vocab_size": 5}


@pytest.mark.parametrize(
    ("data", "options", "told"),
    [
        (Stream(), TOKENS, "of type Stream; supported: map-style data sets"),
        (3, TOKENS, "of type int"),
        ([], TOKENS, "without training items"),
        ([5], TOKENS, "training item 0 is of type int"),
        ([{"inputs": [1], "label": 3}], TOKENS, "training item 0 has 'label'"),
        ([{"inputs": [1]}], TOKENS, "training item 0 has no targets"),
        ([("abc", 1)], TOKENS, "has inputs of type str"),
        (items_with((torch.arange(3), 1)), CLASSES, "try vocab_size=3 or more"),
        ([(torch.rand(3), 1)], CLASSES, "numbers (n, features)"),
        ([(torch.rand(3, 2), 1)], TOKENS, "vocab_size=5 and inputs of shape (3, 2)"),
        (items_with((torch.arange(4), 1)), TOKENS, "item 1 has inputs of length 4; supported: length up to 3"),
        (items_with((torch.arange(3), 2)), TOKENS, "item 1 has targets from 2 to 2; supported: 0 to 1"),
        (items_with((torch.tensor([1, 5]), 1)), TOKENS, "item 1 has inputs from 1 to 5; supported: 0 to 4"),
        (items_with((torch.tensor([1]), torch.tensor([1]))), TOKENS, "targets of shape (1,); supported: ()"),
        (items_with((torch.rand(3, 1), 1)), TOKENS, "item 1 has inputs of shape (3, 1)"),
        ([{"inputs": [1], "targets": 1, "memory": [1]}], TOKENS, "a memory in the pattern noncausal-self"),
        ([([1], 1)], TOKENS | {"pattern": "noncausal-cross"}, "without a memory"),
        ([([1], 1)], TOKENS | {"pattern": "causal"}, "try causal-self"),
        ([([1], 1)], TOKENS | {"objective": "ranking"}, "objective='ranking'"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_number(data, options, told):
    refused(lambda: DatasetTask(data, data, **options).training_batch(0, 0, len(data)), told)


def test_the_example_in_the_documentation_is_compared(tmp_path, capsys):
    line = f"compare --plugin {EXAMPLE} {SMALL_COMPARISON} --budget '100k tokens' --output"
    (row,) = answer(capsys, line, tmp_path / "run")["summary"]["waves"]
    assert row["mean"] > 0.6  # guessing scores 0.34
    assert len(EXAMPLE.read_text().splitlines()) < 40
    assert EXAMPLE.read_text() in (EXAMPLE.parents[1] / "tasks.md").read_text()
