"""Programs of ranks that exchange tensors, run by `torch.distributed` or all in this process.

A program is a generator: it yields what it sends and expects (:class:`Exchange`), receives an object that it must wait
for, even if it only sends, and returns its result. Before waiting, it may compute while tensors are under way. The same
program runs on the ranks of a process group, and on virtual ranks, which take turns in one process.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from regard.contract import Unsupported

T = TypeVar("T")
Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Exchange:
    """What a rank sends to other ranks and expects from them, by rank number.

    Attributes:
        sends: tensors, which must not change before the exchange has been waited for.
        receives: buffers to write to; None for tensors whose number, shapes and dtypes only the sender knows and
            announces.
        announced: whether the shapes of `sends` are announced, for receivers that do not know them.
    """

    sends: Mapping[int, Tensors] = field(default_factory=dict)
    receives: Mapping[int, Tensors | None] = field(default_factory=dict)
    announced: bool = False


class Pending(Protocol):
    """An exchange that is under way."""

    def wait(self) -> Mapping[int, Tensors]:
        """Wait for the exchange, and return the received tensors by sender."""


Program = Generator[Exchange, Pending, T]


@dataclass
class Traffic:
    """Counts of what one rank has sent and computed.

    Attributes:
        bytes: bytes sent to other ranks.
        messages: sent tensors with at least one element.
        steps: exchanges that the rank participated in.
        scores: query-key pairs, counted in every row and head.
    """

    bytes: int = 0
    messages: int = 0
    steps: int = 0
    scores: int = 0

    def count(self, exchange: Exchange) -> None:
        """Add the tensors that an exchange sends."""
        sent = [x for tensors in exchange.sends.values() for x in tensors if x.numel()]
        self.bytes += sum(x.numel() * x.element_size() for x in sent)
        self.messages += len(sent)
        self.steps += bool(exchange.sends or exchange.receives)


@dataclass(frozen=True)
class Ranks:
    """The ranks that run programs: all of them, and the ones in this process.

    Attributes:
        count: number of ranks.
        local: the ranks that run in this process.
        group: process group; None for virtual ranks.
    """

    count: int
    local: tuple[int, ...]
    group: Any = None

    @classmethod
    def of(cls, ranks: int | None, group: Any) -> Ranks:
        """Virtual ranks, or the ranks of a process group or mesh with one axis; of the default group if both are None.

        Raises:
            Unsupported: if both are given, for a mesh with more axes, and for neither if `torch.distributed` is not
                initialised.
        """
        if ranks is not None:
            if group is not None:
                raise Unsupported("virtual ranks and a process group", supported="one of ranks and group")
            if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
                raise Unsupported(f"ranks={ranks!r}", supported="a positive number of virtual ranks", nearest="ranks=2")
            return cls(ranks, tuple(range(ranks)))
        if not (dist.is_available() and dist.is_initialized()):
            raise Unsupported(
                "a process group while torch.distributed is not initialised",
                supported="torch.distributed.init_process_group(...) in a process of torchrun",
                nearest="ranks=2, for virtual ranks in this process",
            )
        if isinstance(group, dist.DeviceMesh):
            if group.ndim != 1:
                raise Unsupported(
                    f"a mesh of {group.ndim} axes", supported="one axis", nearest="mesh['name of an axis']"
                )
            group = group.get_group()
        group = dist.group.WORLD if group is None else group
        here = dist.get_rank(group)
        if here < 0:
            raise Unsupported("a process group that this process is not in", supported="a group of this process")
        return cls(dist.get_world_size(group), (here,), group)

    def run(self, programs: Sequence[Program[T]], traffic: Sequence[Traffic]) -> list[T]:
        """Run the programs of the local ranks, and return their results."""
        if self.group is None:
            return _run_in_turn(programs, traffic)
        return [_run_in_group(programs[0], traffic[0], self.group)]


def swap(sends: Mapping[int, Tensors], receives: Mapping[int, Tensors]) -> Program[Mapping[int, Tensors]]:
    """An exchange that is waited for at once."""
    pending = yield Exchange(sends, receives)
    return pending.wait()


@dataclass
class _Arrived:
    received: Mapping[int, Tensors]
    waited: bool = False

    def wait(self) -> Mapping[int, Tensors]:
        self.waited = True
        return self.received


def _run_in_turn(programs: Sequence[Program[T]], traffic: Sequence[Traffic]) -> list[T]:
    results: list[Any] = [None] * len(programs)
    answers: dict[int, Pending | None] = dict.fromkeys(range(len(programs)))
    arrived: list[_Arrived] = []
    while answers:
        posted: dict[int, Exchange] = {}
        for rank, answer in answers.items():
            try:
                posted[rank] = programs[rank].send(answer)  # type: ignore[arg-type]
                traffic[rank].count(posted[rank])
            except StopIteration as stop:
                results[rank] = stop.value
        answers = {}
        for rank, exchange in posted.items():
            answers[rank] = found = _Arrived(_deliver(rank, posted))
            arrived += [found] if exchange.sends or exchange.receives else []
    if not all(found.waited for found in arrived):  # or else a process group would hang for ever
        raise RuntimeError("a program has ended without waiting for an exchange")
    return results


def _deliver(rank: int, posted: Mapping[int, Exchange]) -> dict[int, Tensors]:
    found: dict[int, Tensors] = {}
    for source, expected in posted[rank].receives.items():
        sent = posted[source].sends[rank]
        if expected is None:
            found[source] = [x.clone() for x in sent]
            continue
        for buffer, x in zip(expected, sent, strict=True):
            if (buffer.shape, buffer.dtype) != (x.shape, x.dtype):  # copy_ would broadcast and cast
                raise RuntimeError(f"rank {rank} expects {buffer.shape} of rank {source}, which sends {x.shape}")
            buffer.copy_(x)
        found[source] = expected
    return found


@dataclass(frozen=True)
class _UnderWay:
    works: list[Any]
    received: Mapping[int, Tensors]
    sent: list[Tensor]
    """Tensors being sent, kept alive until they have left."""

    def wait(self) -> Mapping[int, Tensors]:
        for work in self.works:
            work.wait()
        return self.received


def _run_in_group(program: Program[T], traffic: Traffic, group: Any) -> T:
    answer: Pending | None = None
    while True:
        try:
            exchange = program.send(answer)  # type: ignore[arg-type]
        except StopIteration as stop:
            return stop.value
        traffic.count(exchange)
        answer = _post(exchange, group)


def _post(exchange: Exchange, group: Any) -> Pending:
    def of(rank: int) -> int:
        return dist.get_global_rank(group, rank)

    if exchange.announced:
        for target, tensors in exchange.sends.items():
            dist.send_object_list([[(x.shape, x.dtype) for x in tensors]], of(target), group)
    received: dict[int, Tensors] = {}
    for source, expected in exchange.receives.items():
        if expected is None:
            words: list[Any] = [None]
            dist.recv_object_list(words, of(source), group)
            device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
            expected = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in words[0]]
        received[source] = expected
    sent = [(x.contiguous(), target) for target, tensors in exchange.sends.items() for x in tensors if x.numel()]
    operations = [dist.P2POp(dist.isend, x, of(target), group) for x, target in sent]
    operations += [
        dist.P2POp(dist.irecv, x, of(source), group) for source, held in received.items() for x in held if x.numel()
    ]
    works = dist.batch_isend_irecv(operations) if operations else []
    return _UnderWay(works, received, [x for x, _ in sent])
