"""Retrofits of timm's vision transformers, and the folders they are saved in."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import answer, run
from kills import undisturbed_and_killed
from PIL import Image

import regard
from regard import Unsupported
from regard.measurement.budget import Budget
from regard.models import from_pretrained, from_transformers
from regard.retrofit import open_host
from regard.retrofit.hosts import VisionHost
from regard.retrofit.important import check_importance, head_importance, most_important
from regard.retrofit.measures.vision import quality, recommend
from regard.retrofit.pace import plan
from regard.retrofit.pictures import read_pictures
from regard.retrofit.run import read_settings
from regard.retrofit.settings import RetrofitSettings

timm = pytest.importorskip("timm")
from regard.integrations import timm_folders  # noqa: E402  it needs timm

WORK = {"batch_size": 8, "evaluation_blocks": 2, "rate": 0.01}
CLASSES = ("cats", "dogs", "owls")


def vit(**options):
    given = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3, **options}
    model = timm.create_model("vit_tiny_patch16_224", **given).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(n=40):
    return torch.randn(n, 3, 16, 16)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders with a timm model and with images of its classes."""
    place = tmp_path_factory.mktemp("place")
    timm_folders.save(vit(), place / "vit")
    for name in CLASSES:
        (place / "photos" / name).mkdir(parents=True)
        for number in range(15):
            pixels = np.random.default_rng().integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "photos" / name / f"{number}.png")
    return place


def test_a_folder_of_timm_becomes_one_that_timm_loads(capsys, place):
    line = (
        f"retrofit {place}/vit --mechanism gated_linear --keep-layers auto:1 --data {place}/photos --budget '54 steps' "
        f"--batch-size 8 --evaluation-blocks 2 --output {place}/out"
    )
    found = answer(capsys, line)
    assert (found["kind"], found["counts"], len(found["swapped"])) == ("vision", "images", 1)
    assert found["trained_tokens"]["tune"] == 8 * len(found["losses"]["tune"]) and found["data"]["images"] == 41
    judged = found["results"]["quality"]["photos, held out"]
    assert judged["images"] == 4 and 0 <= judged["agreement"] <= 1 and set(judged["accuracy"]) >= {"original", "change"}
    assert found["results"]["tokens"] == 17 and found["results"]["time"]["images"] == 8
    page = (place / "out" / "report.html").read_text()
    assert found["recommendation"]["text"] in page.replace("&#39;", "'") and "images a second" in page
    charts = ("layers-0", "time", "operations", "transfer", "tune", "sensitivity")
    assert all(f'id="{chart}-t"' in page for chart in charts)
    assert list(found["results"]["time_by_batch"]) == ["1", "2", "8"]
    assert 'timm.create_model("local-dir:' in (place / "out" / "README.md").read_text()
    loaded = timm.create_model(f"local-dir:{place}/out", pretrained=True).eval()
    assert loaded.blocks[found["swapped"][0]].attn.attend.card.name == "gated_linear"
    again, x = open_host(str(place / "vit")).load(place / "out"), images(3)
    assert torch.equal(loaded(x), again(x))
    code, told, _ = run(capsys, line)
    assert code == 0 and "accuracy on photos, held out" in told
    code, out, message = run(capsys, line.replace("vit ", "out ").replace("--output ", "--output other"))
    assert (code, out) == (2, "") and "swapped before" in message


def test_killed_and_resumed_it_equals_one_that_was_not(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    model, data = vit(num_classes=0, class_token=False, global_pool="avg"), images()
    settings = {"keep_layers": "0", "data": data, "budget": "30 steps", "train": "lora:2", **WORK}
    whole, again = undisturbed_and_killed(monkeypatch, tmp_path, model, "agent", stages=[("training", 5)], **settings)
    losses = whole.record["losses"]["tune"]
    assert sum(losses[-3:]) < sum(losses[:3]) and "variance of features" in again.recommendation


@pytest.fixture(scope="module")
def host():
    return open_host(vit())


@pytest.mark.parametrize("open_folder", [from_pretrained, from_transformers])
def test_loaders_of_other_folders_name_the_call_that_loads_it(tmp_path, host, open_folder):
    made, _ = host.copy_with([0], "linear", 0)
    host.with_model(made).save(tmp_path / "out")
    with pytest.raises(Unsupported, match=r"after import regard\.integrations\.timm$") as refused:
        open_folder(tmp_path / "out")
    call, _, first = refused.value.nearest.partition(" after ")
    names = {"timm": pytest.importorskip("timm")}
    exec(first, names)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(eval(call, names).eval()(x), made(x))


def test_the_same_model_says_the_same(host):
    models = {"original": host.model, "retrofit": host.model}
    data = read_pictures(images(), None, host.view, batch=8, seed=0)
    found = quality(models, host, data.held_out, 3)
    assert found == {"images": 4, "by_layer": [1.0, 1.0], "agreement": 1.0, "standard_error": 0.0}
    told = recommend({"quality": {"x": found}, "time": {name: {"median": 1.0} for name in models}})
    assert not told["take"] and told["text"].startswith("Keep the original: 100.0%")


def test_what_is_kept_after_each_layer_falls_where_attention_is_new_and_not_before(host):
    student, _ = host.copy_with([1], "linear", 0)
    data = read_pictures(images(), None, host.view, batch=8, seed=0)
    found = quality({"original": host.model, "retrofit": student}, host, data.held_out, 3)["by_layer"]
    assert found[0] == 1.0 > found[1]


def test_larger_images_are_tokens_of_the_same_patches(host):
    assert [host.tokens(larger) for larger in (1, 2)] == [17, 65]
    large = open_host(vit(img_size=32))
    assert large.tokens(1) == host.tokens(2)


@pytest.mark.parametrize(("mode", "crop"), [("center", 0.9), ("squash", 1.0), ("squash", 0.8)])
def test_images_are_read_as_timm_does(place, mode, crop):
    from timm.data import create_transform, resolve_input_data_config

    host = open_host(vit(pretrained_cfg_overlay={"crop_mode": mode, "crop_pct": crop}))
    path = place / "wide.png"
    waves = np.sin(np.random.default_rng().uniform(2, 4, 3) * np.linspace(0, 1, 140)[:, None])  # (140, 3)
    Image.fromarray((127 + 100 * waves * np.ones((72, 1, 1))).astype(np.uint8)).save(path)
    expected = create_transform(**resolve_input_data_config(host.model))(Image.open(path).convert("RGB"))
    found = host.view.normal(torch.from_numpy(host.view.read(path).transpose(2, 0, 1).copy())[None])[0]
    assert float((found - expected).abs().mean()) < 0.02  # rounding by one byte value is 0.008


def test_images_that_timm_pads_are_refused():
    with pytest.raises(Unsupported, match=r"crop_mode='border'; supported: center and squash"):
        _ = open_host(vit(pretrained_cfg_overlay={"crop_mode": "border"})).view


def test_repeated_images_are_taken_once_and_classes_are_the_models(host, place):
    data = read_pictures(str(place / "photos"), None, host.view, batch=8, seed=0)
    assert data.labelled and set(torch.cat([data.training.labels, data.held_out.labels]).tolist()) == {0, 1, 2}
    some = images(20)
    twice = read_pictures(torch.cat([some, some]), None, host.view, batch=8, seed=0)
    assert twice.size == 18 and len(twice.held_out) == 2 and not twice.labelled
    assert len(twice.drawn(1, 0, 8)) == 8
    assert set(data.training.spread(5).pixels.flatten(1).sum(1).tolist()) <= set(
        data.training.pixels.flatten(1).sum(1).tolist()
    )
    assert twice.training.spread(99).pixels.shape == twice.training.pixels.shape
    flat = read_pictures(str(place / "photos" / "cats"), str(place / "photos"), host.view, batch=8, seed=0)
    assert not flat.labelled and list(flat.sources) == ["cats, held out", "photos, another source"]


@pytest.mark.parametrize(
    ("mechanism", "options"),
    [
        ("softmax", {}),
        ("local", {"form": "block", "block": 4}),
        ("mixture_of_heads", {"active_heads": 2, "mechanism": "linear", "mechanism_options": {"normalize": False}}),
    ],
)
def test_a_swapped_model_is_saved_with_its_options(tmp_path, mechanism, options):
    model, x = vit(class_token=False, global_pool="avg"), images(2)
    regard.swap(model, {"blocks.1.*": (mechanism, options)})
    timm_folders.save(model, tmp_path)
    for _ in range(2):
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert loaded.blocks[1].attn.attend.chosen == model.blocks[1].attn.attend.chosen
        torch.testing.assert_close(loaded(x), model(x))
        timm_folders.save(loaded, tmp_path)
    regard.unswap(loaded)
    timm_folders.save(loaded, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "vit_tiny_patch16_224"


def test_a_model_that_timm_would_not_build_again_is_refused(tmp_path):
    changed = vit()
    changed.blocks = changed.blocks[:1]
    with pytest.raises(Unsupported, match="changed after timm made it"):
        timm_folders.save(changed, tmp_path / "out")
    with pytest.raises(Unsupported, match="does not know by a name"):
        open_host(timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2))
    from regard.integrations import timm as registered

    assert registered.swapped_by_regard is timm_folders.swapped_by_regard
    with pytest.raises(Unsupported, match="with no folder"):
        timm.create_model(timm_folders.NAME)
    assert not (tmp_path / "out").exists()


def test_a_name_of_timm_is_asked_for(monkeypatch):
    asked, made = [], vit()
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append((name, options)) or made)
    monkeypatch.setattr(timm_folders, "recipe", lambda model: ("vit", {}))
    found = open_host("timm:vit_small_patch16_224")
    assert isinstance(found, VisionHost) and found.name == "vit_small_patch16_224"
    assert asked == [("vit_small_patch16_224", {"pretrained": True})]


def test_a_time_is_planned(host):
    settings = host.begun(RetrofitSettings("linear", budget=Budget.parse("20m"), batch_size=4))
    found = plan(host, host.read(images(20), None, settings), settings)
    assert min(found.warm, found.transfer, found.tune) >= 8 and found.windows >= 2
    with pytest.raises(Unsupported, match="4 images a step"):
        plan(host, host.read(images(20), None, settings), replace(settings, budget=Budget.parse("0.001s")))


def swapped(_):
    regard.swap(model := vit(), "linear")
    return {"model": model}


def swin(_):
    return {"model": timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(1, 1, 1, 1))}


def quantized(_):
    model = vit()
    regard.compression.quantize(model, 8)
    return {"model": model}


def texts(path):
    (path / "texts").mkdir()
    (path / "texts" / "a.txt").write_text("dear")
    return {"data": path / "texts"}


def damaged(path):
    (path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        (path / "photos" / name).write_bytes(b"no image")
    return {"data": path / "photos"}


BAD = {
    "swapped before": (swapped, "swapped before"),
    "more than attention": (swin, "learned bias for each offset"),
    "a mechanism that is causal alone": (lambda _: {"mechanism": "lolcats"}, "noncausal-self"),
    "text": (texts, "holds no image"),
    "damaged images": (damaged, "cannot be read as an image"),
    "a file": (lambda _: {"data": __file__}, "not a folder"),
    "few images": (lambda _: {"data": images(9)}, "7 are not held out.*try batch_size=7"),
    "other images": (lambda _: {"data": torch.randn(30, 1, 16, 16)}, "images .n, 3, 16, 16."),
    "a length": (lambda _: {"length": 64}, "length=64 of a VisionTransformer"),
    "tokens": (lambda _: {"budget": "2M tokens"}, "a budget of 2M tokens for images"),
    "unknown classes": (lambda _: {"distil": 0.5}, "whose classes are not the model's 3"),
    "no images": (lambda path: {"data": None}, "without images"),
    "a folder without a model": (lambda path: {"model": path / "nothing"}, "does not exist"),
    "an unknown name": (lambda _: {"model": "timm:vit_nowhere"}, "timm cannot load"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_will_not_do_is_refused_before_anything_is_trained(tmp_path, what):
    make, message = BAD[what]
    there = {"mechanism": "linear", "data": images(), "budget": "60 steps", "output": tmp_path / "out", **WORK}
    given = {"model": vit(), **there, **make(tmp_path)}
    with pytest.raises(Unsupported, match=message):
        regard.retrofit(given.pop("model"), given.pop("mechanism"), **given, watch=unexpected)
    assert not (tmp_path / "out").exists()


def unexpected(progress):
    assert progress.doing == "looking at the model"


def test_the_heads_that_matter_to_the_classes_of_images_are_shared(place, monkeypatch):
    model = vit()
    with torch.no_grad():
        for block, loud in zip(model.blocks, (2, 1), strict=True):
            block.attn.proj.weight[:, [at for at in range(32) if at // 8 != loud]] *= 1e-3
    host = open_host(model)
    asked = read_settings("mixture_of_heads:shared_heads=1", "none", "60 steps", {**WORK, "shared_heads": "important"})
    settings = host.begun(asked)
    data = host.read(place / "photos", None, settings)
    importance = head_importance(host, data, settings, lambda progress: None, 0.0)
    assert most_important(settings.mechanism, importance) == {0: [2], 1: [1]}
    monkeypatch.setattr(VisionHost, "rows", 1)  # each image by itself
    for number, scores in head_importance(host, data, settings, lambda progress: None, 0.0).items():
        assert scores == pytest.approx(importance[number], rel=1e-3, abs=1e-4 * max(scores))
    with pytest.raises(Unsupported, match="without right answers"):
        check_importance(host, host.read(images(), None, settings), settings)
