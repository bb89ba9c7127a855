"""Images of the reproductions: their content and its position."""

import numpy as np
import pytest
import torch

from regard.reproductions import tnt
from regard.reproductions.framework.pictures import Canvas, GridTask, backbone, cut, multiply_adds, start_large
from regard.reproductions.framework.training import cached_task
from regard.tasks import counter_generator


@pytest.mark.parametrize("patch", [1, 4])
def test_a_picture_is_enlarged_in_the_middle_of_a_black_canvas(patch):
    digits = cached_task("images", data="digits", patch=1, evaluation_items=5)
    side = 28  # 8-pixel digits enlarged three times, with a margin of two
    task = Canvas("digits", 5, side, patch)
    (batch,), (plain,) = task.evaluation_batches(8), digits.evaluation_batches(8)
    assert torch.equal(batch.targets, plain.targets)
    assert batch.inputs.shape == (5, task.length, task.features) and batch.grid == (side // patch,) * 2
    whole = plain.inputs.view(5, 8, 8).repeat_interleave(3, 1).repeat_interleave(3, 2)
    expected = torch.full((5, side, side), task.black)
    expected[:, 2:26, 2:26] = whole
    assert torch.equal(batch.inputs, cut(expected, patch))
    assert float(whole.min()) == pytest.approx(task.black, abs=1e-5)


def test_patches_are_squares_row_by_row():
    images = torch.randn(2, 12, 12)
    patches = cut(images, 4).view(2, 3, 3, 4, 4)
    for row in range(3):
        for column in range(3):
            found = images[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.equal(patches[:, row, column], found)


def test_drawn_batches_are_those_of_their_step_and_seed():
    task = tnt.Motifs(10)
    first, again, other = (task.training_batch(3, seed, 4) for seed in (1, 1, 2))
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(first.inputs, other.inputs)
    scored = torch.cat([batch.inputs for batch in task.evaluation_batches(4)])
    assert len(scored) == 10 and len(scored.flatten(1).unique(dim=0)) == 10


def test_every_patch_holds_the_motif_of_its_class_and_nothing_else(monkeypatch):
    monkeypatch.setattr(tnt, "NOISE", 0.0)
    monkeypatch.setattr(tnt, "IN_A_PATCH", 1)
    images, classes = tnt.Motifs(1).draw(counter_generator(0, 0), 8)
    assert len({round(float(motif.sum()), 6) for motif in tnt.MOTIFS}) == 1 and len(set(classes.tolist())) > 1
    corners = set()
    for image, kind in zip(images, classes, strict=True):
        for patch in cut(torch.from_numpy(image)[None], tnt.PATCH)[0].view(-1, tnt.PATCH, tnt.PATCH).numpy():
            places, own = np.argwhere(patch), np.argwhere(tnt.MOTIFS[kind])
            assert np.array_equal(places - places[0], own - own[0])
            corners.add(tuple(places[0]))
    assert len(corners) > 1


def test_a_task_without_pictures_is_no_task():
    with pytest.raises(NotImplementedError):
        GridTask(1).training_batch(0, 0, 1)


def test_multiply_adds_are_those_of_one_image_and_leave_the_model_in_training():
    task = tnt.Motifs(2)
    model = backbone(task, tnt.MODELS["ViT"])
    n, width, patch = 4, 128, tnt.PATCH
    projections = n * (patch**2 * width + 3 * 12 * width**2)
    assert multiply_adds(model, task) == projections + 3 * 2 * n**2 * width + width * task.num_classes
    assert model.training


def test_a_large_start_has_places_as_large_as_what_they_are_added_to_and_an_untouched_head():
    model = backbone(tnt.Motifs(2), tnt.MODELS["TNT"])
    head = model.backbone.head.weight.clone()
    start_large(model)
    tables = [p for name, p in model.named_parameters() if name.endswith("positions")]
    assert len(tables) == 2 and all(0.7 < float(p.detach().std()) < 1.3 for p in tables)
    assert torch.equal(head, model.backbone.head.weight)
