"""Augmented training images: drawn from the seed, in the right range, and never applied to held-out ones."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from task_data import photo, photos, refused

from regard.tasks import Batch, create_task, mean_loss

pytest.importorskip("torchvision")


@pytest.fixture
def folder(tmp_path):
    return photos(tmp_path / "pets")


def images(folder, **options):
    return create_task("images", data=folder, size=8, patch=1, **options)


def batch(task, step=0, seed=0):
    return task.training_batch(step, seed, 12)


@pytest.mark.parametrize("name", ["light", "standard"])
def test_batches_are_a_function_of_step_and_seed_alone(folder, name):
    task, again = (images(folder, augment=name, mix=0.5) for _ in range(2))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = [batch(task, step) for step in range(4)]
    assert torch.equal(torch.get_rng_state(), before), "nobody else's draws are changed"
    torch.manual_seed(2)
    for step in (3, 0):
        other = batch(again, step)
        assert torch.equal(other.inputs, first[step].inputs) and torch.equal(other.targets, first[step].targets)
        shares = [b.class_shares for b in (other, first[step])]
        assert (shares[0] is None and shares[1] is None) or torch.equal(*shares)
    assert not torch.equal(batch(task, 0, seed=1).inputs, first[0].inputs)


@pytest.mark.parametrize("name", ["light", "standard"])
def test_images_are_varied_within_their_scale_and_held_out_ones_are_not(folder, name):
    plain, task = images(folder), images(folder, augment=name, mix=0.0)
    one, other = batch(plain), batch(task)
    assert torch.equal(one.targets, other.targets) and one.inputs.shape == other.inputs.shape
    assert not torch.equal(one.inputs, other.inputs) and other.class_shares is None
    pixels = other.inputs.numpy() * np.array(task.reader.deviation) + np.array(task.reader.mean)
    assert pixels.min() > -1 and pixels.max() < 256 and pixels.max() > 100
    for held in zip(plain.evaluation_batches(4), task.evaluation_batches(4), strict=True):
        assert torch.equal(held[0].inputs, held[1].inputs)


def test_light_crops_of_a_wide_photo_come_from_all_of_it(tmp_path):
    for i in range(8):
        photo(tmp_path / "ab"[i % 2] / f"{i}.png", i, (32, 8))
    task = images(tmp_path, augment="light", flip=False)
    number = task._training[0]
    found = set()
    for seed in range(40):
        pixels, _ = task.augmentation([task._images.pixels[number]], torch.zeros(1, dtype=torch.long), seed)
        whole = task._images.pixels[number]
        for left in range(25):
            found |= {left} if np.array_equal(pixels[0][2:6, 2:6], whole[2:6, left + 2 : left + 6]) else set()
    assert min(found) < 6 and max(found) > 18


def test_mirrored_images_are_mirrored_half_the_time_but_not_digits(folder):
    task = images(folder, augment="light")
    symmetric = np.zeros((8, 8, 3), dtype=np.uint8)
    symmetric[:, :4] = 200
    labels = torch.zeros(1, dtype=torch.long)
    brighter = [task.augmentation([symmetric], labels, seed)[0][0, :, :4].mean() > 100 for seed in range(40)]
    assert 8 < sum(brighter) < 32
    pytest.importorskip("sklearn")
    assert "mirrored" in task.describe()
    assert "mirrored" not in create_task("images", augment="light").describe()


@pytest.mark.parametrize("name", ["light", "standard"])
def test_images_are_not_mirrored_where_a_class_is_named_for_a_side(name, tmp_path):
    for i in range(8):
        photo(tmp_path / ("turn left", "turn right")[i % 2] / f"{i}.png", i)
    task = images(tmp_path, augment=name, mix=0)
    assert "not mirrored, for the class turn left" in task.describe() and not task.augmentation.flip
    assert "mirrored half the time" in images(tmp_path, augment=name, mix=0, flip=True).describe()


def test_flip_alone_mirrors_what_would_be_seen_and_mix_alone_mixes_it(tmp_path):
    """Photos of several shapes: mirrored or not, each is its own middle."""
    for i in range(12):
        photo(tmp_path / "ab"[i % 2] / f"{i}.png", i, (32, 8) if i % 3 else (8, 20))
    plain, flipped, mixed = (images(tmp_path, **given) for given in ({}, {"flip": True}, {"mix": 1.0}))
    mirrored = 0
    for step in range(8):
        was, now = batch(plain, step), batch(flipped, step)
        assert torch.equal(was.targets, now.targets) and now.class_shares is None
        for one, other in zip(was.inputs.unflatten(1, (8, 8)), now.inputs.unflatten(1, (8, 8)), strict=True):
            turned = torch.equal(other, one.flip(1))
            assert turned or torch.equal(other, one)
            mirrored += turned
    assert 25 < mirrored < 71, "of 96, half"
    assert batch(mixed).class_shares is not None
    assert flipped.describe().count("training images: mirrored half the time") == 1
    assert "the middle is seen\n" in flipped.describe()
    assert plain.repeats and not flipped.repeats and not mixed.repeats


def test_mixed_classes_add_up_and_are_the_loss(folder):
    task = images(folder, augment="light", mix=1.0)
    mixed = batch(task)
    shares = mixed.class_shares
    torch.testing.assert_close(shares.sum(1), torch.ones(12))
    assert ((shares > 0).sum(1) == 2).any()
    pixels = mixed.inputs.numpy() * np.array(task.reader.deviation) + np.array(task.reader.mean)
    assert pixels.min() > -1 and 100 < pixels.max() < 256
    logits = torch.randn(12, 3, dtype=torch.float64)
    expected = -(shares.double() * logits.log_softmax(-1)).sum(1).mean()
    torch.testing.assert_close(mean_loss(task, logits, mixed), expected)
    whole = Batch(mixed.inputs, mixed.targets, class_shares=torch.nn.functional.one_hot(mixed.targets, 3).float())
    hard = Batch(mixed.inputs, mixed.targets)
    torch.testing.assert_close(mean_loss(task, logits, whole), mean_loss(task, logits, hard))


def test_grey_of_more_than_8_bits_is_varied_in_its_own_shades(folder):
    image = pytest.importorskip("PIL.Image")
    values = np.random.default_rng(0).integers(0, 65_535, (8, 8)).astype(np.uint16)
    image.fromarray(values).save(folder / "cat" / "deep.png")
    task = images(folder, channels=1, augment="standard")
    pixels = batch(task).inputs.double() * task.reader.deviation[0] + task.reader.mean[0]
    assert pixels.min() > -1 and 100 < pixels.max() < 256
    assert (pixels - pixels.round()).abs().max() > 1e-3


def test_options_that_do_not_go_together_and_a_missing_torchvision_are_said(folder, monkeypatch):
    refused(lambda: images(folder, augment="strong"), "strong", "standard")
    refused(lambda: images(folder, augment="light", mix=1.5), "mix=1.5")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    refused(lambda: images(folder, augment="light"), "without torchvision", "try pip install 'regard[vision]'")
    refused(lambda: images(folder, flip=True), "without torchvision", "augment=none without flip and mix")
