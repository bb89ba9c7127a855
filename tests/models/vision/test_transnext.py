"""TransNeXt and MoH-ViT: parity with the official code, aggregated attention by its definition, and routed heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import close, load, recorded_state, refused, shaken
from torch import Tensor

from regard.engines.aggregated_attention import biases_of_places
from regard.models.vision import create_backbone
from regard.models.vision.transnext import AggregatedAttention, CosineAttention, TransNeXt, TransNeXtConfig

TINY: dict[str, Any] = {
    "widths": (8, 16, 24, 32),
    "depths": (1, 2, 1, 1),
    "heads": (2, 4, 4, 4),
    "expansions": (3, 3, 3, 3),
    "num_classes": 5,
    "image_size": 64,
}
ROUTED: dict[str, Any] = {"shared_heads": (2, 1, 2, 0), "active_heads": (0, 2, 1, 3)}
"""Stages with all heads shared, one shared, a router of each kind, and none shared."""


def tiny(**changed: Any) -> TransNeXt:
    return TransNeXt(TransNeXtConfig(**{**TINY, **changed})).double().eval()


@pytest.mark.parametrize(("name", "options"), [("transnext", {"trained_size": 96}), ("moh_transnext", ROUTED)])
def test_outputs_of_the_official_code(name: str, options: dict[str, Any]) -> None:
    """Compare maps and logits, and the load-balance loss of routed heads."""
    recording = load(f"vision_{name}")
    model = tiny(**options)
    model.load_released(recorded_state(f"vision_{name}"))
    images = recording["images"].double()
    features, maps = model.forward_intermediates(images)
    for level, found in enumerate(maps):
        close(found.mean((2, 3)), recording[f"level_{level}"])
    close(model.forward_head(features), recording["output"])
    losses = model.forward_with_losses(images).losses
    assert losses.keys() == ({"load_balance"} if "load_balance" in recording else set())
    for total, count in losses.values():
        close(total / count, recording["load_balance"])


def aggregated(options: dict[str, Any], grid: tuple[int, int], stage: int = 2) -> tuple[AggregatedAttention, Tensor]:
    """A layer with weights away from their initial values, and tokens for it."""
    size = (grid[0] * 16, grid[1] * 16)
    layer = TransNeXt(TransNeXtConfig(**{**TINY, "image_size": size, **options})).stages[stage].blocks[0].attention
    assert isinstance(layer, AggregatedAttention)
    return shaken(layer, 0.4), torch.randn(2, grid[0] * grid[1], 24, dtype=torch.float64)  # type: ignore[return-value]


def test_aggregated_attention_is_one_softmax_over_a_window_and_the_pooled_map_of_each_place() -> None:
    """Computed place by place on a 4 x 6 map, with 5 x 5 windows that are cut at its borders."""
    grid, pooled = (4, 6), (2, 3)
    layer, x = aggregated({"window": 5}, grid)
    heads = [m(x).unflatten(-1, (4, 6)) for m in (layer.query, layer.key, layer.value)]
    far = F.gelu(layer.reduction(x)).mT.unflatten(-1, grid)
    far = layer.reduction_norm(F.avg_pool2d(far, 2).flatten(2).mT)
    far_keys, far_values = (m(far).unflatten(-1, (4, 6)) for m in (layer.key, layer.value))
    expected = torch.zeros(2, 24, 4, 6, dtype=torch.float64)
    for place in range(24):
        row, column = divmod(place, 6)
        around = [(row + i, column + j) for i in range(-2, 3) for j in range(-2, 3)]
        on_map = [number for number, (i, j) in enumerate(around) if 0 <= i < 4 and 0 <= j < 6]
        near = [around[number][0] * 6 + around[number][1] for number in on_map]
        seen = torch.tensor(float(len(near) + 6), dtype=torch.float64)
        for head in range(4):
            q, k, v = (each[:, :, head] for each in heads)
            direction = F.normalize(q[:, place], dim=-1)
            moved = direction + layer.query_embedding[head, 0]
            moved = moved * F.softplus(layer.temperature[head, 0, 0]) * seen.log()
            keys = F.normalize(torch.cat([k[:, near], far_keys[:, :, head]], 1), dim=-1)
            apart = torch.tensor(
                [(row - 2 * i - 0.5, column - 2 * j - 0.5) for i in range(2) for j in range(3)]
            ).double()
            apart = 8 * apart / torch.tensor([3.0, 5.0])
            read = apart.sign() * (apart.abs() + 1).log2() / 3
            bias = layer.places.down(F.relu(layer.places.up(read)))[:, head]
            bias = torch.cat([layer.window_bias[head, on_map], bias])
            weights = ((moved[:, None] * keys).sum(-1) + bias).softmax(-1)
            learned = direction @ layer.window_tokens[head] + layer.window_weights[head, 0]
            weights = weights + F.pad(learned[:, on_map], (0, len(pooled) * 3))
            values = torch.cat([v[:, near], far_values[:, :, head]], 1)
            expected[:, place, head] = (weights[..., None] * values).sum(1)
    close(layer(x, grid).output, layer.output(expected.flatten(2)))


def test_pooled_places_that_lie_alike_have_the_same_bias_and_those_turned_over_another() -> None:
    layer, _ = aggregated({}, (4, 6))
    bias = biases_of_places(layer.places((4, 6), 2, (4, 6)), (4, 6), 2)
    bias = bias.unflatten(-1, (2, 3)).unflatten(1, (4, 6))  # (H, rows, columns, rows, columns)
    close(bias[:, :2, :4, 0, 0], bias[:, 2:, 2:, 1, 1])
    assert (bias[:, 0, 0, 0, 1] - bias[:, 0, 0, 1, 0]).abs().min() > 1e-9


def test_a_map_is_read_row_by_row() -> None:
    """With image, kernels and windows transposed, the output is the same."""
    model, turned = tiny(image_size=(64, 96)), tiny(image_size=(96, 64))
    state = {}
    for name, value in shaken(model).state_dict().items():
        if value.ndim == 4:
            value = value.mT
        elif ".window_" in name:
            value = value.unflatten(-1, (3, 3)).mT.flatten(-2)
        elif ".places.up.weight" in name:
            value = value.flip(-1)
        state[name] = value
    turned.load_state_dict(state)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    close(turned(x.mT), model(x))


def test_equal_routers_with_every_head_active_leave_transnext() -> None:
    routed, plain = shaken(tiny(shared_heads=(1, 2, 0, 2), active_heads=(1, 2, 4, 2))), tiny()
    with torch.no_grad():
        for name, parameter in routed.named_parameters():
            if ".router." in name:
                parameter.zero_()
    plain.load_state_dict({name: value for name, value in routed.state_dict().items() if ".router." not in name})
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    result = routed.eval().forward_with_losses(x)
    close(result.output, plain(x))
    total, count = result.losses["load_balance"]
    close(total, torch.tensor(1.0 + 2 * 2 + 4 + 2, dtype=torch.float64))  # the sum of k over layers
    assert count == 5


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("moh_transnext_b_75", [(4, 0), (8, 0), (4, 8), (5, 16)]),
        ("moh_transnext_b_50", [(2, 2), (2, 4), (2, 6), (4, 8)]),
    ],
)
def test_stages_with_a_reduction_aggregate_and_the_last_one_reads_all(name: str, heads: list[tuple[int, int]]) -> None:
    with torch.device("meta"):
        first = [stage.blocks[0].attention for stage in create_backbone(name).stages]
    assert [type(attention) for attention in first] == [AggregatedAttention] * 3 + [CosineAttention]
    routers = [attention.router.config for attention in first]
    assert [(router.shared_heads, router.active_heads) for router in routers] == heads


def test_temperatures_and_reductions_begin_as_in_the_official_code() -> None:
    attention = AggregatedAttention(TransNeXtConfig(), 0)
    close(F.softplus(attention.temperature), torch.full_like(attention.temperature, 1 / 0.24), tolerance=1e-6)
    with torch.no_grad():
        fresh = TransNeXt(TransNeXtConfig(**{**TINY, "widths": (96, 16, 24, 32)})).stages[0].blocks[0].attention
    deviation = fresh.reduction.weight.std() * math.sqrt(96 / 2)
    assert 0.95 < deviation < 1.05  # from 96 x 96 draws


def test_what_cannot_be_done_is_refused() -> None:
    refused("multiples of 32", tiny, image_size=80)
    refused("odd sides.*try window=5", tiny, window=4)
    refused("both, or neither", tiny, shared_heads=(1, 1, 1, 1))
    refused("a number for each stage", tiny, active_heads=(1, 1), shared_heads=(1, 1, 1, 1))
    refused("0 to 2", tiny, shared_heads=(3, 1, 1, 1), active_heads=(0, 1, 1, 1))
    refused("multiples of 2", tiny, widths=(9, 16, 24, 32))
