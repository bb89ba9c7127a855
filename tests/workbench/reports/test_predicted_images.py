"""Images in the report: predictions of models for single images, and the page that shows them."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from command_line import SMALL_COMPARISON, run
from report_examples import example
from torch import nn

from regard.contract import Result
from regard.tasks import create_task
from regard.workbench.reports.png import address
from regard.workbench.reports.predicted_images import MISTAKES, SAMPLES, predicted
from regard.workbench.reports.report import render
from regard.workbench.reports.view import Measured

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


@pytest.mark.parametrize("shape", [(5, 9, 1), (8, 8, 3)])
def test_a_picture_is_a_png_of_its_pixels_and_a_large_one_is_made_smaller(shape):
    pixels = np.random.default_rng(None).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(decoded(address(pixels, largest=64)).reshape(shape), pixels)
    large = np.full((200, 100, shape[2]), 77, dtype=np.uint8)
    assert decoded(address(large, largest=64)).shape[:2] == (64, 32)
    assert (decoded(address(large, largest=64)) == 77).all()


class Guess(nn.Module):
    """Predicts the right class for three images in four and the next class for the fourth, with growing confidence."""

    def __init__(self, task):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))
        batches = list(task.evaluation_batches(1000))
        self.known = {row.numpy().tobytes(): i for i, row in enumerate(torch.cat([b.inputs for b in batches]))}
        self.truth = torch.cat([b.targets for b in batches])

    def forward(self, inputs, *, context):
        places = torch.tensor([self.known[row.numpy().tobytes()] for row in inputs])
        said = (self.truth[places] + (places % 4 == 3)) % 10
        return Result(nn.functional.one_hot(said, 10) * (2 + places / 100)[:, None] + self.nothing)


@pytest.mark.parametrize("first", [0, 5])
def test_samples_mistakes_and_confusions_are_those_of_the_model(first):
    task = create_task("images", patch=2)
    found = predicted(Guess(task), task, 32, first)
    truth = torch.cat([b.targets for b in task.evaluation_batches(64)]).tolist()
    assert [one["truth"] for one in found["samples"]] == truth[first : first + SAMPLES]
    assert all(one["prediction"] == (one["truth"] + 1) % 10 for one in found["mistakes"])
    assert len(found["mistakes"]) == MISTAKES
    sureness = [one["confidence"] for one in found["mistakes"]]
    assert sureness == sorted(sureness, reverse=True) and sureness[0] > found["samples"][0]["confidence"]
    confusion = np.array(found["confusion"])
    assert confusion.sum() == found["images"] == len(truth) - first
    np.testing.assert_array_equal(confusion.sum(1), np.bincount(truth[first:], minlength=10))
    assert confusion.trace() == sum((i + first) % 4 != 3 for i in range(found["images"]))
    pixels = task._images.centres(task._scored[first : first + 1])[0, ..., 0]
    np.testing.assert_array_equal(decoded(found["samples"][0]["picture"]), pixels)


def test_tasks_without_images_have_none():
    task = create_task("listops", length=24, evaluation_items=4)
    assert predicted(nn.Linear(1, 1), task, 4) is None


def test_the_page_shows_them_with_names_that_are_text():
    task = create_task("images", patch=2)
    found = predicted(Guess(task), task, 64)
    found["classes"][0] = "<script>x"
    given = example(tasks=1, mechanisms=2)
    for row in given["quality"]:
        row["predicted"] = found if row["seed"] == 0 else None
    page = render(Measured(**given))
    assert page.count('class="picture wrong"') > 2 * MISTAKES and "<script>x" not in page
    assert "&lt;script&gt;x" in page and page.count("Which classes are taken for which") == 2
    assert f"among the first {found['images']} images" in page
    assert "What the models see" not in render(Measured(**example(tasks=1, mechanisms=2)))


def test_a_comparison_on_images_has_them_in_its_report(tmp_path, capsys):
    code, _, said = run(
        capsys,
        f"compare --task images:patch=4,evaluation_items=40 --budget '20 steps' {SMALL_COMPARISON} --output {tmp_path}",
    )
    assert code == 0, said
    page = (tmp_path / "report.html").read_text()
    assert page.count('<figure class="picture') >= SAMPLES and "What the models see" in page
