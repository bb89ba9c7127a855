"""Tests specific to Activator: as published, tokens do not interact; its repaired forms see neighbours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import calls, close, refused
from torch import Tensor

from regard.contract import Context, Pattern, Shape
from regard.create import create_layer
from regard.mechanisms.activator import MECHANISM, sample_inputs

run = calls(MECHANISM, "noncausal-self")


def inputs(n: int = 9, grid: tuple[int, ...] | None = None, channels: int = 6, **options) -> dict[str, Tensor]:
    call = {"dtype": torch.float64, "pattern": Pattern.NONCAUSAL_SELF, "config": MECHANISM.options(**options)}
    sizes = {"d": channels}
    return sample_inputs(torch.default_generator, batch=2, n=n, m=n, sizes=sizes, grid=grid, **call)


def unit(x: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The definition, written with torch's functions."""
    u = F.layer_norm(F.gelu(F.linear(tokens, x["gate"], x["gate_bias"])), (7,), x["norm"], x["norm_bias"])
    v = F.layer_norm(F.linear(tokens, x["value"], x["value_bias"]), (7,), x["norm"], x["norm_bias"])
    return F.linear(u * v, x["down"], x["down_bias"])


def test_as_published_each_token_is_alone_and_every_pattern_is_the_same_map():
    x, order = inputs(), torch.randperm(9)
    found = run(x).output
    close(found, unit(x, x["x"]))
    close(run({**x, "x": x["x"][:, order]}).output, found[:, order])
    close(run({**x, "x": x["x"][:, :4]}).output, found[:, :4])
    close(run(x, pattern="causal-self").output, found)
    state = run(x, pattern="causal-self", return_state=True).state
    assert state.inputs.numel() == 0 and MECHANISM.cost(Shape(1, 1, 9, 9, 6, 6), MECHANISM.options()).state == 0


@pytest.mark.parametrize("mixing", ["none", "shift", "convolution"])
@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self"])
def test_tokens_reach_neighbours_alone(mixing, pattern):
    x, reach = inputs(mixing=mixing), {"none": 0, "shift": 1, "convolution": 1 + (pattern == "causal-self")}[mixing]
    small = {**x, "x": x["x"][:1]}
    call = {"options": {"mixing": mixing}, "pattern": pattern}
    jacobian = torch.func.jacrev(lambda t: run({**small, "x": t}, **call).output)(small["x"])
    meets = jacobian[0, :, :, 0].abs().amax((1, 3)) > 0
    apart = torch.arange(9)[:, None] - torch.arange(9)
    expected = (apart >= 0) & (apart <= reach) if pattern == "causal-self" else apart.abs() <= reach
    assert torch.equal(meets, expected)


def test_without_the_last_map_nothing_is_left():
    x = inputs()
    assert (
        run({**x, "down": torch.zeros_like(x["down"]), "down_bias": torch.zeros_like(x["down_bias"])}).output == 0
    ).all()


def test_plain_norms_make_the_value_s_scale_indifferent_and_the_gate_s_not():
    x = inputs()
    x |= {"norm": torch.ones_like(x["norm"]), "norm_bias": torch.zeros_like(x["norm_bias"]), "x": 1e4 * x["x"]}
    plain = run(x).output
    close(run({**x, "value": 5 * x["value"], "value_bias": 5 * x["value_bias"]}).output, plain, 1e-9)  # up to eps
    shifted = run({**x, "gate_bias": x["gate_bias"] + 1e4}).output  # a norm before the activation would cancel it
    assert (shifted - plain).abs().max() > 1e-2


def test_separate_norms_are_those_that_are_given():
    x = inputs(norm="separate")
    alike = {**x, "value_norm": x["norm"], "value_norm_bias": x["norm_bias"]}
    shared = {name: t for name, t in x.items() if not name.startswith("value_norm")}
    close(run(alike).output, run(shared).output)
    assert (run(x).output - run(shared).output).abs().max() > 1e-3


def test_a_shift_takes_each_part_of_the_channels_from_another_neighbour():
    x = inputs(12, (3, 4), 10)
    image = F.pad(x["x"].unflatten(1, (3, 4)), (0, 0, 1, 1, 1, 1))
    parts = [
        image[:, 1 + down : 4 + down, 1 + right : 5 + right]
        for down, right in ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))
    ]
    moved = torch.cat([part[..., 2 * i : 2 * i + 2] for i, part in enumerate(parts)], -1).flatten(1, 2)
    close(run(x, {"mixing": "shift"}, grid=(3, 4)).output, unit(x, moved))
    before = F.pad(x["x"], (0, 0, 1, 0))[:, :-1]
    late = torch.cat([x["x"][..., :5], before[..., 5:]], -1)
    close(run(x, {"mixing": "shift"}, pattern="causal-self").output, unit(x, late))


@pytest.mark.parametrize(
    ("grid", "pattern"), [(None, "noncausal-self"), (None, "causal-self"), ((3, 4), "noncausal-self")]
)
def test_a_convolution_starts_as_the_identity(grid, pattern):
    torch.manual_seed(0)
    axes = 1 if grid is None else 2
    layer = create_layer("activator", 6, pattern=pattern, mixing="convolution", axes=axes, hidden=7)
    plain = create_layer("activator", 6, pattern=pattern, hidden=7)
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if "filter" not in name})
    x = torch.randn(2, 12, 6)
    close(layer(x, context=Context(grid=grid)).output, plain(x, context=Context(grid=grid)).output, 1e-6)


def test_what_cannot_be_is_refused():
    x = inputs(mixing="convolution")
    refused("mixing='none' with filter and filter_bias", run, x)
    refused("mixing='convolution' with no filter", run, inputs(), {"mixing": "convolution"})
    refused("3 taps on 2 axes", run, x, {"mixing": "convolution"}, grid=(3, 3))
    refused("grid of 4 axes", run, inputs(), {"mixing": "shift"}, grid=(3, 3, 1, 1))
    layer = create_layer("activator", 6, pattern="noncausal-self", mixing="convolution")
    refused("filter of 1 axes.*axes=2", layer, torch.zeros(1, 9, 6), context=Context(grid=(3, 3)))
    refused("axes=2", create_layer, "activator", 6, pattern="causal-self", axes=2)
