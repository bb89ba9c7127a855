"""PyramidTNT: parity with the official code, its merges, tables of other sizes, and mechanisms of the catalogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, load, recorded_state, refused, shaken

from regard.core.grids import tokens_of
from regard.models.vision.pyramid_tnt import Merge, PyramidTNT, PyramidTNTConfig

SMALL: dict[str, Any] = {
    "widths": (8, 12, 16, 16),
    "heads": (2, 2, 4, 4),
    "inner_widths": (4, 6, 8, 8),
    "inner_heads": (1, 2, 2, 2),
    "depths": (1, 7, 2, 1),
    "num_classes": 5,
    "image_size": (64, 128),
}


def small(**options: Any) -> PyramidTNT:
    return shaken(PyramidTNT(PyramidTNTConfig(**{**SMALL, **options}))).eval()


def test_outputs_of_the_official_code() -> None:
    recording, model = load("vision_pyramid_tnt"), small(excitation=True)
    model.load_released(recorded_state("vision_pyramid_tnt"))
    images = recording["images"].double()
    with torch.no_grad():
        features, maps = model.forward_intermediates(images)
        close(model.forward_head(features), recording["output"])
        for level, found in enumerate(maps):
            close(tokens_of(found), recording[f"map{level}"])
        close(model.train()(images), recording["training"])


def test_words_on_a_grid_of_odd_sides_merge_as_in_the_official_code() -> None:
    recording = load("vision_pyramid_tnt")
    state = PyramidTNT.translate(recorded_state("vision_pyramid_tnt"), small().config)
    merge = Merge((3, 5), (8, 12), (4, 6)).double()
    own = "stages.1.merge."
    merge.load_state_dict({name.removeprefix(own): x for name, x in state.items() if name.startswith(own)})
    words, sentences = merge(recording["odd_words"], torch.zeros(2, 15, 8, dtype=torch.float64))
    close(words, recording["odd_merged"])
    assert sentences.shape == (2, 6, 12)


def test_words_are_in_the_first_block_and_in_the_second_of_more_than_six() -> None:
    stages = small().stages
    assert [[block.inner is not None for block in stage.blocks] for stage in stages] == [
        [True],
        [True, True, *[False] * 5],
        [True, False],
        [True],
    ]


@pytest.mark.parametrize("image_size", [32, (40, 72)])
def test_grids_of_odd_sides_and_images_of_one_channel(image_size: Any) -> None:
    model = small(image_size=image_size, depths=(1, 1, 1, 1), channels=1)
    images = torch.randn(2, 1, *model.config.size, dtype=torch.float64)
    features, maps = model.forward_intermediates(images)
    assert [tuple(x.shape[2:]) for x in maps] == model.config.grids
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)
    assert bool(features.isfinite().all())


def test_tables_of_another_size_are_interpolated() -> None:
    sizes = {"depths": (1, 1, 1, 1)}
    old, new = small(image_size=64, **sizes), small(image_size=(96, 64), **sizes)
    state = old.state_dict()
    with torch.no_grad():
        old.stages[0].pair_scores.copy_(torch.randn(1, 2, 64, 4) + torch.randn(2, 1, 1))
        old.stages[1].pair_scores[0, 0] = torch.arange(4.0).view(1, 4)  # by key only: 2 x 2, later 3 x 2
        old.outer_positions.fill_(0.5)
    new.load_released(state)
    close(new.outer_positions, torch.full_like(new.outer_positions, 0.5))
    scores = new.stages[1].pair_scores[0, 0]
    close(scores, scores[:1].expand(scores.shape))
    keys = scores[0].view(3, 2)
    close(keys[:, 1] - keys[:, 0], torch.ones(3, dtype=torch.float64))
    close(keys[1], torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert keys[0, 0] < 0.5 and keys[2, 0] > 1.5


def test_convolutions_and_scores_of_pairs_begin_as_in_the_official_code() -> None:
    model = PyramidTNT(PyramidTNTConfig(**SMALL))
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == 11
    scaled = [module.weight.detach().flatten() * (9 * module.out_channels / 2) ** 0.5 for module in convolutions]
    assert abs(float(torch.cat(scaled).std()) - 1) < 0.1
    assert not any(module.bias.any() for module in convolutions)
    assert abs(float(model.stages[0].pair_scores.detach().std()) - 1) < 0.1


def test_other_mechanisms_mix_the_sentences() -> None:
    options: dict[str, Any] = {"depths": (1, 1, 1, 1), "image_size": 32, "pair_scores": False}
    for each in ({"mixer": "linear"}, {"mixer": "large_kernel", "reductions": (1, 1, 1, 1)}):
        model = small(**options, **each)
        model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
        assert all(x.grad is not None for x in model.parameters())
    refused("noncausal-cross", small, **options, mixer="large_kernel")
    refused("pair_scores=False", small, **options | {"pair_scores": True}, mixer="linear")


def test_what_cannot_be_is_refused() -> None:
    refused("multiples of 8 from 32", small, image_size=24)
    refused("multiples of 8 from 32", small, image_size=(64, 60))
    refused("of 4 stages", small, heads=(2, 2))
    refused("64 x 128, the size of the table", small(), torch.zeros(1, 3, 64, 64, dtype=torch.float64))
