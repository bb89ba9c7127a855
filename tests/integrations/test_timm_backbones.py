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
from regard.models.vision import list_backbones, read_backbone  # noqa: E402
from regard.models.vision.blocks import Blocks  # noqa: E402

FAMILIES = dict.fromkeys(read_backbone(name)[0] for name in list_backbones())
each_family = pytest.mark.parametrize("name", [registered.PREFIX + next(iter(family.sizes)) for family in FAMILIES])
SIDES = (32, 64)


def made(name: str, **options: Any) -> Any:
    """A family's smallest size for grey images that are not square, in evaluation, always with the same weights."""
    torch.manual_seed(0)
    return timm.create_model(name, in_chans=1, img_size=SIDES, **options).eval()


def grey() -> torch.Tensor:
    return torch.randn(2, 1, *SIDES)


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


@each_family
def test_every_family_takes_timms_words_for_classes_pools_and_images(name: str) -> None:
    model, images = made(name, num_classes=7, drop_rate=0.5, drop_path_rate=0.1), grey()
    own = model.global_pool
    assert (model.config.dropout, model.config.drop_path) == (0.5, 0.1)
    sides = SIDES if model.pretrained_cfg["fixed_input_size"] else model.pretrained_cfg["input_size"][1:]
    assert timm.data.resolve_input_data_config(model, {})["input_size"] == (1, *sides)
    with torch.no_grad():
        features = model.forward_features(images)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        close(model(images), model.get_classifier()(pooled), 1e-6)
        model.reset_classifier(0)
        close(model(images), pooled, 1e-6)
        close(made(name, num_classes=0, global_pool=own)(images), pooled, 1e-6)
        close(made(name, num_classes=0, global_pool="")(images), features, 1e-6)
        model.reset_classifier(0, "")
        close(model(images), features, 1e-6)
        refused("num_classes=5 with global_pool=''", model.reset_classifier, 5)
        model.reset_classifier(5, own)
        assert model(images).shape == (2, 5)
    with torch.device("meta"):
        refused("global_pool='max' of this", made, name, global_pool="max")
        refused("num_classes=1000 with global_pool=''", made, name, num_classes=1000, global_pool="")
        refused("drop_path=2.0", made, name, drop_path_rate=2.0)
        refused("dropout=2.0", made, name, drop_rate=2.0)


@each_family
def test_maps_of_some_levels_are_those_of_the_whole_model_and_keep_no_layer_that_they_do_not_need(name: str) -> None:
    whole, images = made(name), grey()
    count = len(whole.levels)
    for indices in ((-1,), (0, -2)):
        maps = made(name, features_only=True, out_indices=indices)
        found = maps(images)
        expected = whole.forward_intermediates(images, indices, intermediates_only=True)
        for one, other in zip(found, expected, strict=True):
            close(one, other, 1e-6)
        assert [one.shape[1] for one in found] == maps.feature_info.channels()
        assert all(whole.get_submodule(module) for module in maps.feature_info.module_name())
        sum(one.square().sum() for one in found).backward()
        assert [key for key, parameter in maps.named_parameters() if parameter.grad is None] == []
    with torch.device("meta"):
        for wrong in (count + 1, 0, (count,), (-count - 1,), ()):
            refused(f"indices from 0 to {count - 1} or", made, name, features_only=True, out_indices=wrong)
        refused("feature_cls='hook'", made, name, features_only=True, feature_cls="hook")
    refused("norm=True", whole.forward_intermediates, images, norm=True)


@each_family
def test_layer_decay_scales_learning_rates_by_depth(name: str) -> None:
    model = made(name, num_classes=7)
    model.head.weight._no_weight_decay = True
    spared = model.no_weight_decay()
    assert "head.weight" in spared
    groups = timm.optim.param_groups_layer_decay(model, no_weight_decay_list=spared, layer_decay=0.5)
    rates = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert rates.keys() == set(model.parameters())
    assert [rates.pop(parameter) for parameter in model.head.parameters()] == [1, 1]
    every = [list(module) for module in model.modules() if isinstance(module, Blocks)]
    blocks = [block for each in every for block in each]
    for depth, block in enumerate(reversed(blocks), 1):
        assert {rates.pop(parameter) for parameter in block.parameters()} == {0.5**depth}
    starts = [len(blocks) - sum(map(len, every[:number])) for number in range(len(every))]
    ends = [start - len(each) + 1 for start, each in zip(starts, every, strict=True)]
    for key, parameter in model.named_parameters():
        part, *inside = key.split(".")
        if parameter in rates and part == "norm":
            assert rates[parameter] == 0.5, key
        elif parameter in rates and part == "stages":
            number = int(inside[0])
            assert rates[parameter] == 0.5 ** (ends[number] if inside[1] == "norm" else starts[number]), key
        elif parameter in rates:
            assert rates[parameter] == 0.5 ** (len(blocks) + 1), key
    coarse = {model.group_matcher(coarse=True)(key) for key, _ in model.named_parameters()}
    assert max(coarse) == len(model.levels) + 1


CLASS_TOKENS = ("vit_nano", "tnt_nano", "vim_nano", "pvt_nano")


@pytest.mark.parametrize("name", CLASS_TOKENS)
def test_a_class_token_or_a_mean_beside_it_is_read_by_timms_word_and_comes_back_from_a_folder(
    name: str, tmp_path: Path
) -> None:
    model, images = made(registered.PREFIX + name, num_classes=5, global_pool="avg"), grey()
    other = made(registered.PREFIX + name, num_classes=3)
    assert (model.global_pool, other.global_pool) == ("avg", "token")
    with torch.no_grad():
        other.reset_classifier(5, "avg")
        other.head.load_state_dict(model.head.state_dict())
        close(other(images), model(images), 1e-6)
        timm.models.save_for_hf(other, tmp_path)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert again.global_pool == "avg" and torch.equal(again(images), other(images))
        maps = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
        close(maps(images)[-1], other.forward_intermediates(images)[1][-1], 1e-6)
        other.reset_classifier(0, "token")
        close(other(images), made(registered.PREFIX + name, num_classes=0)(images), 1e-6)


def test_a_model_without_a_class_token_has_no_pool_of_it() -> None:
    options: dict[str, dict[str, Any]] = {
        "vit_nano": {"pool": "mean"},
        "tnt_nano": {"pool": "mean"},
        "vim_nano": {"class_token": "none"},
        "pvt_nano": {"class_token": False},
    }
    with torch.device("meta"):
        for name, chosen in options.items():
            model = made(registered.PREFIX + name, **chosen)
            assert model.global_pool == "avg"
            refused("without a class token; supported: 'avg'", model.reset_classifier, 5, "token")
            refused("without a class token", made, registered.PREFIX + name, global_pool="token", **chosen)


def test_the_mean_of_patches_beside_a_class_token_is_timms() -> None:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 7}
    theirs, images = timm.create_model("vit_tiny_patch16_224", **sizes).eval(), torch.randn(2, 3, 32, 32)
    model = timm.create_model("regard_vit_nano", num_classes=7).eval()
    for each in (theirs, model):
        each.reset_classifier(5, "avg")
    model.load_released(theirs.state_dict())
    with torch.no_grad():
        close(model(images), theirs(images), 1e-5)
        theirs.reset_classifier(0, "token")
        model.reset_classifier(0, "token")
        close(model(images), theirs(images), 1e-5)


def test_without_a_pool_a_model_comes_back_from_its_folder(tmp_path: Path) -> None:
    model, images = made("regard_vit_nano", num_classes=0, global_pool=""), grey()
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.global_pool == "" and torch.equal(again(images), model(images))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_what_a_backbone_cannot_do_for_timm_is_said() -> None:
    model = timm.create_model("regard_van_nano")
    refused("TorchScript of a VAN", torch.jit.script, model)
    refused("TorchScript of a VAN", torch.jit.trace, model, torch.randn(1, 3, 32, 32))
    refused("global_pool='max'", model.reset_classifier, 5, "max")
