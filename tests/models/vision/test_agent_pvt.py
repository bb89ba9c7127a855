"""PVT and Agent-PVT: parity with the official code, reduced keys, and maps that are not square."""

from __future__ import annotations

import math

import pytest
import torch
from support import close, load, recorded_state, refused, shaken
from torch import Tensor

from regard.contract import Context
from regard.models.vision.agent_pvt import PVT, Block, PVTConfig

TINY = {
    "widths": (8, 16, 24, 32),
    "depths": (1, 2, 1, 1),
    "heads": (1, 2, 3, 4),
    "expansions": (2, 2, 2, 2),
    "num_classes": 5,
    "image_size": 64,
}
AGENTS = {
    "plan": [
        *(("agent", {"num_agents": number, "agent_bias": "all"}) for number in (4, 9)),
        "softmax",
        ("agent", {"num_agents": 1, "agent_bias": "all"}),
    ],
    "reductions": (2, 1, 2, 1),
    "class_token": False,
}
"""Agent attention with and without a reduction, and softmax with one."""


def tiny(**changed: object) -> PVT:
    return PVT(PVTConfig(**{**TINY, **changed})).double().eval()


@pytest.mark.parametrize(("name", "options"), [("pvt", {}), ("agent_pvt", AGENTS)])
def test_outputs_of_the_official_code(name: str, options: dict[str, object]) -> None:
    """Values of a reduced map are interpolated before their convolution; PVT has a class token in its last stage."""
    recording = load(f"vision_{name}")
    model = tiny(**options)
    model.load_released(recorded_state(f"vision_{name}"))
    features, (first,) = model.forward_intermediates(recording["images"].double(), indices=[0])
    close(first.flatten(2).mT.contiguous(), recording["first_stage"])
    close(model.forward_head(features), recording["output"])


@pytest.mark.parametrize("line", ["rows", "columns"])
def test_agent_biases_of_a_row_are_those_of_a_whole_row_of_the_reduced_map(line: str) -> None:
    """Agent a gathers from row (or column) a of the reduced map, and the two rows of queries above it read only that agent."""
    grid, reduced = ((6, 4), (3, 2)) if line == "rows" else ((4, 6), (2, 3))
    config = PVTConfig(**{**TINY, **AGENTS, "image_size": (96, 64) if line == "rows" else (64, 96)})
    block = Block(config, 0, 0.0).double()
    layer, x = block.attention, torch.randn(2, 24, 8, dtype=torch.float64)
    memory = torch.randn(2, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (*layer.query.parameters(), *layer.key.parameters(), *layer.merge.parameters()):
            parameter.zero_()
        for tables, sides, step in ((layer.projection.gather_bias, reduced, 1), (layer.projection.share_bias, grid, 2)):
            for table in tables.parameters():
                table.zero_()
            side = sides[0 if line == "rows" else 1]
            own = torch.arange(4)[:, None] == torch.arange(side) // step
            setattr(tables, line, torch.nn.Parameter(-1e3 * (~own).double().expand(1, 4, side)))
    found = layer(x, memory, context=Context(grid=grid)).output
    values = layer.value(memory).unflatten(1, reduced)
    mean = values.mean(2 if line == "rows" else 1, keepdim=True).expand_as(values)
    mean = mean.repeat_interleave(2, 1).repeat_interleave(2, 2)
    close(found, layer.output(mean.flatten(1, 2)))


@pytest.mark.parametrize("options", [{}, AGENTS], ids=["pvt", "agent"])
def test_another_image_size_is_what_resized_tables_give(options: dict[str, object]) -> None:
    model, x = tiny(**options), torch.randn(2, 3, 96, 128, dtype=torch.float64)
    again = tiny(**options, image_size=(96, 128))
    again.load_released(model.state_dict())
    close(model(x), again(x))


def test_an_image_is_read_row_by_row() -> None:
    """With image, kernels and tables transposed, the output is the same: rows and columns are never mixed up."""
    options = {**AGENTS, "image_size": (64, 128)}
    model, turned = tiny(**options), tiny(**{**options, "image_size": (128, 64)})
    state = {}
    for name, value in model.state_dict().items():
        if "_bias." in name:  # agents come from a square of bins, row by row
            side = math.isqrt(value.shape[1])
            value = value.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
        if value.ndim == 4:
            value = value.mT
        elif name.endswith(".positions"):
            grid = model.stages[int(name.split(".")[1])].grid
            value = value.unflatten(0, grid).transpose(0, 1).flatten(0, 1)
        for line, other in ((".rows", ".columns"), (".columns", ".rows")):
            if name.endswith(line):
                name = name.removesuffix(line) + other
                break
        state[name] = value
    turned.load_state_dict(state)
    x = torch.randn(2, 3, 64, 128, dtype=torch.float64)
    close(turned(x.mT), model(x))


def test_agents_of_the_last_stage_may_stand_beside_a_class_token() -> None:
    options = {**AGENTS, "class_token": True}
    model: PVT = tiny(**options).train()
    x: Tensor = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model(x).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_losses_of_layers_come_with_the_logits() -> None:
    model, x = tiny(plan=["softmax", "softmax", "mixture_of_heads", "softmax"]), torch.randn(2, 3, 64, 64).double()
    result = model.forward_with_losses(x)
    close(result.output, model(x))
    assert result.losses["load_balance"][1] == 1


def test_stochastic_depth_leaves_out_each_branch_of_each_example_alone() -> None:
    block, x = tiny(drop_path=0.6).stages[3].blocks[0], torch.randn(64, 4, 32, dtype=torch.float64)
    with torch.no_grad():
        found = block.train()(x, (2, 2)).output
        mixed = x + block.attend(block.norm1(x), (2, 2)).output / 0.4
        kept = [y + block.mlp(block.norm2(y)) / 0.4 for y in (x, mixed)]
    same = torch.stack([(found - y).abs().amax((1, 2)) < 1e-12 for y in (x, mixed, *kept)])
    assert same.any(0).all()
    assert same.any(1).all()


def test_dropped_tokens_and_branches_leave_the_norm_and_the_head() -> None:
    model = shaken(tiny(branch_dropout=1 - 1e-9)).train()
    found = model(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    close(found, model.head(model.norm.bias).expand(2, -1))


def test_what_cannot_be_done_is_refused() -> None:
    refused("multiples of 32", tiny, image_size=48)
    refused("try 64 x 96 pixels", tiny(), torch.zeros(1, 3, 64, 88, dtype=torch.float64))
    refused("class_token=False", tiny, reductions=(1, 1, 1, 2))
    refused("a number for each stage", tiny, heads=(1, 2))
    refused("dwc='input'", tiny, plan=[("agent", {"num_agents": 4, "dwc": "input"})] * 4, class_token=False)
