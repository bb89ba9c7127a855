"""Running a server with uvicorn: until a signal, or for the length of a block."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from types import TracebackType
from typing import Any

import uvicorn

from regard.contract import Unsupported
from regard.serving.app import Server

GRACE = 1
"""Seconds to tell clients that their answers are given up."""


class _Uvicorn(uvicorn.Server):
    """Serves; once it is to end, answers have `drain` seconds, and then those who wait are told."""

    def __init__(self, server: Server, drain: int, level: str) -> None:
        super().__init__(
            uvicorn.Config(
                server.app(),
                log_level=level,
                timeout_graceful_shutdown=drain + GRACE,
                access_log=False,
                server_header=False,
            )
        )
        self._service, self._drain = server.service, drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._drain, self._service.give_up)
        await super().shutdown(sockets)


def run(server: Server, listening: socket.socket, drain: int) -> None:
    """Serve until SIGTERM or SIGINT; then take nothing more, and finish the answers within `drain` seconds."""
    server.service.start()
    try:
        _Uvicorn(server, drain, "warning").run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn has taken care of it, and passes it on
        pass
    finally:
        server.service.close()


class Running:
    """Serves in a thread of its own inside a ``with`` block."""

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
