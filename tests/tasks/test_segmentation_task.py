"""Segmentation: scores and loss by their definitions, synthetic scenes, folders of masks and heads, and error messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from task_data import items, masked, refused

from regard.tasks import check_task, create_task
from regard.tasks.image_files import read_image
from regard.tasks.protocol import IGNORED, Batch
from regard.tasks.segmentation import heads
from regard.tasks.segmentation.scenes import SCENES
from regard.tasks.segmentation.scores import dice_and_cross_entropy, overlap_by_image

Image = pytest.importorskip("PIL.Image")


def task(data, **options):
    return create_task("segmentation", **({"size": 16, "evaluation_items": 12} | options), data=data)


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(pixels) if mode is None else Image.fromarray(pixels).convert(mode)).save(path)


@pytest.mark.parametrize("measure", ["dice", "iou"])
@pytest.mark.parametrize("background", [0, None])
def test_overlap_is_the_mean_over_the_classes_of_truth_or_prediction(measure, background):
    """Compared with explicit sets of pixels, which leave out ignored pixels."""
    predicted, targets = torch.randint(4, (20, 12)), torch.randint(4, (20, 12))
    targets[torch.rand(20, 12) < 0.3] = IGNORED
    predicted[0], targets[0] = 0, 0  # neither present nor predicted
    targets[1] = IGNORED
    found, weights = overlap_by_image(predicted, targets, 6, background, measure)
    assert found[1] == 0 and weights.tolist() == [float(row != 1) for row in range(20)]
    for row, value in enumerate(found.tolist()):
        sets = [
            {i for i in range(12) if targets[row, i] != IGNORED and x[row, i] == c}
            for x in (predicted, targets)
            for c in range(6)
        ]
        scores = []
        for c in range(6):
            one, other = sets[c], sets[6 + c]
            if c != background and one | other:
                both = len(one & other)
                scores.append(2 * both / (len(one) + len(other)) if measure == "dice" else both / len(one | other))
        if row != 1:
            assert value == pytest.approx(np.mean(scores) if scores else 1.0, abs=1e-12)


def test_the_loss_is_cross_entropy_and_dice_of_the_classes_that_are_there():
    logits, targets = torch.randn(3, 5, 4 * 6, dtype=torch.float64), torch.randint(4, (3, 5, 4))
    targets[0, 2:] = IGNORED
    targets[1] = IGNORED
    sums, weights = dice_and_cross_entropy(logits, Batch(torch.zeros(3, 5, 1), targets))
    assert weights.tolist() == [1, 0, 1] and sums[1] == 0
    for row in (0, 2):
        seen = targets[row].flatten() != IGNORED
        z, t = logits[row].view(20, 6)[seen], targets[row].flatten()[seen]
        p = z.softmax(-1)
        dice = [2 * p[t == c, c].sum() / (p[:, c].square().sum() + (t == c).sum()) for c in t.unique()]
        expected = torch.nn.functional.cross_entropy(z, t) + 1 - torch.stack(dice).mean()
        assert float(sums[row]) == pytest.approx(float(expected), rel=1e-4)
    right = 80.0 * torch.nn.functional.one_hot(targets.clamp(min=0), 6).double().flatten(2)
    assert dice_and_cross_entropy(right, Batch(torch.zeros(3, 5, 1), targets))[0].abs().max() < 1e-9
    refused(lambda: dice_and_cross_entropy(logits[:, :4], Batch(torch.zeros(3, 5, 1), targets)), "4 * classes")


@pytest.mark.parametrize("own_split", [False, True])
def test_images_without_a_labelled_pixel_are_neither_trained_on_nor_scored(tmp_path, own_split):
    """They are left out and told; a batch that has one gives it no weight, as the loss does."""
    masked(tmp_path / "a", count=15)
    masked(tmp_path / "b", count=15, seed=15)
    for i in range(0, 15, 3):
        for folder in ("a", "b"):
            save(tmp_path / folder / "masks" / f"{i}.png", np.full((16, 24), 255, np.uint8))
    one = task(tmp_path / "a", held_out=0.5, **({"validation": tmp_path / "b"} if own_split else {}))
    held = list(one.evaluation_batches(4))
    assert all((batch.targets != IGNORED).flatten(1).any(1).all() for batch in [*held, one.training_batch(0, 0, 30)])
    assert len(one.baseline.items) == sum(batch.size for batch in held) <= 10 and (one.baseline.items[:, 1] == 1).all()
    told = "10 of 30 images" if own_split else "5 of 15 images"
    assert f"note: {told} without a labelled pixel left out" in one.describe()
    held[0].targets[0] = IGNORED
    output = torch.randn(4, one.length, one.num_targets * one.num_classes)
    for sums, weights in (one.score(output, held[0]), *one.figures(output, held[0]).values()):
        assert weights.tolist() == one.loss(output, held[0])[1].tolist() == [0, 1, 1, 1] and sums[0] == 0
    for path in (tmp_path / "b" / "masks").iterdir():
        save(path, np.full((16, 24), 255, np.uint8))
    refused(lambda: task(tmp_path / "a", validation=tmp_path / "b"), "held-out images have no labelled pixel")


@pytest.mark.parametrize("size", [32, [32, 48], [64, 32]])
@pytest.mark.parametrize("data", SCENES)
def test_scenes_have_the_masks_they_were_drawn_with(data, size):
    one = check_task(task(data, size=size))
    height, width = (size, size) if size == 32 else size
    held, training = items(one.evaluation_batches(5)), items([one.training_batch(0, 0, 30)])
    assert len(set(held)) == 12 and not set(held) & set(training)
    batch = one.training_batch(3, 0, 40)
    pixels, masks = one.reader.pixels(batch.inputs), one.whole(batch.targets)
    assert pixels.shape[:3] == masks.shape == (40, height, width)
    assert set(np.unique(masks)) == set(range(one.num_classes))
    if data == "shapes":
        return
    for image, mask in zip(pixels[..., 0].astype(float), masks, strict=True):
        if data == "own-corner":
            assert not mask[:8].any() and not mask[-8:].any() and not mask[:, :8].any() and not mask[:, -8:].any()
            for half in (slice(0, height // 2), slice(height // 2, height)):
                for other in (slice(0, width // 2), slice(width // 2, width)):
                    corner = image[half, other][0 if half.start == 0 else -1, 0 if other.start == 0 else -1]
                    assert set(np.unique(mask[half, other])) <= {0, 2 if corner > 128 else 1}
            continue
        (kind,) = set(np.unique(mask)) - {0}
        corners = [image[a, b].mean() for a in (slice(0, 3), slice(-3, None)) for b in (slice(0, 3), slice(-3, None))]
        border = np.ones_like(mask, dtype=bool)
        border[8:-8, 8:-8] = False
        assert not mask[border].any(), "what decides is far away"
        if data == "far-cue":
            assert (max(corners) > 230) == (kind == 2) and (min(corners) < 25) == (kind == 1)
            assert image[mask > 0].mean() > 150
        else:
            assert (image[mask > 0].mean() > 128) == (kind == 2)


def test_the_pixels_of_a_patch_lie_in_inputs_targets_and_baseline_alike(tmp_path):
    """An image equal to its mask stays so patch by patch; the baseline is each place's most frequent class."""
    for i in range(8):
        mask = np.random.default_rng().integers(0, 3, (16, 16), np.uint8)
        mask[:, 0] = 2
        save(tmp_path / "images" / f"{i}.png", 100 * mask)
        save(tmp_path / "masks" / f"{i}.png", mask)
    one = check_task(task(tmp_path, channels=1, patch=4, held_out=0.25))
    for batch in [one.training_batch(0, 0, 6), *one.evaluation_batches(1)]:
        assert np.array_equal(one.reader.pixels(batch.inputs)[..., 0], 100 * one.whole(batch.targets))
        assert torch.equal(one.reader.patches(one.reader.pixels(batch.inputs)), batch.inputs)
        right = torch.nn.functional.one_hot(batch.targets, 3).float().flatten(2)
        assert one.score(right, batch)[0].tolist() == [1.0] * batch.size
        assert {name: sums.tolist() for name, (sums, _) in one.figures(right, batch).items()} == {
            "mean Dice": [1.0] * batch.size,
            "mean IoU": [1.0] * batch.size,
        }
    whole = one.whole(one.training_batch(0, 0, 6).targets)
    places = np.stack([(whole == c).sum(0) for c in range(3)]).argmax(0)
    for (value, weight), batch in zip(one.baseline.items, one.evaluation_batches(1), strict=True):
        given = torch.nn.functional.one_hot(torch.from_numpy(places), 3).float()
        cut = given.view(4, 4, 4, 4, 3).permute(0, 2, 1, 3, 4).reshape(1, 16, 48)
        assert weight == 1 and value == pytest.approx(float(one.score(cut, batch)[0]), abs=1e-12)


def test_images_and_masks_may_be_of_other_sides_than_square(tmp_path):
    one = check_task(task(masked(tmp_path), size=[16, 36], patch=4, augment="standard", held_out=0.25))
    assert one.grid == (4, 9) and "16x36 pixels" in one.describe()
    plain = task(tmp_path, size=[16, 36], patch=4, held_out=0.25)
    expected = {
        np.asarray(Image.open(path).resize((36, 16), Image.Resampling.NEAREST)).tobytes()
        for path in (tmp_path / "masks").iterdir()
    }
    batches = [plain.training_batch(0, 0, 9), *plain.evaluation_batches(2)]
    assert {mask.astype(np.uint8).tobytes() for batch in batches for mask in plain.whole(batch.targets)} == expected
    pixels = plain.reader.pixels(plain.reader.read([tmp_path / "images" / "0.png"]))
    np.testing.assert_array_equal(pixels[0], read_image(tmp_path / "images" / "0.png", (16, 36), 3, stretch=True)[0])
    refused(lambda: task(tmp_path, size=[16]), "one number, or two (height and width)")
    refused(lambda: task(tmp_path, size=[16, 8]), "size=8")


def test_a_folder_is_listed_counted_and_split_by_image(tmp_path):
    one = check_task(task(masked(tmp_path / "a"), held_out=0.25))
    held, training = items(one.evaluation_batches(5)), items([one.training_batch(0, 0, 9)])
    assert len(set(held)) == 3 and len(set(training)) == 9 and not set(held) & set(training)
    targets, told = one.training_batch(0, 0, 9).targets, one.describe()
    shares = [f"{(targets == c).double().mean():.1%}" for c in range(3)]
    assert f"0 {shares[0]} in 9 (not scored), 1 {shares[1]} in 9, 2 {shares[2]} in 9\n" in told
    assert "training: 9 images; held out: 3 images, 3 of them scored\n" in told
    assert one.reader.values == (0, 1, 2) and one.reader.background == 0
    again = task(tmp_path / "a", held_out=0.25, seed=3)
    assert items(again.evaluation_batches(5)) != held
    other = task(tmp_path / "a", validation=masked(tmp_path / "b", seed=50, count=4))
    assert len(items(other.evaluation_batches(5))) == 4 and "as the data set comes" in other.describe()


def test_names_palettes_ignored_pixels_and_the_background_are_what_a_folder_says(tmp_path):
    folder = masked(tmp_path, values=(1, 4, 255), palette=True)
    one = task(folder)
    assert one.reader.values == (1, 4) and one.reader.background is None  # 255 is ignored, 0 is not a class
    assert one.reader.colours == ((1, 101, 201), (4, 104, 204))
    assert "ignored: " in one.describe()
    assert (torch.cat([b.targets for b in one.evaluation_batches(4)]) == IGNORED).any()
    assert task(folder, ignore=None).reader.values == (1, 4, 255)
    assert task(folder, background=4).reader.background == 1
    (folder / "classes.txt").write_text("1 left lung\n4 heart\n7 spleen\n")
    named = task(folder)
    assert named.reader.classes == ("left lung", "heart", "spleen") and named.num_classes == 3
    three = masked(tmp_path / "three", values=(0, 1, 4))
    (three / "classes.txt").write_text("0 none\n1 lung\n4 unsure\n")
    sure = task(three, ignore=4)  # named, and ignored for all that
    assert sure.reader.classes == ("none", "lung")
    assert {int(label) for batch in sure.evaluation_batches(4) for label in batch.targets.unique()} == {0, 1, IGNORED}
    two = masked(tmp_path / "two", values=(0, 255))
    assert task(two).reader.values == (0, 255)  # with two values none is ignored


def test_the_largest_classes_alone(tmp_path):
    folder = masked(tmp_path, values=(0, 1, 2, 3), shares=(0.4, 0.1, 0.2, 0.3))
    one = task(folder, classes=2)
    assert one.reader.values == (0, 2, 3) and one.reader.classes == ("0", "2", "3")
    whole, few = (np.concatenate([t.whole(b.targets) for b in t.evaluation_batches(9)]) for t in (task(folder), one))
    assert np.array_equal(np.array([0, 0, 1, 2])[whole], few)
    masked(tmp_path / "b", values=(0, 1, 2, 3), shares=(0, 0.9, 0.1, 0), seed=20)
    assert task(folder, classes=2, validation=tmp_path / "b").reader.values == (0, 2, 3)  # held-out masks do not count
    refused(lambda: task(folder, classes=4), "1 to 3")
    refused(lambda: task(folder, classes=1, background=None), "no background")


def test_repeated_images_count_once(tmp_path):
    folder = masked(tmp_path)
    for i in range(3):
        for part in ("images", "masks"):
            (folder / part / f"copy{i}.png").write_bytes((folder / part / f"{i}.png").read_bytes())
    told = task(folder).describe()
    assert "3 exact repetitions left out" in told


def broken(folder, name):
    """Damage a folder in the way called `name`."""
    image, mask = folder / "images" / "1.png", folder / "masks" / "1.png"
    if name == "no masks":
        for path in (folder / "masks").iterdir():
            path.unlink()
        (folder / "masks").rmdir()
    elif name == "one missing":
        mask.unlink()
    elif name == "other size":
        save(mask, np.zeros((20, 16), np.uint8))
    elif name == "colours":
        save(mask, np.zeros((16, 24, 3), np.uint8))
    elif name == "many values":
        save(mask, np.arange(16 * 24, dtype=np.uint8).reshape(16, 24))
    elif name == "corrupt":
        image.write_bytes(image.read_bytes()[:90])
    elif name == "corrupt mask":
        mask.write_bytes(b"no picture")
    elif name == "empty":
        image.write_bytes(b"")
    elif name == "unknown":
        (folder / "classes.txt").write_text("0 nothing\n1 thing\n")
    elif name == "names":
        (folder / "classes.txt").write_text("0 nothing\nthing 1\n")
    elif name == "one class":
        for path in (folder / "masks").iterdir():
            save(path, np.zeros((16, 24), np.uint8))
    elif name == "twice":
        save(folder / "images" / "1.bmp", np.zeros((16, 24), np.uint8))
    elif name == "lossy":
        Image.open(mask).save(mask.with_suffix(".jpg"))
        mask.unlink()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no masks", "without a folder masks"),
        ("one missing", "images/1.png without a mask; supported: a file of the same name in masks"),
        ("other size", "masks/1.png of 16 x 20 pixels, the mask of an image of 24 x 16"),
        ("colours", "a mask of colours (mode RGB)"),
        ("many values", "up to 64 classes"),
        ("corrupt", "images/1.png, which cannot be read"),
        ("corrupt mask", "masks/1.png, which cannot be read as an image (it is of no known kind)"),
        ("empty", "images/1.png, which cannot be read as an image (it is empty)"),
        ("unknown", "with the unknown class 2, which classes.txt does not name"),
        ("names", "classes.txt, line 2: 'thing 1'"),
        ("one class", "masks with 1 class"),
        ("twice", "of one name"),
        ("lossy", "images/1.png without a mask"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, name, told):
    folder = masked(tmp_path)
    broken(folder, name)
    refused(lambda: task(folder), told)


def test_images_that_cannot_be_read_are_left_out_where_that_is_asked(tmp_path):
    masked(tmp_path / "a", count=6)
    for part in ("images/1", "masks/4"):
        (tmp_path / "a" / f"{part}.png").write_bytes(b"no image")
    refused(lambda: task(tmp_path / "a"), "which cannot be read", "--skip-unreadable")
    told = (one := task(tmp_path / "a", skip_unreadable=True)).describe()
    assert "left out: images/1.png" in told and "left out: masks/4.png" in told and "training: 3 images" in told
    assert len(items(one.evaluation_batches(5))) == 1
    save(tmp_path / "a" / "masks" / "2.png", np.zeros((9, 9), np.uint8))
    refused(lambda: task(tmp_path / "a"), "which cannot be read", "--skip-unreadable")
    told = task(tmp_path / "a", skip_unreadable=True).describe()
    assert "left out: masks/2.png of 9 x 9 pixels, the mask of an image of 24 x 16" in told and "training: 2 im" in told
    save(tmp_path / "a" / "masks" / "3.png", np.zeros((16, 24, 3), np.uint8))
    told = task(tmp_path / "a", skip_unreadable=True).describe()
    assert "left out: masks/3.png, a mask of colours (mode RGB)" in told and "training: 1 im" in told
    for path in (tmp_path / "a" / "images").iterdir():
        path.write_bytes(b"")
    refused(lambda: task(tmp_path / "a", skip_unreadable=True), "no image with its mask can be read")
    refused(lambda: task("shapes", skip_unreadable=True), "skip_unreadable=True for shapes")


def test_a_picture_turned_by_its_camera_has_a_mask_of_its_turned_size(tmp_path):
    folder = masked(tmp_path)
    for i in range(12):
        image = Image.open(folder / "images" / f"{i}.png")
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(folder / "images" / f"{i}.png", exif=exif)
    refused(lambda: task(folder), "the mask of an image of 16 x 24")
    for path in (folder / "masks").iterdir():
        Image.open(path).rotate(-90, expand=True).save(path)
    turned = task(folder)
    assert turned.num_classes == 3
    for path in (folder / "masks").iterdir():
        Image.open(path).rotate(90, expand=True).save(path, exif=exif)  # turned by the camera, too
    for one, other in zip(turned.evaluation_batches(4), task(folder).evaluation_batches(4), strict=True):
        assert torch.equal(one.targets, other.targets)


def test_masks_that_lost_their_values_are_told_from_none(tmp_path):
    folder = masked(tmp_path / "a")
    for path in sorted((folder / "masks").iterdir()):
        path.rename(path.with_suffix(".jpg"))
    refused(
        lambda: task(folder), "masks of files ending in .jpg, which do not keep the values", "masks drawn anew as .png"
    )


def test_options_that_mean_nothing_and_unknown_data_are_refused(tmp_path):
    refused(lambda: task("shape"), "try shapes")
    refused(lambda: task(tmp_path / "nothing"), "does not exist")
    refused(lambda: task(tmp_path), "without a folder images and masks", "try --task images")
    refused(lambda: task("far-cue", channels=3), "channels=3 for far-cue, which comes as it is")
    refused(lambda: task("shapes", classes=2), "classes=2 for shapes")
    refused(lambda: task("shapes", ignore=3), "ignore=3 for shapes")
    refused(lambda: task(masked(tmp_path / "a"), ignore=300), "0 to 255")
    refused(lambda: task(tmp_path / "a", background=9), "background=9, a value of no class")
    other = masked(tmp_path / "b", values=(0, 9), seed=70)
    refused(lambda: task(tmp_path / "a", validation=other), "unknown class 9, which no training mask has")
    refused(lambda: task("shapes", metric="iuo"), "try iou")
    refused(lambda: task("shapes", size=8), "try size=16")


def test_slabs_of_held_out_slices_touch_no_training_slice():
    for count, seed in ((145, 0), (60, 1), (37, 2)):
        training, held = heads.split_by_slabs(count, 0.2, seed)
        assert len(training) and len(held) and not set(training) & set(held)
        assert min(abs(a - b) for a in training for b in held) > heads.GAP


@pytest.fixture
def head(tmp_path):
    """A synthetic head in Colin27's file format: nested bright and dark boxes, the inner one a region with two halves."""
    nibabel = pytest.importorskip("nibabel", reason="writes and reads volumes")
    labels = np.zeros((20, 24, 60), np.uint8)
    labels[4:10, 6:18, 4:56], labels[10:16, 6:18, 4:56] = 1, 2
    image = (labels * 60 + np.random.default_rng().integers(0, 40, labels.shape)).astype(np.uint8)
    for name, values in (("ch2", image), ("aal", labels)):
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / f"{name}.nii.gz")
    (tmp_path / "aal.nii.txt").write_text("1 Lung_L 11\n2 Lung_R 12\n")
    return tmp_path


def test_a_head_is_read_in_slices_with_the_names_of_its_regions(head):
    one = check_task(task(head, size=24, patch=4))
    assert one.reader.classes == ("background", "Lung_L", "Lung_R") and one.features == 16
    batch = one.training_batch(0, 0, 20)
    pixels, masks = one.reader.pixels(batch.inputs)[..., 0].astype(float), one.whole(batch.targets)
    assert set(np.unique(masks)) == {0, 1, 2}
    assert pixels[masks == 2].mean() > pixels[masks == 1].mean() + 40 > pixels[masks == 0].mean() + 80
    assert "slabs of 12 slices" in one.describe() and one.baseline.score > 0.9
    wide = task(head, size=[24, 48], patch=4)._images.labels  # a border more on each side
    assert not wide[:, :, :12].any() and not wide[:, :, 36:].any()
    assert np.array_equal(wide[:, :, 12:36], one._images.labels)
    refused(lambda: task(head, channels=3), "which comes as it is")
    assert create_task("segmentation", **one.origin).describe() == one.describe()
    (head / "ch2.nii.gz").write_bytes(b"no volume")
    refused(lambda: task(head), "ch2.nii.gz, which cannot be read")


def test_heads_that_are_not_there_are_told_how_to_get(monkeypatch, tmp_path, packages):
    monkeypatch.setattr(heads, "MRICRON", tmp_path)
    refused(lambda: task("colin27"), "apt install mricron-data")
    packages.without("nilearn")
    refused(lambda: task("mni152"), "without the package nilearn", "pip install --no-deps nilearn")


def test_named_data_stay_names_and_paths_become_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert task("far-cue").origin["data"] == "far-cue"
    masked(tmp_path / "here")
    assert task("here").origin["data"] == str(tmp_path / "here")
