"""A trained model on fewer tokens, from the command line: scored, timed and drawn against itself on all tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import answer, run
from support import refused
from torch import nn

import regard
from regard.compression import load_compressed
from regard.compression.tokens import DynamicTransformer, InterpretedTransformer
from regard.models.image_model import ImageModel, ImageModelConfig
from regard.models.pretrained import from_pretrained, save_pretrained
from regard.tasks import create_task
from regard.tasks.images import SHOWN
from regard.workbench.trained.explain import draw_tokens, rollout
from regard.workbench.trained.folder import RECORD, open_trained
from regard.workbench.trained.reduced import reduced

image = pytest.importorskip("PIL.Image")
OPTIONS = {"dim": 12, "num_layers": 2, "num_heads": 2}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as left by `regard train`, with an untrained model and its images."""
    draws = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            pixels = draws.integers(0, 100, (16, 16, 3)) + 150 * (name == "light")
            image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{number}.png")
    given = {"data": str(tmp_path / "photos"), "size": 16, "held_out": 0.5}
    task = create_task("images", **given)
    torch.manual_seed(0)
    save_pretrained(ImageModel(ImageModelConfig("vit_nano", 2, (4, 4), 4, options=OPTIONS)), tmp_path)
    record = {
        "state": "finished",
        "task": {"name": "images", "options": given},
        "mechanism": "vit_nano",
        "layers": [],
        "tokenizer": None,
        "reader": task.reader.as_record(),
        "settings": {"first_item": 0, "batch_size": 4},
    }
    (tmp_path / RECORD).write_text(json.dumps(record))
    return tmp_path


def test_a_score_on_fewer_tokens_stands_beside_that_on_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "evaluate --reduce tome:remove=3", folder)
    told = found["reduced"]
    assert told["by"] == "tome:remove=3" and told["tokens"] == [14, 11] and told["batch"] == 4
    rates = told["images_per_second"]
    assert told["speedup"] == pytest.approx(rates["reduced"] / rates["all"])
    assert told["loss"] != found["loss"] and 0 <= told["score"] <= 1
    assert answer(capsys, "evaluate --reduce evit:keep=1", folder)["reduced"]["loss"] == pytest.approx(found["loss"])
    code, said, _ = run(capsys, "evaluate --reduce 'evit:keep=0.5,blocks=[0]'", folder)
    assert code == 0 and "images/s" in said and "evit:keep=0.5,blocks=[0]" in said


def test_a_file_of_several_pictures_is_told_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = (image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)) for i in range(3))
    moving, still = folder / "moving.gif", folder / "photos" / "dark" / "0.png"
    first.save(moving, save_all=True, append_images=others)
    found = answer(capsys, "predict", folder, moving, still)
    assert found["notes"] == [f"{moving} holds several pictures: the first is read"] and len(found["images"]) == 2
    first.save(folder / "first.png")
    assert (
        answer(capsys, "predict", folder, folder / "first.png")["images"][0]["classes"] == found["images"][0]["classes"]
    )
    assert "holds several pictures" in run(capsys, "predict", folder, moving)[1].replace("\n", " ")
    assert "2 files of several pictures" in run(capsys, "predict", folder, moving, moving)[1]
    assert "note" not in run(capsys, "predict", folder, still)[1]


def test_predictions_are_those_on_fewer_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = folder / "photos" / "dark" / "0.png"
    plain = answer(capsys, "predict", folder, photo)
    fewer = answer(capsys, "predict --reduce attention:keep=0.3", folder, photo)
    assert "reduced" not in plain and fewer["reduced"]["differ"] in (0, 1)
    assert plain["images"][0]["classes"] != fewer["images"][0]["classes"]
    code, said, _ = run(capsys, "predict --reduce attention:keep=0.3", folder, photo)
    assert code == 0 and "of 1 classes differ" in said


def test_the_tokens_that_are_left_are_drawn(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    photo = folder / "photos" / "dark" / "0.png"
    line = f"explain --output {tmp_path / 'drawn'} --reduce"
    (found,) = answer(capsys, f"{line} tome:remove=4", folder, photo)["images"]
    assert "8 of 16 patch tokens left" in found["method"]
    with image.open(found["drawing"]) as drawn:
        assert drawn.size == (2 * SHOWN + 8, SHOWN)
    code, _, said = run(capsys, f"{line} tome:remove=4 --method rollout", folder, photo)
    assert code == 2 and "one of the two" in said


def test_the_tokens_of_a_model_with_larger_patches_than_the_task_are_drawn(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_pretrained(ImageModel(ImageModelConfig("vit_nano", 2, (4, 4), 4, options=OPTIONS | {"patch": 8})), folder)
    line = f"explain --output {tmp_path / 'drawn'} --reduce tome:remove=1"
    (found,) = answer(capsys, line, folder, folder / "photos" / "dark" / "0.png")["images"]
    assert "2 of 4 patch tokens left" in found["method"] and Path(found["drawing"]).is_file()


def test_a_class_token_alone_leaves_no_patch_tokens(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trained = open_trained(folder)
    model: Any = trained.model()
    model.backbone = InterpretedTransformer(model.backbone, 2, threshold=1.0).eval()
    trained.save_as(tmp_path / "alone", model)
    line = f"explain --output {tmp_path / 'drawn'}"
    (found,) = answer(capsys, line, tmp_path / "alone", folder / "photos" / "dark" / "0.png")["images"]
    assert found["method"] == "ia_red2, 0 of 16 patch tokens left"


def test_drawings_are_kept_beside_those_of_other_questions(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    photo, drawn = folder / "photos" / "dark" / "0.png", {}
    for asked, name in (
        ("", "0.png"),
        ("--class light", "0-light.png"),
        ("--method occlusion", "0-occlusion.png"),
        ("--method occlusion --class light", "0-occlusion-light.png"),
        ("--reduce tome:remove=4", "0-tome_remove_4.png"),
    ):
        (found,) = answer(capsys, f"explain --output {tmp_path / 'drawn'} {asked}", folder, photo)["images"]
        assert Path(found["drawing"]).name == name
        drawn[name] = Path(found["drawing"]).read_bytes()
    assert {path.name: path.read_bytes() for path in (tmp_path / "drawn").iterdir()} == drawn
    assert len(set(drawn.values())) >= 3  # rollout is the same for any class


CHOOSING = {
    "dynamicvit": lambda host: DynamicTransformer(host, keep=0.5, blocks=[1]),
    "ia_red2": lambda host: InterpretedTransformer(host, 2, threshold=0.5),
}


@pytest.mark.parametrize("method", CHOOSING)
def test_a_model_that_has_learned_what_to_keep_is_scored_and_drawn_as_any_other(
    method: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trained = open_trained(folder)
    model: Any = trained.model()
    model.backbone = CHOOSING[method](model.backbone).eval()
    for name, parameter in model.backbone.named_parameters():
        if not name.startswith("model."):
            torch.nn.init.normal_(parameter)
    inputs = trained.reader.read([folder / "photos" / "dark" / "0.png"])
    if method == "ia_red2":
        model.backbone.threshold = float(model.backbone.heat_map(model.images(inputs), 0).detach().median())
    expected = model(inputs).output.detach()
    kept = model.backbone.tokens
    again: Any = trained.save_as(tmp_path / "chosen", model).model()
    assert torch.equal(again(inputs).output, expected) and torch.equal(again.backbone.tokens.places, kept.places)
    refused("load_compressed", from_pretrained, tmp_path / "chosen")
    assert torch.equal(load_compressed(tmp_path / "chosen")(inputs).output, expected)

    assert 0 <= answer(capsys, "evaluate", tmp_path / "chosen")["score"] <= 1
    photo = folder / "photos" / "dark" / "0.png"
    (found,) = answer(capsys, "predict", tmp_path / "chosen", photo)["images"]
    assert dict(found["classes"])["dark"] == pytest.approx(float(expected.softmax(-1)[0, 0]), rel=1e-5)
    line = f"explain --output {tmp_path / 'drawn'}"
    (found,) = answer(capsys, line, tmp_path / "chosen", photo)["images"]
    left = int((kept.places[:, 1:] >= 0).sum())
    assert found["method"] == f"{method}, {left} of 16 patch tokens left" and left < 16
    with image.open(found["drawing"]) as drawn:
        pixels = np.asarray(drawn.convert("L")).astype(int)[2::4, SHOWN + 8 + 2 :: 4]
        plain = np.asarray(drawn.convert("L")).astype(int)[2::4, 2:SHOWN:4]
    side = len(pixels) // 4
    cells = (pixels / np.maximum(plain, 1)).reshape(4, side, 4, side).transpose(0, 2, 1, 3).reshape(16, -1)
    assert ((np.median(cells, 1) < 0.5) == (kept.places[0, 1:] < 0).numpy()).all()
    (found,) = answer(capsys, f"{line} --method occlusion", tmp_path / "chosen", photo)["images"]
    assert found["method"] == "occlusion"
    code, _, said = run(capsys, f"{line} --reduce tome:remove=1", tmp_path / "chosen", photo)
    assert code == 2 and "fewer tokens in a" in said


def test_a_model_that_was_saved_with_fewer_tokens_is_drawn_with_them(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    regard.compress(model := open_trained(folder).model(), "tokens:method=tome,remove=4").save(folder)
    photo = folder / "photos" / "dark" / "0.png"
    (found,) = answer(capsys, f"explain --output {tmp_path / 'drawn'}", folder, photo)["images"]
    assert found["method"] == "tome, 8 of 16 patch tokens left"
    refused("with fewer tokens", rollout, model.backbone, torch.randn(1, 3, 16, 16))


def test_merged_patches_have_one_colour_and_dropped_ones_are_dark() -> None:
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, :16], pixels[:, 16:] = 40, 200
    places = torch.tensor([[0, 0], [-1, 1]])
    drawn = np.asarray(draw_tokens(image.fromarray(pixels), places, side=32))
    left, right = drawn[:, :32], drawn[:, 40:]
    assert (left == pixels).all()
    assert (right[4, [4, 28]] == 120).all()  # the mean of the two upper patches
    assert (right[28, 4] == 8).all() and (right[28, 28] == 200).all()
    assert (right[16, 4] == 255).all() and (right[28, 16] == 255).all()  # lines between tokens
    assert (right[4, 16] == 120).all()  # and none inside a token


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("tom:remove=3", "try tome"),
        ("tome", "try --reduce tome:keep=0.7"),
        ("tome:remov=3", "try remove"),
        ("tome:remove=x", "a whole number"),
        ("tome:remove=[1]", "one a block"),
        ("tome:remove=-1", "remove=-1"),
        ("evit:keep=2", "0 < keep <= 1"),
        ("evit:keep=true", "0 < keep <= 1"),
        ("evit:keep=0.5,blocks=1", "a list of whole numbers"),
        ("evit:keep=0.5,blocks=[2]", "0 to 1"),
        ("tome:remove=1,proportional=3", "proportional"),
        ("tome:remove=1,metric=values", "keys, queries, tokens"),
    ],
)
def test_what_does_not_fit_is_one_sentence(given: str, words: str) -> None:
    model = ImageModel(ImageModelConfig("vit_nano", 2, (4, 4), 4, options=OPTIONS))
    refused(words.replace("[", r"\["), reduced, model, given)


def test_models_without_a_class_token_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused("vit_nano", reduced, nn.Linear(2, 2), "tome:remove=1")
    other = ImageModel(ImageModelConfig("vit_nano", 2, (4, 4), 4, options=OPTIONS | {"pool": "mean"}))
    refused("class token", reduced, other, "evit:remove=1")
    code, _, said = run(capsys, "evaluate --reduce tom", folder)
    assert code == 2 and said.count("\n") == 1
