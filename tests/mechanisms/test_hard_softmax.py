"""Tests specific to hard attention: the mass that is kept, and which keys are read when there are few."""

from __future__ import annotations

import torch
from support import close

from regard.functional import hard_softmax_attention, softmax_attention


def test_hard_attention_keeps_the_mass_of_the_largest_weights_and_soft_attention_with_all_keys():
    q, k, v = (torch.randn(2, 3, 9, 4, dtype=torch.float64) for _ in range(3))
    soft = softmax_attention(q, k, v, pattern="noncausal-self")
    close(hard_softmax_attention(q, k, v, pattern="noncausal-self", keys=9), soft)
    close(hard_softmax_attention(q, k, v, pattern="noncausal-self", keys=200), soft)
    weights = (q @ k.mT / 2).softmax(-1)
    top = weights.topk(4, -1)
    close(
        hard_softmax_attention(q, k, torch.ones_like(v), pattern="noncausal-self", keys=4),
        top.values.sum(-1, keepdim=True).expand_as(v),
    )
    best, where = weights.max(-1)
    expected = best[..., None] * v.gather(2, where[..., None].expand(-1, -1, -1, 4))
    close(hard_softmax_attention(q, k, v, pattern="noncausal-self", keys=1), expected)


def test_in_training_a_weight_that_was_dropped_makes_room_for_another():
    """Keys are chosen after dropout, as in the authors' code."""
    q, k, v = torch.randn(1, 1, 40, 4), torch.randn(1, 1, 20, 4), torch.eye(20)[None, None]
    generator = torch.Generator().manual_seed(5)
    read = hard_softmax_attention(q, k, v, pattern="noncausal-cross", keys=3, dropout=0.5, generator=generator)
    assert bool(((read != 0).sum(-1) == 3).all())
