"""The scheduler in a thread of its own, and its answers as asynchronous streams."""

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
    """The service takes no requests any more."""

    def __init__(self, why: str = "the server is shutting down") -> None:
        super().__init__(why)


@dataclass(eq=False)
class Stream:
    """Events of some requests, in the order in which they come.

    Attributes:
        live: keys of those that are not done.
    """

    service: Service
    live: set[str]
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)

    async def events(self, seconds: float) -> AsyncIterator[Event]:
        """Until all requests are done; raises TimeoutError when that takes longer, Closing when they are given up."""
        end = self.loop.time() + seconds
        while self.live:
            # not `asyncio.timeout`, since the tasks that ask for events may change
            event = await asyncio.wait_for(self.queue.get(), end - self.loop.time())
            if event is None:
                raise Closing
            if event.key in self.live:
                if event.finish:
                    self.live.discard(event.key)
                yield event

    def cancel(self, key: str | None = None) -> None:
        """Stop one of the requests, or all that are left."""
        keys = set(self.live) if key is None else {key} & self.live
        self.live -= keys
        self.service.cancel(keys)

    def put(self, event: Event | None) -> None:
        """From any thread; None gives all up."""
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)
        except RuntimeError:  # the loop has ended, and nobody waits
            LOG.debug("%s came too late", event)


class Service:
    """Runs an engine while there is work.

    Attributes:
        waiting: requests that wait for a place.
        failed: what ended the scheduler, if something did.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.waiting = 0
        self.failed: BaseException | None = None
        self._streams: dict[str, Stream] = {}  # of all requests that are in work or wait
        self._inbox: deque[Request | str] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="regard-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Take no more requests, and end when those that are there are answered or cancelled."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def give_up(self) -> None:
        """Let everybody who waits for an answer know that it will not be finished."""
        with self._wake:
            streams = set(self._streams.values())
        for stream in streams:
            stream.put(None)

    @property
    def healthy(self) -> bool:
        """Whether requests are taken: it has not failed and does not close."""
        return self.failed is None and not self._closing

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Start on requests that belong together; from an event loop.

        Raises:
            Busy: when too many wait.
            Closing: when no more are taken.
            Unsupported: for a request that could never be answered.
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
        """Stop requests by key; those that are done, or unknown, are left alone."""
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
        """Wait for work and take what was handed in; False to end."""
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
