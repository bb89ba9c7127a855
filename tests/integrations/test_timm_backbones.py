"""Backbones among timm's models: made by its factory, with its words, in its feature extractor and training loop."""

from __future__ import annotations

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
    assert registered.register() == [registered.PREFIX + name for name in list_backbones()]  # twice changes nothing


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
    refused("none to download", timm.create_model, "regard_van_nano", pretrained=True)


def test_all_maps_come_where_a_backbone_has_fewer_levels_than_timm_asks_for() -> None:
    model = timm.create_model("regard_pyramid_tnt_nano", features_only=True, img_size=32, in_chans=1).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 1, 32, 32))
    assert [found.shape[1] for found in maps] == model.feature_info.channels() and len(maps) == 2
    assert len(timm.create_model("regard_vit_nano", features_only=True).feature_info.channels()) == 4


def test_blocks_that_cannot_be_computed_again_say_so() -> None:
    model = timm.create_model("regard_van_nano")
    model.set_grad_checkpointing(False)
    refused("gradient checkpointing of a VAN", model.set_grad_checkpointing)
