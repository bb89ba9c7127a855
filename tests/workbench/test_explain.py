"""What a class rests on: occlusion finds the place that a model reads, rollout is the product of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, refused
from torch import Tensor, nn

from regard.contract import Context, Result
from regard.models.image_model import ImageModel, ImageModelConfig
from regard.models.vision.vit import VisionTransformer, VisionTransformerConfig
from regard.workbench.explain import draw, explain, occlusion, rollout

SMALL: dict[str, Any] = {"image_size": 32, "patch": 8, "dim": 12, "num_layers": 2, "num_heads": 2, "num_classes": 3}


class ReadsOnePlace(nn.Module):
    """Class 1 as far as the first number of one patch says so."""

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
    assert wide[1, 3] > wide.max() - 1e-6 and (wide > 1e-6).sum() == 4 * 5  # rows 0 to 3, columns 1 to 5
    assert (occlusion(ReadsOnePlace(), inputs, (4, 6), 0, window=1) <= 0).all()


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


def test_the_method_is_the_models_and_others_are_refused() -> None:
    inputs = torch.randn(16, 48)
    transformer = ImageModel(ImageModelConfig("vit_nano", 3, (4, 4), 4)).eval()
    method, weight = explain(transformer, inputs, (4, 4), 0)
    assert method == "rollout" and weight.shape == (4, 4)
    pyramid = ImageModel(ImageModelConfig("van_nano", 3, (4, 4), 4, options={"widths": (8, 8, 8)})).eval()
    method, weight = explain(pyramid, inputs, (4, 4), 0)
    assert method == "occlusion" and weight.isfinite().all()
    refused("rollout", explain, pyramid, inputs, (4, 4), 0, "rollout")
    refused("method", explain, pyramid, inputs, (4, 4), 0, "gradients")


def test_the_drawing_is_the_picture_and_the_map_beside_it() -> None:
    image = pytest.importorskip("PIL.Image")
    weight = torch.zeros(4, 4)
    weight[0, 0] = 1.0
    drawn = draw(image.new("RGB", (40, 30), "white"), weight)
    assert drawn.size == (2 * 341 + 8, 256)
    bright, dark = drawn.getpixel((341 + 8 + 20, 15)), drawn.getpixel((680, 240))
    assert drawn.getpixel((20, 15)) == (255, 255, 255) and sum(bright) > sum(dark) + 100
