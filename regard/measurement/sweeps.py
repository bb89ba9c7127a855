"""Cells of a sweep on other processes and machines, by Ray (https://docs.ray.io): their rows come back into one store.

A cell is made where it runs into a store of its own, whose rows are then taken over as they are: with the machine and the
versions of the place, and the run and the command of the sweep. So a report is the same wherever its cells were made.
Ray runs a cell again whose worker is lost; rows are written by the process that asked alone.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from regard.contract import Unsupported
from regard.measurement.store import Store
from regard.version import VERSION

RESULTS = "results.db"
TRIES_AGAIN = 3
"""Times that a cell is run again whose worker was lost."""
SECONDS_TO_REACH = 5.0

Make = Callable[[Any, Any, Store, Path], None]
"""Makes a cell: of what all cells share, and what the cell is, into a store and a folder for files. A function of a module."""

Files = Mapping[str, bytes]
"""Contents by path: what a cell leaves behind."""

Done = Callable[[Any, int], None]
"""Told of a cell that has come back, and how many are still under way."""


class Sweep(Protocol):
    """Runs cells somewhere else."""

    def run(
        self,
        make: Make,
        shared: Any,
        cells: Sequence[Any],
        store: Store,
        *,
        threads: int = 1,
        device: str = "cpu",
        on_done: Done = lambda cell, left: None,
    ) -> None:
        """Run cells, and put their rows into `store` and their files beside it as they come back.

        Args:
            make: makes one of them.
            shared: sent once to each worker.
            cells: sent one by one.
            threads: of torch, and processors that a cell is given.
            device: which it computes on; one that is not a CPU is a cell's own.

        Raises:
            Unsupported: as `make`, and for a cell whose workers were lost again and again. Cells that came back before are in
                the store.
        """
        ...


@dataclass(frozen=True)
class Plugins:
    """Files of mechanisms, tasks and models, on their way to the workers.

    Attributes:
        load: takes a list of paths, each followed by the name of a class where one was named; a function of a module.
        files: of each its name, what followed it, and its text.
    """

    load: Callable[[list[Path]], object]
    files: tuple[tuple[str, str, bytes], ...] = ()

    @classmethod
    def read(cls, load: Callable[[list[Path]], object], named: Sequence[Path]) -> Plugins:
        """The files, as a command is given them: ``file.py`` or ``file.py:Class``."""
        found = []
        for one in named:
            path, _, name = str(one).partition(".py:")
            path, name = (f"{path}.py", f":{name}") if name else (path, "")
            found.append((Path(path).name, name, Path(path).read_bytes()))
        return cls(load, tuple(found))

    def enter(self) -> None:
        """Load them, once a process."""
        if self in _ENTERED:
            return
        folder = tempfile.TemporaryDirectory(prefix="regard-plugins-")
        _ENTERED[self] = folder  # which stays as long as the process: errors and documentation are read from the files
        paths = []
        for number, (name, follows, text) in enumerate(self.files):
            place = Path(folder.name) / str(number) / name
            place.parent.mkdir()
            place.write_bytes(text)
            paths.append(Path(f"{place}{follows}"))
        if paths:
            self.load(paths)


_ENTERED: dict[Plugins, Any] = {}


@dataclass(frozen=True)
class Origin:
    """Where a sweep comes from, which its rows say: run, command and version, and the plugins that it knows."""

    run: str
    command: str
    version: str
    plugins: Plugins


def made(make: Make, shared: Any, cell: Any, origin: Origin, threads: int) -> Files:
    """Make a cell, in the process that it was sent to; its rows are in the file `RESULTS` among its files."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix="regard-cell-") as folder:
            place = Path(folder)
            with Store(place / RESULTS, run=origin.run, command=origin.command) as store:
                make(shared, cell, store, place)
            found = (path for path in sorted(place.rglob("*")) if path.is_file())
            return {path.relative_to(place).as_posix(): path.read_bytes() for path in found}
    finally:
        torch.set_num_threads(before)


def take_over(files: Files, store: Store) -> None:
    """Put a cell's rows into `store` and its files beside it; the rows come last, so that a cell with a row has its files."""
    with tempfile.TemporaryDirectory(prefix="regard-cell-") as folder:
        for path, content in files.items():
            place = (Path(folder) if path.startswith(RESULTS) else store.path.parent) / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        store.merge(Path(folder) / RESULTS)


def _unpacked(packed: bytes, cell: bytes, origin: bytes, threads: int) -> Files:
    """:func:`made`, where what was sent may be of plugins, which are entered first."""
    came = pickle.loads(origin)
    if came.version != VERSION:
        raise Unsupported(
            f"a worker with regard {VERSION} for cells of regard {came.version}",
            supported="the same version on all machines",
        )
    came.plugins.enter()
    make, shared = pickle.loads(packed)
    return made(make, shared, pickle.loads(cell), came, threads)


class RaySweep:
    """Cells on a cluster of Ray, as many at a time as it has processors for.

    A context: it joins the cluster, or starts one on this machine, and leaves or stops it. Where the process has joined one
    already, that is used, and stays.

    Args:
        address: ``auto`` for the cluster of this machine, ``local`` for one of its own, ``HOST:PORT``. None for the one in
            ``RAY_ADDRESS`` or on this machine, and where there is none for all processors of this machine.
        plugins: known to the workers before they are given cells.

    Raises:
        Unsupported: without Ray, and where the cluster cannot be reached.
    """

    def __init__(self, address: str | None, plugins: Plugins) -> None:
        self.address, self.plugins = address, plugins
        try:
            import ray
        except ImportError:
            raise Unsupported(
                "engine='ray' without Ray", supported="an installed Ray", nearest="pip install 'regard[cluster]'"
            ) from None
        self.ray, self._own = ray, False

    def __enter__(self) -> Self:
        if not self.ray.is_initialized():
            self._join()
            self._own = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own:
            self.ray.shutdown()
            self._own = False

    def _join(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about the user goes anywhere
        if self.address is not None:
            _reach(self.address)
        try:
            self.ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _unreachable(self.address, error) from error

    def run(
        self,
        make: Make,
        shared: Any,
        cells: Sequence[Any],
        store: Store,
        *,
        threads: int = 1,
        device: str = "cpu",
        on_done: Done = lambda cell, left: None,
    ) -> None:
        ray, pack = self.ray, self.ray.cloudpickle.dumps
        accelerators = 0 if device == "cpu" else 1
        self._check_room(threads, accelerators)
        origin = pack(Origin(store.run, store.command, VERSION, self.plugins))
        function = ray.remote(num_cpus=threads, num_gpus=accelerators, max_retries=TRIES_AGAIN)(_unpacked)
        packed = ray.put(pack((make, shared)))
        under_way = {function.remote(packed, pack(cell), origin, threads): cell for cell in cells}
        try:
            while under_way:
                (done, *_), _ = ray.wait(list(under_way))
                take_over(self._result(done), store)
                cell = under_way.pop(done)
                on_done(cell, len(under_way))
        finally:
            for left in under_way:
                ray.cancel(left, force=True)

    def _result(self, reference: Any) -> Files:
        errors = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except errors.RayTaskError as error:  # of the cell itself
            raise getattr(error, "cause", None) or error from None
        except errors.RayError as error:
            raise Unsupported(
                f"a cell whose worker was lost {TRIES_AGAIN + 1} times ({str(error).strip().splitlines()[0]})",
                supported="workers with memory enough for it; what came back is kept, and the same command goes on",
            ) from error

    def _check_room(self, threads: int, accelerators: int) -> None:
        """A cell that no machine has room for would wait for ever."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= threads and node.get("GPU", 0) >= accelerators for node in nodes):
            wanted = f"{threads} processors" + " and an accelerator" * accelerators
            raise Unsupported(f"cells that take {wanted} each", supported="a cluster with a machine that has them")


def _reach(address: str) -> None:
    """Raise Unsupported where nothing answers, which Ray itself would try to find out for a long time."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        if address in ("auto", "local"):
            return
        raise Unsupported(f"address {address!r}", supported="auto, local, HOST:PORT", nearest="auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_REACH).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str | None, error: Exception) -> Unsupported:
    where = "a cluster of Ray" if address is None else f"a cluster of Ray at {address}"
    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    return Unsupported(
        f"{where}, which cannot be reached ({why})",
        supported="one that runs: ray start --head on one machine, ray start --address HOST:PORT on the others, "
        "and a token where Ray asks for one",
        nearest="--address local, for the processors of this machine",
    )
