"""Memory traffic of attention: counts of an execution equal the closed forms, which grow as the paper says."""

import math

import pytest
import torch

from regard.contract import Unsupported
from regard.measurement.memory_traffic import ALGORITHMS, block_sizes, counted_attention, counted_gradients, io_count

SIZES = [(48, 48, 4, 64), (37, 53, 4, 100), (53, 37, 8, 90), (1, 20, 2, 16), (20, 1, 2, 1000), (11, 13, 3, 1)]
"""(queries, keys, width, fast memory): tiles that divide the sizes, that do not, that hold everything, of one number."""


def inputs(n, m, dim):
    return [torch.randn(length, dim, dtype=torch.float64) for length in (n, m, m, n)]


def attention(q, k, v, visible):
    odds = torch.where(visible, (q @ k.T * q.shape[1] ** -0.5).exp(), 0)
    total = odds.sum(-1, keepdim=True)
    return odds / torch.where(total > 0, total, 1) @ v


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("algorithm", "share"), [*((a, None) for a in ALGORITHMS), *(("flash", s) for s in (0, 0.3, 0.8))]
)
def test_an_execution_is_attention_and_moves_what_the_closed_form_says(algorithm, share, sizes):
    n, m, dim, fast_memory = sizes
    q, k, v, grad = inputs(n, m, dim)
    pairs, options = torch.ones(n, m, dtype=torch.bool), {}
    if share is not None:
        rows, columns = block_sizes(dim, fast_memory)
        options["visible"] = torch.rand(math.ceil(n / rows), math.ceil(m / columns)) < share
        pairs = options["visible"].repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :m]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = attention(*leaves, pairs)
    output, traffic = counted_attention(algorithm, q, k, v, fast_memory, **options)
    torch.testing.assert_close(output, expected.detach(), rtol=1e-12, atol=1e-12)
    assert traffic == io_count(algorithm, *sizes, **options)
    *grads, traffic = counted_gradients(algorithm, q, k, v, grad, fast_memory, **options)
    for found, grad_expected in zip(grads, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(found, grad_expected, rtol=1e-11, atol=1e-11)
    assert traffic == io_count(algorithm, *sizes, backward=True, **options)


def test_tiles_move_less_than_standard_attention_once_fast_memory_exceeds_four_squares_of_the_width():
    """The paper's experiment at small sizes: N from 128 to 2048, d from 16 to 64, fast memory of 4k to 64k numbers."""
    for n in (128, 256, 512, 1024, 2048):
        for dim in (16, 32, 64):
            saved = []
            for fast_memory in (1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16):
                standard, tiles = (io_count(a, n, n, dim, fast_memory).total for a in ALGORITHMS)
                saved.append(standard / tiles)
                assert (saved[-1] > 1) == (fast_memory >= 4 * dim * dim), (n, dim, fast_memory)
            assert saved == sorted(saved) and saved[-1] > saved[0]


VISIBLE = torch.ones(3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: io_count("standard", 9, 9, 3, 12, visible=VISIBLE), "stores all scores"),
        (lambda: counted_attention("standard", *inputs(9, 9, 3)[:3], 12, visible=VISIBLE), "stores all scores"),
        (lambda: io_count("flash", 9, 9, 3, 12, visible=VISIBLE), r"booleans \(9, 9\)"),
        (lambda: io_count("flash", 9, 9, 3, 12, visible=torch.ones(9, 9)), r"booleans \(9, 9\)"),
        (lambda: io_count("standard", -1, 9, 3, 12), ">="),
        (lambda: io_count("flash", 9, -1, 3, 12), ">="),
        (lambda: io_count("flash", 9, 9, 0, 12), ">="),
        (lambda: io_count("standard", 9, 9, 3, 0), ">="),
        (lambda: io_count("tiled", 9, 9, 3, 12), "flash"),
    ],
)
def test_what_cannot_be_counted_is_refused(call, told):
    with pytest.raises(Unsupported, match=told):
        call()
