"""What is peculiar to mixture of block attention: what is chosen and read, small blocks in every form, and parity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Mask, Pattern, Unsupported
from regard.mechanisms.moba import MECHANISM, Config

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
SMALL = {"block_size": 4, "top": 2}


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def tokens(n, m=None, heads=2, batch=1):
    return {
        name: torch.randn(batch, heads, count, 4, dtype=torch.float64)
        for name, count in zip("qkv", (n, m or n, m or n), strict=True)
    }


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_up_to_top_blocks_it_is_softmax_attention(pattern):
    given = tokens(12, 11 if pattern.cross else 12)
    expected = apply(get_mechanism("softmax"), given, pattern=pattern).output
    close(apply(MECHANISM, given, pattern=pattern, config=Config(block_size=4, top=3)).output, expected)
    fewer = apply(MECHANISM, given, pattern=pattern, config=Config(**SMALL)).output
    assert (fewer - expected).abs().max() > 1e-6


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("equal", [False, True])
def test_a_query_reads_its_own_block_and_the_others_with_the_highest_means(pattern, equal):
    """Where all are equally high, as many blocks as ever are read."""
    given = tokens(24)
    if equal:
        given["k"] = torch.zeros_like(given["k"])
    given["v"].requires_grad_()
    output = apply(MECHANISM, given, pattern=pattern, config=Config(**SMALL)).output
    affinity = given["q"] @ given["k"].unflatten(2, (6, 4)).mean(3).mT
    for i in (3, 14, 23):
        (gradient,) = torch.autograd.grad(output[0, 1, i].sum(), given["v"], retain_graph=True)
        read = (gradient[0, 1].abs().sum(-1) > 0).nonzero()[:, 0].tolist()
        own, scores = i // 4, affinity[0, 1, i].tolist()
        others = [r for r in range(6) if pattern.cross or (r < own if pattern.causal else r != own)]
        best = sorted(others, key=lambda r: -scores[r])[: SMALL["top"] - (not pattern.cross)]
        last = i if pattern is Pattern.CAUSAL_SELF else 23
        if equal:
            assert len(read) == min(4 * len(best) + (0 if pattern.cross else min(4, last + 1 - own * 4)), 24)
        else:
            blocks = sorted(best if pattern.cross else [*best, own])
            assert read == [j for r in blocks for j in range(4 * r, 4 * r + 4) if j <= last]


def test_parity_with_the_authors_code():
    with np.load(FIXTURES / "moba_naive.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    given = {name: arrays[name].transpose(0, 1)[None] for name in "qkv"}
    config = Config(block_size=int(arrays["block_size"]), top=int(arrays["top"]))
    for form in (None, "chunked"):
        mask = Mask(cu_seqlens=arrays["cu_seqlens"])
        close(apply(MECHANISM, given, mask=mask, config=config, form=form).output[0].transpose(0, 1), arrays["out"])


def test_bad_options_are_refused():
    for name in Config.__dataclass_fields__:
        with pytest.raises(Unsupported, match=name):
            Config(**{name: 0})
