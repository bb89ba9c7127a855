"""Images: splits, patches, normalisation, and words for whatever is wrong with a user's folder."""

from __future__ import annotations

import gzip
import os
import sys

import numpy as np
import pytest
import torch

from regard.contract import Unsupported
from regard.tasks import check_task, create_task
from regard.tasks import images as module

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")


def photo(path, seed, size=(12, 9), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    depth = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], depth), dtype=np.uint8)
    Image.fromarray(pixels.squeeze()).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for i in range(30):
        photo(tmp_path / "pets" / ("cat", "dog", "newt")[i % 3] / f"{i}.png", i)
    return tmp_path / "pets"


def rows(batches):
    return [row.numpy().tobytes() for batch in batches for row in batch.inputs]


def test_digits_are_split_by_image_with_each_class_in_its_share():
    task = check_task(create_task("images"))
    held_out = rows(task.evaluation_batches(64))
    size = 1438
    epoch = rows(task.training_batch(step, 0, size) for step in range(1))
    assert len(set(epoch)) == size, "an epoch shows each image once"
    assert not set(epoch) & set(held_out)
    labels = torch.cat([batch.targets for batch in task.evaluation_batches(64)])
    counts = torch.bincount(labels, minlength=10)
    assert len(labels) == 359
    assert counts.min() >= 34
    assert counts.max() <= 37


def test_training_batch_is_a_function_of_step_seed_and_size():
    one, other = create_task("images"), create_task("images")
    other.training_batch(1, 1, 3)
    assert torch.equal(one.training_batch(50, 1, 32).inputs, other.training_batch(50, 1, 32).inputs)
    assert not torch.equal(one.training_batch(50, 1, 32).inputs, one.training_batch(50, 2, 32).inputs)
    assert not torch.equal(one.training_batch(50, 1, 32).inputs, one.training_batch(51, 1, 32).inputs)


def test_batches_of_an_epoch_cover_the_training_images_across_the_border(folder):
    task = create_task("images", data=folder, size=8)
    shown = rows(task.training_batch(step, 3, 10) for step in range(12))
    for epoch in range(5):
        assert len(set(shown[24 * epoch : 24 * epoch + 24])) == 24
    assert shown[:24] != shown[24:48]


def test_patches_are_squares_of_the_image_row_by_row():
    pixels, patches = create_task("images"), create_task("images", patch=2)
    assert (pixels.length, pixels.features, pixels.grid) == (64, 1, (8, 8))
    assert (patches.length, patches.features, patches.grid) == (16, 4, (4, 4))
    image = pixels.training_batch(0, 0, 1).inputs.view(8, 8)
    batch = patches.training_batch(0, 0, 1)
    assert batch.grid == (4, 4)
    for row in range(4):
        for column in range(4):
            square = image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(batch.inputs[0, 4 * row + column], square.flatten())


def test_features_are_normalised_by_training_statistics(folder):
    task = create_task("images", data=folder, size=8, patch=1)
    assert task.features == 3
    values = task.training_batch(0, 0, 24).inputs.double()
    torch.testing.assert_close(values.mean((0, 1)), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(values.std((0, 1), correction=0), torch.ones(3, dtype=torch.float64))
    assert create_task("images", data=folder, size=8, patch=1, channels=1).features == 1


def test_length_chooses_the_patch():
    assert create_task("images", length=16).patch == 2
    with pytest.raises(Unsupported, match="lengths 64, 16, 4, 1; try length=16"):
        create_task("images", length=20)
    with pytest.raises(Unsupported, match="length=64 for images of 8x8 with patch=2"):
        create_task("images", length=64, patch=2)


def test_folder_reads_every_mode_and_sub_folder(folder):
    for i, mode in enumerate(("L", "RGBA", "LA")):
        photo(folder / "cat" / "deep" / f"{mode}.png", 100 + i, mode=mode)
    (folder / "cat" / "notes.txt").write_text("not an image")
    task = check_task(create_task("images", data=folder))
    told = task.describe()
    assert task.num_classes == 3
    assert (task.length, task.features) == (64, 48)
    assert "1 files that are not images not read" in told
    assert "33" not in told
    assert "training: 26 images of 3 classes (cat 10, dog 8, newt 8)" in told


def test_class_folders_of_any_name_are_told_in_text_that_can_be_stored(folder):
    os.rename(folder / "newt", os.fsencode(folder) + b"/caf\xe9\x1b[31m")
    for task in ("images", "documents"):
        if task == "documents":
            for path in list(folder.rglob("*.png")):
                path.with_suffix(".txt").write_text(path.name + "text")
        told = create_task(task, data=folder).describe()
        assert r"caf\udce9\x1b[31m 8" in told
        told.encode()


def test_links_out_of_a_folder_are_not_followed_and_those_inside_are(folder):
    photo(folder.parent / "outside.png", 99)
    (folder / "cat" / "out.png").symlink_to(folder.parent / "outside.png")
    (folder / "cat" / "in.png").symlink_to("0.png")
    told = create_task("images", data=folder).describe()
    assert "cat: 1 links that lead out of it not followed" in told
    assert "1 exact repetitions left out" in told


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert module._read_image(tmp_path / "a.png", 4, 3).min() == 255


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
    for i, name in enumerate(("cat", "dog", "newt")):
        ramps.append(np.linspace(low, (high - low) * (i + 1) / 3 + low, 64).astype(dtype).reshape(8, 8))
        Image.fromarray(ramps[-1]).save(folder / name / f"deep.{suffix}")
    task = create_task("images", data=folder, size=8, patch=1, channels=1)
    images = task._images.pixels[..., 0].reshape(-1, 64)
    wide = (np.stack(ramps).reshape(3, 64).astype(float) - low) * (255 / (high - low))
    nearest = np.abs(images[:, None] - wide).max(2).argmin(0)
    np.testing.assert_allclose(images[nearest], wide, atol=0.01)
    assert f"3 images of more than 8 bits a pixel: values from {low:g} to" in task.describe()
    values = task.training_batch(0, 0, len(task._training)).inputs.double()
    assert float(values.std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_one_bright_pixel_does_not_flatten_the_others(tmp_path):
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 90, (8, 8)).astype(np.int32)
        pixels[0, 0] += 10**6 * (i == 0)
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "ab"[i % 2] / f"{i}.tif")
    task = create_task("images", data=tmp_path, size=8, patch=1, channels=1, held_out=0.25)
    values = task.training_batch(0, 0, len(task._training)).inputs.double()
    assert float(values.std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_values_that_are_no_numbers_are_refused(folder):
    Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)).save(folder / "cat" / "deep.tif")
    with pytest.raises(Unsupported, match=r"deep.tif, which cannot be read as an image \(it holds values that are no"):
        create_task("images", data=folder)


def test_repeated_images_count_once_and_cannot_leak(folder):
    (folder / "dog" / "copy.png").write_bytes((folder / "dog" / "1.png").read_bytes())
    task = create_task("images", data=folder)
    assert "1 exact repetitions left out" in task.describe()
    assert len(task._training) + len(task._held_out) == 30


def test_validation_folder_is_what_is_held_out(folder, tmp_path):
    for i in range(6):
        photo(tmp_path / "valid" / ("cat", "dog", "newt")[i % 3] / f"{i}.png", 50 + i)
    (tmp_path / "valid" / "cat" / "shared.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    task = create_task("images", data=folder, validation=tmp_path / "valid")
    held_out = rows(task.evaluation_batches(64))
    training = rows([task.training_batch(0, 0, 29)])
    assert len(held_out) == 7
    assert "1 images of the held-out data are also in the training data: not trained on" in task.describe()
    assert len(set(training)) == 29
    assert not set(held_out) & set(training)
    photo(tmp_path / "valid" / "toad" / "x.png", 7)
    with pytest.raises(Unsupported, match=r"classes differ.*toad"):
        create_task("images", data=folder, validation=tmp_path / "valid")


def write_idx(path, array, compress):
    raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(raw))
    else:
        path.write_bytes(raw)


@pytest.fixture
def idx(tmp_path):
    generator = np.random.default_rng(5)
    for prefix, count, compress in (("train", 40, True), ("t10k", 20, False)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", pixels, compress)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8), compress)
    return tmp_path


def test_idx_files_keep_their_own_split(idx):
    task = check_task(create_task("images", data=idx, evaluation_items=10))
    assert (task.length, task.features, task.grid) == (49, 16, (7, 7))
    assert len(task._training) == 40
    labels = torch.cat([batch.targets for batch in task.evaluation_batches(4)])
    assert sorted(labels.tolist()) == list(range(10)), "a capped evaluation is balanced"


def test_fashion_mnist_is_read_where_debian_puts_it(idx, monkeypatch):
    monkeypatch.setattr(module, "DEBIAN_DATASETS", idx.parent / "nowhere")
    with pytest.raises(Unsupported, match="try apt install dataset-fashion-mnist"):
        create_task("images", data="fashion-mnist")
    target = idx.parent / "datasets"
    target.mkdir()
    idx.rename(target / "fashion-mnist")
    monkeypatch.setattr(module, "DEBIAN_DATASETS", target)
    assert "Fashion-MNIST" in create_task("images", data="fashion-mnist").describe()
    idx.mkdir()


def test_a_cut_idx_file_is_refused_by_name(idx):
    path = idx / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Unsupported, match="t10k-images-idx3-ubyte, which is not a whole IDX file"):
        create_task("images", data=idx)


def test_idx_files_that_hold_nothing_or_too_much_are_refused_by_name(idx, monkeypatch):
    path = idx / "t10k-images-idx3-ubyte"
    whole = path.read_bytes()
    for head, told in (((0, 28, 28), "sizes 0 x 28 x 28"), ((1 << 30, 28, 28), "sizes 1073741824 x 28 x 28")):
        path.write_bytes(whole[:4] + np.array(head, dtype=">u4").tobytes())
        with pytest.raises(Unsupported, match=f"t10k-images-idx3-ubyte, which cannot be read .{told}"):
            create_task("images", data=idx)
    path.write_bytes(whole)
    packed = idx / "train-images-idx3-ubyte.gz"
    whole = packed.read_bytes()
    packed.write_bytes(whole[:40] + bytes(255 - b for b in whole[40:80]) + whole[80:])
    with pytest.raises(Unsupported, match=r"train-images-idx3-ubyte\.gz, which cannot be read"):
        create_task("images", data=idx)
    packed.write_bytes(gzip.compress(gzip.decompress(whole) + bytes(10**7)))
    reads = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, size=-1: reads.append(size) or read(file, size))
    with pytest.raises(Unsupported, match="not a whole IDX file"):
        create_task("images", data=idx)
    assert max(reads) == 40 * 28 * 28 + 1 and min(reads) > 0, "no more is unpacked than the file should hold"


@pytest.mark.parametrize(("package", "options"), [("sklearn", {}), ("PIL", {"data": "pets"})])
def test_a_missing_extra_is_named(folder, monkeypatch, package, options):
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(Unsupported, match=r"try pip install 'regard\[data\]'"):
        create_task("images", **options)


def broken(folder):
    path = folder / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    return folder


def single(folder):
    photo(folder / "eel" / "1.png", 99)
    return folder


def twins(folder):
    first = photo(folder / "eel" / "1.png", 99)
    (folder / "eel" / "2.png").write_bytes(first.read_bytes())
    return folder


def without_images(folder):
    (folder / "eel").mkdir()
    (folder / "eel" / "a.txt").write_text("x")
    return folder


def linked(folder):
    outside = folder.parent / "outside"
    photo(outside / "1.png", 99)
    (folder / "eel").symlink_to(outside)
    return folder


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (broken, "0.png, which cannot be read as an image"),
        (single, "eel with 1 image"),
        (twins, "eel with 1 different images"),
        (without_images, "eel, which holds no image"),
        (linked, "eel, a link that leads out of"),
        (lambda f: f / "cat", "with 0 sub-folders"),
        (lambda f: f.parent / "pet", "pets"),
        (lambda f: f / "cat" / "0.png", "is not a folder"),
        (lambda f: "digit", "try digits"),
        (lambda f: [f], "sub-folder a class"),
    ],
)
def test_unusable_folders_are_refused_with_what_is_wrong(folder, make, told):
    with pytest.raises(Unsupported) as error:
        create_task("images", data=make(folder))
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"patch": 3}, "supported: 1, 2, 4, 8; try patch=2"),
        ({"patch": "x"}, "supported: 1, 2, 4, 8"),
        ({"size": 16}, "digits, which comes as it is"),
        ({"validation": "digits"}, "digits, which comes as it is"),
        ({"held_out": 0}, "from 0.01 to 0.5"),
        ({"pach": 2}, "try patch"),
    ],
)
def test_nonsense_options_are_refused(options, told):
    with pytest.raises(Unsupported) as error:
        create_task("images", **options)
    assert told in str(error.value)


@pytest.mark.parametrize(("options", "told"), [({"size": 2}, "try size=4"), ({"channels": 2}, "3 (colour) or 1")])
def test_nonsense_options_of_a_folder_are_refused(folder, options, told):
    with pytest.raises(Unsupported) as error:
        create_task("images", data=folder, **options)
    assert told in str(error.value)
