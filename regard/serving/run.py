"""Runs a server with uvicorn: until a signal, or inside a ``with`` block."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from types import TracebackType
from typing import Any

import uvicorn

from regard.contract import Unsupported
from regard.serving.app import Server
from regard.serving.connections import GRACE, connection


class _Uvicorn(uvicorn.Server):
    """A uvicorn server that on shutdown gives answers `drain` seconds, then sends errors, then cuts all connections."""

    def __init__(self, server: Server, drain: int, level: str) -> None:
        super().__init__(
            uvicorn.Config(
                server.app(),
                http=connection(server.limits),
                ws="none",
                log_level=level,
                timeout_graceful_shutdown=int(drain + 2 * GRACE),
                access_log=False,
                server_header=False,
            )
        )
        self._service, self._drain = server.service, drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(self._drain, self._service.give_up)
        loop.call_later(self._drain + GRACE, self._cut)
        await super().shutdown(sockets)

    def _cut(self) -> None:
        for each in list(self.server_state.connections):
            each.transport.abort()


def run(server: Server, listening: socket.socket, drain: int) -> None:
    """Serve until SIGTERM or SIGINT; then take no more requests, and finish the answers within `drain` seconds.

    The signal is not raised again: after a clean shutdown, the process goes on to exit with status 0.
    """
    made = _Uvicorn(server, drain, "warning")
    # uvicorn raises its captured signals again at the end; its own handler catches them, so that they kill nothing
    before = {number: signal.signal(number, made.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
    server.service.start()
    try:
        made.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        server.service.close()


class Running:
    """A server that runs in its own thread inside a ``with`` block."""

    def __init__(self, server: Server, listening: socket.socket, drain: int = 5) -> None:
        self._server, self._uvicorn = server, _Uvicorn(server, drain, "error")
        run: Any = self._uvicorn.run
        self._thread = threading.Thread(target=run, kwargs={"sockets": [listening]}, daemon=True)

    def __enter__(self) -> Running:
        self._server.service.start()
        self._thread.start()
        while not self._uvicorn.started:
            if not self._thread.is_alive():
                raise Unsupported("a server that did not start")
            time.sleep(0.01)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._uvicorn.should_exit = True
        self._thread.join()
        self._server.service.close()
