"""Measure the speedup of several ranks, each a process with its own core, over one process that does all the work."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing

from regard.backends.native import library
from regard.contract import at_least
from regard.distributed.attention import DistributedAttention
from regard.distributed.context_parallel import ContextParallel
from regard.functional import softmax_attention
from regard.measurement.memory import keep_freed_memory, peak_memory
from regard.measurement.timing import Timing
from regard.models import LanguageModel, LanguageModelConfig

FEWEST, MOST = 3, 100
"""The fewest and the most timed rounds."""


@dataclass(frozen=True)
class Attention:
    """Causal softmax attention, forward and backward.

    Attributes:
        length: tokens of the sequence.
        heads, head_dim: sizes of queries, keys and values.
        scheme: a scheme of :class:`regard.distributed.DistributedAttention`.
    """

    length: int = 16_384
    heads: int = 4
    head_dim: int = 64
    scheme: str = "ring"

    def actions(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """The work of a rank with the others, and the work alone; each returns tensors to compare."""
        torch.manual_seed(0)
        whole = torch.randn(4, 1, self.heads, self.length, self.head_dim)
        attention = DistributedAttention(self.scheme)
        own = [attention.shard(x).contiguous() for x in whole]

        def together() -> Any:
            q, k, v = (x.detach().requires_grad_() for x in own[:3])
            output = attention(q, k, v, length=self.length)
            output.backward(own[3])
            return output.detach(), q.grad

        def alone() -> Any:
            q, k, v = (x.detach().requires_grad_() for x in whole[:3])
            output = softmax_attention(q, k, v, pattern="causal-self")
            output.backward(whole[3])
            return attention.shard(output.detach()), attention.shard(q.grad)

        return together, alone


@dataclass(frozen=True)
class Training:
    """Gradients of a language model, by :class:`regard.distributed.ContextParallel`.

    Attributes:
        mechanism: the mechanism of all layers.
        length: tokens of the single sequence.
        dim, layers, heads: sizes of the model, which has 256 tokens in its vocabulary.
    """

    mechanism: str = "gated_linear"
    length: int = 4096
    dim: int = 256
    layers: int = 4
    heads: int = 4

    def actions(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """As in :class:`Attention`, but the losses are compared."""
        torch.manual_seed(0)
        config = LanguageModelConfig(256, dim=self.dim, num_heads=self.heads, plan=[self.mechanism] * self.layers)
        model = LanguageModel(config)
        ids = torch.randint(256, (1, self.length))
        parallel = ContextParallel(model)

        def together() -> Any:
            model.zero_grad()
            loss = parallel.loss(ids)
            loss.backward()
            parallel.add_gradients()
            return (loss.detach(),)

        def alone() -> Any:
            model.zero_grad()
            loss = model.loss(ids)
            loss.backward()
            return (loss.detach(),)

        return together, alone


def measure_ranks(work: Attention | Training, *, ranks: int = 2, seconds: float = 20.0) -> dict[str, Any]:
    """Time some work on several ranks and on one, alternately; each process has one thread and its own core.

    Args:
        seconds: approximate measuring time.

    Returns:
        ``together`` and ``alone``, each a :class:`regard.measurement.timing.Timing` of rounds; ``speedup``, the ratio
        of their medians; ``memory``, the most bytes that a rank needs, divided by those of one process; ``error``, the
        largest difference between their results.
    """
    at_least("ranks", ranks, 1)
    at_least("seconds", seconds, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(functools.partial(_rank, work, ranks, seconds, folder), nprocs=ranks)
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
    return {**asdict(work), "ranks": ranks, **found}


def _rank(work: Attention | Training, ranks: int, seconds: float, folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) >= ranks:
        os.sched_setaffinity(0, {cores[rank]})
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    try:
        found = compare_ranks(work, seconds)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))


def compare_ranks(work: Attention | Training, seconds: float) -> dict[str, Any]:
    """The result of :func:`measure_ranks`, in each process of the default group; only the first has ``alone``."""
    first = dist.get_rank() == 0
    together, alone = work.actions()
    found = together()
    error = torch.zeros(())
    if first:
        error = torch.stack([(a - b).abs().max() for a, b in zip(found, alone(), strict=True)]).max()
    shared = torch.tensor(float(_bytes(together)))
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    own = _bytes(alone) if first else 1
    times: dict[str, list[float]] = {"together": [], "alone": []}
    began = time.perf_counter()
    for number in range(MOST):
        over = torch.tensor(float(number >= FEWEST and time.perf_counter() - began > seconds))
        dist.broadcast(over, 0)
        if over:
            break
        started = time.perf_counter()
        together()
        dist.barrier()
        times["together"].append(time.perf_counter() - started)
        if first:
            started = time.perf_counter()
            alone()
            times["alone"].append(time.perf_counter() - started)
        dist.barrier()
    timings = {name: Timing.of(taken) for name, taken in times.items() if taken}
    return {
        **{name: asdict(timing) for name, timing in timings.items()},
        "speedup": timings["alone"].median / timings["together"].median if first else None,
        "memory": float(shared) / own,
        "error": float(error),
    }


def _bytes(action: Callable[[], Any]) -> int:
    library.workspace_peak(reset=True)
    return peak_memory(action).bytes + library.workspace_peak()
