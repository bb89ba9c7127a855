"""Shared parts of timing cells: comparisons are made within rounds, on one thread, in that thread's CPU time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from regard.measurement.statistics import growth_exponent
from regard.measurement.timing import rounds
from regard.reproductions.framework.judging import spread

Action = Callable[[], Any]


def timed_ratio(slow: Action, fast: Action, *, seconds: float) -> dict[str, float]:
    """Return how many times as long `slow` takes: the median and interquartile range over rounds."""
    found = rounds({"slow": slow, "fast": fast}, seconds=seconds, least=5, most=200, clock=time.thread_time)
    return spread([a / b for a, b in zip(found["slow"], found["fast"], strict=True)])


def timed_slopes(actions: Mapping[str, Mapping[float, Action]], *, seconds: float) -> dict[str, dict[str, float]]:
    """Return how each name's time grows with a size: the exponent p of time ~ size^p, fitted within each round.

    Args:
        actions: actions by name and size; each round runs all of them.
        seconds: time to measure for.
    """
    flat = {f"{name} {size}": action for name, by_size in actions.items() for size, action in by_size.items()}
    found = rounds(flat, seconds=seconds, least=5, most=200, clock=time.thread_time)
    return {
        name: spread(_slopes(list(by_size), [found[f"{name} {size}"] for size in by_size]))
        for name, by_size in actions.items()
    }


def growth_and_speedup(actions: Mapping[str, Mapping[float, Action]], *, seconds: float) -> dict[str, dict[str, float]]:
    """Return :func:`timed_slopes` of two names, and ``speedup``, second time over first at the largest size."""
    first, second = actions.values()
    largest = max(first)
    ratio = timed_ratio(second[largest], first[largest], seconds=seconds)
    return {**timed_slopes(actions, seconds=seconds), "speedup": ratio}


@torch.no_grad()
def forward_growth(setting: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """Return :func:`growth_and_speedup` of two noncausal functions of q, k and v over the setting's ``lengths``."""
    inputs = {n: torch.randn(3, 1, 4, n, 64) for n in setting["lengths"]}
    actions = {
        name: {n: partial(f, *x, pattern="noncausal-self") for n, x in inputs.items()} for name, f in functions.items()
    }
    return growth_and_speedup(actions, seconds=setting["seconds"])


def _slopes(sizes: Sequence[float], seconds: Sequence[Sequence[float]]) -> list[float]:
    return [growth_exponent(sizes, row) for row in zip(*seconds, strict=True)]
