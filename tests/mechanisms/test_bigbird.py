"""What is peculiar to BigBird: its layout by row, its draws, full attention on short rows, and parity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.mechanisms.bigbird import MECHANISM, Config, cost, visible_blocks, visible_pairs

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
SMALL = {"block": 2, "random_blocks": 1}
OPTIONS = [
    SMALL,
    {"block": 3, "random_blocks": 2, "seed": 5},
    {"block": 2, "random_blocks": 0},
    {"block": 4, "random_blocks": 1, "first_blocks": 2, "last_blocks": 0},
    {"block": 1, "random_blocks": 3, "neighbours": 0},
    {"block": 2, "random_blocks": 2, "first_blocks": 0, "last_blocks": 0, "neighbours": 2},
]


def inputs(n: int, batch: int = 2, heads: int = 2) -> dict[str, Tensor]:
    return {name: torch.randn(batch, heads, n, 4, dtype=torch.float64) for name in "qkv"}


def run(tensors: dict[str, Tensor], options: dict, **call: Any) -> Tensor:
    return apply(MECHANISM, tensors, pattern="noncausal-self", config=Config(**options), **call).output


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def layout(options: dict, n: int, heads: int = 2) -> Tensor:
    config = Config(**options)
    count = math.ceil(n / config.block)
    return visible_blocks(config, torch.tensor([n]), count, heads)[0].expand(heads, -1, -1)


def without_draws(config: Config, n: int) -> Tensor:
    """Blocks that are seen whatever is drawn, from the definition in words."""
    count = math.ceil(n / config.block)
    ends = [*range(config.first_blocks), *range(count - config.last_blocks, count)]
    seen = torch.zeros(count, count, dtype=torch.bool)
    for beta in range(count):
        for gamma in range(count):
            seen[beta, gamma] = beta in ends or gamma in ends or abs(beta - gamma) <= config.neighbours
    return seen | (n < config.shortest)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [1, 13, 25, 40, 67])
def test_each_middle_block_sees_as_many_more_as_are_drawn(options, n):
    config, found = Config(**options), layout(options, n)
    fixed = without_draws(config, n)
    assert (found | ~fixed).all()
    drawn = (found & ~fixed).sum(-1)
    middle = ~fixed.all(-1)
    assert (drawn[:, middle] == config.random_blocks).all() and (drawn[:, ~middle] == 0).all()
    assert middle.any() == (n >= config.shortest)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [1, 13, 40, 67])
def test_equals_masked_dense_attention(options, n):
    tensors, size = inputs(n), Config(**options).block
    seen = layout(options, n).repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :n, :n]
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors.values(), attn_mask=seen)
    close(run(tensors, options), expected)
    close(run(tensors, options, form="reference"), expected)


def test_the_usual_layout_has_eight_blocks_a_row():
    """g + 3 + r with g = 2 and r = 3; the blocks beside the ends share one with them."""
    found = layout({}, 64 * 20, heads=3)
    assert (found[:, 2:-2].sum(-1) == 8).all()
    assert (found[:, [1, -2]].sum(-1) == 7).all()
    assert found[:, [0, -1]].all() and found[:, :, [0, -1]].all()


def test_draws_differ_by_head_seed_and_row_and_repeat():
    found = layout(SMALL, 80, heads=4)
    assert torch.equal(found, layout(SMALL, 80, heads=4))
    assert len({tuple(head.flatten().tolist()) for head in found}) == 4
    assert not torch.equal(found, layout({**SMALL, "seed": 1}, 80, heads=4))
    rows = (found[0] & ~without_draws(Config(**SMALL), 80)).nonzero()
    assert len(set(rows[:, 1].tolist())) > 10
    # every block that may be drawn is, about equally often
    many = layout({**SMALL, "random_blocks": 2}, 80, heads=2000)[:, 20].double().mean(0)
    free = ~without_draws(Config(**SMALL), 80)[20]
    assert many[free].min() > 0.03 and many[free].max() < 0.09  # 2 of 35


@pytest.mark.parametrize("options", OPTIONS)
def test_rows_shorter_than_the_layout_have_full_attention(options):
    n = Config(**options).shortest - 1
    tensors = inputs(n)
    softmax = apply(get_mechanism("softmax"), tensors, pattern="noncausal-self").output
    close(run(tensors, options), softmax)
    longer = inputs(n + 40)
    other = apply(get_mechanism("softmax"), longer, pattern="noncausal-self").output
    assert not torch.allclose(run(longer, options), other)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_padded_row_has_the_blocks_that_it_has_alone(options):
    """Short rows (full attention), rows that end inside a block, and padding anywhere."""
    tensors = inputs(50, batch=5)
    valid = torch.rand(5, 50) < torch.tensor([0.2, 0.5, 0.8, 0.95, 1.0])[:, None]
    found = run(tensors, options, mask=Mask(valid=valid))
    for row in range(5):
        alone = {name: x[row : row + 1, :, valid[row]] for name, x in tensors.items()}
        close(found[row : row + 1, :, valid[row]], run(alone, options))
        assert (found[row, :, ~valid[row]] == 0).all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [0, 5, 24, 36, 48])
def test_the_cost_counts_visible_pairs(options, n):
    config = Config(**options)
    whole = n - n % config.block  # a drawn block may be one that is cut short
    size = config.block
    seen = layout(options, whole).repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :whole, :whole]
    assert visible_pairs(config, whole) == seen[0].sum() == seen[1].sum()
    assert cost(Shape(2, 3, whole, whole, 4, 5), config).flops == 2 * 2 * 3 * 9 * int(seen[0].sum())


def test_two_layers_connect_any_two_tokens():
    layers = [create_layer("bigbird", 8, 2, pattern="noncausal-self", **SMALL).double() for _ in range(2)]
    x = torch.randn(1, 41, 8, dtype=torch.float64, requires_grad=True)
    once = layers[0](x).output
    (near,) = torch.autograd.grad(once[0, 20].sum(), x, retain_graph=True)
    twice = layers[1](once).output
    (far,) = torch.autograd.grad(twice[0, 20].sum(), x)
    assert (near[0].abs().sum(-1) == 0).any() and (far[0].abs().sum(-1) > 0).all()


def test_biases_by_position_and_by_pair_are_added():
    tensors = inputs(40)
    bias = torch.randn(2, 1, 40, 40, dtype=torch.float64)
    size = 2
    seen = layout(SMALL, 40).repeat_interleave(size, 1).repeat_interleave(size, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *tensors.values(), attn_mask=bias.masked_fill(~seen, -torch.inf)
    )
    close(run(tensors, SMALL, mask=Mask(bias=bias)), expected)
    layer = create_layer("bigbird", 8, 2, pattern="noncausal-self", positions="alibi", **SMALL)
    assert layer(torch.randn(1, 40, 8)).output.isfinite().all()


def test_parity_with_transformers():
    with np.load(FIXTURES / "bigbird_transformers.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    options = {"block": 2, "random_blocks": 2}
    drawn = layout(options, 26) & ~without_draws(Config(**options), 26)
    for head, rows in enumerate(arrays["random"]):
        assert [row.nonzero()[:, 0].tolist() for row in drawn[head, 1:-1]] == rows.tolist()
    tensors = {name: arrays[name].requires_grad_() for name in "qkv"}
    result = apply(MECHANISM, tensors, pattern="noncausal-self", config=Config(**options), want={"weights"})
    close(result.output.transpose(1, 2), arrays["out"].view(1, 26, 2, 4), 1e-10)
    close(result.extras["weights"], arrays["attn"], 1e-10)
    upstream = arrays["grad_out"].view(1, 26, 2, 4).transpose(1, 2)
    found = torch.autograd.grad(result.output, list(tensors.values()), upstream)
    for name, gradient in zip("qkv", found, strict=True):
        close(gradient, arrays[f"grad_{name}"], 1e-10)


def test_it_draws_the_same_in_training_and_after():
    layer = create_layer("bigbird", 8, 2, pattern="noncausal-self", **SMALL).double()
    x = torch.randn(1, 40, 8, dtype=torch.float64)
    assert torch.equal(layer.train()(x).output, layer.eval()(x, context=Context()).output)


def test_what_it_lacks_is_refused_with_the_reason():
    for pattern, reason in (
        (Pattern.CAUSAL_SELF, "earlier queries"),
        (Pattern.NONCAUSAL_CROSS, "no place"),
        (Pattern.CAUSAL_CROSS, "no place"),
    ):
        with pytest.raises(Unsupported, match=reason):
            create_layer("bigbird", 8, 2, pattern=pattern)
    for options in ({"block": 0}, {"random_blocks": -1}, {"neighbours": -1}, {"first_blocks": -1}, {"last_blocks": -1}):
        with pytest.raises(Unsupported):
            Config(**options)
