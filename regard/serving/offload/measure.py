"""Measures offloaded attention on this machine: a single batch against two alternating micro-batches, and against the
simulator, which gets the stage times of micro-batches that were read one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from regard.contract import at_least
from regard.measurement.timing import Timing, rounds
from regard.models import LanguageModel
from regard.serving.engine import Request, Row
from regard.serving.offload.backends import Backend
from regard.serving.offload.costs import Stages
from regard.serving.offload.reader import CHUNK, OffloadedReader
from regard.serving.offload.simulator import simulate, step_stages

STEPS = 400
"""Maximum number of tokens that are added to each sequence during the measurement."""


@dataclass(frozen=True)
class Load:
    """The load of a measurement.

    Attributes:
        batch: number of sequences, at least 2.
        context: initial tokens of each sequence.
        seconds: approximate duration of the measurement.
    """

    batch: int = 8
    context: int = 1024
    seconds: float = 10.0

    def __post_init__(self) -> None:
        at_least("batch", self.batch, 2)
        at_least("context", self.context, 1)
        at_least("seconds", self.seconds, 0.0)


@dataclass(frozen=True)
class Way:
    """A way to run a step: the number of micro-batches, whether they alternate, and whether queries are sent early."""

    micro_batches: int = 1
    in_turn: bool = True
    overlap: bool = False


WAYS = {
    "serial": Way(),
    "early": Way(overlap=True),
    "pipelined": Way(micro_batches=2),
    "pipelined_early": Way(micro_batches=2, overlap=True),
    "halves": Way(micro_batches=2, in_turn=False),
}
"""``early`` sends queries before keys and values are computed; ``halves`` reads micro-batches one after the other."""


@dataclass
class Spent:
    """Seconds of each step: of the model worker's own work, of its waiting, and of the busiest attention worker."""

    model: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)

    def stages(self, layers: int, micro_batches: int) -> Stages:
        """Return median stage times of one micro-batch in one layer; the steps' micro-batches must not alternate."""
        model, waiting, attention = (median(some[1:]) for some in (self.model, self.waiting, self.attention))
        latency = max(waiting - attention, 0.0) / 2  # two messages, out and back
        each = micro_batches * layers
        return Stages(model / (each + micro_batches), attention / each, latency=latency / each)


def measure(model: LanguageModel, workers: int, backend: Backend, load: Load, *, split: str = "auto") -> dict[str, Any]:
    """Measure steps in each way, interleaved; simulate two micro-batches; count the traffic.

    Returns:
        A record with ``seconds_of``, a :class:`regard.measurement.timing.Timing` as a dict for each of :data:`WAYS`;
        ``gain``, serial over pipelined; ``simulated_seconds`` and ``simulated_gain``; ``stages`` of a micro-batch in a
        layer; and the bytes that a step sends and receives.

    Raises:
        Unsupported: as :class:`regard.serving.offload.reader.OffloadedReader` does.
    """
    context = load.context + STEPS
    reader = OffloadedReader(model, workers, backend=backend, split=split, rows=load.batch, context=context)
    try:
        rows = _begun(reader, load)
        spent = {name: Spent() for name in WAYS}
        actions = {name: _action(reader, rows, way, spent[name]) for name, way in WAYS.items()}
        most = STEPS // len(WAYS) - 2
        times = {name: Timing.of(taken) for name, taken in rounds(actions, seconds=load.seconds, most=most).items()}
        before = asdict(reader.pool.traffic)
        actions["serial"]()
        traffic = {name: count - before[name] for name, count in asdict(reader.pool.traffic).items()}
    finally:
        reader.close()
    layers = len(reader.offloaded)
    stages = spent["halves"].stages(layers, 2)
    simulated = simulate([step_stages(stages, layers, last=True)] * 2).seconds
    serial, pipelined = times["serial"].median, times["pipelined"].median
    return {
        **asdict(load),
        "workers": workers,
        "split": split,
        "layers": layers,
        "seconds_of": {name: asdict(timing) for name, timing in times.items()},
        "gain": serial / pipelined,
        "simulated_seconds": simulated,
        "simulated_gain": serial / simulated,
        "simulation_error": simulated / pipelined - 1,
        "stages": asdict(stages),
        "sent_bytes": traffic["sent"],
        "received_bytes": traffic["received"],
    }


def _begun(reader: OffloadedReader, load: Load) -> list[Row]:
    """Read prompts of random tokens; return their rows."""
    draws = torch.Generator().manual_seed(0)
    rows = []
    for i in range(load.batch):
        prompt = torch.randint(reader.vocab_size, (load.context,), generator=draws).tolist()
        row = Row(Request(str(i), prompt, STEPS), i, prompt, None)
        for start in range(0, load.context, CHUNK):
            some = prompt[start : start + CHUNK]
            reader.read([row], [some])
            row.length += len(some)
        rows.append(row)
    return rows


def _action(reader: OffloadedReader, rows: Sequence[Row], way: Way, spent: Spent) -> Callable[[], None]:
    def step() -> None:
        reader.micro_batches, reader.in_turn, reader.overlap = way.micro_batches, way.in_turn, way.overlap
        model, waiting, busy = reader.clock.model, reader.clock.waiting, list(reader.pool.busy)
        reader.read(rows, [[0]] * len(rows))
        spent.model.append(reader.clock.model - model)
        spent.waiting.append(reader.clock.waiting - waiting)
        spent.attention.append(max(now - before for now, before in zip(reader.pool.busy, busy, strict=True)))
        for row in rows:
            row.length += 1

    return step
