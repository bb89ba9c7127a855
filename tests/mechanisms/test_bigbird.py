"""Tests specific to BigBird: its layout by row, its draws, padding of long rows, and parity."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import calls, check_recorded, close, load, qkv
from torch import Tensor

from regard.contract import Mask
from regard.create import create_layer
from regard.integrations.export import export
from regard.mechanisms.bigbird import MECHANISM, Config, visible_blocks

SMALL = {"block": 2, "random_blocks": 1}
OPTIONS = [
    SMALL,
    {"block": 3, "random_blocks": 2, "seed": 5},
    {"block": 2, "random_blocks": 0},
    {"block": 4, "random_blocks": 1, "first_blocks": 2, "last_blocks": 0},
    {"block": 1, "random_blocks": 3, "neighbours": 0},
    {"block": 2, "random_blocks": 2, "first_blocks": 0, "last_blocks": 0, "neighbours": 2},
]

run = calls(MECHANISM, "noncausal-self")


def layout(options: dict, n: int, heads: int = 2) -> Tensor:
    config = Config(**options)
    count = math.ceil(n / config.block)
    return visible_blocks(config, torch.tensor([n]), count, heads)[0].expand(heads, -1, -1)


def by_token(blocks: Tensor, size: int, n: int) -> Tensor:
    return blocks.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :n, :n]


def without_draws(options: dict, n: int) -> Tensor:
    """The blocks that are seen whatever is drawn, by the definition in words."""
    config = Config(**options)
    count = math.ceil(n / config.block)
    ends = [*range(config.first_blocks), *range(count - config.last_blocks, count)]
    seen = torch.zeros(count, count, dtype=torch.bool)
    for beta in range(count):
        for gamma in range(count):
            seen[beta, gamma] = beta in ends or gamma in ends or abs(beta - gamma) <= config.neighbours
    return seen | (n < config.shortest)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [1, 13, 25, 40, 67])
def test_each_middle_block_sees_as_many_more_as_are_drawn_and_short_rows_see_all(options, n):
    config, found, fixed = Config(**options), layout(options, n), without_draws(options, n)
    assert (found | ~fixed).all()
    drawn, middle = (found & ~fixed).sum(-1), ~fixed.all(-1)
    assert (drawn[:, middle] == config.random_blocks).all() and (drawn[:, ~middle] == 0).all()
    assert middle.any() == (n >= config.shortest)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [1, 13, 40, 67])
def test_equals_dense_attention_over_the_blocks_seen_with_a_bias_too(options, n):
    tensors, bias = qkv(n), torch.randn(2, 1, n, n, dtype=torch.float64)
    seen = by_token(layout(options, n), options["block"], n)
    close(run(tensors, options).output, F.scaled_dot_product_attention(*tensors.values(), attn_mask=seen))
    expected = F.scaled_dot_product_attention(*tensors.values(), attn_mask=bias.masked_fill(~seen, -torch.inf))
    close(run(tensors, options, mask=Mask(bias=bias)).output, expected)


def test_the_usual_layout_has_eight_blocks_a_row():
    """g + 3 + r with g = 2 and r = 3; in rows next to the ends, a neighbour is also a global block."""
    found = layout({}, 64 * 20, heads=3)
    assert (found[:, 2:-2].sum(-1) == 8).all()
    assert (found[:, [1, -2]].sum(-1) == 7).all()
    assert found[:, [0, -1]].all() and found[:, :, [0, -1]].all()


def test_draws_differ_by_head_seed_and_row_and_repeat():
    found, fixed = layout(SMALL, 80, heads=4), without_draws(SMALL, 80)
    assert torch.equal(found, layout(SMALL, 80, heads=4))
    assert len({tuple(head.flatten().tolist()) for head in found}) == 4
    assert not torch.equal(found, layout({**SMALL, "seed": 1}, 80, heads=4))
    assert len(set((found[0] & ~fixed).nonzero()[:, 1].tolist())) > 10
    # all blocks that may be drawn are drawn about equally often
    many = layout({**SMALL, "random_blocks": 2}, 80, heads=2000)[:, 20].double().mean(0)[~fixed[20]]
    assert many.min() > 0.03 and many.max() < 0.09  # expected: 2 of 35


@pytest.mark.parametrize("options", OPTIONS)
def test_a_padded_row_has_the_blocks_that_it_has_alone(options):
    """This covers short rows (full attention), rows that end inside a block, and padding anywhere."""
    tensors, valid = qkv(50, batch=5), torch.rand(5, 50) < torch.tensor([0.2, 0.5, 0.8, 0.95, 1.0])[:, None]
    found = run(tensors, options, mask=Mask(valid=valid)).output
    for row in range(5):
        alone = {name: x[row : row + 1, :, valid[row]] for name, x in tensors.items()}
        close(found[row : row + 1, :, valid[row]], run(alone, options).output)
        assert (found[row, :, ~valid[row]] == 0).all()


def test_two_layers_connect_any_two_tokens():
    first, second = (create_layer("bigbird", 8, 2, pattern="noncausal-self", **SMALL).double() for _ in range(2))
    x = torch.randn(1, 41, 8, dtype=torch.float64, requires_grad=True)
    once = first(x).output
    twice = second(once).output
    near, far = (torch.autograd.grad(y[0, 20].sum(), x, retain_graph=True)[0][0] for y in (once, twice))
    assert (near.abs().sum(-1) == 0).any() and (far.abs().sum(-1) > 0).all()


def test_parity_with_transformers():
    arrays, options = load("bigbird_transformers"), {"block": 2, "random_blocks": 2}
    drawn = layout(options, 26) & ~without_draws(options, 26)
    for head, rows in enumerate(arrays["random"]):
        assert [row.nonzero()[:, 0].tolist() for row in drawn[head, 1:-1]] == rows.tolist()
    tensors = {name: arrays[name].requires_grad_() for name in "qkv"}
    result = run(tensors, options, want={"weights"})
    close(result.extras["weights"], arrays["attn"], 1e-10)
    output = result.output.transpose(1, 2).reshape(arrays["out"].shape)
    check_recorded(arrays, output, tensors, 1e-10)


@pytest.mark.parametrize("options", [SMALL, {}])
def test_a_program_serves_lengths_with_and_without_hidden_blocks(options):
    layer = create_layer("bigbird", 8, 2, pattern="noncausal-self", **options).double().eval()
    program = export(layer, torch.randn(2, 7, 8, dtype=torch.float64)).module()
    for n in (3, 40, Config(**options).shortest + 5):
        x = torch.randn(2, n, 8, dtype=torch.float64)
        close(program(x).output, layer(x).output)
