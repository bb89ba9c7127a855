"""Images completed by models: the upper half is the original, and the page shows them."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from report_examples import example

from regard.models import LanguageModel, config_for
from regard.tasks import create_task
from regard.workbench.reports.drawn_images import SHOWN, completed
from regard.workbench.reports.report import render
from regard.workbench.reports.view import Measured

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


@pytest.fixture(scope="module")
def found():
    task = create_task("pixels")
    torch.manual_seed(0)
    model = LanguageModel(config_for(task, ["softmax"], dim=16, num_heads=2, max_length=64))
    return task, model, completed(model, task)


def test_the_upper_half_is_given_and_the_lower_half_drawn(found):
    task, model, told = found
    truths, drawings = (np.stack([decoded(one) for one in told[name]]) for name in ("truths", "drawings"))
    assert truths.shape == (SHOWN, 8, 8)
    np.testing.assert_array_equal(truths, task._images.pixels[task._scored[:SHOWN], ..., 0])
    np.testing.assert_array_equal(drawings[:, :4], truths[:, :4])
    assert (drawings[:, 4:] != truths[:, 4:]).any()
    assert completed(model, task) == told, "the same each time"


def test_a_model_that_is_sure_of_one_value_draws_that(found):
    task, model, _ = found
    with torch.no_grad():
        kept = model.head.weight.clone()
        model.head.weight.zero_()
        model.head.weight[77] = 0
        bias = torch.full((256,), -100.0)
        bias[77] = 100
        hook = model.head.register_forward_hook(lambda module, given, output: output + bias)
        drawings = [decoded(one) for one in completed(model, task)["drawings"]]
        hook.remove()
        model.head.weight.copy_(kept)
    assert all((one[4:] == 77).all() for one in drawings)


def test_other_tasks_have_none_and_the_page_shows_those_there_are(found):
    told = found[2]
    assert completed(found[1], create_task("recall", evaluation_items=4)) is None
    given = example(tasks=1, mechanisms=2)
    for row in given["quality"]:
        row["completed"] = told if row["seed"] == 0 else None
    page = render(Measured(**given))
    assert page.count('alt="drawn by ') == 2 * SHOWN and page.count('alt="held-out image ') == SHOWN
    assert "What the models draw" not in render(Measured(**example(tasks=1, mechanisms=2)))
