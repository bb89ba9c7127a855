"""CSWin and Agent-CSwin: parity with the official code, stripes by their definition, and sizes of maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, load, recorded_state, refused, shaken

from regard.contract import Context
from regard.models.vision import create_backbone, read_backbone
from regard.models.vision.agent_cswin import CSWin, CSWinConfig, StripeAttention

TINY: dict[str, Any] = {
    "widths": (8, 16, 32, 64),
    "depths": (1, 2, 2, 1),
    "heads": (2, 2, 4, 4),
    "stripes": (1, 2, 2),
    "num_classes": 5,
    "image_size": 64,
}
AGENTS = ("agent", {"num_agents": 4, "agent_bias": "all"})
MIXED = ["softmax", AGENTS, AGENTS, *["softmax"] * 3]
"""Agents in the second stage, stripes in the first and third, attention to the whole map in the last."""


def tiny(**changed: Any) -> CSWin:
    return CSWin(CSWinConfig(**{**TINY, **changed})).double().eval()


def test_outputs_of_the_official_code() -> None:
    recording = load("vision_agent_cswin")
    model = tiny(plan=MIXED)
    model.load_released(recorded_state("vision_agent_cswin"))
    features, maps = model.forward_intermediates(recording["images"].double())
    for level, found in enumerate(maps):
        close(found.mean((2, 3)), recording[f"level_{level}"])
    close(model.forward_head(features), recording["output"])


def test_half_of_the_heads_read_columns_and_half_of_them_rows() -> None:
    """Stripes are two rows or three columns of a 4 x 6 map; convolutions end at the stripes' borders."""
    grid, width = (4, 6), 8
    layer = shaken(StripeAttention(width, 4, (2, 3)))
    x = torch.randn(2, 24, width, dtype=torch.float64)
    places = torch.cartesian_prod(torch.arange(4), torch.arange(6))
    q, k, v = (m(x).unflatten(-1, (4, 2)).transpose(1, 2) for m in (layer.query, layer.key, layer.value))
    found = torch.zeros(2, 24, width, dtype=torch.float64)
    for half, stripe in enumerate((places[:, 1] // 3, places[:, 0] // 2)):
        together = stripe[:, None] == stripe[None]
        heads = slice(2 * half, 2 * half + 2)
        scores = (q[:, heads] @ k[:, heads].mT / 2**0.5).masked_fill(~together, -torch.inf)
        out = (scores.softmax(-1) @ v[:, heads]).transpose(1, 2).flatten(2)
        values = v[:, heads].transpose(1, 2).flatten(2)
        for number in stripe.unique():
            own = torch.where((stripe == number)[:, None], values, 0).mT.unflatten(-1, grid)
            local = layer.convolutions[half](own).flatten(2).mT
            out = out + torch.where((stripe == number)[:, None], local, 0)
        found[..., 4 * half : 4 * half + 4] = out
    close(layer(x, context=Context(grid=grid)).output, layer.output(found))


def test_a_map_is_read_row_by_row() -> None:
    """With the image, kernels and tables transposed and the stripes' halves swapped, the output is the same."""
    plan = [AGENTS, "softmax", "softmax"]
    options = {"widths": (8, 16, 16), "depths": (1, 1, 1), "heads": (2, 2, 2), "stripes": (1, 2), "plan": plan}
    model, turned = tiny(**options, image_size=(32, 48)), tiny(**options, image_size=(48, 32))
    own, state = shaken(model).state_dict(), {}
    for name, value in own.items():
        if "_bias." in name:  # four agents from 2 x 2 bins
            value = value[:, [0, 2, 1, 3]]
        if value.ndim == 4:
            value = value.mT
        for line, other in ((".rows", ".columns"), (".columns", ".rows")):
            if name.endswith(line):
                name = name.removesuffix(line) + other
                break
        if name.startswith("stages.1.blocks.0.attention."):  # the block with stripes
            if ".convolutions." in name:
                number = int(name.split(".")[6])
                name = name.replace(f"convolutions.{number}", f"convolutions.{1 - number}")
            elif name.endswith(".output.weight"):
                value = value.roll(8, 1)
            elif ".output." not in name:
                value = value.roll(8, 0)
        state[name] = value
    turned.load_state_dict(state)
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    close(turned(x.mT), model(x))


@pytest.mark.parametrize(("size", "stripes"), [(224, 7), (384, 12), (64, 2)])
def test_stripes_of_later_stages_are_as_wide_as_the_last_map(size: int, stripes: int) -> None:
    _, config = read_backbone("cswin_t", image_size=size)
    assert [config.stripes_of(stage) for stage in range(4)] == [(1, 1), (2, 2), (stripes, stripes), None]


def test_the_released_sizes_have_agents_in_the_first_two_stages() -> None:
    for name, depths in (("t", (2, 4, 18, 1)), ("s", (3, 6, 29, 2)), ("b", (3, 6, 29, 2))):
        _, config = read_backbone(f"agent_cswin_{name}")
        names = [{entry[0] for entry in entries} for entries in config.stages()]
        assert names == [{"agent"}, {"agent"}, {"softmax"}, {"softmax"}] and config.depths == depths
        assert [config.stages()[stage][0][1]["num_agents"] for stage in range(2)] == [9, 16]


def test_losses_of_layers_come_with_the_logits() -> None:
    plan = ["softmax", ("mixture_of_heads", {"shared_heads": 1, "active_heads": 1}), *["softmax"] * 4]
    model, x = tiny(plan=plan), torch.randn(2, 3, 64, 64).double()
    result = model.forward_with_losses(x)
    close(result.output, model(x))
    assert result.losses["load_balance"][1] == 1


def test_what_cannot_be_done_is_refused() -> None:
    refused("multiples of 32", tiny, image_size=80)
    refused("not filled by whole stripes", tiny, stripes=(1, 3, 2))
    refused(
        "image_size=\\(64, 64\\) and stripes=\\(1, 0, 2\\)",
        tiny(stripes=(1, 3, 2), image_size=96),
        torch.zeros(1, 3, 64, 64, dtype=torch.float64),
    )
    refused("an even number", tiny, heads=(1, 2, 4, 4))
    refused("no options", tiny, plan=[("softmax", {"softcap": 3.0}), *["softmax"] * 5])
    refused("3 numbers", tiny, stripes=(1, 2, 2, 2))
    refused("a plan of 1 layers", create_backbone, "agent_cswin_t", plan=["agent"])
