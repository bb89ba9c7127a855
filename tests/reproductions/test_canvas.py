"""Canvases, and the measurements of the IA-RED² reproduction on them."""

from __future__ import annotations

import torch
from support import close

from regard.models.image_model import ImageModel, ImageModelConfig
from regard.reproductions.framework.canvas import NOISE, canvas
from regard.reproductions.interpreters import area, first_in


def test_canvases_are_the_same_in_every_call_and_tokens_are_their_patches() -> None:
    task = canvas(20)
    model = ImageModel(ImageModelConfig("vit_nano", 10, (8, 8), 4, 1, {"dim": 12, "num_layers": 1, "num_heads": 2}))
    first, again = (list(task.evaluation_scenes(8)) for _ in range(2))
    assert sum(len(scene.labels) for scene in first) == 20
    for one, other, batch in zip(first, again, task.evaluation_batches(8), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, batch.targets)
        assert torch.equal(model.images(batch.inputs, batch.grid), one.images)
    steps = [task.training_scene(step, 0, 8).images for step in (0, 0, 1)]
    assert torch.equal(steps[0], steps[1]) and not torch.equal(steps[0], steps[2])


def test_ink_lies_on_four_patches_and_blobs_elsewhere_too() -> None:
    plain, blobs = (canvas(20, number).training_scene(0, 0, 20) for number in (0, 3))
    for scene in (plain, blobs):
        for ink in scene.ink:
            rows, columns = ink.nonzero().unbind(1)
            assert 1 <= int(ink.sum()) <= 4 and rows.max() - rows.min() <= 1 and columns.max() - columns.min() <= 1
    bright = [(scene.images[:, 0] > 6 * NOISE).unflatten(2, (8, 4)).unflatten(1, (8, 4)) for scene in (plain, blobs)]
    outside = [each.any(4).any(2) & ~scene.ink for each, scene in zip(bright, (plain, blobs), strict=True)]
    assert not outside[0].any() and (outside[1].flatten(1).any(1)).float().mean() > 0.9


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    truth = torch.tensor([[True, False, True, False, False]] * 3)
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.0], [0.0, 0.5, 0.1, 0.6, 0.7], [0.4] * 5])
    close(area(scores, truth), torch.tensor([1.0, 0.0, 0.5]))
    close(area(torch.tensor([[0.3, 0.1, 0.2, 0.25, 0.9]]), truth[:1]), torch.tensor([3 / 6]))


def test_drawn_tokens_are_as_many_with_the_class_token_and_none_comes_back() -> None:
    order = torch.rand(4, 9)
    counts = torch.tensor([1, 3, 9, 5])
    many, few = first_in(order, counts), first_in(order, (counts - 2).clamp(min=1))
    assert torch.equal(many.sum(1), counts) and many[:, 0].all() and few[:, 0].all() and (few <= many).all()
