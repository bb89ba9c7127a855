"""Masks as images: those in the report of a segmentation task, and those drawn by a trained model."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regard.contract import Context, Result, Unsupported
from regard.core.patches import joined
from regard.tasks import create_task
from regard.tasks.segmentation.folders import PICTURES
from regard.workbench.reports import mask_pictures
from regard.workbench.trained.segment import likeliest, places_of, segment, write

Image = pytest.importorskip("PIL.Image")


class Knows(nn.Module):
    """A model that knows the masks of a task's held-out images by their inputs, and gives class 0 for other inputs."""

    def __init__(self, task: Any) -> None:
        super().__init__()
        self.task, self.unused = task, nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor, *, context: Context) -> Result:
        classes = torch.zeros(*inputs.shape[:2], self.task.num_targets, dtype=torch.long)
        for batch in self.task.evaluation_batches(64):
            for row, each in enumerate(inputs):
                same = (batch.inputs == each).flatten(1).all(1)
                if same.any():
                    classes[row] = batch.targets[same][0]
        return Result(5.0 * nn.functional.one_hot(classes, self.task.num_classes).float().flatten(2))


def picture(address: str) -> Any:
    return Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))


def test_a_report_shows_images_beside_their_masks_and_predictions() -> None:
    task = create_task("segmentation", data="far-cue", size=32, evaluation_items=12)
    pictures, found = mask_pictures.shown(task), mask_pictures.predicted(Knows(task), task)
    assert pictures is not None and found is not None
    held = next(iter(task.evaluation_batches(12)))
    images, masks = task.reader.pixels(held.inputs)[..., 0], task.whole(held.targets)
    places = []
    for image, truth, mask in zip(pictures["images"], pictures["truths"], found["masks"], strict=True):
        (place,) = np.flatnonzero((images == np.asarray(picture(image))).all((1, 2)))
        assert np.array_equal(np.asarray(picture(truth)), masks[place])
        assert np.array_equal(np.asarray(picture(mask)), masks[place])
        places.append(place)
    assert len(set(places)) == 4 and min(places) >= 3, "none of the first quarter, which may have chosen a rate"
    assert found["scores"] == [1.0] * 4
    assert pictures["classes"][0][0] == "background"
    told = mask_pictures.table(pictures, [("sees", {"masks": found}), ("blind", {"masks": None})])
    assert told is not None and [name for name, _ in told["models"]] == ["sees"] and len(told["rows"]) == 4
    assert mask_pictures.table(None, [("sees", {"masks": found})]) is None
    other = create_task("recall", length=24, pairs=4, queries=4, vocab_size=17, evaluation_items=4)
    assert mask_pictures.shown(other) is None and mask_pictures.predicted(Knows(task), other) is None


def test_large_pictures_are_made_smaller() -> None:
    task = create_task("segmentation", size=192, evaluation_items=4)
    pictures = mask_pictures.shown(task)
    assert pictures is not None
    assert {picture(p).size for p in (*pictures["images"], *pictures["truths"])} == {(160, 160)}


def test_masks_have_the_size_of_the_picture_and_the_values_of_the_classes(tmp_path: Path) -> None:
    """For an image of the model's input size the result is the mask itself; for larger ones logits are interpolated."""
    task = create_task("segmentation", size=32, evaluation_items=4)
    batch = next(iter(task.evaluation_batches(1)))
    Image.fromarray(task.reader.pixels(batch.inputs)[0]).save(tmp_path / "a.png")
    classes, shares = segment(Knows(task), task.reader, tmp_path / "a.png")
    truth = task.whole(batch.targets)[0]
    assert np.array_equal(classes, truth)
    assert shares == {task.reader.classes[i]: (truth == i).mean() for i in np.unique(truth)}
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    Image.new("RGB", (50, 20)).save(tmp_path / "b.png")
    classes, shares = segment(Knows(task), task.reader, tmp_path / "b.png")
    assert classes.shape == (20, 50) and shares == {"background": 1.0}
    logits = torch.randn(5, 8, 8)
    whole = nn.functional.interpolate(logits[None], (13, 20), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(likeliest(logits, (13, 20)), whole)
    output = Knows(task)(batch.inputs, context=Context()).output
    assert np.array_equal(joined(output, task.reader.grid, task.reader.patch)[0].argmax(0).numpy(), truth)
    write(tmp_path / "mask.png", np.array([[0, 1], [4, -100]]), task.reader)
    drawn = Image.open(tmp_path / "mask.png")
    assert np.asarray(drawn)[0].tolist() == [0, 1] and np.asarray(drawn)[1, 1] not in task.reader.values
    assert drawn.convert("RGB").getpixel((0, 1)) == task.reader.colours[4]
    read = [Path("x/1.jpg"), Path("y/1.png")]
    assert [place.name for place in places_of(tmp_path, read, PICTURES)] == ["1.png", "1_.png"]


def test_no_result_replaces_a_file_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scans")
    read = [tmp_path / "scans" / name for name in ("b.jpg", "a.png")]
    for output in (tmp_path / "scans", tmp_path / "link"):
        with pytest.raises(Unsupported, match=r"a\.png is a file to read"):
            places_of(output, read, PICTURES)
        assert [place.name for place in places_of(output, read, PICTURES, ["rollout"])] == [
            "b-rollout.png",
            "a-rollout.png",
        ]
    with pytest.raises(Unsupported, match="is a file to read"):
        places_of(read[1], read[1:], PICTURES)
    assert places_of(tmp_path / "c.png", read[1:], PICTURES) == [tmp_path / "c.png"]


def test_the_picture_to_draw_on_is_stretched_as_the_model_sees_it(tmp_path: Path) -> None:
    wide = Image.new("RGB", (60, 20), "black")
    wide.paste("white", (0, 0, 15, 20))  # a quarter, which a crop to the centre would lose
    wide.save(tmp_path / "wide.png")
    reader = create_task("segmentation", size=16).reader
    shown = np.asarray(reader.picture(tmp_path / "wide.png").convert("L"))
    assert shown.shape == (384, 384) and (shown[:, :80] > 200).all() and (shown[:, 112:] < 50).all()
