"""Backends for attention workers: in the same process, in other processes with shared memory, or over TCP.

A backend starts workers and returns a :class:`Link` to each, through which messages are sent and answers come back in
the same order. The messages are the same for all backends.
"""

from __future__ import annotations

import atexit
import hmac
import itertools
import json
import mmap
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import regard
from regard.contract import Unsupported, at_least, one_of
from regard.serving.offload.messages import Channel, Garbled, Message, Ring
from regard.serving.offload.worker import LOOPBACK, PROCESS, AttentionWorker

Answer = TypeVar("Answer")
SECRET_BYTES = 32
"""Length of the secret that a worker sends when it connects."""
PATIENCE = 60.0
"""Seconds without an answer after which a worker counts as lost."""
GREETING = 5.0
"""Seconds within which a new connection must send the secret, and an ended worker must exit."""
SHARED_BYTES = 16 << 20
"""Bytes of shared memory for the messages to and from a worker, together."""


class Lost(Exception):
    """A worker has ended or does not answer."""


class Link(Protocol):
    """The model worker's connection to an attention worker.

    Attributes:
        framing: bytes of messages apart from their tensors, both ways; 0 in the same process.
    """

    @property
    def framing(self) -> int: ...

    def send(self, message: Message) -> None:
        """Send a message; raises Lost."""
        ...

    def receive(self) -> Message:
        """Return the next answer; raises Lost."""
        ...

    def close(self) -> None:
        """End the worker."""
        ...


class Backend(Protocol):
    """Starts attention workers."""

    def start(self, count: int) -> Sequence[Link]:
        """Start `count` more workers; raises Unsupported if one does not start."""
        ...


class LocalLink:
    """A worker in the same process."""

    framing = 0

    def __init__(self) -> None:
        self.worker: AttentionWorker | None = AttentionWorker()
        self._answers: deque[Message] = deque()

    def send(self, message: Message) -> None:
        if self.worker is None:
            raise Lost("an attention worker that was closed")
        answer = self.worker.answer(message)
        if answer is not None:
            self._answers.append(answer)

    def receive(self) -> Message:
        if self.worker is None:
            raise Lost("an attention worker that was closed")
        return self._answers.popleft()

    def close(self) -> None:
        self.worker = None


class LocalBackend:
    """Workers in the same process, which compute as soon as they are sent a message: for tests of the split alone."""

    def start(self, count: int) -> Sequence[Link]:
        return [LocalLink() for _ in range(count)]


class ProcessLink:
    """A worker in its own process.

    Attributes:
        process: its process ID.
    """

    def __init__(self, process: int, connection: socket.socket, memory: mmap.mmap | None = None) -> None:
        self.process, self._memory = process, memory
        rings: tuple[Ring, ...] = ()
        if memory is not None:
            half = len(memory) // 2
            rings = Ring(memory, 0, half), Ring(memory, half, half)
        connection.settimeout(PATIENCE)
        self._channel = Channel(connection, *rings)
        self._lost = False  # if so, later data may start in the middle of a message

    @property
    def framing(self) -> int:
        """Bytes of messages apart from their tensors, as the channel counts them."""
        return self._channel.framing

    def send(self, message: Message) -> None:
        self._reach(lambda: self._channel.send(message))

    def receive(self) -> Message:
        return self._reach(self._channel.receive)

    def _reach(self, action: Callable[[], Answer]) -> Answer:
        said = ""
        if not self._lost:
            try:
                return action()
            except (OSError, EOFError, Garbled) as error:
                self._lost, said = True, f" ({error})"
        raise Lost(f"process {self.process} does not answer{said}")

    def close(self) -> None:
        self._lost = True
        self._channel.close()
        _end(self.process)
        if self._memory is not None:
            self._memory.close()


class ProcessBackend:
    """Workers in other processes: messages go over a socket pair, their tensors through shared memory.

    Args:
        threads: threads of each worker.
        cores: processor cores, assigned to the workers in turn; None to leave workers unpinned.
        shared_bytes: bytes of shared memory for a worker's messages; tensors that do not fit go over the socket.
    """

    def __init__(
        self, threads: int = 1, cores: Sequence[int] | None = None, *, shared_bytes: int = SHARED_BYTES
    ) -> None:
        self._orders, self._bytes = _orders(threads, cores), shared_bytes

    def start(self, count: int) -> Sequence[Link]:
        return _all(count, self._one)

    def _one(self) -> Link:
        with _memory_file(self._bytes) as file:
            memory = mmap.mmap(file.fileno(), self._bytes)
            ours, theirs = socket.socketpair()
            with theirs:
                order = {**next(self._orders), "bytes": self._bytes}
                process = nursery().fork(order, (theirs.fileno(), file.fileno()))
        return ProcessLink(process, ours, memory)


class TcpBackend:
    """Workers in other processes of this machine, over TCP on 127.0.0.1. A worker identifies itself with a secret.

    Args:
        threads, cores: as for :class:`ProcessBackend`.
    """

    def __init__(self, threads: int = 1, cores: Sequence[int] | None = None) -> None:
        self._orders = _orders(threads, cores)

    def start(self, count: int) -> Sequence[Link]:
        return _all(count, self._one)

    def _one(self) -> Link:
        secret = secrets.token_bytes(SECRET_BYTES)
        with socket.create_server((LOOPBACK, 0)) as listening:
            order = {**next(self._orders), "port": listening.getsockname()[1], "secret": secret.hex()}
            process = nursery().fork(order)
            return ProcessLink(process, _accepted(listening, secret))


class Nursery:
    """A process that has imported torch and forks itself to start workers; it ends with this process."""

    def __init__(self) -> None:
        if not hasattr(os, "fork"):
            raise Unsupported("attention workers as processes on this system", supported="Linux and macOS")
        self._orders, theirs = socket.socketpair()
        # regard may have been imported from a folder that is not on the new process's path
        path = [str(Path(regard.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        words = [sys.executable, "-c", "from regard.serving.offload.worker import main; main()", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                words, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}
            )
        self._lock = threading.Lock()

    def fork(self, order: Mapping[str, Any], inherited: Sequence[int] = ()) -> int:
        """Fork a worker with an order (see :func:`regard.serving.offload.worker.start`); return its process ID."""
        with self._lock:
            try:
                socket.send_fds(self._orders, [json.dumps(order).encode()], inherited)
                answer = self._orders.recv(PROCESS.size, socket.MSG_WAITALL)
            except OSError:
                answer = b""
        if not answer:
            raise Unsupported("an attention worker that did not start", supported="what it said on the error output")
        return PROCESS.unpack(answer)[0]

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self._process.poll() is None

    def close(self) -> None:
        self._orders.close()
        self._process.wait()


_NURSERIES: list[Nursery] = []
_LOCK = threading.Lock()


def nursery() -> Nursery:
    """Return the nursery of this process; a new one if the last has ended."""
    with _LOCK:
        if not _NURSERIES or not _NURSERIES[-1].alive:
            _NURSERIES.append(Nursery())
            atexit.register(_NURSERIES[-1].close)
        return _NURSERIES[-1]


BACKENDS = {"local": LocalBackend, "process": ProcessBackend, "tcp": TcpBackend}


def create_backend(name: str, threads: int = 1, cores: Sequence[int] | None = None) -> Backend:
    """Create a backend by name: ``local``, ``process`` or ``tcp``.

    Raises:
        Unsupported: for another name, fewer than one thread, or cores that this machine does not have.
    """
    one_of("backend", name, BACKENDS)
    if name == "local":
        return LocalBackend()
    return ProcessBackend(threads, cores) if name == "process" else TcpBackend(threads, cores)


def _orders(threads: int, cores: Sequence[int] | None) -> Iterator[dict[str, Any]]:
    """Return an endless iterator over the workers' orders: the number of threads, and the core of each worker."""
    at_least("threads", threads, 1)
    if cores is not None:
        if not hasattr(os, "sched_getaffinity"):
            raise Unsupported("cores on this system", supported="Linux", nearest="cores=None")
        there = sorted(os.sched_getaffinity(0))
        if not cores or not set(cores) <= set(there):
            raise Unsupported(f"cores={list(cores)}", supported=f"some of {there}", nearest="cores=None")
    return ({"threads": threads, "core": core} for core in itertools.cycle(cores or [None]))


def _all(count: int, start: Callable[[], Link]) -> list[Link]:
    """Start `count` links; if one does not start, close all."""
    links: list[Link] = []
    try:
        while len(links) < count:
            links.append(start())
    except BaseException:
        for link in links:
            link.close()
        raise
    return links


SHARED_FOLDERS = (Path("/dev/shm"), Path(tempfile.gettempdir()))
"""Folders for shared memory: the in-memory file system, or the temporary folder if it is full (as in containers)."""


def _memory_file(size: int) -> IO[bytes]:
    """Create an unnamed file with all its space allocated: a write without room left would kill the process."""
    take = getattr(os, "posix_fallocate", None) or (lambda file, start, size: os.truncate(file, size))
    said = ""
    for folder in filter(Path.is_dir, SHARED_FOLDERS):
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        try:
            take(file.fileno(), 0, size)
            return file
        except OSError as error:
            file.close()
            said = f"{folder}: {error.strerror or error}"
    raise Unsupported(
        f"{size} bytes that a worker and its model both see ({said})",
        supported=f"so much room in {' or '.join(map(str, SHARED_FOLDERS))} for each worker",
    )


def _accepted(listening: socket.socket, secret: bytes) -> socket.socket:
    """Accept the connection that sends the secret; others are closed."""
    listening.settimeout(PATIENCE)
    while True:
        try:
            connection, _ = listening.accept()
        except TimeoutError:
            raise Unsupported("an attention worker that does not connect", supported="one within a minute") from None
        connection.settimeout(GREETING)
        try:
            shown = connection.recv(SECRET_BYTES, socket.MSG_WAITALL)
        except OSError:
            shown = b""
        if hmac.compare_digest(secret, shown):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        connection.close()


def _end(process: int) -> None:
    """Wait for a process whose channel was closed to exit; kill it if it does not."""
    end = time.monotonic() + GREETING
    try:
        while time.monotonic() < end:
            os.kill(process, 0)
            time.sleep(0.002)
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass
