"""Images: splits, patches, normalisation, and messages for whatever is wrong with a user's folder."""

from __future__ import annotations

import gzip
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from task_data import items, photo, photos, refused

from regard.tasks import check_task, create_task
from regard.tasks import idx as idx_files
from regard.tasks.image_files import read_image
from regard.tasks.images import SHOWN

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")

CLASSES = ("cat", "dog", "newt")


@pytest.fixture
def folder(tmp_path):
    return photos(tmp_path / "pets")


def images(data, **options):
    return create_task("images", data=data, **options)


def pixels(data, **options):
    """A task whose tokens are the grey pixels of 8 x 8 images."""
    return images(data, size=8, patch=1, channels=1, **options)


def values(task):
    return task.training_batch(0, 0, len(task._training)).inputs.double()


def write(path, array):
    Image.fromarray(array).save(path)


def test_digits_are_split_by_image_with_each_class_in_its_share():
    task = check_task(create_task("images"))
    held_out = items(task.evaluation_batches(64))
    epoch = items([task.training_batch(0, 0, 1438)])
    assert len(set(epoch)) == 1438, "an epoch shows each image once"
    assert not set(epoch) & set(held_out)
    counts = torch.bincount(torch.cat([batch.targets for batch in task.evaluation_batches(64)]), minlength=10)
    assert counts.sum() == 359
    assert counts.min() >= 34
    assert counts.max() <= 37


def test_batches_of_an_epoch_cover_the_training_images_across_the_border(folder):
    task = images(folder, size=8)
    shown = items(task.training_batch(step, 3, 10) for step in range(5))
    assert len(set(shown[:24])) == len(set(shown[24:48])) == 24
    assert shown[:24] != shown[24:48]


def test_patches_are_squares_of_the_image_row_by_row():
    whole, patches = create_task("images"), create_task("images", length=16)
    assert (whole.length, whole.features, whole.grid) == (64, 1, (8, 8))
    assert (patches.patch, patches.length, patches.features, patches.grid) == (2, 16, 4, (4, 4))
    image = whole.training_batch(0, 0, 1).inputs.view(8, 8)
    batch = patches.training_batch(0, 0, 1)
    assert batch.grid == (4, 4)
    for row in range(4):
        for column in range(4):
            square = image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(batch.inputs[0, 4 * row + column], square.flatten())


def test_features_are_normalised_by_training_statistics(folder):
    task = images(folder, size=8, patch=1)
    assert (task.features, pixels(folder).features) == (3, 1)
    found = values(task)
    torch.testing.assert_close(found.mean((0, 1)), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.std((0, 1), correction=0), torch.ones(3, dtype=torch.float64))


def test_folder_reads_every_mode_and_sub_folder_and_leaves_out_repetitions_and_other_files(folder):
    for i, mode in enumerate(("L", "RGBA", "LA")):
        photo(folder / "cat" / "deep" / f"{mode}.png", 100 + i, mode=mode)
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / "dog" / "copy.png").write_bytes((folder / "dog" / "1.png").read_bytes())
    photo(folder.parent / "outside.png", 99)
    (folder / "cat" / "out.png").symlink_to(folder.parent / "outside.png")
    (folder / "cat" / "in.png").symlink_to("0.png")
    task = check_task(images(folder))
    assert (task.num_classes, task.length, task.features) == (3, 64, 48)
    for told in (
        "1 file of other kinds than images not read",
        "training: 26 images of 3 classes (cat 10, dog 8, newt 8)",
        "2 exact repetitions left out",
        "cat: 1 link out of it not followed",
    ):
        assert told in task.describe()
    assert len(task._training) + len(task._held_out) == 33


def test_class_folders_of_any_name_are_told_in_text_that_can_be_stored(folder):
    os.rename(folder / "newt", os.fsencode(folder) + b"/caf\xe9\x1b[31m")
    for path in list(folder.rglob("*.png")):
        path.with_suffix(".txt").write_text(path.name + "text")
    for task in ("images", "documents"):
        told = create_task(task, data=folder).describe()
        assert r"caf\udce9\x1b[31m 8" in told
        told.encode()


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", (4, 4), 3)[0].min() == 255


@pytest.mark.parametrize(
    ("suffix", "dtype", "low", "high"),
    [
        ("png", np.uint16, 0, 65_535),
        ("tif", np.uint16, 900, 5_000),
        ("tif", np.int32, -7, 10**6),
        ("tif", np.float32, 0, 1),
    ],
)
def test_grey_of_more_than_8_bits_keeps_its_shades(folder, suffix, dtype, low, high):
    ramps = []
    for i, name in enumerate(CLASSES):
        ramps.append(np.linspace(low, (high - low) * (i + 1) / 3 + low, 64).astype(dtype).reshape(8, 8))
        write(folder / name / f"deep.{suffix}", ramps[-1])
    task = pixels(folder)
    found = task._images.centres(np.arange(33)).reshape(-1, 64)
    wide = (np.stack(ramps).reshape(3, 64).astype(float) - low) * (255 / (high - low))
    nearest = np.abs(found[:, None] - wide).max(2).argmin(0)
    np.testing.assert_allclose(found[nearest], wide, atol=0.01)
    assert f"3 images of more than 8 bits a pixel: values from {low:g} to" in task.describe()
    assert float(values(task).std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_values_between_pixels_stay_in_the_range_of_the_file(tmp_path):
    write(tmp_path / "a.png", (np.indices((8, 8)).sum(0) % 2 * 5000 + 1000).astype(np.uint16))
    found, _ = read_image(tmp_path / "a.png", (20, 20), 1)
    assert (found.min(), found.max()) == (1000, 6000)
    refused(lambda: images(tmp_path, span=[3, 1]), "span=[3, 1]")


def test_one_bright_pixel_does_not_flatten_the_others(tmp_path):
    for i in range(8):
        image = np.random.default_rng(i).integers(0, 90, (8, 8)).astype(np.int32)
        image[0, 0] += 10**6 * (i == 0)
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        write(tmp_path / "ab"[i % 2] / f"{i}.tif", image)
    found = values(pixels(tmp_path, held_out=0.25))
    assert float(found.std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_validation_folder_is_what_is_held_out(folder, tmp_path):
    valid = tmp_path / "valid"
    for i in range(6):
        photo(valid / CLASSES[i % 3] / f"{i}.png", 50 + i)
    (valid / "cat" / "shared.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    task = images(folder, validation=valid)
    held_out, training = items(task.evaluation_batches(64)), items([task.training_batch(0, 0, 29)])
    assert (len(held_out), len(set(training))) == (7, 29)
    assert not set(held_out) & set(training)
    assert "1 image of the held-out data also in the training data: not trained on" in task.describe()
    photo(valid / "toad" / "x.png", 7)
    refused(
        lambda: images(folder, validation=valid),
        "valid with the unknown class toad; supported: sub-folders of the classes cat, dog, newt",
    )


@pytest.fixture
def idx(tmp_path):
    generator = np.random.default_rng(5)
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix, count in (("train", 40), ("t10k", 20)):
        arrays = {"images-idx3": generator.integers(0, 256, (count, 28, 28)), "labels-idx1": np.arange(count) % 10}
        for name, array in arrays.items():
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
            raw = head + array.astype(np.uint8).tobytes()
            path = folder / f"{prefix}-{name}-ubyte"
            if prefix == "train":
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(raw))
            else:
                path.write_bytes(raw)
    return folder


def test_idx_files_keep_their_own_split(idx):
    task = check_task(images(idx, evaluation_items=10))
    assert (task.length, task.features, task.grid) == (49, 16, (7, 7))
    assert len(task._training) == 40
    labels = torch.cat([batch.targets for batch in task.evaluation_batches(4)])
    assert sorted(labels.tolist()) == list(range(10)), "a capped evaluation is balanced"


def test_fashion_mnist_is_read_where_debian_puts_it(idx, monkeypatch):
    monkeypatch.setattr(idx_files, "DEBIAN_DATASETS", idx.parent)
    refused(lambda: images("fashion-mnist"), "try apt install dataset-fashion-mnist", "dpkg-deb -x")
    place = idx.rename(idx.parent / "fashion-mnist")
    for data in ("fashion-mnist", "fashion_mnist", place):
        told = images(data).describe()
        assert "Fashion-MNIST" in told and "ankle boot 4" in told


def test_a_folder_that_has_the_name_of_a_data_set_is_told_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "note:" not in images("digits").describe()
    photos(tmp_path / "digits")
    assert "note: the folder digits is passed over; ./digits reads it" in images("digits").describe()
    assert "images: digits, 32x32 pixels, colour" in images("./digits").describe()


def test_images_with_masks_read_as_two_classes_are_told_of(tmp_path):
    for i in range(6):
        photo(tmp_path / ("images", "masks")[i % 2] / f"{i}.png", i)
    assert "note: classes named images and masks: where" in images(tmp_path).describe()


def test_a_task_on_data_by_name_is_made_again_from_its_record_in_any_folder(tmp_path, monkeypatch):
    task = create_task("images", data="digits", patch=2)
    monkeypatch.chdir(tmp_path)
    assert items([create_task("images", **task.origin).training_batch(0, 0, 4)]) == items(
        [task.training_batch(0, 0, 4)]
    )


def test_idx_and_digits_are_resized_on_demand(idx):
    task = images(idx, size=40)
    assert (task.grid, task.features) == ((10, 10), 16)
    small, large = images(idx)._images.pixels.astype(float), task._images.pixels.astype(float)
    np.testing.assert_allclose(large.mean((1, 2)), small.mean((1, 2)), atol=2)
    assert "resized from 28x28" in task.describe()


def test_images_may_be_of_other_sides_than_square(folder, idx):
    task = check_task(images(folder, size=[8, 20], patch=4, augment="standard"))
    assert (task.grid, task.length) == ((2, 5), 10)
    path = photo(folder.parent / "high.png", 3, (16, 32))
    large, _ = read_image(path, (8, 20), 3)
    assert large.shape == (40, 20, 3)
    np.testing.assert_array_equal(task.reader.pixels(task.reader.read([path]))[0], large[16:24])
    assert task.reader.picture(path).size == (960, 384)
    assert images(idx, size=[8, 20]).grid == (2, 5) and "resized to cover 8x20 pixels" in task.describe()
    assert images(folder, size=[12, 12]).origin["size"] == [12, 12]
    refused(lambda: images(folder, size=[8, 8, 3]), "one number, or two (height and width)")
    refused(lambda: images(folder, size=[8, 2]), "size=2")


def test_idx_files_that_are_cut_or_hold_nothing_or_too_much_are_refused_by_name(idx, monkeypatch):
    path, packed = idx / "t10k-images-idx3-ubyte", idx / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content, told in (
        (whole[:-1], "which is not a whole IDX file"),
        (whole[:4] + np.array((0, 28, 28), dtype=">u4").tobytes(), "which cannot be read (sizes 0 x 28 x 28"),
        (whole[:4] + np.array((1 << 30, 28, 28), dtype=">u4").tobytes(), "sizes 1073741824 x 28 x 28"),
    ):
        path.write_bytes(content)
        refused(lambda: images(idx), path.name, told)
    path.write_bytes(whole)
    whole = packed.read_bytes()
    packed.write_bytes(whole[:40] + bytes(255 - b for b in whole[40:80]) + whole[80:])
    refused(lambda: images(idx), "train-images-idx3-ubyte.gz, which cannot be read")
    packed.write_bytes(gzip.compress(gzip.decompress(whole) + bytes(10**7)))
    reads, read = [], gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, size=-1: reads.append(size) or read(file, size))
    refused(lambda: images(idx), "not a whole IDX file")
    assert max(reads) == 40 * 28 * 28 + 1 and min(reads) > 0, "no more is unpacked than the file should hold"


@pytest.mark.parametrize(("package", "options"), [("sklearn", {}), ("PIL", {"data": "pets"})])
def test_a_missing_extra_is_named(folder, monkeypatch, package, options):
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(folder.parent)
    refused(lambda: create_task("images", **options), "try pip install 'regard[data]'")


def put(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path.parents[1]


def cut(folder):
    path = folder / "cat" / "0.png"
    return put(path, path.read_bytes()[:60])


def not_numbers(folder):
    write(folder / "cat" / "deep.tif", np.full((8, 8), np.nan, dtype=np.float32))
    return folder


def twins(folder):
    for name in "ab":
        photo(folder / "eel" / f"{name}.png", 99)
    return folder


def linked(folder):
    (folder / "eel").symlink_to(photo(folder.parent / "outside" / "1.png", 99).parent)
    return folder


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (cut, "0.png, which cannot be read as an image"),
        (not_numbers, "deep.tif, which cannot be read as an image (it holds values that are no"),
        (lambda folder: photo(folder / "eel" / "1.png", 99).parents[1], "eel with 1 image"),
        (twins, "eel with 1 different image"),
        (lambda folder: put(folder / "eel" / "a.txt", b"x"), "eel, which holds no image"),
        (linked, "eel, a link that leads out of"),
        (lambda folder: folder / "cat", "with 0 sub-folders"),
        (lambda folder: folder.parent / "pet", "pets"),
        (lambda folder: folder / "cat" / "0.png", "is not a folder"),
        (lambda folder: "digit", "try digits"),
        (lambda folder: [folder], "sub-folder per class"),
    ],
)
def test_unusable_folders_are_refused_with_what_is_wrong(folder, make, told):
    refused(lambda: images(make(folder)), told)


def test_a_reader_gives_back_the_pixels_and_the_part_of_a_picture_that_it_saw(folder):
    reader = images(folder, size=8, patch=4).reader
    path = photo(folder.parent / "wide.png", 3, (32, 16))
    patches = reader.read([path])
    large, _ = read_image(path, (SHOWN, SHOWN), 3)
    np.testing.assert_array_equal(np.asarray(reader.picture(path)), large[:, SHOWN // 2 : 3 * SHOWN // 2])
    Image.fromarray(np.full((16, 16), 30000, np.uint16)).save(folder.parent / "deep.png")
    deep = replace(reader, span=(0.0, 60000.0)).picture(folder.parent / "deep.png")
    assert deep.getpixel((99, 99)) == (128, 128, 128)  # not white, as if 16 bits were clipped at 255
    expected, _ = read_image(path, (8, 8), 3)
    np.testing.assert_array_equal(reader.pixels(patches)[0], expected[:, 4:12])
