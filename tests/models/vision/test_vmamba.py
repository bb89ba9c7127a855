"""VMamba: parity with the official code, published sizes, and its scans over the whole map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, load, recorded_state, refused, shaken

from regard.models.vision.vmamba import Block, PatchMerging, VMamba, VMambaConfig

SMALL: dict[str, Any] = {"widths": (8, 12, 16, 24), "depths": (1, 2, 1, 1), "num_classes": 5, "expand": 2.0}
RECORDED = {
    "vision_vmamba": VMambaConfig(**SMALL),
    "vision_vmamba_v0": VMambaConfig(**SMALL, version="v0", mlp_ratio=0, mixer={"d_state": 4}),
}


@pytest.mark.parametrize("name", RECORDED)
def test_outputs_of_the_official_code(name: str) -> None:
    """The images have 40 x 72 pixels, whose maps are neither square nor even."""
    recording = load(name)
    model = VMamba(RECORDED[name]).double().eval()
    model.load_released(recorded_state(name))
    with torch.no_grad():
        features, maps = model.forward_intermediates(recording["images"].double())
        close(model.forward_head(features), recording["output"])
    for level, found in enumerate(maps):
        close(found.mean((2, 3)), recording[f"level_{level}"])


def test_weights_with_the_older_names_and_with_projections_as_convolutions_load() -> None:
    state = recorded_state("vision_vmamba_v0")
    old = {}
    for name, value in state.items():
        for new, before in (
            ("patch_embed.0", "patch_embed.proj"),
            ("patch_embed.2", "patch_embed.norm"),
            ("classifier.", ""),
            (".op.", ".self_attention."),
        ):
            name = name.replace(new, before)
        if ".blocks." in name:
            name = name.replace(".norm.", ".ln_1.")
        old[name] = value[:, :, None, None] if name.endswith("in_proj.weight") else value
    model, other = (VMamba(RECORDED["vision_vmamba_v0"]).double() for _ in range(2))
    model.load_released(state)
    other.load_released(old)
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_every_pixel_reaches_every_place_of_a_block_and_fewer_paths_see_fewer() -> None:
    def seen(**options: Any) -> torch.Tensor:
        block = shaken(Block(4, 8, {"d_state": 1, "gate": False, "conv_width": 0, **options}, 0.0))
        x = torch.randn(1, 4, 3, 5, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(block(x)[0, :, 1, 2].sum(), x)
        return gradient[0].abs().amax(0) > 0

    assert seen().all()
    assert torch.equal(seen(scan="forward").flatten(), torch.arange(15) <= 7)


def test_blocks_turn_with_their_input_where_directions_share_their_weights() -> None:
    sets = ("x_proj", "dt", "A", "D")
    block = shaken(Block(4, 8, {"d_state": 2, "conv_width": 0, "shared": sets}, 0.0))
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    close(block(x.flip(2, 3)), block(x).flip(2, 3))
    close(block(x.transpose(2, 3)), block(x).transpose(2, 3))
    assert float((block(x.flip(3)) - block(x).flip(3)).detach().abs().max()) > 1e-6


def test_merging_puts_each_pixel_into_one_patch_and_fills_odd_sides_with_zeros() -> None:
    merging = PatchMerging(2, 8).double()
    with torch.no_grad():
        merging.reduction.weight.copy_(torch.eye(8))
    merging.norm = torch.nn.Identity()
    x = torch.arange(30, dtype=torch.float64).view(1, 2, 3, 5)
    y = merging(x)
    assert y.shape == (1, 8, 2, 3)
    assert y[0, ::2, 0, 0].tolist() == [0, 5, 1, 6]
    assert y[0, ::2, 1, 2].tolist() == [14, 0, 0, 0]


def test_images_whose_pixels_would_be_left_over_are_refused() -> None:
    model = VMamba(VMambaConfig(widths=(4, 8), depths=(1, 1), version="v0"))
    refused("multiples of 4 from 4; try 32 x 32 pixels", model, torch.randn(1, 3, 31, 32))
    refused("version", VMambaConfig, version="v1")


def test_weights_of_scans_are_spared_by_the_decay_and_projections_start_small() -> None:
    model = VMamba(VMambaConfig(widths=(64,), depths=(1,)))
    spared = {"A_log", "D", "dt_bias"}
    assert model.no_weight_decay() == {f"stages.0.blocks.0.mixer.{name}" for name in spared}
    block = model.stages[0].blocks[0]
    for linear in (block.mixer.in_proj, block.mixer.out_proj, block.mlp.up, block.mlp.down):
        assert 0.015 < float(linear.weight.detach().std()) < 0.025
    assert float(block.mixer.x_proj[0].weight.detach().std()) > 0.05
