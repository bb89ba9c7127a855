"""The five long-range tasks: each is the task that it claims to be, as a sequence, solvable and reproducible."""

from __future__ import annotations

import pytest
import torch
from task_data import for_any_task, photos, save_json, words

from regard.contract import Unsupported
from regard.tasks import Scored, check_task, create_task
from regard.tasks.long_range import TASKS


def made(which, folder):
    if which == "image":
        pytest.importorskip("PIL.Image")
        return create_task("long_range", which=which, data=photos(folder), length=64)
    if which in ("text", "retrieval"):
        records = [for_any_task(f"{i} {words(20, i)}", i) for i in range(40)]
        return create_task("long_range", which=which, data=save_json(folder / "a.jsonl", records), length=100)
    return create_task("long_range", which=which, evaluation_items=16, length=64 if which == "listops" else 576)


@pytest.mark.parametrize("which", TASKS)
def test_each_is_a_sequence_to_classify_that_is_told_apart_and_made_again(which, tmp_path):
    task = check_task(made(which, tmp_path))
    assert task.name == f"long_range_{which}" and task.describe().startswith(f"{task.name}, as the task ")
    batch = task.training_batch(0, 0, 4)
    assert batch.grid is None and batch.inputs.shape[1] == task.length
    assert (task.vocab_size is None) == (which == "image") and task.features == (1 if which == "image" else None)
    again = create_task(task.registered, **task.origin).training_batch(0, 0, 4)
    assert torch.equal(batch.inputs, again.inputs) and torch.equal(batch.targets, again.targets)
    assert task.baseline is not None and task.baseline.score <= 1


def test_the_tasks_behind_it_have_the_same_items(tmp_path):
    inner = create_task("pathfinder", size=24, evaluation_items=8)
    outer = create_task("long_range", which="pathfinder", length=576, evaluation_items=8)
    for one, other in zip(inner.evaluation_batches(8), outer.evaluation_batches(8), strict=True):
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("which", ["text", "retrieval"])
def test_a_trained_model_is_scored_on_what_it_was_trained_on_and_told_how_much_that_is(which, tmp_path):
    records = [for_any_task(f"{i} {words(20, i)}", i) for i in range(40)]
    data, half = save_json(tmp_path / "a.jsonl", records), save_json(tmp_path / "half.jsonl", records[:20])
    for name, options in (("documents" if which == "text" else "matching", {}), ("long_range", {"which": which})):
        scored = create_task(name, data=data, validation=half, scored=Scored(), **options)
        assert scored.shared == 20
        assert create_task(name, data=data, validation=data, scored=Scored(), **options).shared == 40
        with pytest.raises(Unsupported, match="all of the training data"):
            create_task(name, data=data, validation=data, **options)
