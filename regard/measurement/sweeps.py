"""Running the cells of a sweep on other processes and machines by Ray (https://docs.ray.io), with one store of results.

Each cell writes to a store of its own where it runs; its rows are then merged unchanged into the sweep's store, with
the worker's machine and versions and the sweep's run and command. So a report is the same wherever its cells were run.
If a worker is lost, Ray runs its cell again; only the process that started the sweep writes to the sweep's store.
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

from regard.catalogue import files_beside
from regard.contract import Unsupported
from regard.measurement.store import Store
from regard.version import VERSION

RESULTS = "results.db"
TRIES_AGAIN = 3
"""How often a cell is retried when its worker is lost."""
SECONDS_TO_REACH = 5.0

Make = Callable[[Any, Any, Store, Path], None]
"""``make(shared, cell, store, folder)`` runs a cell and writes rows and files; must be a module-level function."""

Files = Mapping[str, bytes]
"""The files that a cell leaves behind: path -> contents."""

Done = Callable[[Any, int], None]
"""Called with each finished cell, and the number of cells still running."""


class Sweep(Protocol):
    """The protocol for running cells in other processes."""

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
        """Run cells; as each finishes, add its rows to `store` and its files next to it.

        Args:
            make: runs one cell.
            shared: data for all cells, sent once to each worker.
            cells: data of each cell, sent one by one.
            threads: number of processors, and torch threads, for each cell.
            device: device that cells compute on; unless it is a CPU, each cell has one to itself.
            on_done: called with each finished cell and the number of cells still running.

        Raises:
            Unsupported: as `make`, and for a cell whose workers were lost repeatedly. Cells that finished before are in
                the store.
        """
        ...


@dataclass(frozen=True)
class Plugins:
    """Plugin files with mechanisms, tasks and models, to be sent to the workers.

    Attributes:
        load: loads a list of paths, each with ``:Class`` appended if a class was named; must be a module-level
            function.
        files: for each file, its name, the appended ``:Class`` or nothing, and the contents of the file and of those
            that it imported from beside it, by their paths.
    """

    load: Callable[[list[Path]], object]
    files: tuple[tuple[str, str, tuple[tuple[str, bytes], ...]], ...] = ()

    @classmethod
    def read(cls, load: Callable[[list[Path]], object], named: Sequence[Path]) -> Plugins:
        """Read plugin files named as on the command line: ``file.py`` or ``file.py:Class``.

        Of the files beside a plugin, those that this process has imported are sent along: load the plugins before.
        """
        found = []
        for one in named:
            path, _, follows = str(one).partition(".py:")
            file = Path(f"{path}.py" if follows else path).absolute()
            texts = {
                beside.relative_to(file.parent).as_posix(): beside.read_bytes()
                for beside in [file, *files_beside(file)]
            }
            found.append((file.name, f":{follows}" if follows else "", tuple(texts.items())))
        return cls(load, tuple(found))

    def enter(self) -> None:
        """Load the plugins, once per process."""
        if self in _ENTERED:
            return
        folder = tempfile.TemporaryDirectory(prefix="regard-plugins-")
        _ENTERED[self] = folder  # kept as long as the process: tracebacks and documentation read the files
        paths = []
        for number, (name, follows, texts) in enumerate(self.files):
            place = Path(folder.name) / str(number)
            for path, text in texts:
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                (place / path).write_bytes(text)
            paths.append(Path(f"{place / name}{follows}"))
        if paths:
            self.load(paths)


_ENTERED: dict[Plugins, Any] = {}


@dataclass(frozen=True)
class Origin:
    """The origin of a sweep: run and command, which its rows record, regard's version, and the plugins."""

    run: str
    command: str
    version: str
    plugins: Plugins


def made(make: Make, shared: Any, cell: Any, origin: Origin, threads: int) -> Files:
    """Run a cell in the worker and return its files; the file `RESULTS` has its rows."""
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
    """Add a cell's files next to `store`, then its rows to it, so that every cell with a row has its files."""
    with tempfile.TemporaryDirectory(prefix="regard-cell-") as folder:
        for path, content in files.items():
            place = (Path(folder) if path.startswith(RESULTS) else store.path.parent) / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        store.merge(Path(folder) / RESULTS)


def _unpacked(packed: bytes, cell: bytes, origin: bytes, threads: int) -> Files:
    """Unpickle a cell and call :func:`made`; plugins are loaded first, since the cell may need their classes."""
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
    """Runs cells on a Ray cluster, as many at a time as it has processors for.

    As a context manager, it joins the cluster or starts one on this machine, and leaves or stops it at the end. If the
    process has already joined a cluster, that one is used and kept.

    Args:
        address: ``auto`` for the cluster of this machine, ``local`` for a new one, or ``HOST:PORT``. None for the
            cluster in ``RAY_ADDRESS`` or on this machine or, if there is none, a new one with all processors of this
            machine.
        plugins: plugins that the workers load before they run cells.

    Raises:
        Unsupported: if Ray is not installed, or the cluster cannot be reached.
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
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage data is sent
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
        except errors.RayTaskError as error:  # raised by the cell itself
            raise getattr(error, "cause", None) or error from None
        except errors.RayError as error:
            raise Unsupported(
                f"a cell whose worker was lost {TRIES_AGAIN + 1} times ({str(error).strip().splitlines()[0]})",
                supported="workers with enough memory; finished cells are kept, and the same command continues",
            ) from error

    def _check_room(self, threads: int, accelerators: int) -> None:
        """Raise Unsupported if no machine has room for a cell, which would otherwise wait forever."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= threads and node.get("GPU", 0) >= accelerators for node in nodes):
            wanted = f"{threads} processors" + " and an accelerator" * accelerators
            raise Unsupported(f"cells that take {wanted} each", supported="a cluster with a machine that has them")


def _reach(address: str) -> None:
    """Raise Unsupported if nothing answers at the address, since Ray itself would keep trying for a long time."""
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
