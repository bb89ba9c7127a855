"""Explanations of a class: occlusion finds the place that a model reads, rollout is the product of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, refused
from torch import Tensor, nn

from regard.contract import Context, Result
from regard.models.image_model import ImageModel, ImageModelConfig
from regard.models.vision.vit import VisionTransformer, VisionTransformerConfig
from regard.workbench.trained.explain import ClassShares, agents, draw, explain, occlusion, regions, rollout

SMALL: dict[str, Any] = {"image_size": 32, "patch": 8, "dim": 12, "num_layers": 2, "num_heads": 2, "num_classes": 3}


class ReadsOnePlace(nn.Module):
    """Scores class 1 by the first number of one patch."""

    def forward(self, inputs: Tensor, *, context: Context) -> Result:
        logit = inputs[:, 9, 0]
        return Result(torch.stack([-logit, logit], -1))


def test_occlusion_is_nothing_but_around_the_place_that_is_read() -> None:
    inputs = torch.randn(24, 5)
    inputs[9, 0] = 2.0
    found = occlusion(ReadsOnePlace(), inputs, (4, 6), 1, window=1)
    lost = torch.sigmoid(torch.tensor(4.0)) - 0.5
    expected = torch.zeros(24).index_fill(0, torch.tensor(9), float(lost)).view(4, 6)
    close(found, expected, 1e-6)
    wide = occlusion(ReadsOnePlace(), inputs, (4, 6), 1, window=3)
    assert wide[1, 3] > wide.max() - 1e-6 and (wide > 1e-6).sum() == 4 * 5  # 4 rows, columns 1 to 5
    assert (occlusion(ReadsOnePlace(), inputs, (4, 6), 0, window=1) <= 0).all()


def test_on_fine_grids_occlusion_hides_blocks_of_patches() -> None:
    inputs = torch.zeros(34 * 50, 5)
    inputs[9, 0] = 2.0  # in row 0, in the fifth of 25 blocks of 2 x 2
    found = occlusion(ReadsOnePlace(), inputs, (34, 50), 1, window=1)
    expected = torch.zeros(34, 50)
    expected[:2, 8:10] = torch.sigmoid(torch.tensor(4.0)) - 0.5
    close(found, expected, 1e-6)
    odd = occlusion(ReadsOnePlace(), inputs[: 33 * 47], (33, 47), 1)
    assert odd.shape == (33, 47) and odd.isfinite().all() and (odd > 1e-6).sum() == 6 * 10


class ReadsAMark(nn.Module):
    """A segmenter of 3 classes and 2 pixels a patch, which gives the last patches class 2 if a mark is in patch 9."""

    def forward(self, inputs: Tensor, *, context: Context) -> Result:
        logits = torch.zeros(*inputs.shape[:2], 2, 3, dtype=inputs.dtype)
        logits[:, 20:, :, 2] = inputs[:, 9, :1, None]
        return Result(logits.flatten(2))


def test_a_segmenter_is_explained_by_the_share_of_a_class() -> None:
    inputs = torch.randn(24, 5, dtype=torch.float64)
    inputs[9, 0] = 2.0
    model = ClassShares(ReadsAMark(), 3)
    shares = model(inputs[None], context=Context()).output.softmax(-1)[0]
    sure = torch.tensor([0.0, 0, 2], dtype=torch.float64).softmax(0)
    close(shares, (20 / 3 + 4 * sure) / 24, 1e-12)
    method, found = explain(model, inputs, (4, 6), 2)
    assert method == "occlusion" and found[1, 3] > found.max() - 1e-6
    alone = occlusion(model, inputs, (4, 6), 2, window=1)
    assert alone[1, 3] == pytest.approx(float(4 * (sure[2] - 1 / 3) / 24), rel=1e-5)
    assert (alone.abs() > 1e-6).sum() == 1
    refused("rollout' of a ReadsAMark", explain, model, inputs, (4, 6), 2, "rollout")


def test_rollout_is_the_product_of_half_the_weights_and_half_the_identity() -> None:
    model = VisionTransformer(VisionTransformerConfig(**SMALL)).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x, product = model.embed(images), torch.eye(17, dtype=torch.float64)
    with torch.no_grad():
        for block in model.blocks:
            normed = block.mixer_norm(x)
            query, key = (
                part(normed).unflatten(-1, (2, 6)).transpose(1, 2) for part in (block.mixer.query, block.mixer.key)
            )
            weights = (query @ key.mT / 6**0.5).softmax(-1).mean(1)
            product = (weights + torch.eye(17, dtype=torch.float64)) / 2 @ product
            x = block(x, context=Context()).output
    close(rollout(model, images).double(), product[:, 0, 1:].unflatten(1, (4, 4)), 1e-6)


ROUTED = ("mixture_of_heads", {"shared_heads": 1, "active_heads": 2})
KINDS: dict[str, dict[str, Any]] = {
    "a mixture of heads": {"plan": [ROUTED, "softmax"], "num_heads": 4},
    "rotary": {"positions": "rotary"},
    "sigmoid, whose weights have no sum of 1": {"plan": "sigmoid"},
    "distillation": {"distillation_token": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_rollout_follows_the_weights_of_any_block_that_has_them(kind: str) -> None:
    model = VisionTransformer(VisionTransformerConfig(**SMALL | KINDS[kind])).double().eval()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    x, before = model.embed(images), model.config.class_tokens
    reached = torch.nn.functional.one_hot(torch.zeros(1, dtype=torch.long), x.shape[1]).double()
    rows = []
    with torch.no_grad():
        for block in model.blocks:
            result = block(x, context=Context(want=frozenset({"weights"})))
            weights = result.extras["weights"].mean(1) + torch.eye(x.shape[1], dtype=torch.float64)
            rows.append(weights / weights.sum(-1, keepdim=True))
            x = result.output
    for weights in reversed(rows):
        reached = (reached[:, None] @ weights)[:, 0]
    found = rollout(model, images)
    close(found.double(), reached[:, before:].unflatten(1, (4, 4)), 1e-6)
    assert found.sum() < 1 and found.min() > 0


def test_models_without_weights_or_a_class_token_are_refused_in_words_of_rollout() -> None:
    images = torch.randn(1, 3, 32, 32)
    for words, changed in (
        (
            r"rollout of a VisionTransformer whose block 1 \(linear\) has no attention weights",
            {"plan": ["softmax", "linear"]},
        ),
        ("rollout of a VisionTransformer without a class token", {"pool": "mean"}),
    ):
        refused(words, rollout, VisionTransformer(VisionTransformerConfig(**SMALL | changed)), images)
    averaging = VisionTransformer(VisionTransformerConfig(**SMALL))
    averaging.reset_classifier(3, "avg")
    refused("whose head does not read its class token", rollout, averaging, images)


def test_the_method_is_the_models_and_others_are_refused() -> None:
    inputs = torch.randn(16, 48)
    transformer = ImageModel(ImageModelConfig("vit_nano", 3, (4, 4), 4)).eval()
    method, weight = explain(transformer, inputs, (4, 4), 0)
    assert method == "rollout" and weight.shape == (4, 4)
    options: dict[str, Any] = {"plan": [("mixture_of_heads", {})] * 6}
    routed = ImageModel(ImageModelConfig("vit_nano", 3, (4, 4), 4, options=options)).eval()
    assert explain(routed, inputs, (4, 4), 0)[0] == "rollout"
    linear = ImageModel(ImageModelConfig("vit_nano", 3, (4, 4), 4, options={"plan": ["linear"] * 6})).eval()
    assert explain(linear, inputs, (4, 4), 0)[0] == "occlusion"
    refused("no attention weights", explain, linear, inputs, (4, 4), 0, "rollout")
    pyramid = ImageModel(ImageModelConfig("van_nano", 3, (4, 4), 4, options={"widths": (8, 8, 8)})).eval()
    method, weight = explain(pyramid, inputs, (4, 4), 0)
    assert method == "occlusion" and weight.isfinite().all()
    refused("rollout", explain, pyramid, inputs, (4, 4), 0, "rollout")
    refused("method", explain, pyramid, inputs, (4, 4), 0, "gradients")
    for method in ("regions", "agents"):
        refused(f"method='{method}' of a VAN", explain, pyramid, inputs, (4, 4), 0, method)


def test_regions_are_read_as_often_as_they_are_chosen() -> None:
    options: dict[str, Any] = {"widths": (16, 16), "depths": (1, 1), "top": (3, 0), "windows": 2, "head_dim": 8}
    model = ImageModel(ImageModelConfig("biformer_nano", 3, (4, 6), 8, options=options)).eval()
    found = regions(model, torch.randn(24, 192), (4, 6))
    assert found is not None and found.shape == (8, 12)  # the first stage's map; the second reads everything
    blocks = found.unflatten(0, (2, 4)).unflatten(2, (2, 6))
    assert (blocks == blocks[:, :1, :, :1]).all()
    share = blocks[:, 0, :, 0]
    close(share.sum(), torch.tensor(3.0), 1e-6)  # each of four regions chooses three
    assert (share * 4 == (share * 4).round()).all() and explain(model, torch.randn(24, 192), (4, 6), 0)[0] == "regions"


def test_maps_of_agents_are_their_weights_of_the_places() -> None:
    model = ImageModel(ImageModelConfig("agent_pvt_nano", 3, (4, 6), 8)).double().eval()
    inputs = torch.randn(24, 192, dtype=torch.float64)
    with torch.no_grad():
        before = model(inputs[None], context=Context(grid=(4, 6))).output
    found = agents(model, inputs, (4, 6))
    assert found is not None and found.ndim == 3
    close(found.sum((1, 2)), torch.ones(len(found), dtype=torch.float64), 1e-12)
    assert 2 * len(found) < found[0].numel() and not torch.equal(found[0], found[1])
    assert explain(model, inputs, (4, 6), 0)[0] == "agents"
    with torch.no_grad():
        after = model(inputs[None], context=Context(grid=(4, 6))).output
    assert torch.equal(before, after)
    assert not any("mix" in vars(module) for module in model.modules())


def test_the_drawing_is_the_picture_and_the_map_beside_it() -> None:
    image = pytest.importorskip("PIL.Image")
    weight = torch.zeros(4, 4)
    weight[0, 0] = 1.0
    drawn = draw(image.new("RGB", (40, 30), "white"), weight, side=256)
    assert drawn.size == (2 * 341 + 8, 256)
    bright, dark = drawn.getpixel((341 + 8 + 20, 15)), drawn.getpixel((680, 240))
    assert drawn.getpixel((20, 15)) == (255, 255, 255) and sum(bright) > sum(dark) + 100
    several = draw(image.new("RGB", (40, 30), "white"), torch.rand(5, 4, 4), side=260, smooth=False)
    assert several.size == (347 + 8 + 3 * 175 - 4, 260)
    many = draw(image.new("RGB", (4000, 3000), "white"), torch.rand(49, 4, 4), side=96)
    assert many.size == (128 + 8 + 7 * 47 - 4, 7 * 36 - 4)  # drawings do not grow with the photo
