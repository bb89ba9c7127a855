"""Segmentation of volumes: windows, crops, synthetic scenes, folders of NIfTI files and heads, and error messages."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from task_data import items, refused, save_scan, scans
from torch import nn

from regard.contract import Result
from regard.core.patches import cut, joined
from regard.models.segmentation_model import SegmentationModel, SegmentationModelConfig
from regard.tasks import check_task, create_task
from regard.tasks.protocol import IGNORED
from regard.tasks.segmentation import heads
from regard.tasks.segmentation_3d.blocks import read_blocks
from regard.tasks.segmentation_3d.reader import VolumeReader, resampled
from regard.tasks.segmentation_3d.scenes import SCENES
from regard.tasks.segmentation_3d.windows import in_windows, starts
from regard.training import evaluate


def task(data, **options):
    return create_task("segmentation_3d", **({"size": 8, "evaluation_items": 6} | options), data=data)


def whole(task, tokens):
    """The volumes of a training batch."""
    return joined(tokens, task.grid, task.patch)[:, 0].numpy()


def test_windows_cover_an_axis_evenly_and_overlap():
    for side, window, overlap in itertools.product((4, 5, 9, 17), (1, 3, 4), (0.0, 0.5, 0.9)):
        found = starts(side, window, overlap)
        assert found[0] == 0 and found[-1] == side - window and found == sorted(set(found))
        assert max(np.diff(found), default=0) <= max(1, window * (1 - overlap))
    assert starts(12, 4, 0.0) == [0, 4, 8] and starts(12, 4, 0.5) == [0, 2, 4, 6, 8]


def test_a_volume_is_the_weighted_mean_of_its_windows():
    """Computed voxel by voxel for a model that sees its whole window; for one that sees single voxels it is its output."""
    grid, window, patch = (3, 2, 4), (2, 2, 2), 2
    inputs = torch.randn(2, 24, 8, dtype=torch.float64)

    def alone(tokens):
        return torch.stack([tokens, -3 * tokens, tokens**2], -1).flatten(2)

    assert torch.allclose(in_windows(alone, inputs, grid, window, patch, 0.5), alone(inputs), atol=1e-12)

    def mixing(tokens):
        return alone(tokens * tokens.mean((1, 2), keepdim=True))

    volume, sides = joined(inputs, grid, patch)[:, 0], (6, 4, 8)
    total, weight = torch.zeros(2, 3, *sides, dtype=torch.float64), torch.zeros(sides, dtype=torch.float64)
    fall = torch.exp(-0.5 * ((torch.arange(4, dtype=torch.float64) - 1.5) / (4 / 8)) ** 2)
    weights = fall[:, None, None] * fall[:, None] * fall
    for x, y, z in itertools.product((0, 2), (0,), (0, 2, 4)):
        part = volume[:, x : x + 4, y : y + 4, z : z + 4]
        output = joined(mixing(cut(part[:, None], patch)), window, patch)
        total[:, :, x : x + 4, y : y + 4, z : z + 4] += weights * output
        weight[x : x + 4, y : y + 4, z : z + 4] += weights
    found = joined(in_windows(mixing, inputs, grid, window, patch, 0.5), grid, patch)
    assert torch.allclose(found, total / weight, atol=1e-12)


@pytest.mark.parametrize("data", SCENES)
def test_scenes_have_the_masks_they_were_drawn_with(data):
    one = check_task(task(data, size=16, patch=4))
    held, training = items(one.evaluation_batches(5)), items([one.training_batch(0, 0, 20)])
    assert len(set(held)) == 6 and len(set(training)) == 20 and not set(held) & set(training)
    batch = one.training_batch(3, 0, 40)
    assert batch.grid == (4, 4, 4) and batch.inputs.shape == (40, 64, 64)
    volumes, masks = whole(one, batch.inputs), whole(one, batch.targets)
    assert set(np.unique(masks)) == set(range(one.num_classes))
    for volume, mask in zip(volumes, masks, strict=True):
        kinds = set(np.unique(mask)) - {0}
        if data == "bodies" or not kinds:
            continue
        (kind,) = kinds
        assert not mask[:2].any() and not mask[:, -2:].any() and not mask[..., :2].any(), "what decides is far away"
        corners = [volume[x, y, z].mean() for x, y, z in itertools.product((slice(2), slice(-2, None)), repeat=3)]
        seen = max(corners, key=abs) if data == "far-cue" else volume[mask > 0].mean()
        assert (seen > 0) == (kind == 2)


class BySign(nn.Module):
    """Predicts class 1 for voxels above 0, and accepts only inputs of the task's window."""

    def __init__(self, length):
        super().__init__()
        self.length, self.unused = length, nn.Parameter(torch.zeros(1))

    def forward(self, inputs, *, context):
        assert inputs.shape[1] == self.length == np.prod(context.grid)
        return Result(5.0 * nn.functional.one_hot((inputs > 0).long(), 2).float().flatten(2))


def test_whole_volumes_are_scored_once_each_whatever_their_sides(tmp_path):
    """Sides are not multiples of a token, and the padding counts nowhere."""
    one = task(scans(tmp_path, sides=[(8, 9, 11), (13, 8, 10), (12, 12, 9), (10, 10, 10)], count=12), held_out=0.5)
    batches = list(one.evaluation_batches(64))
    assert [batch.size for batch in batches] == [1] * 6
    voxels = {tuple(batch.grid): int((batch.targets != IGNORED).sum()) for batch in batches}
    assert all(voxels[grid] in (8 * 9 * 11, 13 * 8 * 10, 12 * 12 * 9, 10**3) for grid in voxels)
    found = evaluate(BySign(one.length), one, 3)
    assert found.items == [(1.0, 1.0)] * 6 and set(found.figures) == {"mean Dice", "mean IoU"}
    assert evaluate(BySign(one.length), one, 3, first=2, last=5).items == [(1.0, 1.0)] * 3
    assert one.baseline.score > 0.9, "shades tell the classes"
    assert "held out: 6 volumes, 6 of them scored whole" in one.describe()


def test_crops_are_parts_of_volumes_and_every_third_is_around_a_class(tmp_path):
    """Volumes have a single voxel of the class, which few crops would contain by chance."""
    for i in range(4):
        voxels, mask = np.random.default_rng().normal(size=(40, 30, 50)), np.zeros((40, 30, 50), np.uint8)
        mask[tuple(np.random.default_rng().integers(0, mask.shape))] = 7
        voxels[mask > 0] = 30
        save_scan(tmp_path / "images" / f"{i}.nii.gz", voxels)
        save_scan(tmp_path / "masks" / f"{i}.nii.gz", mask)
    one = task(tmp_path)
    volumes, masks = [], []
    for step in range(40):
        batch = one.training_batch(step, 0, 6)
        volumes.append(whole(one, batch.inputs))
        masks.append(whole(one, batch.targets))
    volumes, masks = np.concatenate(volumes), np.concatenate(masks)
    assert np.array_equal(volumes > 10, masks == 1)
    assert 0.2 < (masks == 1).any((1, 2, 3)).mean() < 0.5
    corners = {volume[0, 0, 0] for volume in volumes}
    assert len(corners) > 100


def test_axes_are_turned_to_one_order_and_spacings_to_one(tmp_path):
    """A head stored in two ways gives the same input."""
    sides = (9, 12, 10)
    voxels, mask = np.random.default_rng(1).normal(size=sides), np.random.default_rng(2).integers(0, 3, sides)
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    turned = np.zeros((4, 4))
    turned[2, 0], turned[0, 1], turned[1, 2], turned[3, 3] = -4.0, 2.0, 3.0, 1.0
    turned[2, 3] = 4.0 * (sides[2] - 1)
    for name, of, how in (("plain", affine, lambda x: x), ("turned", turned, lambda x: x.transpose(2, 0, 1)[::-1])):
        save_scan(tmp_path / name / "images" / "a.nii", how(voxels), of)
        save_scan(tmp_path / name / "masks" / "a.nii", how(mask).astype(np.uint8), of)
        save_scan(tmp_path / name / "images" / "b.nii", how(-voxels), of)
        save_scan(tmp_path / name / "masks" / "b.nii", how(mask).astype(np.uint8), of)
    plain, other = (task(tmp_path / name) for name in ("plain", "turned"))
    assert items(plain.evaluation_batches(1)) == items(other.evaluation_batches(1))
    assert "voxels of 2 to 4 mm" not in plain.describe()
    (batch,) = task(tmp_path / "plain", spacing=2.0, patch=4).evaluation_batches(1)
    assert batch.grid == (3, 5, 5)  # 9 x 18 x 20 voxels of 2 mm
    assert int((batch.targets != IGNORED).sum()) == 9 * 18 * 20


def test_a_folder_is_listed_and_split_by_volume(tmp_path):
    folder = scans(tmp_path / "a", count=5, values=(0, 3, 255, 9))
    (folder / "images" / "copy.nii.gz").write_bytes((folder / "images" / "1.nii.gz").read_bytes())
    (folder / "masks" / "copy.nii.gz").write_bytes((folder / "masks" / "1.nii.gz").read_bytes())
    one = check_task(task(folder, held_out=0.4))
    told = one.describe()
    assert "1 exact repetition left out" in told and "crops of 3 volumes; held out: 2 volumes" in told
    assert one.reader.values == (0, 3, 9) and "ignored: " in told
    assert task(folder, ignore=None).reader.values == (0, 3, 9, 255)
    assert task(folder, classes=1).num_classes == 2
    (folder / "classes.txt").write_text("0 nothing\n3 left lung\n9 heart\n255 other\n")
    assert task(folder).reader.classes == ("nothing", "left lung", "heart", "other")
    other = task(folder, validation=scans(tmp_path / "b", count=2, seed=50, values=(0, 3, 255, 9)))
    assert len(items(other.evaluation_batches(5))) == 2 and "as the data set comes" in other.describe()
    by_data = task(folder, normalise="data").reader.scale
    assert by_data is not None and by_data[0][0] < by_data[0][2] < by_data[0][1]


def test_volumes_without_a_labelled_voxel_are_neither_trained_on_nor_scored(tmp_path):
    folder = scans(tmp_path, count=6, values=(0, 3, 9))
    for i in (0, 3):
        save_scan(folder / "masks" / f"{i}.nii.gz", np.full((10, 10, 10), 255, np.uint8))
    one = task(folder, held_out=0.5)
    held = list(one.evaluation_batches(1))
    assert all((batch.targets != IGNORED).any() for batch in held) and len(one.baseline.items) == len(held)
    told = one.describe()
    assert "note: 2 of 6 volumes without a labelled voxel left out" in told
    assert f"crops of {4 - len(held)} volume" in told and f"held out: {len(held)} volume" in told
    held[0].targets[:] = IGNORED
    sums, weights = one.score(torch.randn(1, len(held[0].inputs[0]), one.num_targets * one.num_classes), held[0])
    assert sums.tolist() == weights.tolist() == [0]


def broken(folder, name):
    """Damage a folder in the way called `name`."""
    image, mask = folder / "images" / "1.nii.gz", folder / "masks" / "1.nii.gz"
    sides = (10, 10, 10)
    if name == "missing":
        mask.unlink()
    elif name == "shape":
        save_scan(mask, np.zeros((10, 10, 12), np.uint8))
    elif name == "affine":
        save_scan(mask, np.zeros(sides, np.uint8), np.diag([1.0, 1.0, 2.0, 1.0]))
    elif name == "unknown":
        (folder / "classes.txt").write_text("0 nothing\n4 thing\n")
    elif name == "fractions":
        save_scan(mask, np.full(sides, 0.5, np.float32))
    elif name == "slice":
        save_scan(image, np.zeros((10, 10), np.float32))
    elif name == "thin":
        save_scan(image, np.zeros((10, 10, 1), np.float32))
    elif name == "several":
        save_scan(image, np.zeros((10, 10, 10, 17), np.float32))
    elif name == "others":
        save_scan(image, np.zeros((10, 10, 10, 3), np.float32))
    elif name == "nan":
        values = np.zeros(sides, np.float32)
        values[0, 0, :2] = np.nan, np.inf
        save_scan(image, values)
    elif name == "small":
        for path in (image, mask):
            save_scan(path, np.zeros((10, 7, 10), np.uint8))
    elif name == "corrupt":
        image.write_bytes(image.read_bytes()[:300])
    elif name == "pictures":
        for path in (folder / "images").iterdir():
            path.rename(path.with_name(path.name.replace(".nii.gz", ".png")))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("missing", "1.nii.gz without a mask; supported: a file of the same name in masks: .nii .nii.gz; try"),
        ("shape", "masks/1.nii.gz of 10 x 10 x 12 voxels, the mask of a volume of 10 x 10 x 10"),
        ("affine", "masks/1.nii.gz, which lies 9 mm away from its volume 1.nii.gz (another affine)"),
        ("unknown", "with the unknown class 1, which classes.txt does not name"),
        ("fractions", "values that are no classes, such as 0.5"),
        ("slice", "images/1.nii.gz, a single slice of 10 x 10 voxels"),
        ("thin", "a single slice of 10 x 10 x 1 voxels; supported: volumes of three axes; try --task segmentation"),
        ("several", "1.nii.gz of 10 x 10 x 10 x 17 voxels; supported: one volume per file"),
        ("others", "1.nii.gz of 3 channels; supported: volumes of 1 channel, as 0.nii.gz has"),
        ("nan", "with 2 voxels that are no finite numbers"),
        ("small", "of 10 x 7 x 10 voxels, smaller than crops of 8 x 8 x 8; supported: volumes as large as a crop"),
        ("corrupt", "images/1.nii.gz, which cannot be read"),
        ("pictures", "which holds no volume; supported: files ending in .nii .nii.gz; try --task segmentation"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_a_line(tmp_path, name, told):
    folder = scans(tmp_path)
    broken(folder, name)
    refused(lambda: task(folder), told)


def test_channels_of_a_fourth_axis_are_each_normalised_and_reach_the_model_as_they_lie_in_the_file(tmp_path):
    scans(tmp_path, count=5)
    for path in sorted((tmp_path / "images").iterdir()):
        scale = np.array([1.0, 50.0, -3.0])
        save_scan(path, np.random.default_rng(int(path.name[0])).normal(size=(10, 10, 10, 3)) * scale + 7 * scale)
    one = check_task(task(tmp_path, patch=4))
    assert one.features == 64 * 3 and "3 channels" in one.describe()
    config = SegmentationModelConfig.for_task(one, "unet_nano_3d", {"widths": (4, 8)})
    assert (config.channels, config.patch) == (3, 4)
    assert SegmentationModelConfig.for_task(task(tmp_path, patch=2), "unet_nano_3d", {"widths": (4, 8)}).channels == 3
    images = SegmentationModel(config).images(one.training_batch(0, 0, 3).inputs)
    assert images.shape == (3, 3, 8, 8, 8)

    path = tmp_path / "images" / "2.nii.gz"
    inputs, grid, sides, scan = one.reader.read(path)
    whole_volume = joined(inputs, grid, 4)[0, :, :10, :10, :10].numpy()
    assert sides == (10, 10, 10) and abs(whole_volume.mean((1, 2, 3))).max() < 1e-5
    for channel in range(3):
        own = scan.voxels[..., channel]
        assert np.allclose(whole_volume[channel], (own - own.mean()) / own.std(), atol=1e-4)
        alone = resampled(own[..., None], (1.0,) * 3, 0.7)
        assert np.array_equal(resampled(scan.voxels, (1.0,) * 3, 0.7)[..., channel], alone[..., 0])
    (low, high, mean, _), *_ = by_data = task(tmp_path, normalise="data").reader.scale
    assert len(by_data) == 3 and low < mean < high and by_data[1][2] > 100 > 0 > by_data[2][2]
    other = save_scan(tmp_path / "other.nii.gz", np.zeros((10, 10, 10)))
    refused(lambda: one.reader.read(other), "of 1 channel; supported: volumes of 3 channels, as the model was trained")
    kept = VolumeReader(
        size=(8,) * 3,
        patch=4,
        spacing=None,
        overlap=0.5,
        scale=None,
        classes=("a", "b"),
        values=(0, 1),
        colours=((0, 0, 0),) * 2,
        background=0,
    )
    old = kept.as_record() | {"scale": [0.0, 2.0, 1.0, 0.5]}
    del old["channels"]
    assert VolumeReader.of_record(old).normalised(np.full((8, 8, 8, 1), 1.5)).max() == 1.0


def test_volumes_that_cannot_be_read_are_left_out_where_that_is_asked(tmp_path):
    scans(tmp_path, count=5)
    (tmp_path / "images" / "1.nii.gz").write_bytes(b"no volume")
    refused(lambda: task(tmp_path), "1.nii.gz, which cannot be read", "--skip-unreadable")
    one = task(tmp_path, skip_unreadable=True)
    assert "left out: images/1.nii.gz" in one.describe() and "crops of 3 volumes; held out: 1 volume" in one.describe()
    save_scan(tmp_path / "masks" / "2.nii.gz", np.zeros((9, 10, 10), np.uint8))
    told = task(tmp_path, skip_unreadable=True).describe()
    assert (
        "left out: masks/2.nii.gz of 9 x 10 x 10 voxels, the mask of a volume of" in told and "crops of 2 vol" in told
    )


def test_without_nibabel_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    folder = scans(tmp_path)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    refused(lambda: task(folder), "without the package nibabel", "pip install 'regard[medical]'")


def test_options_that_mean_nothing_are_refused(tmp_path):
    refused(lambda: task("body"), "try bodies")
    refused(lambda: task("bodies", spacing=2), "spacing=2 for bodies, which comes as it is")
    refused(lambda: task("far-cue", classes=1), "classes=1 for far-cue")
    refused(lambda: task("bodies", size=4), "try size=8")
    refused(lambda: task("bodies", size=[8, 8]), "one number, or three")
    refused(lambda: task("bodies", size=[8, 8, 16], patch=3), "patch=3 for images of 8x8x16; supported: 1, 2, 4, 8")
    refused(lambda: task("bodies", normalise="file"), "volume, data")
    refused(lambda: task("bodies", overlap=1), "0.0 to 0.9")
    refused(lambda: task(tmp_path), "without a folder images and masks")
    folder = scans(tmp_path / "a")
    refused(lambda: create_task("segmentation", data=folder), "try --task segmentation_3d")
    refused(lambda: task(folder, background=8), "background=8, a value of no class")


def test_blocks_of_a_head_are_held_out_across_its_whole_width(monkeypatch):
    """A head's halves look alike, so no cut separates them, and no two blocks are near each other."""
    sides = (16, 36, 44)
    places, classes = np.arange(np.prod(sides)).reshape(sides), np.ones(sides, np.int64)
    made = places, classes, ("background", "head"), "a head"
    monkeypatch.setattr("regard.tasks.segmentation_3d.blocks.read_head", lambda data: made)
    volumes = read_blocks("mni152", (8, 8, 8), None, 0.2, 0)
    assert {v.shape for v in volumes.voxels} == {(16, 8, 8, 1)} and len(volumes.voxels) == 3 * 4
    corners = np.array([np.unravel_index(int(v[0, 0, 0, 0]), sides)[1:] for v in volumes.voxels])
    for one_corner, other in itertools.combinations(corners, 2):
        assert abs(one_corner - other).max() >= 8 + heads.GAP
    training, held_out, _ = volumes.split
    assert len(held_out) == 2 and not set(held_out) & set(training)
    assert "one head: other heads are not held out" in check_task(task("mni152")).describe()
    refused(lambda: task("mni152", size=[32, 8, 8]), "in crops of 32 x 8 x 8")
    refused(lambda: task("mni152", size=[16, 32, 40]), "crops of which two lie behind or above each other")


def test_more_volumes_than_the_memory_holds_are_refused(tmp_path, monkeypatch):
    folder = scans(tmp_path)
    monkeypatch.setattr("regard.tasks.segmentation_3d.reader.machine_memory", lambda: 11 * 6000)
    refused(lambda: task(folder), "which are held in memory", "a larger spacing")
    assert task(folder, spacing=1.2).num_classes == 2
