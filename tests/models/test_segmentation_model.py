"""Segmentation networks as models of the task: patches and pixels, accepted sizes, and the command line."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import answer, run
from support import close, refused

from regard.contract import Context, Mask
from regard.core.patches import joined
from regard.models import build_model, config_for, from_pretrained, save_pretrained
from regard.models.levels import level_weights
from regard.models.segmentation_model import SegmentationModel, SegmentationModelConfig
from regard.models.vision import list_networks
from regard.tasks import Batch, create_task, mean_loss
from regard.tasks.segmentation import MaskReader
from regard.training.step import batch_context, losses_of

UNET = SegmentationModelConfig("unet_nano", 3, grid=(4, 8), patch=4, channels=1, options={"widths": [4, 8]})


def test_logits_of_a_patch_are_those_of_its_pixels() -> None:
    model = SegmentationModel(UNET).double().eval()
    images = torch.randn(2, 1, 16, 32, dtype=torch.float64)
    patches = images.view(2, 4, 4, 8, 4).permute(0, 1, 3, 2, 4).reshape(2, 32, 16)
    logits = model.backbone(images)  # (B, 3, 16, 32)
    output = model(patches).output
    assert output.shape == (2, 32, 16 * 3)
    for row, column in ((0, 0), (5, 9), (15, 31)):
        place, pixel = row // 4 * 8 + column // 4, row % 4 * 4 + column % 4
        close(output.unflatten(2, (16, 3))[:, place, pixel], logits[:, :, row, column])
    larger = torch.randn(1, 64, 16, dtype=torch.float64)
    assert model(larger, context=Context(grid=(8, 8))).output.shape == (1, 64, 48)
    refused("mask", model, patches, context=Context(mask=Mask(lengths=torch.tensor([1, 2]))))


CUBES = SegmentationModelConfig("unet_nano_3d", 3, grid=(2, 3, 4), patch=4, channels=1, options={"widths": [4, 8, 8]})


def test_logits_of_a_cube_are_those_of_its_voxels() -> None:
    model = SegmentationModel(CUBES).double().eval()
    volumes = torch.randn(2, 1, 8, 12, 16, dtype=torch.float64)
    cubes = volumes.view(2, 2, 4, 3, 4, 4, 4).permute(0, 1, 3, 5, 2, 4, 6).reshape(2, 24, 64)
    logits, output = model.backbone(volumes), model(cubes).output
    assert output.shape == (2, 24, 64 * 3)
    for x, y, z in ((0, 0, 0), (5, 9, 2), (7, 11, 15)):
        place, voxel = (x // 4 * 3 + y // 4) * 4 + z // 4, (x % 4 * 4 + y % 4) * 4 + z % 4
        close(output.unflatten(2, (64, 3))[:, place, voxel], logits[:, :, x, y, z])


@pytest.mark.parametrize("stages", [3, 4])
def test_strides_that_are_given_keep_their_stages_on_thin_crops(stages: int) -> None:
    """Without strides, the short axis leaves two stages."""
    task = create_task("segmentation_3d", size=[8, 32, 32], evaluation_items=1)
    strides = [1, [1, 2, 2], [1, 2, 2], [2, 2, 2]][:stages]
    config = SegmentationModelConfig.for_task(task, "unet_nano_3d", {"strides": strides})
    assert config.read()[1].widths == (8, 16, 32, 32)[:stages]
    batch = task.training_batch(0, 0, 2)
    output = SegmentationModel(config)(batch.inputs, context=Context(grid=batch.grid)).output
    assert output.shape == (*batch.targets.shape[:2], batch.targets.shape[2] * task.num_classes)
    plain = SegmentationModelConfig.for_task(task, "unet_nano_3d", {})
    assert plain.read()[1].widths == (8, 16)
    refused("strides", SegmentationModelConfig.for_task, task, "unet_nano_3d", {"strides": 2})


@pytest.mark.parametrize("axes", [2, 3])
def test_deep_supervision_adds_coarser_losses_of_halved_weights(axes: int) -> None:
    """Losses use the targets nearest to each place, without the coarsest stage; in inference coarser heads do not run."""
    widths = [4, 4, 8, 8]
    options = {"widths": widths, "deep_supervision": True}
    task = create_task("segmentation" + "_3d" * (axes == 3), size=16, patch=4, data="near-cue", evaluation_items=2)
    config = SegmentationModelConfig.for_task(task, "unet_nano" + "_3d" * (axes == 3), options)
    model = SegmentationModel(config).double().train()
    batch = dataclasses.replace(task.training_batch(0, 0, 2), inputs=task.training_batch(0, 0, 2).inputs.double())
    loss, more = losses_of(model, task, batch, batch_context(batch), nullcontext())
    levels = model.backbone.forward_levels(joined(batch.inputs, task.grid or (), 4))
    labels = joined(batch.targets, task.grid or (), 4)
    expected = []
    for level in levels:
        coarse = torch.nn.functional.interpolate(labels.double(), level.shape[2:], mode="nearest-exact").long()
        each = Batch(batch.inputs, coarse.flatten(1)[..., None])
        expected.append(mean_loss(task, level.flatten(2).mT, each))
    close(loss, expected[0])
    close(loss + more, 2 / 3 * expected[0] + 1 / 3 * expected[1])
    (loss + more).backward()
    gradients = [head.weight.grad is not None for head in model.backbone.heads]
    assert gradients == [False, True, True], "from the coarsest"
    called = []
    for number, head in enumerate(model.backbone.heads):
        head.register_forward_hook(lambda *_, number=number: called.append(number))
    with torch.no_grad():
        result = model.eval()(batch.inputs)
    assert called == [2] and not result.extras
    assert [level_weights(count) for count in (1, 2, 4)] == [(1.0,), (1.0, 0.0), (4 / 7, 2 / 7, 1 / 7, 0.0)]


def test_a_saved_model_is_the_same_and_keeps_what_was_chosen_for_the_size(tmp_path: Path) -> None:
    config = SegmentationModelConfig.for_task(create_task("segmentation", size=16, evaluation_items=2), "unet_nano", {})
    assert config.options == {"widths": (16, 32, 64)}  # with the named four stages, the last would have 2 x 2 places
    model = SegmentationModel(config).eval()
    save_pretrained(model, tmp_path)
    inputs = torch.randn(2, 16, 48)
    assert torch.equal(from_pretrained(tmp_path)(inputs).output, model(inputs).output)


def test_a_mechanism_gives_a_class_to_each_pixel_of_its_patches() -> None:
    task = create_task("segmentation", size=16, evaluation_items=2)
    model = build_model(config_for(task, "softmax", dim=16, num_layers=1, num_heads=2))
    batch = task.training_batch(0, 0, 2)
    assert model(batch.inputs, context=Context(grid=batch.grid)).output.shape == (2, 16, 16 * 5)


def test_what_a_network_cannot_take_is_said_before_it_is_made() -> None:
    task = create_task("segmentation", size=20, evaluation_items=2)
    make = SegmentationModelConfig.for_task
    refused("vm_unet_nano on images of 20 x 20 pixels.*multiples of 16; try 16 x 16", make, task, "vm_unet_nano", {})
    refused("multiples of 8; try 16 x 16", make, task, "unet_nano", {"widths": [4, 8, 8, 8]})
    refused("3 axes", make, task, "unet_3d", {})
    refused("which the task sets", make, task, "unet_nano", {"channels": 3})
    refused("segment images", make, create_task("listops"), "unet_nano", {})
    refused("widhts", make, task, "unet_nano", {"widhts": [4, 8]})
    assert {"unet_nano", "segformer_b0", "van_b0"} <= set(list_networks())


def halves(folder: Path, side: int = 24) -> Path:
    """Make a folder of images that are bright on the left or on the right, which is the class of those pixels."""
    image, draws = pytest.importorskip("PIL.Image"), np.random.default_rng()
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(30):
        pixels, mask = draws.integers(0, 60, (side, side), dtype=np.uint8), np.zeros((side, side), dtype=np.uint8)
        half = slice(0, side // 2) if number % 2 else slice(side // 2, side)
        pixels[:, half] += 150
        mask[:, half] = 7 if number % 2 else 9
        image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    (folder / "classes.txt").write_text("0 dark\n7 left\n9 right\n")
    return folder


def test_train_evaluate_and_predict_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    data, folder = halves(tmp_path / "data"), tmp_path / "model"
    line = f"train {data} --task segmentation:size=16,channels=1 --model unet_nano:widths=[8,8,8] --learning-rate 0.01"
    found = answer(capsys, f"{line} --batch-tokens 256 --budget 40steps --output {folder}")
    assert found["score"] > 0.9 and found["figures"]["mean Dice"][0] == pytest.approx(found["score"])
    assert found["figures"]["mean IoU"][0] <= found["score"] and found["baseline"]["score"] < 0.7
    told = answer(capsys, f"evaluate {folder}")
    assert (told["score"], told["figures"]) == (found["score"], found["figures"])
    assert told["standard_error"] == pytest.approx(told["figures"]["mean Dice"][1])
    assert answer(capsys, f"evaluate {folder} {halves(tmp_path / 'more')}")["items"] == 30

    picture, mask = data / "images" / "1.png", tmp_path / "out.png"
    (row,) = answer(capsys, f"predict {folder} {picture} --output {mask}")["images"]
    with Image.open(mask) as drawn:
        assert drawn.mode == "P" and drawn.size == (24, 24)
        values = np.asarray(drawn)
        colour = drawn.convert("RGB").getpixel((2, 12))
    truth = np.asarray(Image.open(data / "masks" / "1.png"))
    assert (values == truth).mean() > 0.9 and set(np.unique(values)) <= {0, 7, 9}
    reader = MaskReader.of_record(json.loads((folder / "training.json").read_text())["reader"])
    assert colour == reader.colours[1]
    assert row["shares"]["left"] == pytest.approx((values == 7).mean())
    rows = answer(capsys, f"predict {folder} {data / 'images'} --output {tmp_path / 'all'}")["images"]
    assert sorted(Path(row["mask"]).name for row in rows) == sorted(f"{i}.png" for i in range(30))
    code, out, _ = run(capsys, f"predict {folder} {picture}")
    assert code == 0 and "left" in out and "%" in out
    assert f"regard explain {folder} picture.jpg" in (folder / "README.md").read_text()
    line = f"explain {folder} {picture} --output {tmp_path / 'drawn'}"
    (likeliest,), (named,) = (answer(capsys, line + more)["images"] for more in ("", " --class dark"))
    assert likeliest["class"] == "left" and likeliest["method"] == "occlusion"  # dark is the background
    assert 0.3 < likeliest["share"] < 0.6 and likeliest["share"] + named["share"] == pytest.approx(1, abs=0.1)
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["1-dark.png", "1.png"]
    assert "of the pixels), by occlusion" in run(capsys, line)[1].replace("\n", " ")
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    for asked, word in (
        (f"predict {folder} {picture} {broken} --output {tmp_path / 'no'}", "broken.png, which cannot be read"),
        (f"predict {folder} {data / 'images'} --output {tmp_path / 'one.png'}", "for 30 masks"),
        (f"predict {folder} {picture} --output {tmp_path / 'one.jpg'}", "ending in .png"),
        (f"explain {folder} {picture} --class lefft", "try left"),
        (f"explain {folder} {picture} --method rollout", "rollout"),
        (f"explain {folder} {picture} --reduce tome:remove=1", "fewer tokens"),
        (
            f"train {data} --task segmentation:size=24 --model vm_unet_nano --output {tmp_path / 'no'}",
            "multiples of 16",
        ),
        (f"train {data} --task segmentation --model van_b0 --output {tmp_path / 'no'}", "classify images"),
        (f"train --task images --model unet_nano --output {tmp_path / 'no'}", "segment images"),
    ):
        code, _, error = run(capsys, asked)
        assert code == 2 and word in error, error
    assert not (tmp_path / "no").exists()


def test_networks_are_compared_and_the_report_shows_their_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(
        capsys,
        "compare --task segmentation:data=near-cue,size=16,patch=2,evaluation_items=8 "
        "--models unet_nano:widths=[4,4],umamba_bot_nano:widths=[4,4] --mechanisms softmax --frame bare --dim 16 "
        f"--layers 1 --seeds 1 --rates 0.01 --lengths 36 --budget 20steps --output {tmp_path / 'run'}",
    )
    (entries,) = told["summary"].values()
    names = {"softmax", "unet_nano:widths=[4,4]", "umamba_bot_nano:widths=[4,4]"}
    assert {entry["mechanism"] for entry in entries} == names
    page = Path(told["report"]).read_text()
    section = page[page.index('id="masks-0"') :]
    section = section[: section.index("</section>")]
    assert section.count("data:image/png;base64,") == 4 * (2 + len(names))
    assert all(f"mask by {name}" in section for name in names) and section.count("mean IoU") == len(names)


def test_networks_are_listed_with_what_they_serve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some = ["umamba_enc_2d", "unet_2d", "unet_3d", "segformer_b0"]
    monkeypatch.setattr("regard.models.vision.list_backbones", lambda: ["van_b0"])
    monkeypatch.setattr("regard.models.vision.segmentation.list_segmenters", lambda: some)
    rows = {row["name"]: row for row in answer(capsys, "list --backbones")}
    assert rows["unet_2d"]["serves"] == "segmentation" and rows["unet_2d"]["image_size"] is None
    assert rows["van_b0"]["serves"] == "images" and rows["umamba_enc_2d"]["image_size"] == [256, 256]
    assert rows["unet_3d"]["serves"] == "segmentation_3d"
    assert rows["segformer_b0"]["summary"].startswith("SegFormer")
