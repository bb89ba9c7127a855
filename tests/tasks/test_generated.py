"""Recall, copying and ListOps: labels are right, held-out items are never trained on."""

from __future__ import annotations

import statistics

import pytest
import torch
from task_data import SMALL, items

from regard.tasks import IGNORED, create_task
from regard.tasks.listops import VOCABULARY, spell


def make(name, **options):
    return create_task(name, **(SMALL[name] | options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("recall", {"pairs": 1, "length": 3, "vocab_size": 17, "queries": 1}),
        ("copying", {"tokens": 2, "length": 7, "alphabet": 6}),
        ("listops", {"length": 8, "depth": 1}),
    ],
)
def test_training_never_shows_a_held_out_item_even_where_few_items_exist(name, options):
    task = create_task(name, evaluation_items=4, **options)
    held_out = set(items(task.evaluation_batches(4)))
    trained = set(items(task.training_batch(step, 0, 256) for step in range(8)))
    assert len(trained) < 2048, "items must repeat for this test to mean something"
    assert not held_out & trained


@pytest.mark.parametrize("overwrite", [False, True])
def test_recall_targets_are_the_last_values_written(overwrite):
    task = make("recall", overwrite=overwrite, queries=6)
    batch = task.training_batch(int(torch.randint(1000, ())), 0, 32)
    rewritten = 0
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        memory, end = {}, 2 * task.writes
        for key, value in zip(inputs[0:end:2], inputs[1:end:2], strict=True):
            rewritten += key in memory
            assert 1 <= key <= task.keys < value < task.vocab_size
            memory[key] = value
        assert len(memory) == task.pairs
        asked = [i for i, token in enumerate(inputs) if i >= end and token]
        assert len(asked) == 6
        assert all(targets[i] == (memory[inputs[i]] if i in asked else IGNORED) for i in range(task.length))
    assert rewritten == (32 * task.pairs if overwrite else 0)


def test_recall_asks_every_key_once_when_there_are_as_many_queries():
    for inputs in make("recall").training_batch(0, 0, 16).inputs.tolist():
        assert sorted(token for token in inputs[8:] if token) == sorted(inputs[0:8:2])


def test_copying_targets_are_the_data_tokens_in_order():
    task = make("copying")
    batch = task.training_batch(int(torch.randint(1000, ())), 0, 32)
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        data = [token for token in inputs[:20] if token != 0]
        assert len(data) == 4
        assert min(data) >= 2
        assert inputs[20:] == [1] * 4
        assert targets == [IGNORED] * 20 + data


OPERATORS = {
    "[MAX": max,
    "[MIN": min,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}


def evaluate(words, start=0):
    """Value, end, depth and largest number of arguments of the expression at `start`, independent of the generator, which
    computes values as it builds expressions."""
    if words[start].isdigit():
        return int(words[start]), start + 1, 0, 0
    arguments, place, deepest, most = [], start + 1, 0, 0
    while words[place] != "]":
        value, place, depth, count = evaluate(words, place)
        arguments.append(value)
        deepest, most = max(deepest, depth), max(most, count)
    assert len(arguments) >= 2
    return OPERATORS[words[start]](arguments), place + 1, 1 + deepest, max(most, len(arguments))


def test_listops_labels_equal_an_independent_evaluation_within_the_bounds():
    task = create_task("listops", length=64, depth=4, arguments=5, evaluation_items=64)
    batch = task.training_batch(int(torch.randint(1000, ())), 0, 256)
    assert len(batch.targets.unique()) == 10
    shapes = set()
    for tokens, valid, label in zip(batch.inputs, batch.valid, batch.targets.tolist(), strict=True):
        words = spell(tokens.tolist()).split()
        value, end, *shape = evaluate(words)
        assert (value, end) == (label, len(words)) and 16 <= end <= 64
        assert valid[:end].all() and not valid[end:].any() and (tokens[end:] == 0).all()
        shapes.add(tuple(shape))
    assert max(depth for depth, _ in shapes) == 4 and max(most for _, most in shapes) == 5


def test_the_rule_for_listops_knows_the_outermost_operator():
    task = create_task("listops", length=128, evaluation_items=1000)
    batch = next(iter(task.evaluation_batches(1000)))
    right = task.baseline.items[:, 0] == 1
    answers = {
        int(token): set(batch.targets[right & (batch.inputs[:, 0] == token).numpy()].tolist())
        for token in range(11, 15)
    }
    assert [len(values) for values in answers.values()] == [1, 1, 1, 1]
    assert answers[VOCABULARY.index("[MAX")] == {9} and answers[VOCABULARY.index("[MIN")] == {0}
    assert task.baseline.score > 0.2 > 0.16 > task.chance
    assert f"the commonest value by outermost operator: {task.baseline.score:.3f}" in task.describe()


@pytest.mark.parametrize("name", ["recall", "copying", "listops"])
def test_a_perfect_and_a_constant_model_score_one_and_about_chance(name):
    task = make(name)
    assert "held out: 64 distinct items" in task.describe()
    (batch,) = task.evaluation_batches(64)
    classes = task.num_classes or task.vocab_size
    perfect = torch.nn.functional.one_hot(batch.targets.clamp(min=0), classes).double()
    right, count = task.score(perfect, batch)
    assert right.shape == count.shape == (64,)
    assert torch.equal(right, count)
    guess = torch.zeros_like(perfect)
    guess[..., torch.bincount(batch.targets[batch.targets >= 0]).argmax()] = 1
    right, count = task.score(guess, batch)
    assert float(right.sum() / count.sum()) == pytest.approx(task.chance, abs=0.2)
