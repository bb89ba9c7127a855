"""The Visual Attention Network: parity with the official code, published sizes, and details of its block."""

from __future__ import annotations

import pytest
import torch
from support import close, load, recorded_state

from regard.models.vision import create_backbone
from regard.models.vision.van import VAN, Block, VANConfig

TINY = VANConfig(widths=(8, 16, 24, 32), depths=(1, 2, 1, 1), expansions=(4, 4, 2, 2), num_classes=5, image_size=64)


@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_outputs_of_the_official_code(mode: str) -> None:
    recording = load("vision_van")
    model = VAN(TINY).double()
    model.load_released(recorded_state("vision_van"))
    model.train(mode == "training")
    images = recording["images"].double()
    _, maps = model.forward_intermediates(images)
    for level, found in enumerate(maps):
        close(found.mean((2, 3)), recording[f"{mode}_level_{level}"])
    model.load_released(recorded_state("vision_van"))
    close(model(images), recording[f"{mode}_output"])


def block(**changed: float) -> tuple[Block, torch.Tensor]:
    config = VANConfig(**changed)
    made = Block(8, 16, config, 0.0).double().train()
    return made, torch.randn(2, 8, 6, 5, dtype=torch.float64)


def test_a_block_whose_scales_are_zero_is_the_identity() -> None:
    made, x = block(scale=0.0)
    close(made(x), x)


def test_the_normed_input_comes_through_where_the_projection_gives_nothing() -> None:
    made, x = block(scale=0.5)
    with torch.no_grad():
        for last in (made.attention.output_proj, made.mlp.down):
            last.weight.zero_()
            last.bias.zero_()
    close(made(x), x + 0.5 * made.norm1(x))


def test_the_kernels_of_the_catalogue_may_be_others() -> None:
    model = create_backbone("van_b0", attention={"kernel": 7, "dilation": 2}, image_size=32, num_classes=2)
    assert model.stages[0].blocks[0].attention.config.receptive_field == 9
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 2)
