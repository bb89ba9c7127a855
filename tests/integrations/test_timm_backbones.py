"""Backbones as timm models: made by its factory with its options, in its feature extractor and its training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import close, refused

timm = pytest.importorskip("timm")
pytest.importorskip("timm.data")
pytest.importorskip("timm.optim")

import regard.integrations.timm as registered  # noqa: E402
from regard.models.vision import list_backbones  # noqa: E402


def test_every_backbone_is_listed_by_timm() -> None:
    assert timm.list_models("regard_*") == sorted(registered.PREFIX + name for name in list_backbones())
    assert registered.register() == [registered.PREFIX + name for name in list_backbones()]  # no change


def test_timm_makes_a_backbone_by_its_own_words() -> None:
    model = timm.create_model(
        "regard_van_nano", num_classes=7, in_chans=1, img_size=48, drop_rate=0.2, drop_path_rate=0.1
    )
    config = model.config
    assert (config.num_classes, config.channels, config.size) == (7, 1, (48, 48))
    assert (config.dropout, config.drop_path) == (0.2, 0.1)
    images = torch.randn(2, 1, 48, 48)
    model.eval()
    with torch.no_grad():
        close(model.forward_head(model.forward_features(images)), model(images), 1e-6)
    pooled = timm.create_model("regard_van_nano", num_classes=0).eval()
    assert pooled(torch.randn(1, 3, 32, 32)).shape == (1, pooled.num_features)


def test_timm_gives_maps_of_the_levels_that_are_asked_for() -> None:
    model = timm.create_model("regard_van_nano", features_only=True, out_indices=(0, 2)).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        maps = model(images)
    channels, strides = model.feature_info.channels(), model.feature_info.reduction()
    assert [tuple(found.shape) for found in maps] == [
        (1, c, 32 // s, 32 // s) for c, s in zip(channels, strides, strict=True)
    ]


def test_a_backbone_learns_in_a_loop_of_timms_own_parts() -> None:
    torch.manual_seed(0)
    model = timm.create_model("regard_van_nano", num_classes=2)
    data = timm.data.resolve_data_config(model.pretrained_cfg, model=model)
    assert data["input_size"] == (3, 32, 32)
    transform = timm.data.create_transform(**data, is_training=True)
    assert callable(transform)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    labels = torch.tensor([0, 1] * 8)
    images = torch.randn(16, 3, 32, 32) + 2 * labels.view(-1, 1, 1, 1)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_weights_that_nobody_published_are_refused() -> None:
    refused("none can be downloaded", timm.create_model, "regard_van_nano", pretrained=True)


def test_weights_come_from_a_file_under_their_own_names_and_with_another_head(tmp_path: Path) -> None:
    model = timm.create_model("regard_vit_nano", num_classes=7).eval()
    images = torch.randn(2, 3, 32, 32)
    official = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3, num_classes=7
    ).eval()
    path = tmp_path / "weights.pth"
    torch.save({"model": official.state_dict()}, path)
    given: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 7}}
    with torch.no_grad():
        loaded = timm.create_model("regard_vit_nano", num_classes=7, **given).eval()
        close(loaded(images), official(images), 1e-5)
        other = timm.create_model("regard_vit_nano", num_classes=5, **given).eval()
        assert other(images).shape == (2, 5)
        close(other.forward_features(images), loaded.forward_features(images), 1e-6)
    torch.save({"model": {**official.state_dict(), "stem.weight": torch.zeros(1)}}, path)
    refused("with stem.weight", timm.create_model, "regard_vit_nano", num_classes=5, **given)
    timm.models.save_for_hf(model, tmp_path / "folder")
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert torch.equal(again(images), model(images))
    maps = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, features_only=True).eval()
    assert torch.equal(maps(images)[-1], model.forward_intermediates(images)[1][-1])


def test_weights_of_as_many_classes_keep_their_head(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    given: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    model = timm.create_model("regard_vit_nano", num_classes=7)
    torch.save(model.state_dict(), path)
    same = timm.create_model("regard_vit_nano", num_classes=7, **given)
    assert torch.equal(same.head.weight, model.head.weight) and torch.equal(same.head.bias, model.head.bias)
    assert same.pretrained_cfg["num_classes"] == 7
    assert timm.create_model("regard_vit_nano", num_classes=5, **given).head.weight.shape == (5, 96)
    assert timm.create_model("regard_vit_nano", **given).head.weight.shape == (1000, 96)


def test_distilled_weights_of_other_classes_get_two_new_heads(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    options: dict[str, Any] = {"distillation_token": True, "num_layers": 1, "dim": 48, "img_size": 32}
    model = timm.create_model("regard_deit_t", num_classes=7, **options)
    torch.save(model.state_dict(), path)
    options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    other = timm.create_model("regard_deit_t", num_classes=3, **options)
    assert [len(head.weight) for head in (other.head, other.distillation_head)] == [3, 3]
    assert torch.equal(other.positions, model.positions)
    same = timm.create_model("regard_deit_t", num_classes=7, **options)
    assert torch.equal(same.distillation_head.weight, model.distillation_head.weight)


def test_pixels_are_normalised_as_the_released_weights_read_them() -> None:
    half, imagenet = (0.5, 0.5, 0.5), timm.data.IMAGENET_DEFAULT_MEAN
    for name, mean in (
        ("vit_t", half),
        ("mixer_b16", half),
        ("tnt_s", half),
        ("pyramid_tnt_s", half),
        ("deit_t", imagenet),
        ("van_b0", imagenet),
        ("swin_t", imagenet),
    ):
        assert timm.get_pretrained_cfg(registered.PREFIX + name).mean == mean, name


def test_timms_scripts_learn_which_images_a_model_takes() -> None:
    asked = {"img_size": 48, "in_chans": 1}
    model = timm.create_model(**timm.models.resolve_model_input_args("regard_vit_nano", asked))
    assert model.config.size == (48, 48) and model.config.channels == 1
    assert timm.data.resolve_input_data_config(model, asked)["input_size"] == (1, 48, 48)
    any_size = timm.create_model(**timm.models.resolve_model_input_args("regard_van_nano", {"img_size": 40}))
    assert timm.data.resolve_input_data_config(any_size, {"img_size": 56})["input_size"] == (3, 56, 56)


def test_all_maps_come_where_a_backbone_has_fewer_levels_than_timm_asks_for() -> None:
    model = timm.create_model("regard_pyramid_tnt_nano", features_only=True, img_size=32, in_chans=1).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 1, 32, 32))
    assert [found.shape[1] for found in maps] == model.feature_info.channels() and len(maps) == 2
    assert len(timm.create_model("regard_vit_nano", features_only=True).feature_info.channels()) == 4


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_what_a_backbone_cannot_do_for_timm_is_said() -> None:
    model = timm.create_model("regard_van_nano")
    refused("TorchScript of a VAN", torch.jit.script, model)
    refused("TorchScript of a VAN", torch.jit.trace, model, torch.randn(1, 3, 32, 32))
    refused("global_pool='avg'", model.reset_classifier, 5, "avg")
