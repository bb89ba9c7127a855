"""Vision Mamba: parity with the official code, published sizes, the class token in the middle, and its positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, load, recorded_state, refused, shaken

from regard.models.vision.vim import FIRST_VERSION, Vim, VimConfig

SMALL: dict[str, Any] = {"width": 20, "depth": 2, "patch": 8, "stride": 4, "num_classes": 5, "image_size": (24, 16)}


def small(**options: Any) -> Vim:
    return shaken(Vim(VimConfig(**{**SMALL, "mixer": {"d_state": 4}, **options}))).eval()


@pytest.mark.parametrize(("name", "mixer"), [("vision_vim", {}), ("vision_vim_v1", FIRST_VERSION)])
def test_outputs_of_the_official_code(name: str, mixer: dict[str, Any]) -> None:
    recording = load(name)
    model = small(mixer={"d_state": 4, **mixer})
    model.load_released(recorded_state(name))
    with torch.no_grad():
        features, maps = model.forward_intermediates(recording["images"].double())
        close(model.forward_head(features), recording["output"])
    for level, found in enumerate(maps):
        close(found.mean((2, 3)), recording[f"level_{level}"])


def test_the_class_token_is_in_the_middle_and_its_output_is_the_pooled_one() -> None:
    model, images = small(), torch.randn(2, 3, 24, 16, dtype=torch.float64)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    features = model.forward_features(images)
    assert features.shape == (2, 16, 20)
    patches = model.embedding(images)
    tokens = torch.cat([patches[:, :7], model.class_token.expand(2, -1, -1), patches[:, 7:]], 1)
    close(seen[0], tokens + model.positions)
    close(model.forward_head(features, pre_logits=True), model.norm(features[:, 7]))


@pytest.mark.parametrize("class_token", ["first", "last", "none"])
def test_other_places_of_the_class_token(class_token: str) -> None:
    model, images = small(class_token=class_token), torch.randn(2, 3, 24, 16, dtype=torch.float64)
    features, (_, last) = model.forward_intermediates(images)
    pooled = model.forward_head(features, pre_logits=True)
    place = {"first": slice(0, 1), "last": slice(15, 16), "none": slice(0, 15)}[class_token]
    close(pooled, model.norm(features[:, place]).mean(1))
    patches = {"first": features[:, 1:], "last": features[:, :15], "none": features}[class_token]
    close(last.flatten(2).mT, patches)


def test_a_sequence_reversed_with_its_positions_gives_the_output_reversed_where_directions_share_weights() -> None:
    sets = ("conv", "x_proj", "dt", "A", "D")
    model = small(mixer={"d_state": 4, "shared": sets}, class_token="none")
    x = torch.randn(2, 15, 20, dtype=torch.float64)
    block = model.blocks[0]
    close(block(x.flip(1)), block(x).flip(1))


def test_weights_for_another_size_keep_the_class_token_and_have_patches_interpolated() -> None:
    size = {"stride": 8, "image_size": 32}
    old, new = small(**size), small(**{**size, "image_size": (64, 40)})
    with torch.no_grad():
        rows = torch.arange(4.0, dtype=torch.float64)[:, None].expand(4, 4).flatten()
        old.positions[0] = torch.cat([rows[:8], torch.tensor([100.0]), rows[8:]])[:, None]
    new.load_released(old.state_dict())
    table = new.positions[0, :, 0].detach()
    assert table[20] == 100
    places = torch.cat([table[:20], table[21:]]).view(8, 5)
    close(places, places[:, :1].expand(8, 5))
    close(places.flip(0), 3 - places)
    assert (places[1:] > places[:-1]).all()
    assert torch.equal(new.blocks[1].mixer.A_log, old.blocks[1].mixer.A_log)
    assert new(torch.randn(1, 3, 64, 40, dtype=torch.float64)).shape == (1, 5)


def test_what_does_not_fit_the_table_of_positions_is_refused() -> None:
    refused("image_size", small(), torch.randn(1, 3, 24, 24, dtype=torch.float64))
    refused("multiples of 16 from 16; try 224 x 224 pixels", Vim, VimConfig(image_size=230))
    refused("class_token", VimConfig, class_token="centre")


def test_the_residual_keeps_float32_and_the_rest_may_be_narrow() -> None:
    model = small().bfloat16()
    features, maps = model.forward_intermediates(torch.randn(1, 3, 24, 16, dtype=torch.bfloat16))
    assert features.dtype == torch.float32 and maps[0].dtype == torch.bfloat16
    assert model.forward_head(features).dtype == torch.bfloat16


def test_initial_values() -> None:
    model = Vim(VimConfig(**{**SMALL, "width": 64, "depth": 4, "patch": 16, "stride": 16, "image_size": 64}))
    assert model.no_weight_decay() >= {"positions", "class_token", "blocks.0.mixer.A_log"}
    assert 0.015 < float(model.positions.detach().std()) < 0.025
    assert float(model.embedding.projection.weight.detach().std()) == pytest.approx(768**-0.5, rel=0.05)
    largest = float(model.blocks[0].mixer.out_proj.weight.detach().abs().max()) * 2 * 128**0.5
    assert 0.95 < largest <= 1
