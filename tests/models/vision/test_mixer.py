"""MLP-Mixer, NiNformer and Activator: parity with the official code, parameter counts, shuffled patches, other sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import close, load, recorded_state, refused, shaken

from regard.contract import Context
from regard.models.vision import create_backbone

TINY = {"image_size": 16, "patch": 4, "width": 12, "hidden": 20, "depth": 2, "num_classes": 5}
NAMES = {"mixer_s16": {"token_hidden": 7}, "ninformer_net": {}, "activator_net": {}, "activator_geglu": {}}


def tiny(name: str, **options):
    return create_backbone(name, **{**TINY, **NAMES[name], **options})


def drawn(name: str, **options):
    """A model in evaluation mode and float64, with no parameter at its initial value."""
    return shaken(tiny(name, **options)).eval()


def images(side: int = 16, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_parity_with_the_official_code(name):
    recording = load(f"vision_{name.removesuffix('_net')}")
    model = tiny(name).double().eval()
    model.load_released(recorded_state(f"vision_{name.removesuffix('_net')}"))
    pictures = recording["images"].double()
    close(model(pictures), recording["output"])
    for found, block in zip(model.forward_intermediates(pictures, intermediates_only=True), range(2), strict=True):
        close(found, recording[f"block{block}"])


@pytest.mark.parametrize(
    ("name", "published"), [("ninformer_net", 2_637_056), ("activator_net", 2_635_776), ("activator_geglu", 1_584_128)]
)
def test_parameters_of_the_blocks_that_share_a_norm(name, published):
    with torch.device("meta"):
        model = create_backbone(name)
    assert sum(p.numel() for p in model.blocks.parameters()) == published
    norms = [key for key in model.blocks[0].state_dict() if "norm" in key and not key.endswith("bias")]
    assert len(norms) == (3 if name == "ninformer_net" else 2)


def shuffled(pictures: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    patches = F.unfold(pictures, 4, stride=4)[..., order]
    return F.fold(patches, pictures.shape[2:], 4, stride=4)


@pytest.mark.parametrize(
    ("name", "unit", "mixes"),
    [
        ("activator_net", {}, False),
        ("activator_geglu", {}, False),
        ("activator_net", {"mixing": "shift"}, True),
        ("activator_net", {"mixing": "convolution"}, True),
        ("ninformer_net", {}, True),
        ("ninformer_net", {"inner": "channel"}, False),
    ],
)
def test_the_order_of_patches_is_seen_only_where_tokens_mix(name, unit, mixes):
    """The published Activator can therefore never tell which of two marked patches comes first."""
    model, pictures = drawn(name, unit=unit), images()
    found = model(shuffled(pictures, torch.randperm(16))) - model(pictures)
    assert (found.abs().max() > 1e-4) if mixes else (found.abs().max() < 1e-12)


def test_an_activator_with_a_convolution_starts_as_the_published_one():
    published, repaired = (
        tiny("activator_net").double().eval(),
        tiny("activator_net", unit={"mixing": "convolution"}).double(),
    )
    repaired.load_state_dict(published.state_dict(), strict=False)
    repaired.eval()
    for side in (16, 20):  # also a size other than the config's
        pictures = images(side)
        close(repaired(pictures), published(pictures))


@pytest.mark.parametrize("name", ["mixer_s16", "ninformer_net"])
def test_weights_of_another_image_size_write_the_same_picture_larger(name):
    """A single-colour image has equal tokens, so a block's output differs only by place."""
    small, large = drawn(name, depth=1), drawn(name, depth=1, image_size=32)
    state = small.state_dict()
    for key in state:
        if ("channel" in key and "down" in key) or ".mlp.down" in key:
            state[key] = torch.zeros_like(state[key])
    small.load_state_dict(state)
    large.load_released(state)
    colour = torch.randn(2, 3, 1, 1, dtype=torch.float64)
    (before,), (after,) = (
        model.forward_intermediates(colour.expand(-1, -1, side, side), intermediates_only=True)
        for model, side in ((small, 16), (large, 32))
    )
    assert before.std((2, 3)).min() > 1e-3
    close(after, F.interpolate(before, (8, 8), mode="bilinear", align_corners=False))
    state["blocks.0." + ("tokens.weights.up" if name == "mixer_s16" else "unit.weights.token_up")] = torch.ones(7, 15)
    refused("weights of 15 places", large.load_released, state)


@pytest.mark.parametrize(
    ("name", "silenced"),
    [("ninformer_net", "unit.project."), ("activator_net", "unit.weights.down"), ("mixer_s16", "tokens.")],
)
def test_dropout_comes_after_the_last_map_too(name, silenced):
    """With the other branch silenced, half of what the feed-forward network adds is therefore exactly zero."""
    block = drawn(name, branch_dropout=0.5, width=64).blocks[0].train()
    for key, parameter in block.named_parameters():
        if key.startswith(silenced):
            torch.nn.init.zeros_(parameter)
    x = torch.randn(1, 16, 64, dtype=torch.float64)
    added = block(x, Context(grid=(4, 4))) - x
    assert 0.4 < (added == 0).double().mean() < 0.6


def test_what_cannot_be_is_refused():
    for name in ("mixer_s16", "ninformer_net"):
        refused("images of 32 x 16 pixels.*16 x 16.*image_size=", tiny(name), torch.zeros(1, 3, 32, 16))
    refused("multiples of 4", tiny("activator_net"), torch.zeros(1, 3, 18, 16))
    refused("multiples of 16", create_backbone, "mixer_s16", image_size=40)
    refused("without feed-forward", create_backbone, "activator_geglu", branch_dropout=0.1)
    refused("mixing='fourier'", create_backbone, "activator_net", unit={"mixing": "fourier"})
