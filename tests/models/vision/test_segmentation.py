"""Segmentation networks: parity with the official code, sizes, the plain U-Net inside U-Mamba, and the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, load, recorded_state, refused, shaken

from regard.models.parameters import count_parameters
from regard.models.vision import create_backbone
from regard.models.vision.segmentation import (
    SEGMENTERS,
    Segmenter,
    UMamba,
    create_segmenter,
    dice_loss,
    read_segmenter,
    segmentation_loss,
)
from regard.models.vision.segmentation.umamba import MambaLayer
from regard.models.vision.segmentation.vm_unet import PatchExpanding

FLAT = {"channels": 2, "num_classes": 3, "widths": (4, 6, 8)}
RECORDED: dict[str, tuple[str, dict[str, Any]]] = {
    "vision_umamba_bot_2d": ("umamba_bot_2d", {**FLAT, "strides": (1, 2, (2, 1))}),
    "vision_umamba_enc_2d": ("umamba_enc_2d", {**FLAT, "image_size": (8, 8)}),
    "vision_umamba_enc_3d": (
        "umamba_enc_3d",
        {**FLAT, "widths": (3, 4, 6), "strides": (1, (1, 2, 2), (2, 2, 1)), "image_size": (2, 8, 4)},
    ),
    "vision_vm_unet": (
        "vm_unet",
        {"num_classes": 4, "widths": (8, 16), "depths": (1, 2), "decoder_depths": (2, 1), "mixer": {"d_state": 4}},
    ),
}


def recorded(name: str) -> Segmenter:
    size, options = RECORDED[name]
    model = create_segmenter(size, **options).double().eval()
    model.load_released(recorded_state(name))
    return model


@pytest.mark.parametrize("name", RECORDED)
def test_outputs_of_the_official_code(name: str) -> None:
    """Covers all levels of deep supervision, strides that differ between axes, and channels as tokens."""
    recording, model = load(name), recorded(name)
    images = recording["images"].double()
    with torch.no_grad():
        close(model(images), recording["level_0"])
        if isinstance(model, UMamba):
            for number, level in enumerate(model.forward_levels(images)):
                close(level, recording[f"level_{number}"])


def test_weights_by_two_names_load_once_and_those_here_by_their_own() -> None:
    model, other = (
        recorded("vision_umamba_bot_2d"),
        create_segmenter("umamba_bot_2d", **RECORDED["vision_umamba_bot_2d"][1]),
    )
    state = recorded_state("vision_umamba_bot_2d")
    twice = {f"decoder.{name}": value for name, value in state.items() if name.startswith("encoder.")}
    twice |= {
        name.replace(".conv.", ".all_modules.0."): value for name, value in state.items() if ".conv1.conv." in name
    }
    other.double().load_released({**state, **twice})
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    other.load_released(model.state_dict())
    refused("without decoder", other.load_released, {})


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [("segformer_b0", 150, 3_752_694), ("segformer_b2", 19, 27_361_235), ("vm_unet", 9, 27_427_761)],
)
def test_a_network_has_as_many_parameters_as_its_code(name: str, classes: int, count: int) -> None:
    with torch.device("meta"):
        assert count_parameters(create_segmenter(name, num_classes=classes)) == count


def tiny(name: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Options for a tiny network of a named size for grey images and three classes, and the sides of its images."""
    options: dict[str, Any] = {"widths": (8, 16), "num_classes": 3, "channels": 1}
    if name.startswith("segmamba"):
        options |= {"depths": (1, 1), "bottom": 8}
        size: tuple[int, ...] = (4, 8, 4)
    elif name.endswith("_3d"):
        size = (4, 2, 6)
    else:
        size = (8, 16)
    if "enc" in name:
        options["image_size"] = size
    if name.startswith("vm_unet"):
        options |= {"depths": (1, 1), "decoder_depths": (1, 1), "channels": 3 if name == "vm_unet" else 1}
    if name.startswith("segformer"):
        options |= {"depths": (1, 1), "heads": (1, 2), "expansions": (2, 2), "reductions": (2, 1), "decoder_width": 8}
    return options, size


@pytest.mark.parametrize("name", SEGMENTERS)
def test_logits_have_the_size_of_the_images_and_every_weight_a_gradient(name: str) -> None:
    """Tiny networks of every kind, two-dimensional ones under autocast, from which Mamba exempts itself.

    In three axes, torch 2.13 occasionally gives non-finite gradients for bfloat16 convolutions over a few voxels.
    """
    options, size = tiny(name)
    model = create_segmenter(name, **options)
    images = torch.randn(2, 1, *size)  # grey images also for three channels
    with torch.autocast("cpu", torch.bfloat16, enabled=len(size) == 2):
        assert model.eval()(images).shape == (2, 3, *size)
        model.train()
        loss = segmentation_loss(model(images).float(), torch.randint(3, (2, *size)))
    loss.backward()
    lacking = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not lacking
    assert model(images[:0]).shape == (0, 3, *size)


EACH_KIND = ("segformer_nano", "segmamba_nano", "umamba_bot_nano", "unet_nano_3d", "vm_unet_nano")


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", EACH_KIND)
def test_a_reset_classifier_is_an_untrained_head_on_the_same_network(name: str) -> None:
    options, size = tiny(name)
    model = shaken(create_segmenter(name, **options)).eval()
    before, heads = copied(model), copied(model.get_classifier())
    model.reset_classifier(64)
    assert model.num_classes == 64
    own = model.state_dict()
    assert sum(not torch.equal(own[key], value) for key, value in before.items()) == len(heads)
    images = torch.randn(2, 1, *size, dtype=torch.float64)
    with torch.no_grad():
        for logits in model.forward_levels(images) if isinstance(model, UMamba) else [model(images)]:
            assert logits.shape[:2] == (2, 64) and logits.dtype == torch.float64
    fresh = create_segmenter(name, **{**options, "num_classes": 64}).double().eval()
    drawn = fresh.get_classifier().state_dict()
    for key, value in model.get_classifier().state_dict().items():
        assert abs(float(value.std()) - float(drawn[key].std())) <= 0.4 * float(drawn[key].std())
    refused(r"try num_classes=3, and reset_classifier\(64\)", fresh.load_released, before)
    fresh.load_released(own)
    with torch.no_grad():
        close(fresh(images), model(images))
    refused("num_classes=0", model.reset_classifier, 0)


@pytest.mark.parametrize("name", EACH_KIND)
def test_an_encoder_s_weights_are_those_of_another_network_whatever_its_head_and_the_rest_stays(name: str) -> None:
    options, _ = tiny(name)
    given = shaken(create_segmenter(name, **options)).state_dict()
    model = create_segmenter(name, **{**options, "num_classes": 4}).double()
    before = copied(model)
    model.load_encoder({f"backbone.{key}": value for key, value in given.items()})
    for key, value in model.state_dict().items():
        assert torch.equal(value, (given if key.startswith(model.encoder_parts) else before)[key]), key
    parts = [key for key in given if key.startswith(model.encoder_parts)]
    assert parts and len(parts) < len(given)
    loaded = copied(model)
    refused(
        f"without {min(parts)} for the encoder of this",
        model.load_encoder,
        {k: given[k] for k in given if k != min(parts)},
    )
    refused("instead of .* for the encoder", model.load_encoder, {**given, parts[0]: torch.zeros(3, 5)})
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded[key]), key


def test_an_encoder_s_weights_are_those_of_the_backbone_of_its_layout() -> None:
    """MiT in SegFormer, with its head; VMamba in VM-UNet, with more blocks, under the names here and the official ones."""
    mit = shaken(create_backbone("mit_nano", num_classes=5, image_size=64)).eval()
    segformer = create_segmenter("segformer_nano").double().eval()
    segformer.load_encoder(mit.state_dict())
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for found, expected in zip(
            *(m.forward_intermediates(images)[1] for m in (segformer.encoder, mit)), strict=True
        ):
            close(found, expected)
    mixer = {"d_state": 4}
    shape = {"widths": (8, 16), "version": "v0", "expand": 2.0, "mlp_ratio": 0.0, "mixer": mixer}
    vmamba = shaken(create_backbone("vmamba_t_v0", depths=(2, 3), **shape)).state_dict()
    unet = create_segmenter("vm_unet", widths=(8, 16), depths=(1, 2), decoder_depths=(1, 1), mixer=mixer).double()
    unet.load_encoder(vmamba)
    for key, value in unet.encoder.state_dict().items():
        assert torch.equal(value, vmamba[f"stages.{key}"]), key
    unet.load_encoder(recorded_state("vision_vm_unet"))
    for key, value in recorded("vision_vm_unet").encoder.state_dict().items():
        assert torch.equal(unet.encoder.state_dict()[key], value), key


def test_weights_of_another_layout_than_the_encoder_s_are_refused() -> None:
    vit = create_backbone("vit_nano").state_dict()
    refused("encoder of this SegFormer", create_segmenter("segformer_nano").load_encoder, vit)
    refused("encoder of this VMUNet", create_segmenter("vm_unet_nano").load_encoder, vit)
    newer = create_backbone("vmamba_nano", widths=(24, 48, 96)).state_dict()
    refused(
        r"with encoder\.0\.blocks\.0\.mlp.*encoder of this VMUNet", create_segmenter("vm_unet_nano").load_encoder, newer
    )
    plain = create_segmenter("unet_nano").state_dict()
    refused("without mambas.*encoder of this UMamba", create_segmenter("umamba_bot_nano").load_encoder, plain)
    colour = create_backbone("mit_nano").state_dict()
    refused(r"\(32, 3, .*instead of \(32, 1, ", create_segmenter("segformer_nano", channels=1).load_encoder, colour)


def test_without_mamba_what_is_left_is_the_plain_residual_network() -> None:
    images = torch.randn(1, 2, 8, 12, dtype=torch.float64)
    plain = create_segmenter("unet_2d", **RECORDED["vision_umamba_bot_2d"][1]).double().eval()
    model = recorded("vision_umamba_bot_2d")
    plain.load_released({key: value for key, value in model.state_dict().items() if not key.startswith("mambas.")})
    assert float((model(images) - plain(images)).detach().abs().max()) > 1e-3
    model.mambas["2"] = torch.nn.Identity()
    close(model(images), plain(images))


def test_tokens_are_channels_where_there_are_no_more_places() -> None:
    """In that case a channel's output depends only on the channels up to it."""
    for places, of_channels in ((7, False), (6, True), (4, True)):
        layer = shaken(MambaLayer(6, places, {"d_state": 2}))
        assert layer.of_channels == of_channels
        x = torch.randn(1, 6, places, 1, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(x)[0, 2, 2 if places > 2 else 0].sum(), x)
        seen = gradient[0, :, :, 0].abs() > 0
        if of_channels:
            assert seen[:3].all() and not seen[3:].any()
        else:
            assert seen[:, :3].all() and not seen[:, 3:].any()
    assert not MambaLayer(6, None, {}).of_channels


def test_expanding_is_the_opposite_of_merging() -> None:
    expanding = PatchExpanding(8, 8, 2).double()
    with torch.no_grad():
        expanding.expand.weight.copy_(torch.eye(8))
    expanding.norm = torch.nn.Identity()
    x = torch.arange(8.0, dtype=torch.float64).view(1, 8, 1, 1).expand(1, 8, 2, 3)
    y = expanding(x)
    assert y.shape == (1, 2, 4, 6)
    assert y[0, :, :2, :2].tolist() == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


def test_the_dice_loss_is_0_of_a_right_answer_and_finite_of_empty_masks() -> None:
    labels = torch.randint(3, (2, 5, 4))
    right = 60 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).double()
    close(dice_loss(right, labels) + 1, torch.tensor(1.0, dtype=torch.float64), 1e-9)
    nothing = torch.zeros(2, 5, 4, dtype=torch.int64)
    close(dice_loss(torch.full((2, 1, 5, 4), -60.0).double(), nothing) + 1, torch.tensor(1.0).double(), 1e-9)
    for classes in (1, 3):
        logits = torch.randn(2, classes, 5, 4, dtype=torch.float64, requires_grad=True)
        loss = segmentation_loss(logits, nothing)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.isfinite().all()
    p, t = torch.tensor([0.25, 0.75]).double(), torch.tensor([[0, 1]])
    expected = 1 - (2 * 0.75 + 1) / (1 + 1 + 1)
    close(dice_loss(p.logit().view(1, 1, 2), t), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("ignored", [-100, 255])
def test_ignored_pixels_have_no_part_in_the_losses(classes: int, ignored: int) -> None:
    """Losses and gradients are those of the other pixels alone, also beside NaN; without any, both are 0."""
    logits = torch.randn(2, classes, 12, dtype=torch.float64)
    labels = torch.randint(max(2, classes), (2, 12))
    ignore = {} if ignored == -100 else {"ignore_index": ignored}
    more = torch.cat([logits, torch.full((2, classes, 5), torch.nan).double()], 2).requires_grad_()
    wider = torch.cat([labels, torch.full((2, 5), ignored)], 1)
    nothing = torch.full_like(wider, ignored)
    for loss in (dice_loss, segmentation_loss):
        found = loss(more, wider, **ignore)
        (gradient,) = torch.autograd.grad(found, more)
        close(found, loss(logits, labels))
        assert gradient[..., :12].any() and not gradient[..., 12:].any() and gradient.isfinite().all()
        assert loss(more, nothing, **ignore).detach() == 0
        if classes == 1:  # an image without a label is not in the mean over images
            close(loss(logits, torch.stack([labels[0], nothing[0, :12]]), **ignore), loss(logits[:1], labels[:1]))
        refused("the label 7 for", loss, more, wider.where(wider == ignored, 7), **ignore)


@pytest.mark.parametrize("classes", [1, 3])
def test_losses_in_half_precision_are_near_those_in_full(classes: int) -> None:
    """Sums over so many pixels are beyond float16."""
    logits, labels = torch.randn(2, classes, 400, 400), torch.randint(max(2, classes), (2, 400, 400))
    for loss in (dice_loss, segmentation_loss):
        found = loss(logits.half(), labels.byte())
        assert float(found) == pytest.approx(float(loss(logits, labels)), rel=1e-3)


@pytest.mark.parametrize(
    ("size", "stages"), [((512, 512), 7), ((64, 64), 5), ((64, 40), 4), ((36, 36), 3), ((6, 6), 2), ((7, 8), 2)]
)
def test_stages_are_planned_for_the_size_of_the_images(size: tuple[int, int], stages: int) -> None:
    """Sides are halved as long as they are even and at least 4 remain; explicit widths are kept."""
    segmenter, config = read_segmenter("unet_2d", fit=size)
    assert config.widths == (32, 64, 128, 256, 512, 512, 512)[:stages]
    assert read_segmenter("unet_2d", fit=size, widths=[8, 16, 32])[1].widths == (8, 16, 32)
    if size[0] % 2:
        refused("multiples of 2; try 8 x 8", segmenter.check_size, config, size)
    else:
        segmenter.check_size(config, size)


def test_what_does_not_fit_is_refused() -> None:
    model = create_segmenter("umamba_bot_2d", **FLAT)
    refused("multiples of 4", model, torch.randn(1, 2, 8, 6))
    refused("2 channels|3 channels", model, torch.randn(1, 3, 8, 8))
    refused("height, width", model, torch.randn(2, 8, 8))
    refused("multiples of 32", create_segmenter("vm_unet"), torch.randn(1, 3, 48, 64))
    refused("one position", create_segmenter("unet_nano"), torch.randn(1, 1, 8, 8))
    encoder = create_segmenter("umamba_enc_2d", **{**FLAT, "image_size": (8, 8)})
    refused("image_size", encoder, torch.randn(1, 2, 8, 16))
    refused("image_size", create_segmenter, "unet_2d", mamba="encoder")
    refused("strides", create_segmenter, "unet_2d", strides=(1, 2))
    refused("mamba", create_segmenter, "unet_2d", mamba="all")
    refused("widths", create_segmenter, "vm_unet", widths=(96, 192, 300, 600))
    refused("depths", create_segmenter, "vm_unet", decoder_depths=(1, 2))
    refused("vm_unet", create_segmenter, "vmunet")
    refused("widths", create_segmenter, "vm_unet", width=3)
    refused("integers", dice_loss, torch.zeros(1, 2, 4), torch.zeros(1, 4))
