"""Swin and Agent-Swin: parity with the official code and timm's, windows and their shift, and sizes of maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, load, recorded_state, refused, shaken

from regard.models.vision import create_backbone, read_backbone
from regard.models.vision.agent_swin import Swin, SwinConfig, Windows, reads_windows

TINY: dict[str, Any] = {
    "widths": (8, 16, 32),
    "depths": (2, 3, 2),
    "heads": (2, 2, 4),
    "patch": 2,
    "num_classes": 5,
    "image_size": 56,
}
AGENTS = ("agent", {"num_agents": 4, "agent_bias": "all"})
MIXED = [AGENTS, AGENTS, AGENTS, *["softmax"] * 4]
"""Agents in the first stage and in the second stage's first block, windows in the other blocks."""


def tiny(**changed: Any) -> Swin:
    return Swin(SwinConfig(**{**TINY, **changed})).double().eval()


def test_outputs_of_the_official_agent_swin() -> None:
    recording = load("vision_agent_swin")
    model = tiny(plan=MIXED)
    model.load_released(recorded_state("vision_agent_swin"))
    features, maps = model.forward_intermediates(recording["images"].double())
    for level, found in enumerate(maps):
        close(found.mean((2, 3)), recording[f"level_{level}"])
    close(model.forward_head(features), recording["output"])


def test_outputs_of_timms_swin_on_images_that_are_not_square() -> None:
    recording = load("vision_swin_timm")
    model = tiny(depths=(2, 2, 2), image_size=(32, 64), window=4)
    model.load_released(recorded_state("vision_swin_timm"))
    features, maps = model.forward_intermediates(recording["images"].double())
    for level, found in enumerate(maps):
        close(found.mean((2, 3)), recording[f"level_{level}"])
    close(model.forward_head(features), recording["output"])


@pytest.mark.parametrize("shifted", [False, True])
def test_attention_in_windows_is_attention_of_the_map_that_sees_its_own_window_alone(shifted: bool) -> None:
    """Shifted windows begin half a window later; they are cut at both borders of the map."""
    grid, sides = (6, 9), (2, 3)
    block = shaken(tiny(plan="softmax").stages[0].blocks[0])
    block.windows = shaken(Windows(2, sides, shifted))
    x = torch.randn(2, 54, 8, dtype=torch.float64)
    places = torch.cartesian_prod(torch.arange(6), torch.arange(9))
    shift = torch.tensor([1, 1]) if shifted else torch.tensor([0, 0])
    window = (places - shift).div(torch.tensor(sides), rounding_mode="floor")
    together = (window[:, None] == window[None]).all(-1)
    apart = (places[:, None] - places[None]).clamp(torch.tensor([-1, -2]), torch.tensor([1, 2]))
    bias = block.windows.table[:, apart[..., 0] + 1, apart[..., 1] + 2]
    layer = block.attention
    q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (layer.query, layer.key, layer.value))
    scores = (q @ k.mT / 2 + bias).masked_fill(~together, -torch.inf)
    close(block.attend(x, grid).output, layer.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


def test_windows_come_back_as_the_map() -> None:
    x = torch.randn(2, 8 * 6, 5)
    for shifted in (False, True):
        windows = Windows(1, (4, 2), shifted)
        assert torch.equal(windows.join(windows.split(x, (8, 6)), (8, 6)), x)


def test_a_map_is_read_row_by_row() -> None:
    """With image, kernels, tables and merging transposed, the output is the same."""
    agents = [AGENTS, AGENTS, "softmax", "softmax"]
    options = {"depths": (2, 2), "widths": (8, 16), "heads": (2, 2), "plan": agents, "window": 2}
    model, turned = tiny(**options, image_size=(16, 24)), tiny(**options, image_size=(24, 16))
    state = {}
    for name, value in model.state_dict().items():
        if "_bias." in name:  # four agents from 2 x 2 bins
            value = value[:, [0, 2, 1, 3]]
        if value.ndim == 4 or name.endswith(".table"):
            value = value.mT
        elif ".embedding." in name and value.shape[-1] == 32:  # merges four neighbours
            value = value.unflatten(-1, (2, 2, 8)).transpose(-2, -3).flatten(-3)
        for line, other in ((".rows", ".columns"), (".columns", ".rows")):
            if name.endswith(line):
                name = name.removesuffix(line) + other
                break
        state[name] = value
    turned.load_state_dict(state)
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    close(turned(x.mT), model(x))


@pytest.mark.parametrize(("size", "windows"), [(224, (7, 7)), (384, (12, 12)), (64, (4, 4)), ((96, 160), (6, 10))])
def test_windows_follow_the_size_of_the_images_and_fill_every_map(size: Any, windows: tuple[int, int]) -> None:
    _, config = read_backbone("swin_t", image_size=size)
    assert config.windows == windows
    for stride in config.strides:
        grid = config.size[0] // stride, config.size[1] // stride
        assert all(side % window == 0 or side < window for side, window in zip(grid, windows, strict=True))


def test_the_released_sizes_have_agents_where_the_official_configurations_have_them() -> None:
    for name, blocks in (("t", "AA AA AAAAAA BB"), ("s", f"AA AA {'B' * 18} BB"), ("b", f"AA AA AA{'B' * 16} BB")):
        _, config = read_backbone(f"agent_swin_{name}")
        found = " ".join("".join("B" if reads_windows(entry) else "A" for entry in stage) for stage in config.stages())
        assert found == blocks
    _, config = read_backbone("agent_swin_t")
    assert [stage[0][1].get("num_agents") for stage in config.stages()] == [9, 16, 49, None]


def test_tables_of_other_windows_are_resized_as_the_official_code_does() -> None:
    model, larger = tiny(plan=MIXED), tiny(plan=MIXED, image_size=64)
    larger.load_released(model.state_dict())
    table, found = (m.stages[2].blocks[0].windows.table for m in (model, larger))
    expected = torch.nn.functional.interpolate(table[None], (15, 15), mode="bicubic")[0]
    close(found, expected)


def test_losses_of_layers_in_windows_come_with_the_logits() -> None:
    plan = ["softmax", ("mixture_of_heads", {"shared_heads": 1, "active_heads": 1}), *["softmax"] * 5]
    model, x = tiny(plan=plan), torch.randn(2, 3, 56, 56).double()
    result = model.forward_with_losses(x)
    close(result.output, model(x))
    assert result.losses["load_balance"][1] == 1


def test_a_map_that_windows_of_whole_smaller_maps_cut_is_refused() -> None:
    net = tiny(image_size=24, patch=2, plan=[AGENTS, AGENTS, AGENTS, AGENTS, AGENTS, "softmax", "softmax"])
    assert net.config.windows == (6, 6) and net(torch.randn(1, 3, 24, 24).double()).shape == (1, 5)
    assert net(torch.randn(1, 3, 24, 48).double()).shape == (1, 5)
    refused("map of 3 x 4 is not filled by whole windows", net, torch.randn(1, 3, 24, 32).double())


def test_what_cannot_be_done_is_refused() -> None:
    refused("multiples of 8", tiny, image_size=60)
    refused("not filled by whole windows", tiny, window=5)
    refused("image_size=\\(48, 56\\)", tiny(), torch.zeros(1, 3, 48, 56, dtype=torch.float64))
    assert tiny(plan=[AGENTS] * 7)(torch.zeros(1, 3, 48, 56, dtype=torch.float64)).shape == (1, 5)
    refused("a number for each stage", tiny, heads=(2, 2))
    refused("a plan of 2 layers", create_backbone, "agent_swin_t", plan=["agent", "softmax"])
