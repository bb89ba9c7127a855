"""Photographs found in practice: of any shape, damaged, rotated, in odd modes; and the message about each."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from command_line import answer, run
from task_data import photo, photos, refused

from regard.tasks import create_task
from regard.tasks.image_files import LONGEST, centre, read_image

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path):
    return photos(tmp_path / "pets")


def stripes(path, size, bright):
    """Save a black image with some bright columns, counted from the left."""
    image = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    image[:, bright] = 255
    Image.fromarray(image).save(path)
    return path


@pytest.mark.parametrize(("size", "whole"), [((40, 20), (8, 16)), ((20, 40), (16, 8)), ((90, 3), (8, 8 * LONGEST))])
def test_images_keep_their_proportions_up_to_a_limit_and_the_middle_is_seen(tmp_path, size, whole):
    image, _ = read_image(stripes(tmp_path / "a.png", size, slice(size[0] // 2 - 1, size[0] // 2 + 1)), (8, 8), 3)
    assert image.shape == (*whole, 3)
    seen = centre(image, (8, 8)).mean((0, 2))
    assert seen.argmax() in (3, 4) and seen[[0, -1]].max() < seen.max() / 4
    edge, _ = read_image(stripes(tmp_path / "b.png", (40, 20), slice(0, 4)), (8, 8), 3)
    assert edge.max() > 200 > 20 > centre(edge, (8, 8)).max(), "what lies beside the middle is not seen"


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    upright = stripes(tmp_path / "a.png", (16, 8), slice(0, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    with Image.open(upright) as opened:
        opened.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    first, second = (read_image(tmp_path / name, (8, 8), 3)[0] for name in ("a.png", "b.png"))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("mode", ["CMYK", "P", "1", "LA", "YCbCr"])
def test_a_uniform_colour_survives_every_mode(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.new("RGB", (9, 7), (255, 255, 255)).convert(mode).save(path)
    assert read_image(path, (8, 8), 3)[0].min() >= 250


def test_of_several_pictures_in_a_file_the_first_is_read_and_the_file_is_counted(folder):
    frames = [Image.new("L", (9, 9), shade) for shade in (200, 10)]
    frames[0].save(folder / "cat" / "moving.gif", save_all=True, append_images=frames[1:])
    image, count = read_image(folder / "cat" / "moving.gif", (8, 8), 1)
    assert count == 2 and image.min() == 200
    assert "1 file of several pictures: the first of each" in create_task("images", data=folder).describe()


def empty(path):
    path.write_bytes(b"")


def cut(path):
    photo(path, 5, (90, 90))
    path.write_bytes(path.read_bytes()[:-900])


def one_pixel(path):
    photo(path, 5, (1, 1))


def gigantic(path):
    """Write a PNG whose header claims 60,000 x 60,000 pixels."""
    photo(path, 5)
    raw = path.read_bytes()
    side = (60_000).to_bytes(4, "big")
    head = b"IHDR" + side * 2 + raw[24:29]
    path.write_bytes(raw[:12] + head + zlib.crc32(head).to_bytes(4, "big") + raw[33:])


def text(path):
    path.write_text("no image")


BAD = {
    empty: "it is empty",
    cut: "truncated",
    one_pixel: "pixels small",
    gigantic: "it has more than 89 million pixels",
    text: "it is of no known kind",
}


@pytest.mark.parametrize("make", BAD)
def test_a_bad_image_is_one_line_and_nothing_is_written(folder, tmp_path, capsys, make):
    make(folder / "cat" / "bad.png")
    for command in ("train --model", "compare --models"):
        options = f"vit_nano --task images {folder} --budget '40 steps' --output {tmp_path / 'out'}"
        code, _, said = run(capsys, f"{command} {options}")
        assert code == 2 and "bad.png, which cannot be read as an image" in said and "--skip-unreadable" in said
        assert BAD[make] in said
        assert len(said.strip().splitlines()) == 1, said
    assert not (tmp_path / "out").exists()


def test_bad_images_are_named_and_left_out_on_demand(folder):
    whole = create_task("images", data=folder, size=8)
    for i, make in enumerate([*BAD] * 2):
        make(folder / ("cat", "dog")[i % 2] / f"bad{i}.png")
    task = create_task("images", data=folder, size=8, skip_unreadable=True)
    told = task.describe()
    assert told.count("left out: bad") == 5 and "10 files that cannot be read left out" in told
    for one, other in zip(task.evaluation_batches(8), whole.evaluation_batches(8), strict=True):
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)
    (folder / "eel").mkdir()
    empty(folder / "eel" / "0.png")
    refused(lambda: create_task("images", data=folder, skip_unreadable=True), "eel with 0 images that can be read")


def test_more_pixels_than_memory_holds_are_refused_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 1 << 10)
    refused(lambda: create_task("images", data=folder, size=512), "30 images", "held in memory", "try size=76")


def test_the_command_line_goes_on_without_bad_images_where_images_are_read(folder, tmp_path, capsys):
    cut(folder / "cat" / "bad.png")
    small = "--model vit_nano:num_layers=1,dim=24 --batch-tokens 256 --budget '20 steps' --skip-unreadable"
    code, out, said = run(capsys, f"train {folder} --task images:size=8 {small} --output {tmp_path / 'out'}")
    assert code == 0 and "left out: bad.png" in out, said
    code, _, said = run(capsys, f"train --task recall {small} --output {tmp_path / 'other'}")
    assert code == 2 and "--skip-unreadable with recall" in said


def test_new_data_is_scored_without_its_bad_images_on_demand(folder, tmp_path, capsys):
    small = "--model vit_nano:num_layers=1,dim=24 --batch-tokens 256 --budget '20 steps'"
    assert run(capsys, f"train {folder} --task images:size=8 {small} --output {tmp_path / 'out'}")[0] == 0
    for i, name in enumerate(("cat", "dog", "newt")):
        photo(tmp_path / "new" / name / "0.png", 100 + i)
    cut(tmp_path / "new" / "dog" / "worse.png")
    code, _, said = run(capsys, f"evaluate {tmp_path / 'out'} {tmp_path / 'new'}")
    assert code == 2 and "worse.png, which cannot be read" in said and "--skip-unreadable" in said
    found = answer(capsys, f"evaluate --skip-unreadable {tmp_path / 'out'} {tmp_path / 'new'}")
    assert found["items"] == 3 and any("left out: worse.png" in note for note in found["notes"])
    cut(folder / "dog" / "bad.png")
    assert "left out: bad.png" in run(capsys, f"evaluate --skip-unreadable {tmp_path / 'out'}")[1]
