"""Timings that can be compared: paired and interleaved in one process, medians with spread."""

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
    """Seconds of one action: the median and the middle half of its repeats."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """The summary of measured seconds, at least one."""
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
        return cls(float(median), float(low), float(high), len(seconds))


def calm_clock(device: torch.device | None = None) -> Callable[[], float]:
    """The clock for some work: where one thread computes, the time of that thread, which counts no interruption by other work
    on the machine; the time of day elsewhere."""
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
    """Time actions in turn, A B C C B A ..., so that a drift of the machine's speed meets them all alike.

    Args:
        actions: what to time, by name. Each runs once before timing starts.
        seconds: stop starting new rounds after this time...
        least: ...but not before this many rounds,
        most: and after this many in any case.
        device: synchronised around each action when it is a GPU.
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
    """The seconds of each round of :func:`interleaved`, so that actions can be compared within rounds.

    Args:
        clock: what times an action; `time.thread_time` for work on a single thread of a shared machine.
        warm: whether the actions have run before, and need no run more.
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
    """The shortest length from which a cost stays below softmax's (the CAB's efficiency length, arXiv 2210.07661).

    Between two measured lengths the crossing is interpolated on logarithmic axes. None when softmax is still cheaper
    at the longest length; the shortest measured length when it never is.
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
