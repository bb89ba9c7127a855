"""Tests specific to mixture of block attention: which blocks are chosen and read, and parity."""

from __future__ import annotations

import pytest
import torch
from support import calls, close, load, qkv

from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Mask, Pattern
from regard.mechanisms.moba import MECHANISM

run = calls(MECHANISM)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_up_to_top_blocks_it_is_softmax_attention(pattern):
    inputs = qkv(12, 11 if pattern.cross else 12)
    expected = calls(get_mechanism("softmax"))(inputs, pattern=pattern).output
    close(run(inputs, {"block_size": 4, "top": 3}, pattern=pattern).output, expected)
    fewer = run(inputs, {"block_size": 4, "top": 2}, pattern=pattern).output
    assert (fewer - expected).abs().max() > 1e-6


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("equal", [False, True])
def test_a_query_reads_its_own_block_and_the_others_with_the_highest_means(pattern, equal):
    """If all means are equal, the number of blocks that are read stays the same."""
    inputs, top = qkv(24, batch=1), 2
    if equal:
        inputs["k"] = torch.zeros_like(inputs["k"])
    inputs["v"].requires_grad_()
    output = run(inputs, {"block_size": 4, "top": top}, pattern=pattern).output
    affinity = inputs["q"] @ inputs["k"].unflatten(2, (6, 4)).mean(3).mT
    for i in (3, 14, 23):
        (gradient,) = torch.autograd.grad(output[0, 1, i].sum(), inputs["v"], retain_graph=True)
        read = (gradient[0, 1].abs().sum(-1) > 0).nonzero()[:, 0].tolist()
        own, scores = i // 4, affinity[0, 1, i].tolist()
        others = [r for r in range(6) if pattern.cross or (r < own if pattern.causal else r != own)]
        best = sorted(others, key=lambda r: -scores[r])[: top - (not pattern.cross)]
        last = i if pattern is Pattern.CAUSAL_SELF else 23
        if equal:
            assert len(read) == min(4 * len(best) + (0 if pattern.cross else min(4, last + 1 - own * 4)), 24)
        else:
            blocks = sorted(best if pattern.cross else [*best, own])
            assert read == [j for r in blocks for j in range(4 * r, 4 * r + 4) if j <= last]


def test_parity_with_the_authors_code():
    arrays = load("moba_naive")
    inputs = {name: arrays[name].transpose(0, 1)[None] for name in "qkv"}
    options = {name: int(arrays[name]) for name in ("block_size", "top")}
    found = run(inputs, options, mask=Mask(cu_seqlens=arrays["cu_seqlens"])).output
    close(found[0].transpose(0, 1), arrays["out"])
