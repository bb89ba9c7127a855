"""Connections that end: a client that does not send its request, or does not read its answer, in time is cut off, and one that
has gone is forgotten."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from regard.serving.app import ServerLimits

GRACE = 5.0
"""Seconds to tell a client that its time is over before its connection is cut."""
ASK_AGAIN = 1.0
"""Seconds between two questions whether a client that sends nothing more is still there."""


def connection(limits: ServerLimits) -> type[H11Protocol]:
    """The protocol that uvicorn speaks on each connection."""

    class Connection(H11Protocol):
        """HTTP/1.1 with a clock for whatever the client has to do next.

        Each head of a request and each body has `body_seconds`, the answer `seconds`, and as long again what of it lies in
        buffers when it is complete. After that the connection is cut, whatever is still to be written: for the application
        the client has gone, and its answers are forgotten.

        The end of what a client sends may be that of its request alone, or it has gone: the two look the same until something
        is written to it, which then fails, though not the first time. So it is told "100 Continue", which says nothing and
        which every client of HTTP/1.1 has to take, again and again until its answer begins.
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
            """Set the clock anew where something else is next."""
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
