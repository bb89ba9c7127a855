"""The HTTP server: routes, limits, errors and metrics around a service."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from regard.contract import Unsupported, at_least

try:
    import prometheus_client  # noqa: F401
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as error:
    raise Unsupported(
        f"regard serve without its libraries ({error})",
        supported="starlette, uvicorn and prometheus-client",
        nearest="pip install 'regard[serve]'",
    ) from error

from regard.serving.engine import Busy, Event
from regard.serving.metrics import Metrics
from regard.serving.protocol import Answer, ApiError, Asked, read_chat, read_completion
from regard.serving.service import Closing, Service, Stream
from regard.serving.text import Text

RETRY_SECONDS = 1
"""Seconds after which a client that was turned away may retry (the header ``Retry-After``)."""
LONG_BODY = 1 << 15
"""Bytes from which a request is tokenized in a thread, off the event loop: a megabyte may take over a second."""


@dataclass(frozen=True)
class ServerLimits:
    """Limits on the requests of a client.

    Attributes:
        body: maximum bytes of a request.
        body_seconds: maximum seconds for a request to arrive.
        seconds: maximum seconds for an answer, including the time in the queue.
    """

    body: int = 4 << 20
    body_seconds: float = 30.0
    seconds: float = 600.0

    def __post_init__(self) -> None:
        at_least("body", self.body, 2)
        for name in ("body_seconds", "seconds"):
            at_least(name, getattr(self, name), 0.001)


class Server:
    """A model behind OpenAI's HTTP API.

    Args:
        service: the started scheduler; the application closes it on shutdown.
        text: the tokenizer.
        name: name of the model.
        limits: see :class:`ServerLimits`.
        key: API key that clients must send; None if no key is needed.
    """

    def __init__(
        self, service: Service, text: Text, name: str, *, limits: ServerLimits | None = None, key: str | None = None
    ) -> None:
        self.service, self.text, self.name = service, text, name
        self.limits, self.key = limits or ServerLimits(), key
        self.metrics = Metrics(service)
        self._reading_long = asyncio.Lock()
        self.created = int(time.time())

    def app(self) -> ASGIApp:
        """Return the ASGI application, for uvicorn and for tests."""
        routes = [
            Route("/v1/completions", self._reading(read_completion), methods=["POST"]),
            Route("/v1/chat/completions", self._reading(read_chat), methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.models, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.tell_metrics, methods=["GET"]),
        ]
        handlers: Any = {ApiError: _api_error, HTTPException: _http_error, Exception: _unexpected}
        return _Guard(Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan), self)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.service.close)

    async def health(self, _: Request) -> Response:
        """Report the server's state and how many requests run and wait; status 503 while closing or after a failure."""
        service = self.service
        if service.failed is not None:
            return JSONResponse({"status": "failed"}, 503)
        state = {"running": len(service.engine.active), "waiting": service.waiting}
        return JSONResponse(
            {"status": "ok" if service.healthy else "closing", **state}, 200 if service.healthy else 503
        )

    async def models(self, request: Request) -> Response:
        """Return the list with the one model, or the model of the given name; 404 for any other name."""
        wanted = request.path_params.get("name")
        own = {"id": self.name, "object": "model", "created": self.created, "owned_by": "regard"}
        own |= {"max_model_len": self.service.engine.context, "vocab_size": self.service.engine.reader.vocab_size}
        if wanted is None:
            return JSONResponse({"object": "list", "data": [own]})
        if wanted != self.name:
            raise ApiError(404, f"no model {wanted!r} here; this server has {self.name!r}", code="model_not_found")
        return JSONResponse(own)

    async def tell_metrics(self, _: Request) -> Response:
        """Return the metrics in Prometheus' format."""
        body, kind = self.metrics.text()
        return Response(body, media_type=kind)

    def _reading(self, read: Callable[[Any, Text, str, int], Asked]) -> Callable[[Request], Any]:
        def asked_in(body: bytes) -> Asked:
            return read(_parsed(body), self.text, self.name, self.service.engine.limits.places)

        async def answer(request: Request) -> Response:
            body = await self._body(request)
            if len(body) < LONG_BODY:
                asked = asked_in(body)
            else:
                async with self._reading_long:  # one at a time, so that long bodies leave CPU time for others
                    asked = await asyncio.to_thread(asked_in, body)
            return await self._answer(request, asked)

        return answer

    async def _body(self, request: Request) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > self.limits.body:
                        raise ApiError(413, f"the body is larger than {self.limits.body} bytes", code="body_too_large")
                    parts.append(part)
        except TimeoutError:
            raise ApiError(408, "the body took too long to arrive", code="timeout") from None
        except ClientDisconnect:
            raise ApiError(499, "the client has gone") from None
        return b"".join(parts)

    async def _answer(self, request: Request, asked: Asked) -> Response:
        client = "" if request.client is None else request.client.host
        began = time.perf_counter()
        try:
            requests = asked.requests(self.text, self.service.engine.context, client)
            stream = self.service.submit(requests)
        except Unsupported as error:
            code = "context_length_exceeded" if "tokens in all" in str(error) else None
            raise ApiError(400, str(error), code=code) from None
        except Busy as error:
            raise ApiError(429, f"{error}; try again later", code="busy") from None
        except Closing as error:
            raise ApiError(503, str(error), code="closing") from None
        answer = Answer(asked, requests, self.text, self.name)
        pieces = self._pieces(answer, stream, began)
        if not asked.stream:
            await self._until_gone(request, _exhaust(pieces))
            return JSONResponse(answer.whole())
        # errors before the first token still get an HTTP status of their own
        first = await self._until_gone(request, anext(pieces))
        return StreamingResponse(_events(first, pieces, answer), media_type="text/event-stream", headers=_NO_BUFFER)

    async def _pieces(self, answer: Answer, stream: Stream, began: float) -> AsyncIterator[dict[str, Any]]:
        """Yield an event for each token until all answers are complete; an early exit cancels what is left."""
        before: dict[str, float] = {}
        try:
            async for event in stream.events(self.limits.seconds):
                self._time(event, began, before)
                choice, new, told = answer.push(event)
                if choice.finish:
                    stream.cancel(event.key)
                yield answer.piece(choice, new, told)
        except Closing as error:
            raise ApiError(503, str(error), code="closing") from None
        except TimeoutError:
            raise ApiError(408, f"no whole answer within {self.limits.seconds:g} s", code="timeout") from None
        finally:
            stream.cancel()

    def _time(self, event: Event, began: float, before: dict[str, float]) -> None:
        now = time.perf_counter()
        if event.key in before:
            self.metrics.between_tokens.observe(now - before[event.key])
        else:
            self.metrics.first_token.observe(now - began)
        before[event.key] = now

    @staticmethod
    async def _until_gone(request: Request, work: Any) -> Any:
        """Return the result of `work`, which is cancelled when the client disconnects."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ApiError(499, "the client has gone")
            return task.result()
        finally:
            for each in (task, gone):
                each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


_NO_BUFFER = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _exhaust(pieces: AsyncIterator[Any]) -> None:
    async for _ in pieces:
        pass


async def _events(first: dict[str, Any], pieces: AsyncIterator[dict[str, Any]], answer: Answer) -> AsyncIterator[str]:
    """Yield server-sent events. An error after the first token is an event, since the status has already been sent."""
    try:
        for piece in (*answer.first(), first):
            yield _event(piece)
        async for piece in pieces:
            yield _event(piece)
        for piece in answer.last():
            yield _event(piece)
    except ApiError as error:
        yield _event(error.body())
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _parsed(body: bytes) -> Any:
    try:
        text = body.decode("utf-8-sig")
        found = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the body has half a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error})") from None
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers=headers)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    said = ApiError(error.status_code, words.get(error.status_code, error.detail))
    return JSONResponse(said.body(), error.status_code, headers=error.headers)


def _unexpected(_: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "the server has made a mistake; its log says which").body(), 500)


class _Guard:
    """ASGI middleware that checks the API key, counts answers, and rejects bodies with too large a declared length."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        path, known = request.url.path, ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.server.metrics.answers.labels(path if path in known else "other", message["status"]).inc()
            await send(message)

        refused = self._refused(request)
        if refused is not None:
            await _api_error(request, refused)(scope, receive, counted)
            return
        await self.app(scope, receive, counted)

    def _refused(self, request: Request) -> ApiError | None:
        key = self.server.key
        if key is not None and request.url.path != "/health":
            scheme, _, shown = request.headers.get("authorization", "").partition(" ")
            shown = shown if scheme.lower() == "bearer" else ""
            if not hmac.compare_digest(shown.encode(), key.encode()):
                return ApiError(401, "this server asks for its key: Authorization: Bearer KEY", code="invalid_api_key")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.server.limits.body:
            return ApiError(413, f"the body is larger than {self.server.limits.body} bytes", code="body_too_large")
        return None
