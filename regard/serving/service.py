"""The scheduler in its own thread, with answers as asynchronous streams."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from regard.contract import Unsupported
from regard.serving.engine import FAILED, Busy, Engine, Event, Request

LOG = logging.getLogger("regard.serving")


class Closing(Exception):
    """The service no longer accepts requests."""

    def __init__(self, why: str = "the server is shutting down") -> None:
        super().__init__(why)


@dataclass(eq=False)
class Stream:
    """The events of one or more requests, in order of arrival.

    Attributes:
        service: the service that answers the requests.
        live: keys of the requests that are not done.
        loop: the event loop of the caller.
        queue: events that have not been read; None ends the stream.
    """

    service: Service
    live: set[str]
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)

    async def events(self, seconds: float) -> AsyncIterator[Event]:
        """Yield events until all requests are done; raises TimeoutError after `seconds`, Closing if given up."""
        end = self.loop.time() + seconds
        while self.live:
            # not `asyncio.timeout`, since different tasks may ask for the events
            event = await asyncio.wait_for(self.queue.get(), end - self.loop.time())
            if event is None:
                raise Closing
            if event.key in self.live:
                if event.finish:
                    self.live.discard(event.key)
                yield event

    def cancel(self, key: str | None = None) -> None:
        """Cancel one of the requests, or all that are left."""
        keys = set(self.live) if key is None else {key} & self.live
        self.live -= keys
        self.service.cancel(keys)

    def put(self, event: Event | None) -> None:
        """Add an event, from any thread; None ends the stream with Closing."""
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)
        except RuntimeError:  # the loop has ended, so nobody waits for the event
            LOG.debug("%s came too late", event)


class Service:
    """Runs an engine in a thread while there is work.

    Attributes:
        waiting: number of requests in the queue.
        failed: the exception that ended the scheduler; None while it works.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.waiting = 0
        self.failed: BaseException | None = None
        self._streams: dict[str, Stream] = {}  # by request, running or waiting
        self._inbox: deque[Request | str] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="regard-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Accept no more requests, and end once the present ones are answered or cancelled."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def give_up(self) -> None:
        """End all streams with Closing: their answers will not be finished."""
        with self._wake:
            streams = set(self._streams.values())
        for stream in streams:
            stream.put(None)

    @property
    def healthy(self) -> bool:
        """True if requests are accepted: the scheduler has not failed and is not closing."""
        return self.failed is None and not self._closing

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Start requests that belong together. Must be called from an event loop.

        Raises:
            Busy: if too many requests wait.
            Closing: if no more requests are accepted.
            Unsupported: for a request that can never be answered.
        """
        for request in requests:
            self.engine.check(request)
        stream = Stream(self, {request.key for request in requests}, asyncio.get_running_loop())
        places = self.engine.limits.places
        if len(requests) > places:
            raise Unsupported(f"{len(requests)} answers at once", supported=f"up to {places}")
        with self._wake:
            if not self.healthy:
                raise Closing() if self.failed is None else Closing("the scheduler has failed")
            if len(self._streams) + len(requests) > places:
                raise Busy(f"{self.waiting} requests are waiting")
            self.waiting += len(requests)
            self._streams.update(dict.fromkeys(stream.live, stream))
            self._inbox.extend(requests)
            self._wake.notify()
        return stream

    def cancel(self, keys: set[str]) -> None:
        """Cancel requests by key; keys that are done or unknown are ignored."""
        with self._wake:
            for key in keys:
                if self._streams.pop(key, None) is not None:
                    self._inbox.append(key)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._take():
                for event in self.engine.step():
                    self._tell(event)
                with self._wake:
                    new = sum(isinstance(item, Request) for item in self._inbox)
                    self.waiting = len(self.engine.waiting) + new
        except BaseException as error:
            LOG.exception("the scheduler has failed")
            with self._wake:
                self.failed = error
                left = list(self._streams)
            for key in left:
                self._tell(Event(key, None, finish=FAILED, error="the scheduler has failed"))

    def _take(self) -> bool:
        """Wait for work, and pass new requests and cancellations to the engine; False to end."""
        with self._wake:
            while not (self._inbox or self.engine.busy or self._closing):
                self._wake.wait()
            taken = list(self._inbox)
            self._inbox.clear()
            if self._closing and not taken and not self.engine.busy:
                return False
        for item in taken:
            if isinstance(item, str):
                self.engine.cancel(item)
            else:
                self.engine.submit(item)
        return True

    def _tell(self, event: Event) -> None:
        with self._wake:
            stream = self._streams.get(event.key)
            if event.finish:
                self._streams.pop(event.key, None)
        if stream is not None:
            stream.put(event)
