"""Augmentation of images and volumes together with their masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from task_data import items, masked, refused, save_scan, scans

from regard.tasks import check_task, create_task
from regard.tasks.protocol import IGNORED
from regard.tasks.segmentation import augmentation
from regard.tasks.segmentation.augmentation import LARGER, MaskAugmentation

SIDES = [(32, 48), (24, 16, 32)]


def made(name, axes, *, classes=("background", "thing"), flip=None, shift=True):
    return MaskAugmentation(name, classes, flip=flip, mirrored=(tuple(range(axes)), "along each axis"), shift=shift)


def random():
    return np.random.default_rng()


@pytest.mark.parametrize("sides", SIDES)
def test_light_moves_each_point_with_its_class(sides):
    labels = random().integers(0, 9, sides)
    labels[random().random(sides) < 0.2] = IGNORED
    points = np.stack([labels, -2 * labels], -1)
    vary, rng, found = made("light", len(sides)), random(), []
    for _ in range(40):
        moved, classes = vary(points, labels, rng)
        assert classes.shape == sides and classes.dtype == labels.dtype
        assert np.array_equal(moved, np.stack([classes, -2 * classes], -1))
        assert set(np.unique(classes)) <= set(np.unique(labels))
        found.append(classes.tobytes())
    assert len(set(found)) > 20 and np.array_equal(points[..., 0], labels), "what is given stays"


@pytest.mark.parametrize("sides", SIDES)
def test_turning_and_scaling_keep_right_angles_and_take_classes_along(sides, monkeypatch):
    """Ramps along the axes of a non-square map keep slopes of equal length at right angles."""
    monkeypatch.setattr(augmentation, "OFTEN", 0.0)
    points = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"), -1).astype(float)
    labels = 3 * np.arange(sides[0]).reshape(-1, *[1] * (len(sides) - 1)) + np.zeros(sides, np.int64)
    middle = tuple(slice(side // 2 - 2, side // 2 + 2) for side in sides)
    vary, rng, sizes = made("standard", len(sides), flip=False), random(), []
    for _ in range(20):
        moved, classes = vary(points, labels, rng)
        slopes = np.stack([np.gradient(moved[..., c], axis=(0, 1)) for c in (0, 1)])[(..., *middle)]
        steady = abs(slopes - slopes.mean(tuple(range(2, slopes.ndim)), keepdims=True)).max() < 1e-3
        (a, b), (c, d) = slopes.mean(tuple(range(2, slopes.ndim)))
        assert steady and abs(a * c + b * d) < 1e-3 and np.hypot(a, b) == pytest.approx(np.hypot(c, d), abs=1e-3)
        sizes.append(np.hypot(a, b))
        assert abs(classes - 3 * moved[..., 0])[middle].max() <= 3 * 0.5 * 1.5 * sizes[-1] + 1e-3
    assert 1 / LARGER - 1e-3 <= min(sizes) < 0.95 and 1.05 < max(sizes) <= LARGER + 1e-3


def test_shades_change_alone_in_any_scale(monkeypatch):
    monkeypatch.setattr(augmentation, "OFTEN", 1.0)
    points = random().normal(size=(16, 16, 2)) * [3, 300] + [0, 1000]
    seed = int(random().integers(1 << 31))
    one, other = (augmentation._shaded(x, np.random.default_rng(seed)) for x in (points, 10 * points - 5))
    assert np.allclose(10 * one - 5, other) and not np.allclose(one, points)
    moved, spread, span = abs(one.mean((0, 1)) - points.mean((0, 1))), points.std((0, 1)), np.ptp(points, axis=(0, 1))
    # brightness by up to 0.3 deviations and the mean of the noise; a power of 1.5 by up to 0.15 of the stretched range
    assert (moved < 0.4 * spread + 0.15 * 1.25 * span).all()
    flat = augmentation._shaded(np.full((4, 4, 1), 7.0), random())
    assert np.isfinite(flat).all()


@pytest.mark.parametrize("names", [("background", "Hippocampus_L"), ("air", "left lung"), ("x", "kidney (right)")])
def test_what_has_a_side_is_not_mirrored_unless_asked(names):
    assert not made("light", 2, classes=names).flip and names[1] in str(made("light", 2, classes=names))
    assert made("light", 2, classes=names, flip=True).flip
    assert made("light", 2, classes=("air", "leftover", "bright", "lung")).flip


@pytest.mark.parametrize("name", ["light", "standard"])
def test_training_batches_are_varied_by_step_and_seed_alone_and_held_out_items_are_not(tmp_path, name):
    pytest.importorskip("PIL.Image", reason="writes and reads images")
    folder = masked(tmp_path / "a")
    plain, varied = (check_task(create_task("segmentation", data=folder, size=16, augment=a)) for a in ("none", name))
    again = create_task("segmentation", data=folder, size=16, augment=name)
    batches = [task.training_batch(3, 7, 4) for task in (plain, varied, again)]
    assert torch.equal(batches[1].inputs, batches[2].inputs) and torch.equal(batches[1].targets, batches[2].targets)
    assert not torch.equal(batches[0].inputs, batches[1].inputs)
    assert set(batches[1].targets.unique().tolist()) <= {0, 1, 2}
    assert items(plain.evaluation_batches(3)) == items(varied.evaluation_batches(3))
    assert str(varied.augmentation) in varied.describe() and "augment=light" in plain.describe()


def test_flip_alone_mirrors_images_with_their_masks(tmp_path):
    pytest.importorskip("PIL.Image", reason="writes and reads images")
    folder = masked(tmp_path / "a")
    plain, flipped = (create_task("segmentation", data=folder, size=16, patch=1, flip=f) for f in (False, True))
    found = []
    for step in range(8):
        was, now = plain.training_batch(step, 0, 4), flipped.training_batch(step, 0, 4)
        for i in range(4):
            image, mask = was.inputs[i].unflatten(0, (16, 16)), was.targets[i].reshape(16, 16)
            ways = [(image, mask), (image.flip(1), mask.flip(1))]
            same = [
                torch.equal(a.flatten(0, 1), now.inputs[i]) and torch.equal(b.reshape(-1), now.targets[i].reshape(-1))
                for a, b in ways
            ]
            assert any(same)
            found.append(same[1])
    assert 0 < sum(found) < len(found)
    assert "mirrored half the time" in flipped.describe() and "shifted" not in flipped.describe()


def test_crops_of_volumes_are_varied_with_their_masks(tmp_path):
    """If a voxel's value determines its class, it still does after augmentation."""
    for i in range(4):
        mask = random().integers(0, 3, (12, 10, 9)).astype(np.uint8)
        save_scan(tmp_path / "masks" / f"{i}.nii.gz", mask)
        save_scan(tmp_path / "images" / f"{i}.nii.gz", np.stack([mask, 100 - mask], -1).astype(np.float32))
    plain, varied = (create_task("segmentation_3d", data=tmp_path, size=8, augment=a) for a in ("none", "light"))
    first, batch = (task.training_batch(1, 0, 8) for task in (plain, varied))
    assert not torch.equal(first.inputs, batch.inputs)
    order = [batch.inputs.unflatten(2, (-1, 2))[..., 0][batch.targets == k] for k in range(3)]
    assert order[0].max() < order[1].min() and order[1].max() < order[2].min()
    assert items(plain.evaluation_batches(1)) == items(varied.evaluation_batches(1))
    standard = create_task("segmentation_3d", data=scans(tmp_path / "b"), size=8, augment="standard")
    batch = check_task(standard).training_batch(0, 0, 4)
    assert batch.inputs.isfinite().all() and set(batch.targets.unique().tolist()) <= {0, 1}


def test_options_that_do_not_go_together_are_refused(tmp_path):
    refused(lambda: create_task("segmentation", augment="light"), "augment=light for shapes, which comes as it is")
    refused(lambda: create_task("segmentation_3d", augment="light"), "augment=light for bodies")
    refused(lambda: create_task("segmentation", data=tmp_path, augment="ligth"), "try light")
    refused(lambda: create_task("segmentation_3d", flip=True), "flip=True for bodies, which comes as it is")
