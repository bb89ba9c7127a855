"""New data are normalised with the training statistics, which are stored in the model's folder."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from task_data import masked, photo, photos, scans, words

from regard import Unsupported
from regard.tasks import IGNORED, create_task
from regard.workbench.trained.folder import TrainedModel


def trained(folder, name, **options):
    task = create_task(name, **options)
    reader = None if name == "text" else task.reader.as_record()
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


IMAGES = ["images", "segmentation", "segmentation_3d"]


@pytest.mark.parametrize("name", IMAGES)
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


def scored(task):
    """The inputs and the targets of all scored items."""
    batches = list(task.evaluation_batches(64))
    return [x for one in batches for x in one.inputs], [x for one in batches for x in one.targets]


@pytest.mark.parametrize("name", IMAGES)
def test_what_a_model_was_trained_on_is_scored_too_and_counted(name, tmp_path):
    pytest.importorskip("PIL" if name != "segmentation_3d" else "nibabel")
    options, _ = of(name, tmp_path)
    task, model = trained(tmp_path, name, **options, held_out=0.5)
    found = model.task(options["data"])
    count = 2 * len(scored(task)[0])
    assert len(scored(found)[0]) == found.shared == count and found.reader == task.reader
    with pytest.raises(Unsupported, match="that include every training"):
        create_task(name, **options, validation=options["data"])


@pytest.mark.parametrize("name", IMAGES)
def test_other_data_are_scored_alike_when_those_of_the_training_are_gone(name, tmp_path):
    pytest.importorskip("PIL" if name != "segmentation_3d" else "nibabel")
    options, others = of(name, tmp_path)
    task, model = trained(tmp_path, name, **options)
    before = model.task(others)
    assert model.missing_data() is None
    (tmp_path / "a").rename(tmp_path / "moved")
    assert model.missing_data() == options["data"]
    found = model.task(others)
    assert (found.reader, found.shared, found.baseline) == (task.reader, 0, None)
    for one, other in zip(scored(found), scored(before), strict=True):
        assert len(one) == len(other) and all(map(torch.equal, one, other))
    with pytest.raises(Unsupported, match=f"the data of its training, {tmp_path / 'a'}.*try ln -s"):
        model.task()


@pytest.mark.parametrize("gone", [False, True])
def test_some_of_the_classes_are_scored_as_the_model_numbers_them(gone, tmp_path):
    pytest.importorskip("PIL")
    options, _ = of("images", tmp_path)
    _, images = trained(tmp_path, "images", **options)
    places = {"data": str(masked(tmp_path / "c" / "a", values=(0, 3, 7, 255))), "size": 16}
    task, masks = trained(tmp_path, "segmentation", **places)
    if gone:
        (tmp_path / "a").rename(tmp_path / "moved")
        (tmp_path / "c").rename(tmp_path / "moved too")
    for i in range(2):
        photo(tmp_path / "new" / "dog" / f"{i}.png", 70 + i)
    assert [int(label) for label in scored(images.task(str(tmp_path / "new")))[1]] == [1, 1]
    photo(tmp_path / "new" / "dogs" / "0.png", 80)
    with pytest.raises(Unsupported, match=r"new with the unknown class dogs; supported.*cat, dog, newt; try dog"):
        images.task(str(tmp_path / "new"))

    some = masked(tmp_path / "some", count=3, seed=60, values=(0, 7, 255))
    found = masks.task(str(some))
    assert found.reader == task.reader and found.reader.classes == ("0", "3", "7")
    assert {int(label) for mask in scored(found)[1] for label in mask.unique()} == {0, 2, IGNORED}
    with pytest.raises(Unsupported, match=r"unknown class 5, which the model was not trained on; supported: [^;]*$"):
        masks.task(str(masked(tmp_path / "other", count=3, values=(0, 5))))


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("name", IMAGES[1:])
def test_the_largest_classes_of_the_training_are_those_of_other_data(name, gone, tmp_path):
    """Other masks have other classes most, one that is ignored, and some that the training never saw."""
    pytest.importorskip("PIL" if name == "segmentation" else "nibabel")
    write = masked if name == "segmentation" else scans
    own = write(tmp_path / "a", values=(0, 0, 0, 4, 5, 5, 7, 7, 7))
    task, model = trained(tmp_path, name, data=str(own), size=16 if name == "segmentation" else 8, classes=2)
    assert task.reader.values == (0, 5, 7) and "2 of 3 classes kept; the others count as 0" in task.describe()
    others = write(tmp_path / "b", values=(0, 4, 4, 4, 4, 7, 9, 255), seed=50)
    if gone:
        own.rename(tmp_path / "moved")
    found = model.task(str(others))
    assert found.reader == task.reader
    assert {int(label) for mask in scored(found)[1] for label in mask.unique()} == {0, 2, IGNORED}
    alone = model.task(str(write(tmp_path / "c", values=(4,), seed=70)))
    assert {int(label) for mask in scored(alone)[1] for label in mask.unique()} <= {0, IGNORED}  # padding is ignored


def test_a_model_of_text_reads_other_text_when_its_own_is_gone(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(words(400, ord(name)))
    data, others = (str(tmp_path / f"{name}.txt") for name in "ab")
    _, model = trained(tmp_path, "text", data=data, length=16)
    before = scored(model.task(others))
    (tmp_path / "a.txt").unlink()
    for one, other in zip(scored(model.task(others)), before, strict=True):
        assert all(map(torch.equal, one, other))


def test_data_whose_classes_have_changed_since_are_refused(tmp_path):
    pytest.importorskip("PIL")
    options, _ = of("images", tmp_path)
    _, model = trained(tmp_path, "images", **options)
    for i in range(4):
        photo(tmp_path / "a" / "axolotl" / f"{i}.png", 90 + i)
    with pytest.raises(Unsupported, match="whose classes differ"):
        model.task()
    assert dataclasses.asdict(model.reader)["classes"] == ("cat", "dog", "newt")
