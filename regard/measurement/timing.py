"""Comparable timings: paired and interleaved in one process, with medians and quartiles."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Action = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of an action: the median and the quartiles of its repeats."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarise one or more measured times."""
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
        return cls(float(median), float(low), float(high), len(seconds))


def calm_clock(device: torch.device | None = None) -> Callable[[], float]:
    """Return the clock for timing work on a device.

    If a single thread computes, it is that thread's CPU time, which excludes interruptions by other work on the
    machine; otherwise the wall clock.
    """
    alone = torch.get_num_threads() == 1 and (device is None or device.type == "cpu")
    return time.thread_time if alone else time.perf_counter


def interleaved(
    actions: Mapping[str, Action],
    *,
    seconds: float = 1.0,
    least: int = 3,
    most: int = 50,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time actions in turn, A B C C B A ..., so that a drift of the machine's speed affects all of them alike.

    Args:
        actions: what to time, by name. Each runs once before timing starts.
        seconds: no new round starts after this time, within the limits of `least` and `most`.
        least: minimum number of rounds.
        most: maximum number of rounds.
        device: synchronised around each action if it is a GPU.
        clock: as in :func:`rounds`.
    """
    found = rounds(actions, seconds=seconds, least=least, most=most, device=device, clock=clock)
    return {name: Timing.of(values) for name, values in found.items()}


def rounds(
    actions: Mapping[str, Action],
    *,
    seconds: float = 1.0,
    least: int = 3,
    most: int = 50,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Return the seconds of each round of :func:`interleaved`, so that actions can be compared within rounds.

    Args:
        clock: the clock; `time.thread_time` suits work on a single thread of a shared machine.
        warm: whether the actions have run before, so that no warm-up run is needed.
    """
    for action in () if warm else actions.values():
        action()
    _synchronise(device)
    found: dict[str, list[float]] = {name: [] for name in actions}
    order = list(actions)
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        for round_number in range(most):
            if round_number >= least and time.perf_counter() - started > seconds:
                break
            for name in order:
                _synchronise(device)
                start = clock()
                actions[name]()
                _synchronise(device)
                found[name].append(clock() - start)
            order.reverse()
    finally:
        if collecting:
            gc.enable()
    return found


def _synchronise(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def efficiency_length(own: Mapping[int, float], softmax: Mapping[int, float]) -> int | None:
    """Return the shortest length from which a cost stays below softmax's (CAB's efficiency length, arXiv 2210.07661).

    Between two measured lengths the crossing is interpolated on logarithmic axes. None if softmax is still cheaper at
    the longest length; the shortest measured length if softmax is never cheaper.
    """
    lengths = sorted(set(own) & set(softmax))
    gaps = [math.log(max(own[n], 1e-12)) - math.log(max(softmax[n], 1e-12)) for n in lengths]
    if not lengths or gaps[-1] >= 0:
        return None
    last = max((i for i, gap in enumerate(gaps) if gap >= 0), default=None)
    if last is None:
        return lengths[0]
    before, after = gaps[last], gaps[last + 1]
    share = before / (before - after)
    crossing = math.log(lengths[last]) + share * (math.log(lengths[last + 1]) - math.log(lengths[last]))
    return round(math.exp(crossing))
