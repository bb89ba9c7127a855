"""Memory traffic of attention: what an execution counts equals the closed forms, which grow as the paper says."""

import math

import pytest
import torch

from regard.contract import Unsupported
from regard.measurement.memory_traffic import (
    ALGORITHMS,
    block_sizes,
    counted_attention,
    counted_gradients,
    io_count,
)
from regard.measurement.statistics import growth_exponent

SIZES = [(48, 48, 4, 64), (37, 53, 4, 100), (53, 37, 8, 90), (1, 20, 2, 16), (20, 1, 2, 1000), (11, 13, 3, 1)]
"""Queries, keys, width and fast memory: tiles that divide them, that do not, that hold all, and of one number."""


def inputs(n, m, dim):
    return [torch.randn(length, dim, dtype=torch.float64) for length in (n, m, m, n)]


def attention(q, k, v, visible=None):
    scores = q @ k.T * q.shape[1] ** -0.5
    if visible is None:
        return scores.softmax(-1) @ v
    odds = torch.where(visible, scores.exp(), 0)
    total = odds.sum(-1, keepdim=True)
    return odds / torch.where(total > 0, total, 1) @ v


def some_blocks(n, m, dim, fast_memory, share):
    rows, columns = block_sizes(dim, fast_memory)
    visible = torch.rand(math.ceil(n / rows), math.ceil(m / columns)) < share
    return visible, visible.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :m]


def same_gradients(q, k, v, grad, found, visible=None):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(attention(*leaves, visible), leaves, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("n", "m", "dim", "fast_memory"), SIZES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_execution_is_attention_and_moves_what_the_closed_form_says(algorithm, n, m, dim, fast_memory):
    q, k, v, grad = inputs(n, m, dim)
    output, traffic = counted_attention(algorithm, q, k, v, fast_memory)
    torch.testing.assert_close(output, attention(q, k, v), rtol=1e-12, atol=1e-12)
    assert traffic == io_count(algorithm, n, m, dim, fast_memory)
    *grads, traffic = counted_gradients(algorithm, q, k, v, grad, fast_memory)
    same_gradients(q, k, v, grad, grads)
    assert traffic == io_count(algorithm, n, m, dim, fast_memory, backward=True)


@pytest.mark.parametrize(("n", "m", "dim", "fast_memory"), SIZES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_an_execution_of_visible_blocks_moves_what_the_closed_form_says(share, n, m, dim, fast_memory):
    q, k, v, grad = inputs(n, m, dim)
    visible, pairs = some_blocks(n, m, dim, fast_memory, share)
    output, traffic = counted_attention("flash", q, k, v, fast_memory, visible=visible)
    torch.testing.assert_close(output, attention(q, k, v, pairs), rtol=1e-12, atol=1e-12)
    assert traffic == io_count("flash", n, m, dim, fast_memory, visible=visible)
    *grads, traffic = counted_gradients("flash", q, k, v, grad, fast_memory, visible=visible)
    same_gradients(q, k, v, grad, grads, pairs)
    assert traffic == io_count("flash", n, m, dim, fast_memory, visible=visible, backward=True)


@pytest.mark.parametrize(("n", "m", "dim", "fast_memory"), SIZES)
def test_the_closed_forms_are_those_of_the_paper(n, m, dim, fast_memory):
    """Algorithm by algorithm, in the order in which it loads and stores."""
    blocks = math.ceil(m / block_sizes(dim, fast_memory)[1])
    found = io_count("standard", n, m, dim, fast_memory)
    assert found.reads == (n + m) * dim + n * m + (n * m + m * dim)
    assert found.writes == n * m + n * m + n * dim
    found = io_count("flash", n, m, dim, fast_memory)
    assert found.total == 2 * m * dim + blocks * (3 * n * dim + 4 * n)
    everything = torch.ones(math.ceil(n / block_sizes(dim, fast_memory)[0]), blocks, dtype=torch.bool)
    assert found == io_count("flash", n, m, dim, fast_memory, visible=everything)


@pytest.mark.parametrize("backward", [False, True])
def test_traffic_of_tiles_grows_as_the_square_of_the_length_and_falls_as_fast_memory_grows(backward):
    def total(n, fast_memory):
        return io_count("flash", n, n, 64, fast_memory, backward=backward).total

    lengths, memories = [1 << p for p in range(14, 19)], [1 << p for p in range(13, 18)]
    assert growth_exponent(lengths, [total(n, 1 << 15) for n in lengths]) == pytest.approx(2, abs=0.02)
    assert growth_exponent(memories, [total(1 << 18, s) for s in memories]) == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize("backward", [False, True])
def test_what_tiles_save_grows_as_fast_memory_over_the_square_of_the_width(backward):
    def saved(dim, fast_memory):
        standard, tiles = (io_count(a, 1 << 18, 1 << 18, dim, fast_memory, backward=backward) for a in ALGORITHMS)
        return standard.total / tiles.total

    memories, widths = [1 << p for p in range(13, 18)], [64, 128, 256, 512]
    assert growth_exponent(memories, [saved(64, s) for s in memories]) == pytest.approx(1, abs=0.03)
    assert growth_exponent(widths, [saved(d, 1 << 17) for d in widths]) == pytest.approx(-2, abs=0.03)


@pytest.mark.parametrize("backward", [False, True])
def test_traffic_of_visible_blocks_is_in_proportion_to_their_share(backward):
    n, dim, fast_memory = 1 << 16, 64, 1 << 15
    draws = torch.rand([math.ceil(n / size) for size in block_sizes(dim, fast_memory)])
    shares = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
    totals = [
        io_count("flash", n, n, dim, fast_memory, visible=draws < share, backward=backward).total for share in shares
    ]
    assert growth_exponent(shares, totals) == pytest.approx(1, abs=0.03)


def test_tiles_move_less_than_standard_attention_once_fast_memory_exceeds_four_squares_of_the_width():
    """The paper's experiment at small sizes: N of 128 to 2048, d of 16 to 64, 4k to 64k numbers of fast memory."""
    for n in (128, 256, 512, 1024, 2048):
        for dim in (16, 32, 64):
            saved = []
            for fast_memory in (1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16):
                standard, tiles = (io_count(a, n, n, dim, fast_memory).total for a in ALGORITHMS)
                saved.append(standard / tiles)
                assert (saved[-1] > 1) == (fast_memory >= 4 * dim * dim), (n, dim, fast_memory)
            assert saved == sorted(saved) and saved[-1] > saved[0]


def test_what_cannot_be_counted_is_refused():
    visible = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(Unsupported, match="stores all scores"):
        io_count("standard", 9, 9, 3, 12, visible=visible)
    with pytest.raises(Unsupported, match="stores all scores"):
        counted_attention("standard", *inputs(9, 9, 3)[:3], 12, visible=visible)
    for wrong in (visible, torch.ones(9, 9)):
        with pytest.raises(Unsupported, match=r"booleans \(9, 9\)"):
            io_count("flash", 9, 9, 3, 12, visible=wrong)
    for sizes in ((-1, 9, 3, 12), (9, -1, 3, 12), (9, 9, 0, 12), (9, 9, 3, 0)):
        for algorithm in ALGORITHMS:
            with pytest.raises(Unsupported, match=">="):
                io_count(algorithm, *sizes)
    with pytest.raises(Unsupported, match="flash"):
        io_count("tiled", 9, 9, 3, 12)
