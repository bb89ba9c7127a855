"""Image backbones as models of tasks: patches joined into images, training, saving, and prediction for pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import answer, run
from support import close, refused

from regard.compression.tokens import reduce_tokens
from regard.contract import Context, Mask
from regard.models import from_pretrained, save_pretrained
from regard.models.image_model import ImageModel, ImageModelConfig
from regard.models.registry import config_for
from regard.tasks import create_task
from regard.training import TrainConfig, train

CONFIG = ImageModelConfig("van_nano", num_classes=3, grid=(4, 8), patch=4, channels=3, options={"widths": [8, 8, 8]})


def patches_of(images: torch.Tensor, patch: int) -> torch.Tensor:
    rows = [
        images[:, :, top : top + patch, left : left + patch].permute(0, 2, 3, 1).flatten(1)
        for top in range(0, images.shape[2], patch)
        for left in range(0, images.shape[3], patch)
    ]
    return torch.stack(rows, 1)


def test_patches_become_the_image_that_they_were_cut_from() -> None:
    model = ImageModel(CONFIG).double().eval()
    images = torch.randn(2, 3, 16, 32, dtype=torch.float64)
    close(model(patches_of(images, 4)).output, model.backbone(images))
    larger = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    close(model(patches_of(larger, 4), context=Context(grid=(8, 8))).output, model.backbone(larger))


def test_losses_of_a_backbones_layers_come_with_the_logits() -> None:
    sizes = {"plan": ["mixture_of_heads"] * 2, "num_layers": 2, "patch": 8, "dim": 16, "num_heads": 4}
    model = ImageModel(ImageModelConfig("vit_t", num_classes=3, grid=(4, 8), patch=4, options=sizes))
    assert model(torch.randn(2, 32, 48)).losses["load_balance"][1] == 2


def test_a_saved_model_is_the_same(tmp_path: Path) -> None:
    model = ImageModel(CONFIG).eval()
    save_pretrained(model, tmp_path)
    inputs = torch.randn(2, 32, 48)
    assert torch.equal(from_pretrained(tmp_path)(inputs).output, model(inputs).output)


def test_what_an_image_model_cannot_take_is_refused() -> None:
    model = ImageModel(CONFIG)
    refused("32, 48", model, torch.randn(2, 32, 47))
    refused("mask", model, torch.randn(2, 32, 48), context=Context(mask=Mask(lengths=torch.tensor([1, 2]))))
    refused("channels", ImageModelConfig, "van_nano", 3, (4, 8), options={"channels": 1})
    refused("classify images", ImageModelConfig.for_task, create_task("listops"), "van_nano", {})
    refused("van_nano", config_for, create_task("images"), "softmax", "van_nan")


def test_what_the_config_does_not_tell_is_not_saved(tmp_path: Path) -> None:
    model = ImageModel(ImageModelConfig("vit_nano", num_classes=3, grid=(2, 2), patch=4))
    model.backbone.reset_classifier(3, "avg")
    refused("saving a ImageModel with global_pool=.avg. of its backbone", save_pretrained, model, tmp_path)
    model.backbone.reset_classifier(5, "token")
    refused("of 5 classes and a config of 3; .*num_classes=5", save_pretrained, model, tmp_path)
    model.backbone.reset_classifier(3)
    reduction = reduce_tokens(model.backbone, "random", remove=1, proportional=False)
    refused("fewer tokens, as by reduce_tokens of its backbone", save_pretrained, model, tmp_path)
    assert not list(tmp_path.iterdir())
    reduction.undo()
    save_pretrained(model, tmp_path)
    assert len(from_pretrained(tmp_path).backbone.head.weight) == 3
    model.backbone.reset_classifier(5)
    model.config = replace(model.config, num_classes=5)
    save_pretrained(model, tmp_path)
    assert torch.equal(from_pretrained(tmp_path).backbone.head.weight, model.backbone.head.weight)
    model.backbone.prune_intermediate_layers([0], prune_head=False)
    refused("pruned intermediate layers", save_pretrained, model, tmp_path)


@pytest.mark.parametrize("name", ["mixer_nano", "vit_nano", "pvt_nano", "vmamba_t_v0"])
def test_a_size_that_a_backbone_cannot_take_is_refused_by_its_name_before_it_is_built(name: str) -> None:
    words = f"{name} with images of 30 x 30 pixels.*try 32 x 32 pixels"
    refused(words, ImageModelConfig, name, num_classes=3, grid=(6, 6), patch=5)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes: bright in the upper half, and bright in the lower half."""
    image = pytest.importorskip("PIL.Image")
    root, draws = tmp_path_factory.mktemp("photographs"), np.random.default_rng()
    for name, rows in (("above", slice(0, 8)), ("below", slice(8, 16))):
        (root / name).mkdir()
        for number in range(12):
            pixels = draws.integers(0, 60, (16, 16, 3), dtype=np.uint8)
            pixels[rows] += 150
            image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_train_evaluate_and_predict_from_the_command_line(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, widths = tmp_path / "model", "van_nano:widths=[8,8,8]"
    found = answer(
        capsys, f"train {photographs} --task images:size=16 --model {widths} --budget 30steps --output {folder}"
    )
    assert found["backbone"] == ["van_nano", {"widths": [8, 8, 8]}] and found["score"] > 0.9
    assert answer(capsys, f"evaluate {folder}")["score"] == found["score"]
    for name in ("above", "below"):
        (tmp_path / "more" / name).mkdir(parents=True)
        for number in range(3):
            picture = (photographs / name / f"{number}.png").read_bytes()
            (tmp_path / "more" / name / f"{number}.png").write_bytes(picture)
    assert answer(capsys, f"evaluate {folder} {tmp_path / 'more'}")["shared"] == 6
    assert answer(capsys, f"evaluate {folder} {photographs}")["shared"] == 24
    code, out, _ = run(capsys, f"evaluate {folder} {tmp_path / 'more'}")
    assert code == 0 and "6 of the items are among the data of its training" in " ".join(out.split())
    record = folder / "training.json"
    record.write_text(record.read_text().replace(str(photographs), str(tmp_path / "gone")))
    told = answer(capsys, f"evaluate {folder} {photographs}")
    assert "shared" not in told and told["items"] == 24 and told["baseline"] is None
    assert told["notes"] == [
        f"the data of its training, {tmp_path / 'gone'}, are not there any more: which items it knows is not known"
    ]
    assert "without the data of its training" in run(capsys, f"evaluate {folder}")[2]
    record.write_text(record.read_text().replace(str(tmp_path / "gone"), str(photographs)))
    (tmp_path / "broken.png").write_text("no picture")
    above, broken = photographs / "above" / "0.png", tmp_path / "broken.png"
    told = answer(capsys, f"predict {folder} {above} {broken} --skip-unreadable")
    assert [row["classes"][0][0] for row in told["images"]] == ["above"]
    assert len(told["skipped"]) == 1 and "broken.png" in told["skipped"][0]
    drawn = answer(capsys, f"explain {folder} {above} --output {tmp_path / 'drawn'}")["images"]
    assert drawn[0]["class"] == "above" and drawn[0]["method"] == "occlusion" and Path(drawn[0]["drawing"]).is_file()
    single = tmp_path / "drawn.png"
    assert answer(capsys, f"explain {folder} {above} --output {single}")["images"][0]["drawing"] == str(single)
    assert single.read_bytes() == Path(drawn[0]["drawing"]).read_bytes()
    code, _, error = run(capsys, f"explain {folder} {above} {above} --output {single}")
    assert code == 2 and "for 2 drawings" in error
    told = answer(capsys, f"explain {folder} {above} {broken} --skip-unreadable --output {tmp_path / 'some'}")
    assert len(told["images"]) == 1 and "broken.png" in told["skipped"][0]
    code, _, error = run(capsys, f"explain {folder} {above} {broken} --output {tmp_path / 'nothing'}")
    assert code == 2 and "broken.png" in error and not (tmp_path / "nothing").exists()
    code, _, error = run(capsys, f"explain {folder} {above} --class abov")
    assert code == 2 and "try above" in error
    code, _, error = run(capsys, f"predict {folder} {broken}")
    assert code == 2 and "broken.png, which cannot be read as an image" in error
    code, _, error = run(capsys, f"predict {folder} {tmp_path / 'none.png'}")
    assert code == 2 and "does not exist" in error
    code, _, error = run(capsys, f"train {photographs} --task images:size=16 --model van_nano --mechanism linear")
    assert code == 2 and "has its own layers" in error


def test_a_reader_of_a_record_normalises_as_the_task_did() -> None:
    task = create_task("images")
    record = json.loads(json.dumps(task.reader.as_record()))
    assert type(task.reader).of_record(record) == task.reader


def test_backbones_are_compared_beside_a_mechanism(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(
        capsys,
        f"compare --task images:evaluation_items=40 --models van_nano:widths=[8,8,8] --mechanisms softmax --seeds 1 --rates 0.003 "
        f"--dim 16 --layers 1 --heads 2 --lengths 16 --at-length 16 --budget 20steps --output {tmp_path / 'run'}",
    )
    (entries,) = told["summary"].values()
    assert sorted(entry["mechanism"] for entry in entries) == ["softmax", "van_nano:widths=[8,8,8]"]
    assert "van_nano:widths=[8,8,8] has" in " ".join(told["recommendation"]["notes"])
    assert Path(told["report"]).is_file()
    code, _, error = run(capsys, "compare --task images --models softmax")
    assert code == 2 and "try --mechanisms" in error


@pytest.mark.parametrize("name", ["van_nano", "vim_nano", "biformer_nano"])
def test_backbones_train_in_bfloat16_near_to_float32_with_weights_in_float32(photographs: Path, name: str) -> None:
    task = create_task("images", data=photographs, size=16, patch=4)
    losses = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = ImageModel(ImageModelConfig.for_task(task, name, {}))
        config = TrainConfig(steps=3, batch_size=8, learning_rate=1e-3, precision=precision, measure_memory=False)
        losses.append([point.loss for point in train(model, task, config).curve])
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[0] != losses[1], "products are in bfloat16"
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
