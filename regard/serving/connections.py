"""Connections with timeouts: a client that is too slow to send its request or to read its answer is cut off, and the
requests of a client that has disconnected are cancelled."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from regard.serving.app import ServerLimits

GRACE = 5.0
"""Seconds between the end of a client's time, in which it can be sent an error, and the cut of its connection."""
ASK_AGAIN = 1.0
"""Seconds between two checks of whether a client that has closed its sending side is still connected."""


def connection(limits: ServerLimits) -> type[H11Protocol]:
    """Return the protocol class that uvicorn uses for each connection."""

    class Connection(H11Protocol):
        """HTTP/1.1 with a timeout for each phase of a request.

        Head and body of a request have `body_seconds` each to arrive. The answer has `seconds` to be completed, and
        what is still buffered then has as long again to be read. After that the connection is cut, even with data left
        to write: the application sees a disconnected client and cancels its requests.

        A client that closes its sending side may still wait for its answer, or it may be gone. The two look the same
        until something is written to the client, and only a second write fails if it is gone. So it is sent "100
        Continue", which means nothing and which every HTTP/1.1 client must accept, again and again until its answer
        begins.
        """

        _clock: asyncio.TimerHandle | None = None
        _next: tuple[object, ...] = ()
        _sent_all = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._look()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look()

        def eof_received(self) -> bool:  # type: ignore[override]
            cycle = self.cycle
            asked = cycle is not None and not cycle.more_body and not cycle.response_complete
            self._sent_all = asked and cycle.scope["http_version"] != "1.0"
            if self._sent_all:
                self._ask_whether_there()
            return self._sent_all

        def _ask_whether_there(self) -> None:
            if self.transport.is_closing():
                return
            if not self.cycle.response_started:
                told = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
                self.transport.write(self.conn.send(told) or b"")
            self.loop.call_later(ASK_AGAIN, self._ask_whether_there)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._look()
            if self._sent_all and self.cycle.response_complete:
                self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._clock is not None:
                self._clock.cancel()
            super().connection_lost(exc)

        def _look(self) -> None:
            """Restart the timer when the connection enters another phase."""
            cycle = self.cycle
            following = (cycle, cycle is not None and (cycle.more_body, cycle.response_complete))
            if following == self._next:
                return
            self._next = following
            if self._clock is not None:
                self._clock.cancel()
            sending = cycle is None or (cycle.more_body and not cycle.response_complete)
            seconds = limits.body_seconds if sending else limits.seconds
            self._clock = self.loop.call_later(seconds + GRACE, self.transport.abort)

    return Connection
