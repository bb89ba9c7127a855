"""Choose items: splits by group, epochs, balance over classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from regard.tasks.protocol import SPLIT, TRAINING, check_integer, counter_generator

if TYPE_CHECKING:
    from jaxtyping import Int


def in_epochs(items: Int[np.ndarray, " n"], step: int, seed: int, batch_size: int) -> Int[np.ndarray, " b"]:
    """Items of a step's batch. Each epoch shows each item once, in an order drawn from `seed`."""
    check_integer("batch_size", batch_size, 1, 1 << 20)
    places = step * batch_size + np.arange(batch_size)
    epochs = places // len(items)
    chosen = np.empty(batch_size, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        order = counter_generator(seed, epoch, TRAINING).permutation(items)
        here = epochs == epoch
        chosen[here] = order[places[here] % len(items)]
    return chosen


def one_of_each_in_turn(chosen: Int[np.ndarray, " m"], labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """The same items reordered, one of each class in turn, so that every prefix is balanced."""
    rank: Counter[int] = Counter()
    ranks = []
    for label in labels[chosen].tolist():
        ranks.append(rank[label])
        rank[label] += 1
    return chosen[np.argsort(ranks, kind="stable")]


def held_out_groups(sizes: Mapping[str, int], share: float, seed: int) -> set[str]:
    """Choose groups to hold out, in an order drawn from `seed`, as long as that brings their size closer to the share.

    Holds out at least one group and, for a share of up to a half, never all of two or more.
    """
    groups = list(sizes)
    wanted = share * sum(sizes.values())
    held_out: set[str] = set()
    size = 0
    for i in counter_generator(seed, 0, SPLIT).permutation(len(groups)):
        group = groups[i]
        if abs(size + sizes[group] - wanted) < abs(size - wanted):
            held_out.add(group)
            size += sizes[group]
    return held_out or {min(groups, key=lambda group: sizes[group])}


def spread(count: int, kept: int) -> Int[np.ndarray, " k"]:
    """At most `kept` of the numbers 0 to `count` - 1, evenly spread."""
    kept = min(count, kept)
    return np.arange(kept) * count // max(kept, 1)


def without_repetitions(
    digests: Sequence[bytes], held_out: Collection[int] = (), *, scored: bool = False
) -> tuple[list[int], int]:
    """Choose items without exact repetitions: of a training item and a held-out one that are the same, the held-out one.

    Args:
        digests: a hash of each item.
        held_out: indices of the held-out items.
        scored: whether a trained model is scored on the held-out items: training items that are held out too then stay.

    Returns:
        The indices of the chosen items, ascending, and the number of held-out ones that are training items too.
    """
    apart = set(held_out)
    first: dict[tuple[bytes, bool], int] = {}
    for i in [*sorted(apart), *(i for i in range(len(digests)) if i not in apart)]:
        first.setdefault((digests[i], scored and i in apart), i)
    trained = {digest for i, digest in enumerate(digests) if i not in apart}
    return sorted(first.values()), sum(i in apart and digests[i] in trained for i in first.values())
