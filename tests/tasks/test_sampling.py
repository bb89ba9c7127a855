"""Splits by group, epochs, balance."""

from __future__ import annotations

import numpy as np
import pytest

from regard.tasks.sampling import held_out_groups, in_epochs, one_of_each_in_turn, spread


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5])
def test_held_out_groups_are_close_to_their_share_and_never_none_or_all(share):
    for seed in range(30):
        sizes = {str(i): int(n) for i, n in enumerate(np.random.default_rng(seed).integers(1, 50, 2 + seed))}
        held_out = held_out_groups(sizes, share, seed)
        assert 0 < len(held_out) < len(sizes)
        size, total = sum(sizes[group] for group in held_out), sum(sizes.values())
        if len(held_out) > 1:
            assert abs(size - share * total) <= max(sizes.values())
    assert held_out_groups({"a": 5, "b": 90}, share, 0) == {"a"} or share == 0.5


def test_epochs_show_each_item_once_across_the_borders_of_batches():
    items = np.arange(100, 110)
    drawn = np.concatenate([in_epochs(items, step, 7, 4) for step in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == items.tolist()
    assert not np.array_equal(drawn[:10], drawn[10:])
    assert sorted(in_epochs(items, 0, 7, 25)[:20]) == sorted([*items, *items])


def test_the_first_few_are_balanced_and_nothing_is_lost():
    labels = np.array([0] * 20 + [1] * 5 + [2] * 3)
    chosen = np.random.default_rng(0).permutation(28)
    turned = one_of_each_in_turn(chosen, labels)
    assert sorted(turned) == sorted(chosen)
    assert np.bincount(labels[turned[:9]]).tolist() == [3, 3, 3]


def test_spread_numbers_are_distinct_and_reach_far():
    assert spread(10, 20).tolist() == list(range(10))
    assert spread(10, 3).tolist() == [0, 3, 6]
    assert spread(0, 3).tolist() == []
