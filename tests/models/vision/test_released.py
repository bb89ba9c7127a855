"""Checkpoints as found in practice: wrapped, prefixed, of another network, or not checkpoints at all."""

from __future__ import annotations

import pytest
import torch
from support import close, refused
from torch import nn

from regard.compression.tokens import DynamicTransformer
from regard.compression.tokens.dynamic import RELEASED
from regard.contract import Unsupported
from regard.models.vision import create_backbone
from regard.models.vision.segmentation import create_segmenter


def vit(**options: object) -> nn.Module:
    return create_backbone("vit_nano", **{"image_size": 8, "dim": 12, "num_layers": 4, "num_classes": 5} | options)


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0].keys() | states[1].keys())


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "make",
    [vit, lambda: DynamicTransformer(vit(), keep=0.5), lambda: create_segmenter("unet_nano", widths=(4, 8))],
    ids=["backbone", "dynamic", "segmenter"],
)
def test_weights_are_found_in_a_checkpoint_and_under_the_names_of_a_wrapper(make):
    trained = make()
    state = trained.state_dict()
    if isinstance(trained, DynamicTransformer):  # released with the official names
        state = {**trained.model.state_dict(), **official(trained)}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
    for checkpoint in (
        prefixed("module.", state),
        prefixed("module._orig_mod.", state),
        prefixed("backbone.", state),
        {"model": state, "optimizer": optimizer, "scaler": {}, "epoch": 3},
        {"epoch": 3, "state_dict": prefixed("model.", state)},
    ):
        fresh = make()
        assert not same(fresh, trained)
        fresh.load_released(checkpoint)
        assert same(fresh, trained)


def official(dynamic: DynamicTransformer) -> dict[str, torch.Tensor]:
    names = {own: theirs for theirs, own in RELEASED.items()}
    found = {}
    for name, value in dynamic.predictors.state_dict().items():
        stage, part = name.split(".", 1)
        layer, _, kind = part.rpartition(".")
        found[f"score_predictor.{stage}.{names.get(layer, layer)}.{kind}"] = value
    return found


def test_what_is_no_state_dict_or_several_is_refused_and_changes_nothing():
    model, state = vit(), vit().state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for wrong, words in (
        ("weights.pth", "weights as a str"),
        (vit(), "its state_dict()"),
        ({"model": state, "model_ema": state}, "2 state dicts: model, model_ema"),
        ({"epoch": 3, "args": None}, "without a state dict, of epoch, args"),
        ({name: value.numpy() for name, value in state.items()}, "without a state dict"),
        (
            {name: torch.tensor(1.0) for name in ("cls_token", *state)},
            "weights that do not belong to a VisionTransformer",
        ),
        ({**state, "blocks.0.attn.qkv.bias": torch.zeros(2)}, "weights that do not belong to a VisionTransformer"),
    ):
        refused(words, model.load_released, wrong)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_weights_that_do_not_fit_are_counted_and_other_classes_get_the_way_to_load_them():
    model = vit()
    other = create_segmenter("unet_nano", widths=(4, 8)).state_dict()
    own, theirs = len(model.state_dict()), len(other)
    refused(f"and {own - 1} others; with", model.load_released, other)
    refused(f"and {theirs - 1} others for this", model.load_released, other)
    refused("and 1 other for this VisionTransformer", vit(num_classes=7).load_released, model.state_dict())
    refused(r"try num_classes=5, and reset_classifier\(7\)", vit(num_classes=7).load_released, model.state_dict())
    refused(r"try num_classes=5, and reset_classifier\(0\)", vit(num_classes=0).load_released, model.state_dict())
    with pytest.raises(Unsupported) as error:
        vit(dim=24, num_classes=7).load_released(model.state_dict())
    assert error.value.nearest == ""


def test_weights_of_a_model_with_other_parts_name_the_options_that_it_has():
    plain, distilled, mean = vit(), vit(distillation_token=True, num_classes=7), vit(pool="mean")
    for model, weights, words in (
        (plain, distilled, "distillation_token=True, num_classes=7, and reset_classifier(5) after loading"),
        (distilled, plain, "distillation_token=False, num_classes=5, and reset_classifier(7) after loading"),
        (plain, mean, "pool='mean'"),
        (
            mean,
            distilled,
            "pool='class', distillation_token=True, num_classes=7, and reset_classifier(5) after loading",
        ),
        (plain, vit(distillation_token=True, image_size=16), "distillation_token=True"),
    ):
        with pytest.raises(Unsupported) as error:
            model.load_released(weights.state_dict())
        assert error.value.nearest == f"another model, with {words}"
    for weights in (vit(distillation_token=True, dim=24), vit(distillation_token=True, num_layers=5)):
        with pytest.raises(Unsupported) as error:
            plain.load_released(weights.state_dict())
        assert error.value.nearest == ""


@pytest.mark.parametrize(
    ("theirs", "sizes", "name", "own", "option"),
    [
        ("deit_tiny_distilled_patch16_224", {"embed_dim": 24}, "deit_t", {"dim": 24}, "distillation_token=True"),
        ("tnt_s_legacy_patch16_224", {"embed_dim": 24}, "tnt_s", {"width": 24}, "legacy=True"),
    ],
)
def test_checkpoints_of_timm_load_with_the_option_that_their_refusal_names(
    theirs: str, sizes: dict[str, int], name: str, own: dict[str, int], option: str
) -> None:
    timm = pytest.importorskip("timm")
    depth = "num_layers" if name == "deit_t" else "depth"
    published = timm.create_model(theirs, img_size=32, num_classes=5, depth=2, **sizes).double().eval()
    options = {"image_size": 32, "num_classes": 5, depth: 2, **own}
    refused(
        f"try another model, with {option}$", create_backbone(name, **options).load_released, published.state_dict()
    )
    model = create_backbone(name, **options, **{option.removesuffix("=True"): True}).double().eval()
    model.load_released(published.state_dict())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        close(model(images), published(images))
