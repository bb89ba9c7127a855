"""Images as sequences of pixels: the tokens are the image, scores are bits per token, the rule is a fitted histogram."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from task_data import photo, photos

from regard.models import LanguageModel, config_for
from regard.tasks import check_task, create_task
from regard.tasks.pixels import nearest_colour

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits():
    return check_task(create_task("pixels"))


def test_a_sequence_is_the_image_row_by_row_and_the_input_is_the_sequence_before(digits):
    batch = digits.training_batch(3, 1, 40)
    assert (digits.length, digits.vocab_size) == (64, 256)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1]) and not batch.inputs[:, 0].any()
    known = {one.tobytes() for one in digits._images.pixels}
    assert all(image.tobytes() in known for image in digits.pictures(batch.targets.numpy()))
    assert batch.grid is None


def test_channels_follow_each_other_in_each_pixel(tmp_path):
    pytest.importorskip("PIL.Image")
    task = create_task("pixels", data=photos(tmp_path), size=8)
    tokens = task.training_batch(0, 0, 4).targets
    assert task.length == 8 * 8 * 3
    pictures = task.pictures(tokens.numpy())
    row, column, channel = 5, 2, 1
    assert np.array_equal(pictures[:, row, column, channel], tokens[:, (row * 8 + column) * 3 + channel].numpy())


@pytest.mark.parametrize("palette", [None, 17])
def test_a_model_that_finds_all_values_alike_spends_the_bits_of_the_alphabet(palette):
    task = create_task("pixels", palette=palette)
    batch = next(iter(task.evaluation_batches(16)))
    spent, count = task.score(torch.zeros(16, 64, task.vocab_size), batch)
    expected = 8.0 if palette is None else math.log2(17)
    assert (spent / count).tolist() == pytest.approx([expected] * 16) and task.chance == pytest.approx(expected)
    sure = torch.nn.functional.one_hot(batch.targets, task.vocab_size).double() * 1e3
    assert float(task.score(sure, batch)[0].abs().max()) < 1e-9


def test_the_rule_is_the_histogram_of_its_neighbourhood(digits):
    """The histogram is counted pixel by pixel."""

    def shade(image, y, x):
        return -1 if y < 0 or x < 0 else int(image[y, x]) * 16 // 256

    counts, every = {}, np.ones(256)
    images = digits._images.pixels[..., 0]
    for image in images[digits._training]:
        for (y, x), value in np.ndenumerate(image):
            place = shade(image, y, x - 1), shade(image, y - 1, x)
            counts.setdefault(place, np.zeros(256))[value] += 1
            every[value] += 1
    prior = 16 * every / every.sum()
    for row in (0, 7):
        image, spent = images[digits._scored[row]], 0.0
        for (y, x), value in np.ndenumerate(image):
            chances = counts.get((shade(image, y, x - 1), shade(image, y - 1, x)), np.zeros(256)) + prior
            spent -= math.log2(chances[value] / chances.sum())
        assert digits.baseline.items[row].tolist() == pytest.approx([spent, 64])
    assert digits.baseline.score < 0.5 * digits.chance


def test_a_palette_has_all_colours_or_those_chosen_and_pixels_take_the_nearest(tmp_path):
    pytest.importorskip("PIL.Image")
    whole = create_task("pixels", palette=200)
    assert whole.vocab_size == 17, "digits have 17 shades"
    batch = whole.training_batch(0, 0, 8)
    known = {one.tobytes() for one in whole._images.pixels}
    assert all(image.tobytes() in known for image in whole.pictures(batch.targets.numpy()))
    task = create_task("pixels", data=photos(tmp_path), size=8, palette=12)
    assert task.length == 64 and 2 <= task.vocab_size <= 12
    assert (np.diff(task.palette.sum(1, dtype=np.int64)) >= 0).all()
    pixels = np.random.default_rng(None).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    apart = ((pixels[..., None, :].astype(int) - task.palette.astype(int)) ** 2).sum(-1)
    found = nearest_colour(pixels, task.palette)
    assert np.array_equal(np.take_along_axis(apart, found[..., None], -1)[..., 0], apart.min(-1))


def test_images_of_more_than_8_bits_are_bytes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for i in range(6):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        photo(path, i, (8, 8), "L")
        image.fromarray(np.random.default_rng(i).integers(0, 60_000, (8, 8)).astype(np.uint16)).save(path)
    task = create_task("pixels", data=tmp_path, size=8, channels=1)
    tokens = task._tokens(np.arange(6))
    assert (tokens.min(), tokens.max()) == (0, 255)


def test_a_language_model_serves_it(digits):
    model = LanguageModel(config_for(digits, ["softmax"], dim=16, num_heads=2, max_length=64))
    batch = digits.training_batch(0, 0, 2)
    assert model(batch.inputs).output.shape == (2, 64, 256)
