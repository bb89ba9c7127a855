"""Clients of a soak test: what they do to a server, and checks that it answers as it must."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from soak_questions import LENGTHS, Question, together

SECONDS = 300.0
"""Timeout for an answer, in seconds."""
LINGER = 10.0
"""Seconds for which a client that disconnected may still occupy its places."""
RACE = 2.0
"""A request sent up to this many seconds before the stop signal may not have been accepted yet."""
JSON = {"Content-Type": "application/json"}


@dataclass
class Tally:
    """Counts of outcomes by act and by HTTP status, and a description of each fault."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, act: str, outcome: str, status: int | None = None) -> None:
        """Count one more outcome."""
        with self.lock:
            self.outcomes[act, outcome] += 1
            if status is not None:
                self.statuses[status] += 1

    def fault(self, act: str, words: str, status: int | None = None) -> None:
        """Record something that must not happen."""
        self.count(act, "wrong", status)
        with self.lock:
            self.faults.append(f"{act}: {words}")


class Places:
    """Counts the answers under way as far as clients know, so that a client that is turned away can tell if that was right.

    Args:
        most: the number of answers that the server takes at a time.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._peaks: dict[int, int] = {}
        self._counts: dict[int, tuple[int, float | None]] = {}
        self._next = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def taken(self, count: int, linger: float = 0.0) -> Iterator[Callable[[], int]]:
        """Count `count` more answers during the block; yields a function that returns the peak since its start."""
        with self._lock:
            key, self._next = self._next, self._next + 1
            self._counts[key], self._peaks[key] = (count, None), 0
            now = time.monotonic()
            self._counts = {k: (n, end) for k, (n, end) in self._counts.items() if end is None or end > now}
            busy = sum(n for n, _ in self._counts.values())
            for other in self._peaks:
                self._peaks[other] = max(self._peaks[other], busy)
        try:
            yield lambda: self._peaks[key]
        finally:
            with self._lock:
                del self._peaks[key]
                if linger:
                    self._counts[key] = count, time.monotonic() + linger
                else:
                    del self._counts[key]


@dataclass
class Told:
    """An answer as received."""

    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str | None] = field(default_factory=dict)
    logprobs: Counter[int] = field(default_factory=Counter)
    usage: dict[str, int] | None = None

    def add(self, piece: dict[str, Any]) -> None:
        """Add a whole answer, or an event of a stream."""
        if "error" in piece:
            raise ValueError(f"an error in the stream: {piece['error']}")
        for choice in piece["choices"]:
            index = choice["index"]
            content = choice.get("message") or choice.get("delta") or {"content": choice.get("text", "")}
            self.texts[index] = self.texts.get(index, "") + content.get("content", "")
            self.finishes[index] = choice["finish_reason"] or self.finishes.get(index)
            self.logprobs[index] += len((choice.get("logprobs") or {}).get("tokens", ()))
        self.usage = piece.get("usage") or self.usage

    def differs(self, question: Question) -> str | None:
        """How the answer differs from that of the model alone; None if it does not."""
        for i, answer in enumerate(question.answers):
            if self.texts.get(i) != answer.text:
                return f"{question.kind} {question.body} was answered {self.texts.get(i)!r} and not {answer.text!r}"
            if self.finishes.get(i) != answer.finish:
                return f"{question.kind} {question.body} ended for {self.finishes.get(i)} and not {answer.finish}"
            if "logprobs" in question.body and answer.tokens is not None:
                told = answer.tokens - (answer.finish == "stop")  # the stop token is not part of the text
                if self.logprobs[i] != told:
                    return f"{question.kind} has {self.logprobs[i]} log-probabilities for {told} tokens"
        if len(self.texts) != len(question.answers):
            return f"{question.kind} has {len(self.texts)} answers and not {len(question.answers)}"
        written = [answer.tokens for answer in question.answers]
        if self.usage is not None and None not in written and self.usage["completion_tokens"] != sum(written):
            return f"{question.kind} counts {self.usage} for {written} tokens"
        if self.usage is not None and question.prompt_tokens not in (None, self.usage["prompt_tokens"]):
            return f"{question.kind} counts {self.usage} for a prompt of {question.prompt_tokens}"
        return None


def read_whole(response: http.client.HTTPResponse, _: random.Random) -> Told:
    """Read an answer that is not streamed."""
    told = Told()
    told.add(json.loads(response.read()))
    if told.usage is None:
        raise ValueError("an answer without usage")
    return told


def read_events(response: http.client.HTTPResponse, draws: random.Random, pause: float = 0.0) -> Told:
    """Read a streamed answer, with pauses of up to `pause` seconds between its lines."""
    told, ended = Told(), False
    for line in iter(response.readline, b""):
        if pause:
            time.sleep(draws.uniform(0, pause))
        if line.startswith(b"data:"):
            ended = line[5:].strip() == b"[DONE]"
            if not ended:
                told.add(json.loads(line[5:]))
    if not ended:
        raise ValueError("a stream that broke off")
    return told


def read_slowly(response: http.client.HTTPResponse, draws: random.Random) -> Told:
    """Read a streamed answer slowly: wait first, so that buffers fill up, then pause between lines."""
    time.sleep(draws.uniform(0, 3))
    return read_events(response, draws, 0.01)


class Clients:
    """Everything that the clients do.

    Args:
        address: the server's host and port.
        model: the name of the model.
        key: the API key that the server requires.
        questions: questions with their answers.
        bad: requests that must be refused: description, method, path, body, headers and status.
        places: the number of answers that the server takes at a time.
    """

    def __init__(
        self,
        address: tuple[str, int],
        model: str,
        key: str,
        questions: Sequence[Question],
        bad: Sequence[tuple[str, str, str, bytes, dict[str, str], int]],
        places: int,
    ) -> None:
        self.address, self.model, self.bad = address, model, bad
        self.headers = {"Authorization": f"Bearer {key}"}
        self.tally, self.places = Tally(), Places(places)
        self.closing: float | None = None
        self.gone = False
        self.long = [question for question in questions if question.kind == "long answer"]
        self.short = [question for question in questions if question.kind != "long answer"]
        groups = [
            [q for q in self.short if q.kind == "short prompt" and q.body["max_tokens"] == count] for count in LENGTHS
        ]
        self.groups = [group for group in groups if len(group) > 1]
        self.acts: list[tuple[float, Callable[[random.Random], None]]] = [
            (10, self.whole), (10, self.streamed), (3, self.several), (2, self.slow_reader), (1, self.slow_writer),
            (3, self.goes_away), (2, self.goes_at_once), (6, self.wrong), (1, self.burst), (2, self.sampled),
            (0.5, self.stops_reading), (0.5, self.no_http), (0.2, self.stalls), (2, self.looks), (3, self.rests),
        ]  # fmt: skip

    def act(self, draws: random.Random) -> None:
        """Do one of the acts at random."""
        weights, acts = zip(*self.acts, strict=True)
        draws.choices(acts, weights)[0](draws)

    def whole(self, draws: random.Random) -> None:
        """Ask for an answer in one piece."""
        self.ask("whole", draws.choice(self.short), draws)

    def streamed(self, draws: random.Random) -> None:
        """Ask for a streamed answer."""
        self.ask("streamed", draws.choice(self.short), draws, read_events)

    def several(self, draws: random.Random) -> None:
        """Send several prompts in one request, or ask for several answers to one."""
        read = draws.choice([read_whole, read_events])
        if self.groups and draws.random() < 0.5:
            question = together(draws.sample(group := draws.choice(self.groups), min(3, len(group))))
        else:
            one = draws.choice([q for q in self.short if "seed" not in q.body])
            count = None if one.prompt_tokens is None else one.prompt_tokens
            question = Question(f"{one.kind} twice", one.body | {"n": 2}, one.answers * 2, count)
        self.ask("several answers", question, draws, read)

    def slow_reader(self, draws: random.Random) -> None:
        """Slowly read a long answer with log-probabilities, more than buffers hold."""
        self.ask("slow reader", draws.choice(self.long), draws, read_slowly)

    def slow_writer(self, draws: random.Random) -> None:
        """Send the body in pieces."""
        self.ask("slow writer", draws.choice(self.short), draws, slowly=True)

    def sampled(self, draws: random.Random) -> None:
        """Ask for a sampled answer, which cannot be known, and check only its length."""
        body = {"prompt": "Once", "max_tokens": draws.choice(LENGTHS), "user": f"user {draws.random()}"}

        def count(response: http.client.HTTPResponse) -> str:
            usage = json.loads(response.read())["usage"]
            if not 0 < usage["completion_tokens"] <= body["max_tokens"]:
                raise ValueError(f"{usage}")
            return "done"

        self._send("sampled", "/v1/completions", body, 1, count)

    def goes_away(self, draws: random.Random) -> None:
        """Disconnect from a stream after some events."""
        body = draws.choice(self.long).body | {"stream": True}

        def read_some(response: http.client.HTTPResponse) -> str:
            for _ in range(draws.randrange(12)):
                response.readline()
            return "done"

        self._send("goes away in mid-stream", "/v1/completions", body, 1, read_some, linger=LINGER)

    def goes_at_once(self, draws: random.Random) -> None:
        """Send a request, or half of one, and disconnect without waiting for the answer."""
        question = draws.choice(self.long + self.short)
        raw = json.dumps(self._body(question.body, stream=draws.random() < 0.5)).encode()
        half = draws.random() < 0.3
        head = f"POST {question.path} HTTP/1.1\r\nHost: here\r\nAuthorization: {self.headers['Authorization']}\r\n"
        whole = head.encode() + f"Content-Length: {len(raw)}\r\n\r\n".encode() + raw
        with self.places.taken(1, LINGER), socket.create_connection(self.address, SECONDS) as connection:
            connection.sendall(whole[: len(whole) // 2] if half else whole)
            time.sleep(draws.choice([0, 0, 0.05, 0.3]))
            if draws.random() < 0.5:  # closes with a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.tally.count("goes away at once", "done")

    def stops_reading(self, draws: random.Random) -> None:
        """Ask for a stream, read nothing for some seconds, then disconnect."""
        body = draws.choice(self.long).body | {"stream": True}

        def wait(_: http.client.HTTPResponse) -> str:
            time.sleep(draws.uniform(1, 8))
            return "done"

        self._send("stops reading", "/v1/completions", body, 1, wait, linger=LINGER)

    def stalls(self, draws: random.Random) -> None:
        """Send a body that never ends."""
        with contextlib.closing(self._connect()) as connection:
            try:
                connection.putrequest("POST", "/v1/completions")
                for name, value in (self.headers | {"Content-Length": "100"}).items():
                    connection.putheader(name, value)
                connection.endheaders(b'{"prompt":')
                status = connection.getresponse().status
            except (OSError, http.client.HTTPException) as error:
                self.tally.fault("stalls", repr(error))
                return
        self._expect("stalls", "a body that never ends", status, 408)

    def wrong(self, draws: random.Random) -> None:
        """Send a request that must be refused."""
        self.refused(*draws.choice(self.bad))

    def refused(self, name: str, method: str, path: str, body: bytes, headers: dict[str, str], wanted: int) -> None:
        """Check that a request is refused with the wanted status and an error message."""
        with contextlib.closing(self._connect()) as connection:
            try:
                connection.request(method, path, body, self.headers | JSON | headers, encode_chunked=True)
                response = connection.getresponse()
                text = response.read()
                message = json.loads(text)["error"]["message"]
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
                self.tally.fault("bad request", f"{name}: {error!r}")
                return
        self._expect("bad request", f"{name} ({message[:200]})", response.status, wanted)

    def no_http(self, draws: random.Random) -> None:
        """Send bytes of another protocol."""
        try:
            with socket.create_connection(self.address, SECONDS) as connection:
                connection.sendall(b"\x16\x03\x01" + draws.randbytes(200) + b"\r\n\r\n")
                said = connection.recv(1 << 16)
        except OSError as error:
            self.tally.fault("no HTTP", repr(error))
            return
        self._expect("no HTTP", f"{said[:80]!r}", int(said[9:12]) if said.startswith(b"HTTP/1.1 ") else 0, 400)

    def burst(self, draws: random.Random) -> None:
        """Send at least as many requests at once as there are places."""
        seeds = [draws.random() for _ in range(draws.randint(self.places.most, 2 * self.places.most))]
        threads = [threading.Thread(target=self._one_of_many, args=(random.Random(seed),)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _one_of_many(self, draws: random.Random) -> None:
        self.ask("burst", draws.choice(self.short), draws, draws.choice([read_whole, read_events]))

    def looks(self, draws: random.Random) -> None:
        """Get health, models or metrics."""
        path = draws.choice(["/health", "/metrics", "/v1/models", f"/v1/models/{self.model}"])
        try:
            status, _ = self.get(path)
        except (OSError, http.client.HTTPException) as error:
            self.tally.fault("looks", repr(error))
            return
        self._expect("looks", path, status, 200)

    def rests(self, draws: random.Random) -> None:
        """Do nothing for a while."""
        time.sleep(draws.uniform(0, 2))

    def get(self, path: str) -> tuple[int, str]:
        """GET a path; returns status and text."""
        with contextlib.closing(self._connect()) as connection:
            connection.request("GET", path, headers=self.headers)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def ask(
        self,
        act: str,
        question: Question,
        draws: random.Random,
        read: Callable[[http.client.HTTPResponse, random.Random], Told] = read_whole,
        *,
        slowly: bool = False,
    ) -> None:
        """Ask a question and compare the answer."""
        body = self._body(question.body)
        if read is not read_whole:
            body["stream"] = True
            if draws.random() < 0.5:
                body["stream_options"] = {"include_usage": True}
        if draws.random() < 0.3:
            body["user"] = f"user {draws.randrange(9)}"

        def compare(response: http.client.HTTPResponse) -> str:
            differs = read(response, draws).differs(question)
            if differs is not None:
                raise ValueError(differs)
            return "right"

        count = len(question.answers)
        self._send(act, question.path, body, count, compare, slowly=draws if slowly else None)

    def _send(
        self,
        act: str,
        path: str,
        body: dict[str, Any],
        count: int,
        use: Callable[[http.client.HTTPResponse], str],
        *,
        linger: float = 0.0,
        slowly: random.Random | None = None,
    ) -> None:
        """Send a body and count the outcome.

        Args:
            count: number of answers asked for.
            use: called with the response if its status is 200; returns the outcome, or raises ValueError.
            linger: seconds that the server may take to notice that its client has gone.
            slowly: draws of the pauses with which the body is sent in pieces; None sends it at once.
        """
        began = time.monotonic()
        with self.places.taken(count, linger) as most, contextlib.closing(self._connect()) as connection:
            try:
                raw = json.dumps(self._body(body)).encode()
                connection.request("POST", path, _pieces(raw, slowly) if slowly else raw, self.headers | JSON)
                response = connection.getresponse()
                status = response.status
                if status == 200:
                    self.tally.count(act, use(response), status)
                    return
                text, retry = response.read().decode(errors="replace"), response.headers["Retry-After"]
                peak = most()
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
                if self._late(began) and not isinstance(error, ValueError):
                    self.gone = True
                    self.tally.count(act, "too late")
                else:
                    self.tally.fault(act, f"{error!r} after {time.monotonic() - began:.1f} s of {str(body)[:200]}")
                return
        if status == 429 and peak > self.places.most and retry:
            self.tally.count(act, "turned away", status)
            time.sleep(float(retry) if self.closing is None else 0)
        elif status == 503 and self._late(began):
            self.tally.count(act, "too late")
        else:
            words = f"status {status} {text[:300]} with {peak} of {self.places.most} places taken"
            self.tally.fault(act, words, status)

    def _late(self, began: float) -> bool:
        return self.closing is not None and began > self.closing - RACE

    def _expect(self, act: str, words: str, status: int, wanted: int) -> None:
        if status == wanted:
            self.tally.count(act, "right", status)
        else:
            self.tally.fault(act, f"{words}: status {status} and not {wanted}", status)

    def _body(self, body: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"model": self.model, **body, **more}

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=SECONDS)


def _pieces(raw: bytes, draws: random.Random) -> Iterator[bytes]:
    """Yield the body in chunks, with pauses."""
    size = max(1, len(raw) // 5)
    for start in range(0, len(raw), size):
        time.sleep(draws.uniform(0, 0.2))
        yield raw[start : start + size]


def bad_requests(
    model: str, vocab_size: int, context: int, most_bytes: int, places: int
) -> list[tuple[str, str, str, bytes, dict[str, str], int]]:
    """Requests that a server must refuse, with the status of each."""
    completions, chats = "/v1/completions", "/v1/chat/completions"
    made: list[tuple[str, str, str, bytes, dict[str, str], int]] = []

    def add(
        name: str, body: bytes, status: int = 400, path: str = completions, method: str = "POST", **headers: str
    ) -> None:
        made.append((name, method, path, body, headers, status))

    for name, raw in {
        "no body": b"", "half a body": b'{"prompt": "a', "no object": b"[]", "a number": b"7", "no text": b"\xff\xfe{",
        "not a number": b'{"prompt": "a", "temperature": NaN}', "infinity": b'{"prompt": "a", "temperature": 1e999}',
        "deep": b"[" * 20_000, "deep objects": b'{"a":' * 9_000, "half a character": b'{"prompt": "\\ud800"}',
        "a long number": b'{"prompt": "a", "seed": ' + b"9" * 6_000 + b"}", "null": b"null",
    }.items():  # fmt: skip
        add(name, raw)
    good = {"prompt": "a", "max_tokens": 2}
    for field_, values in {
        "prompt": [7, {}, [], "", [[]], [1.5], [True], ["a", 3], [-1], [vocab_size], [2**70], None],
        "max_tokens": [0, -1, 1.5, "7", True, [], context + 1, 2**70], "temperature": [-1, "hot", [], True, 1e9],
        "top_p": [0, 2, "a"], "top_k": [0, 1.5, "a"], "n": [0, 1000, places + 1, "a"], "seed": ["a", 2**64, 1.5],
        "stream": [1, "true"], "stream_options": [{}, {"a": 1}, 3], "stop": [7, [""], ["a"] * 17, {"a": 1}],
        "user": [7, "u" * 513], "model": [7, []], "logprobs": [-1, 21, True], "echo": [True], "best_of": [2],
        "logit_bias": [{"1": 2}], "presence_penalty": [1], "suffix": ["b"], "tools": [[]], "max_token": [3], "": [1],
    }.items():  # fmt: skip
        for value in values:
            add(f"{field_} = {str(value)[:20]}", json.dumps(good | {field_: value}).encode())
    talk = [{"role": "user", "content": "Hi"}]
    for field_, values in {
        "messages": [[], "Hi", [7], [{}], [{"role": "user"}], [{"role": 1, "content": "a"}], [{"role": "user", "content": 5}]],
        "top_logprobs": [3], "tools": [[{"type": "function"}]], "response_format": [{"type": "json_object"}], "logprobs": [3],
    }.items():  # fmt: skip
        for value in values:
            add(f"{field_} = {str(value)[:20]}", json.dumps({"messages": talk, field_: value}).encode(), path=chats)
    image = [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]
    add("an image", json.dumps({"messages": [{"role": "user", "content": image}]}).encode(), path=chats)
    add("a prompt too long", json.dumps({"prompt": [1] * (context + 1), "max_tokens": 1}).encode())
    add("a full prompt with an answer", json.dumps({"prompt": [1] * context, "max_tokens": 1}).encode())
    for path, body in ((completions, good), (chats, {"messages": talk})):
        add("another model", json.dumps(body | {"model": f"{model}-x"}).encode(), 404, path)
        add("a large body", json.dumps(body).encode() + b" " * most_bytes, 413, path)
        chunked = {"Transfer-Encoding": "chunked"}
        add("a large body in chunks", json.dumps(body).encode() + b" " * most_bytes, 413, path, **chunked)
        add("no key", json.dumps(body).encode(), 401, path, Authorization="")
        add("another key", json.dumps(body).encode(), 401, path, Authorization="Bearer é")
        add("a get", b"", 405, path, "GET")
    add("another path", b"{}", 404, "/v1/embeddings")
    add("a path up", b"{}", 404, "/v1/../../etc/passwd", "GET")
    add("another model's card", b"", 404, "/v1/models/other%20one", "GET")
    return made
