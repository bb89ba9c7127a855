"""The Sparse Frontier (Nawrot et al., arXiv 2504.17768): at equal cost, is larger and sparse or smaller and dense
better?

The paper (abstract): for very long sequences, larger and highly sparse models are better than smaller and dense ones at
the same cost; no method is best for all tasks, and even moderate sparsity hurts in at least one.

Here: a hand-constructed attention layer (:mod:`regard.compression.sparse.constructed`) finds a value by its key among
1024 and 4096 keys, dense or with Quest, at widths of 16 to 64, with pages that share a topic and with pages of
unrelated keys. The cost is counted: at 256 keys, no wider sparse layer would be as cheap as a dense one.
"""

from __future__ import annotations

from typing import Any

from regard.compression.sparse.constructed import cost, retrieval
from regard.contract import Paper
from regard.reproductions.framework.judging import Check, Seed, measured, number
from regard.reproductions.framework.protocol import Reproduction, Setting

TRIALS = 150
POINTS = ((16, 1), (32, 1), (32, 4), (64, 1), (64, 16))
"""Pairs of a width and a compression ratio."""


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure the share of found keys, and the cost, of each width and compression ratio."""
    n, trials = setting["keys"], setting["trials"]
    found = {}
    for width, ratio in setting["points"]:
        scores = retrieval(n, width, ratio, trials, seed, topics=setting["topics"])
        found[f"{width} at {ratio}x"] = sum(scores) / trials
        found[f"cost of {width} at {ratio}x"] = cost(n, width, ratio)
    return found


def _gain(setting: str, larger: str, smaller: str) -> Any:
    """Return a check value: a larger sparse layer's score minus a smaller dense one's; nan if the larger costs more."""

    def value(seed: Seed) -> float:
        if number(seed, setting, f"cost of {larger}") > number(seed, setting, f"cost of {smaller}"):
            return float("nan")
        return number(seed, setting, larger) - number(seed, setting, smaller)

    return value


def _setting(keys: int, *, topics: bool) -> dict[str, Any]:
    return {"keys": keys, "topics": topics, "trials": TRIALS, "points": [list(point) for point in POINTS]}


REPRODUCTION = Reproduction(
    name="sparse_frontier",
    mechanisms=("softmax",),
    source=Paper("The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs", "2504.17768", 2025, 45),
    claim=(
        "For very long sequences larger and highly sparse models are better than smaller and dense ones at the same cost; no "
        "method is best everywhere, and even moderate sparsity hurts at least one task."
    ),
    instead=(
        "A layer made by hand finds a value by its key among 1024 and 4096, dense or by Quest at 1/4 and 1/16, at widths of 16, "
        "32 and 64; pages of keys with a topic in common and without. Multiplications are counted."
    ),
    settings={
        "1024 keys": _setting(1024, topics=True),
        "4096 keys": _setting(4096, topics=True),
        "4096 keys without topics": _setting(4096, topics=False),
    },
    run_cell=run_cell,
    needs=(
        Check("a dense layer of width 64 finds above 0.9 among 4096", measured("4096 keys", "64 at 1x"), above=0.9),
        Check("and without topics too", measured("4096 keys without topics", "64 at 1x"), above=0.9),
    ),
    checks=(
        Check(
            "among 4096 keys width 64 at 16x is 0.2 above a dense 16 that costs more",
            _gain("4096 keys", "64 at 16x", "16 at 1x"),
            above=0.2,
        ),
        Check(
            "among 1024 keys width 32 at 4x is above a dense 16 that costs more",
            _gain("1024 keys", "32 at 4x", "16 at 1x"),
            above=0.0,
        ),
        Check(
            "the gain over a dense 16 is greater among 4096 keys than among 1024",
            lambda seed: (
                _gain("4096 keys", "64 at 16x", "16 at 1x")(seed) - _gain("1024 keys", "32 at 4x", "16 at 1x")(seed)
            ),
            above=0.0,
        ),
        Check(
            "where pages have nothing in common, 16x loses 0.2 or more",
            lambda seed: (
                number(seed, "4096 keys without topics", "64 at 1x")
                - number(seed, "4096 keys without topics", "64 at 16x")
            ),
            above=0.2,
        ),
    ),
    left_out=(
        "safe sparsity in decoding against prefill, by model size: `regard sparse tiny` and `small` measure it, on models that "
        "take longer to train than a cell may",
        "scaling laws: a layer made by hand has no law to follow; the same commands fit them",
        "models of 7 to 72 billion parameters and contexts to 128k tokens",
    ),
    smoke={"keys": 4096, "trials": 2},
    seconds=40,
    seeds=4,
)
