"""Volume segmentation: training, whole volumes and NIfTI masks from the command line, and comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import answer, run
from torch import Tensor, nn

from regard.contract import Context, Result
from regard.measurement.budget import Budget
from regard.tasks import create_task
from regard.workbench.comparison.compare import _input
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.comparison.task_models import build, square_grid
from regard.workbench.comparison.work import Work
from regard.workbench.reports import mask_pictures

nibabel = pytest.importorskip("nibabel", reason="writes and reads volumes")
AFFINE = np.array([[0, 2.0, 0, 30], [0, 0, 3, -8], [-2, 0, 0, 5], [0, 0, 0, 1]])
"""The affine of a scanner whose axes have neither the order nor the direction that models read."""


def scans(folder: Path, count: int = 6, seed: int = 0) -> Path:
    """Save volumes with a bright ball, which is class 7."""
    for i in range(count):
        draws = np.random.default_rng(seed + i)
        sides = tuple(draws.integers(10, 14, 3))
        places = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"))
        ball = ((places - draws.uniform(4, 8, (3, 1, 1, 1))) ** 2).sum(0) < 20
        for part, voxels in (("images", draws.normal(0, 10, sides) + 100 * ball), ("masks", 7 * ball)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            kind = np.float32 if part == "images" else np.uint8
            nibabel.save(nibabel.Nifti1Image(voxels.astype(kind), AFFINE), folder / part / f"{i}.nii.gz")
    (folder / "classes.txt").write_text("0 air\n7 ball\n")
    return folder


def test_train_evaluate_and_predict_volumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, folder = scans(tmp_path / "data"), tmp_path / "model"
    line = f"train {data} --task segmentation_3d:size=8,spacing=2,overlap=0.25,held_out=0.4 --model unet_nano_3d:widths=[4,8],deep_supervision=true"
    found = answer(
        capsys, f"{line} --learning-rate 0.02 --batch-tokens 64 --budget 40steps --best-of 0 --output {folder}"
    )
    assert found["score"] > 0.8 and found["figures"]["mean Dice"][0] == pytest.approx(found["score"])
    assert found["figures"]["mean IoU"][0] <= found["score"]
    told = answer(capsys, f"evaluate {folder}")
    assert (told["score"], told["figures"], told["items"]) == (found["score"], found["figures"], 2)
    assert answer(capsys, f"evaluate {folder} {scans(tmp_path / 'more', 3, 40)}")["items"] == 3

    scan, mask = data / "images" / "1.nii.gz", tmp_path / "out.nii.gz"
    (row,) = answer(capsys, f"predict {folder} {scan} --output {mask}")["images"]
    drawn, truth = nibabel.load(mask), nibabel.load(data / "masks" / "1.nii.gz")
    assert drawn.shape == truth.shape and np.array_equal(drawn.affine, truth.affine)
    values, wanted = (np.asarray(each.dataobj) for each in (drawn, truth))
    assert set(np.unique(values)) <= {0, 7} and (values == wanted).mean() > 0.9
    assert 2 * ((values == 7) & (wanted == 7)).sum() / ((values == 7).sum() + (wanted == 7).sum()) > 0.7
    assert row["shares"]["ball"] == pytest.approx((values == 7).mean())
    rows = answer(capsys, f"predict {folder} {data / 'images'} --output {tmp_path / 'all'}")["images"]
    assert sorted(Path(row["mask"]).name for row in rows) == [f"{i}.nii.gz" for i in range(6)]
    assert f"predict {folder} scan.nii.gz --output mask.nii.gz" in (folder / "README.md").read_text()

    small, slice_ = tmp_path / "small.nii", tmp_path / "slice.nii"
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 9, 9), np.float32), np.eye(4)), small)
    nibabel.save(nibabel.Nifti1Image(np.zeros((40, 40), np.float32), np.eye(4)), slice_)
    for asked, word in (
        (f"predict {folder} {data / 'images'} --output {tmp_path / 'one.nii.gz'}", "for 6 masks"),
        (f"predict {folder} {scan} --output {tmp_path / 'one.png'}", "ending in .nii.gz or .nii"),
        (f"predict {folder} {small} --output {tmp_path / 'one.nii'}", "smaller than crops of 8 x 8 x 8"),
        (f"predict {folder} {slice_} --output {tmp_path / 'one.nii'}", "a single slice of 40 x 40 voxels"),
        (f"predict {folder} {tmp_path / 'nothing.nii'}", "which does not exist"),
        (f"explain {folder} {scan}", "a model that segments volumes"),
        (f"train {data} --task segmentation_3d:size=8 --model unet_nano --output {tmp_path / 'no'}", "2 axes"),
        (f"train {data} --task segmentation_3d:size=10 --model unet_nano_3d:widths=[4,4,4] --output {tmp_path / 'no'}", "multiples of 4"),
        (f"train --task segmentation_3d:size=8 --model unet_nano_3d --teacher {folder} --output {tmp_path / 'no'}", "a teacher on"),
        (f"train --task segmentation:size=16 --model unet_nano --teacher {folder} --output {tmp_path / 'no'}", "reads volumes"),
    ):  # fmt: skip
        code, _, error = run(capsys, asked)
        assert code == 2 and word in error, error
    assert not any((tmp_path / name).exists() for name in ("no", "one.nii", "one.nii.gz", "one.png"))


class Knows(nn.Module):
    """A model that knows the classes of a task's held-out volumes by the voxels of their windows."""

    def __init__(self, task: Any) -> None:
        super().__init__()
        self.task, self.unused, self.calls = task, nn.Parameter(torch.zeros(1)), 0

    def forward(self, inputs: Tensor, *, context: Context) -> Result:
        assert context.grid == self.task.grid
        self.calls += 1
        known = torch.cat([batch.inputs[0] for batch in self.task.evaluation_batches(1)])
        classes = torch.cat([batch.targets[0] for batch in self.task.evaluation_batches(1)])
        nearest = (inputs[:, :, None] == known).all(-1).float().argmax(-1)  # finds the identical token
        return Result(5.0 * nn.functional.one_hot(classes[nearest], self.task.num_classes).float().flatten(2))


def test_a_report_shows_a_slice_of_whole_volumes() -> None:
    task = create_task("segmentation_3d", size=8, evaluation_items=5)
    model = Knows(task)
    pictures, found = mask_pictures.shown(task), mask_pictures.predicted(model, task)
    assert pictures is not None and found is not None
    assert model.calls == 4 * 2  # 12 voxels along each axis make eight windows
    assert found["scores"] == [1.0] * 4 and found["masks"] == pictures["truths"]
    assert len(set(pictures["images"])) == 4 and pictures["classes"][0][0] == "background"


def test_costs_are_measured_on_cubes() -> None:
    task = create_task("segmentation_3d", size=8, patch=2, evaluation_items=2)
    settings = CompareSettings(("unet_nano_3d:widths=[4,4]",), Budget.parse("1m"), lengths=(100,))
    (name,) = settings.names
    config = Work(task, settings).config_for(name, 100)
    assert config.grid == (4, 4, 4) and [square_grid(n, 3) for n in (63, 64, 216)] == [(3,) * 3, (4,) * 3, (6,) * 3]
    (inputs,), context = _input(task, 100)
    assert build(config, 0)(inputs, context=context).output.shape == (1, 64, 8 * 5)
