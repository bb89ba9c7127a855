"""New data are normalised with the training statistics, which are stored in the model's folder."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from task_data import masked, photo, photos, scans

from regard import Unsupported
from regard.tasks import create_task
from regard.workbench.trained.folder import TrainedModel


def trained(folder, name, **options):
    task = create_task(name, **options)
    reader = task.reader.as_record()
    record = {"task": {"name": name, "options": options}, "tokenizer": None, "reader": reader}
    return task, TrainedModel(folder, record)


def of(name, folder):
    """Options with a task's data, and the path of other data with the same classes."""
    if name == "images":
        for i in range(6):
            photo(folder / "b" / ("cat", "dog", "newt")[i % 3] / f"{i}.png", 90 + i)
        return {"data": str(photos(folder / "a")), "size": 8}, str(folder / "b")
    if name == "segmentation":
        return {"data": str(masked(folder / "a")), "size": 16}, str(masked(folder / "b", seed=50))
    return {"data": str(scans(folder / "a")), "size": 8, "normalise": "data"}, str(scans(folder / "b", seed=50))


@pytest.mark.parametrize("name", ["images", "segmentation", "segmentation_3d"])
def test_new_data_are_normalised_as_in_training(name, tmp_path):
    pytest.importorskip("PIL" if name != "segmentation_3d" else "nibabel")
    options, others = of(name, tmp_path)
    task, model = trained(tmp_path, name, **options)
    alone = create_task(name, **options, validation=others)
    found = model.task(others)
    assert alone.reader != task.reader, "all of the data are for training once others are held out"
    assert found.reader == task.reader
    mine, its = (next(iter(each.evaluation_batches(4))).inputs for each in (found, alone))
    assert mine.shape == its.shape and not torch.equal(mine, its)
    again = (next(iter(each.evaluation_batches(4))).inputs for each in (task, model.task()))
    assert torch.equal(*again)


def deep(folder, count, values, names=("cat", "dog")):
    image = pytest.importorskip("PIL.Image")
    for i in range(count):
        (folder / names[i % 2]).mkdir(parents=True, exist_ok=True)
        shades = np.random.default_rng(values[0] + i).integers(*values, (12, 12)).astype(np.uint16)
        image.fromarray(shades).save(folder / names[i % 2] / f"{i}.png")
    return str(folder)


def test_brighter_and_darker_pixels_of_new_data_are_as_the_ends_of_the_trained_range(tmp_path):
    task, model = trained(tmp_path, "images", data=deep(tmp_path / "a", 8, (1000, 5000)), size=12, channels=1, patch=12)
    others = deep(tmp_path / "b", 2, (1500, 4500))
    image = pytest.importorskip("PIL.Image")
    shades = np.full((12, 12), 3000, np.uint16)
    shades[0, 0], shades[0, 1] = 60000, 0
    image.fromarray(shades).save(tmp_path / "b" / "cat" / "0.png")
    found = model.task(others)
    assert found.reader == task.reader and 1000 <= task.reader.span[0] < task.reader.span[1] < 5000
    read = found.reader.pixels(next(iter(found.evaluation_batches(2))).inputs)
    assert sorted((read[:, 0, 0, 0].max(), read[:, 0, 1, 0].min())) == [0, 255]
    plain, _ = of("images", tmp_path / "plain")
    _, model = trained(tmp_path, "images", **plain)
    for name in ("cat", "dog", "newt"):
        (tmp_path / "c" / name).mkdir(parents=True)
        image.fromarray(shades).save(tmp_path / "c" / name / "0.png")
    with pytest.raises(Unsupported, match="whose bits of a pixel differ"):
        model.task(str(tmp_path / "c"))


def test_data_that_have_moved_are_named_though_others_are_given(tmp_path):
    pytest.importorskip("PIL")
    options, others = of("images", tmp_path)
    _, model = trained(tmp_path, "images", **options)
    (tmp_path / "a").rename(tmp_path / "moved")
    for data in (others, None):
        with pytest.raises(Unsupported, match=f"the data of its training, {tmp_path / 'a'}.*try ln -s"):
            model.task(data)


def test_data_whose_classes_have_changed_since_are_refused(tmp_path):
    pytest.importorskip("PIL")
    options, _ = of("images", tmp_path)
    _, model = trained(tmp_path, "images", **options)
    for i in range(4):
        photo(tmp_path / "a" / "axolotl" / f"{i}.png", 90 + i)
    with pytest.raises(Unsupported, match="whose classes differ"):
        model.task()
    assert dataclasses.asdict(model.reader)["classes"] == ("cat", "dog", "newt")
