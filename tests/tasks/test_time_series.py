"""Labelled series: files of the archives, splits, missing values, and the nearest-mean baseline."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from command_line import run
from task_data import items, refused, save_series

from regard.tasks import Scored, create_task
from regard.tasks.time_series import filled, resampled
from regard.tasks.ts_files import SETS, read_set, read_ts

HEADER = "#comment\n@problemName Made\n@timeStamps false\n@univariate false\n@classLabel true a b\n@data\n"


def written(folder, lines, header=HEADER):
    path = folder / "made.ts"
    path.write_text(header + lines)
    return path


def test_a_file_is_read_as_it_is_written(tmp_path):
    one, other = read_ts(written(tmp_path, "1,2.5,-3e1:4,?,6:b\n\n0.5:7:a\n"))
    assert (one.label, other.label) == ("b", "a")
    assert np.array_equal(one.values, [[1, 4], [2.5, np.nan], [-30, 6]], equal_nan=True)
    assert np.array_equal(other.values, [[0.5, 7]])


@pytest.mark.parametrize(
    ("header", "lines", "told"),
    [
        (HEADER, "", "made.ts without series"),
        (HEADER, "1,2:3,4:c\n", "line 7, with the class c; supported: the classes that @classLabel names: a, b"),
        (HEADER, "1,2:3,4:a\n1,2:b\n", "line 8, with 1 channel; supported: 2"),
        (HEADER, "1,2:3,4,5:a\n", "line 7, with channels of 2 to 3 values"),
        (HEADER, "1,two:3,4:a\n", "line 7: 'two'; supported: numbers, and ?"),
        (HEADER, "1,inf:3,4:a\n", "line 7: 'inf'"),
        (HEADER, "1,,2:3,4,5:a\n", "line 7: ''"),
        (HEADER, "1,2,3\n", "line 7, without a class"),
        (HEADER.replace("@data\n", ""), "1,2:a\n", "line 6, before @data: '1,2:a'"),
        (HEADER.replace("@timeStamps false", "@timeStamps true"), "", "line 3: series with times"),
        (HEADER.replace("@classLabel true a b", "@classLabel false"), "", "line 5: series without classes"),
        (HEADER.replace("@classLabel true a b", "@targetLabel true"), "", "line 5: series without classes"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(tmp_path, header, lines, told):
    refused(lambda: read_ts(written(tmp_path, lines, header)), told)


def test_other_files_and_names_are_refused(tmp_path):
    path = written(tmp_path, "1:a\n2:b\n")
    refused(lambda: create_task("time_series", data=str(tmp_path / "mode.ts")), "does not exist", str(path))
    refused(lambda: create_task("time_series", data="JapaneseVowel"), "try data=JapaneseVowels")
    refused(lambda: create_task("time_series", data="GunPoint", validation=path), "supported: no validation")
    path.write_bytes(b"\xff\xfe\x00")
    refused(lambda: read_ts(path), "cannot be read")


def test_the_same_share_of_each_class_is_held_out_and_repeated_series_count_once(tmp_path):
    path = save_series(tmp_path / "made.ts", 60)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[-1], lines[-2]]) + "\n")
    task = create_task("time_series", data=path, held_out=0.25, seed=3)
    assert "2 repeated series left out" in task.describe()
    (held_out,) = task.evaluation_batches(64)
    assert held_out.targets.bincount().tolist() == [5, 5, 5]
    training = task.training_batch(0, 0, 45)
    assert training.targets.bincount().tolist() == [15, 15, 15]
    assert not set(items([training])) & set(items([held_out]))


def test_what_is_also_held_out_is_not_trained_on(tmp_path):
    path = save_series(tmp_path / "made.ts", 60)
    header, lines = path.read_text().split("@data\n")
    other = tmp_path / "other.ts"
    other.write_text(f"{header}@data\n" + "\n".join(lines.splitlines()[:9]))
    task = create_task("time_series", data=path, validation=other)
    training = [task.training_batch(step, 0, 51) for step in range(2)]
    assert len(set(items(training))) == 51
    assert not set(items(training)) & set(items(task.evaluation_batches(64)))
    assert "9 series of the held-out data (other.ts) also in the training data: not trained on" in task.describe()
    refused(lambda: create_task("time_series", data=path, validation=path), "holds all of the training data")


def test_channels_are_standardised_by_the_training_series_and_shorter_ones_padded(tmp_path):
    task = create_task("time_series", data=save_series(tmp_path / "made.ts", 60))
    batch = task.training_batch(0, 0, 48)
    steps = batch.inputs[batch.valid]
    torch.testing.assert_close(steps.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(steps.std(0, correction=0), torch.ones(2), atol=1e-5, rtol=0)
    assert (batch.inputs[~batch.valid] == 0).all()
    assert len(set(batch.valid.sum(1).tolist())) > 1


def test_other_data_are_scored_on_the_scale_and_with_the_length_of_the_training(tmp_path):
    data = save_series(tmp_path / "a.ts", 60)
    task = create_task("time_series", data=data)
    known = Scored(fitted=json.loads(json.dumps(dict(task.fitted))))
    values = 100 + 9 * np.random.default_rng().normal(size=(2, 30))
    lines = "".join(":".join([*(",".join(map(str, part)) for part in values), label]) + "\n" for label in "abc")
    other = written(tmp_path, lines, HEADER.replace("true a b", "true a b c"))
    scored = create_task("time_series", data=data, validation=other, scored=known)
    assert scored.length == task.length < 30
    found = next(iter(scored.evaluation_batches(1))).inputs[0].double().numpy()
    expected = (values.T - known.fitted["mean"]) / known.fitted["deviation"]
    np.testing.assert_allclose(found, resampled(expected, task.length), rtol=1e-5)


def test_missing_values_are_those_before_and_longer_series_are_resampled(tmp_path):
    nan = np.nan
    found = filled(np.array([[nan, 1], [2, nan], [nan, nan], [3, 4]]), np.array([9, 9]))
    assert found.tolist() == [[9, 1], [2, 1], [2, 1], [3, 4]]
    line = np.stack([np.arange(9.0), 2 * np.arange(9.0)], 1)
    assert np.allclose(resampled(line, 5), line[::2]) and np.allclose(resampled(line, 17)[::2], line)
    short = create_task("time_series", data=save_series(tmp_path / "made.ts", 60), length=4)
    assert short.training_batch(0, 0, 4).inputs.shape == (4, 4, 2)
    assert "resampled to 4" in short.describe()


def test_the_rule_takes_the_nearest_mean_series(tmp_path):
    task = create_task("time_series", data=save_series(tmp_path / "made.ts", 90, equal=True))
    training = task.training_batch(0, 0, 72)
    means = torch.stack([training.inputs[training.targets == label].mean(0) for label in range(3)])
    (held_out,) = task.evaluation_batches(64)
    nearest = torch.cdist(held_out.inputs.flatten(1), means.flatten(1)).argmin(1)
    assert task.baseline.score == pytest.approx((nearest == held_out.targets).double().mean().item())
    assert task.baseline.score > task.chance


def test_a_set_of_sktime_is_read_where_it_lies_and_the_missing_package_names_its_command(tmp_path, packages, capsys):
    folder = packages.package("sktime") / "datasets" / "data" / "GunPoint"
    folder.mkdir(parents=True)
    for part, count in (("TRAIN", 30), ("TEST", 12)):
        save_series(folder / f"GunPoint_{part}.ts", count, seed=count)
    task = create_task("time_series", data="GunPoint")
    assert (task.training_batch(0, 0, 4).inputs.shape[2], sum(b.size for b in task.evaluation_batches(8))) == (2, 12)
    assert task.origin == {"data": "GunPoint", "seed": 0}
    packages.without("sktime")
    code, out, messages = run(capsys, "compare --task time_series --output", tmp_path / "run")
    assert code == 2 and "pip install --no-deps sktime" in out + messages
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("sktime") is None, reason="needs the package sktime")
@pytest.mark.parametrize("name", SETS)
def test_the_packaged_sets_have_series_of_all_classes_in_both_parts(name):
    training, test = read_set(name, "a test")
    assert {item.label for item in training} == {item.label for item in test}
