"""A load test for any server with OpenAI's API: throughput and latencies for a growing number of clients.

Each client sends its requests one after another and reads the answers as a stream. Prompts are random tokens, which
have no more than the requested prefix in common; answers are greedy and go on past the model's stop tokens, so that all
have the same length.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from regard.contract import Unsupported, at_least
from regard.core.files import write_text_atomically
from regard.measurement import provenance, units
from regard.workbench.reports import charts
from regard.workbench.reports.pages import pages
from regard.workbench.reports.scales import Axis

PAGE, FIGURES = "load.html", "load.json"
TIMES = ("first_p50", "first_p99", "between_p50", "between_p99")
FOREIGN_TOKENS = range(100, 20_000)
"""Token ids for prompts to servers that do not report their vocabulary size: ordinary tokens in most vocabularies."""


@dataclass(frozen=True)
class Load:
    """The load of a measurement.

    Attributes:
        clients: numbers of concurrent clients, measured one after another.
        requests: requests per client.
        prompt_tokens, new_tokens: tokens of a prompt and of its answer.
        shared_tokens: length of the prefix that all prompts share.
        seed: seed of the random prompts.
    """

    clients: tuple[int, ...] = (1, 4, 16)
    requests: int = 2
    prompt_tokens: int = 512
    new_tokens: int = 128
    shared_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.clients:
            raise Unsupported("a load without clients", supported="one or more", nearest="--clients 1,4,16")
        for name in ("requests", "prompt_tokens", "new_tokens"):
            at_least(name, getattr(self, name), 1)
        at_least("clients", min(self.clients), 1)
        if not 0 <= self.shared_tokens <= self.prompt_tokens:
            raise Unsupported(f"shared_tokens={self.shared_tokens}", supported=f"0 to {self.prompt_tokens}")

    def as_record(self) -> dict[str, Any]:
        """Return the load as plain data."""
        return asdict(self)


@dataclass
class _Seen:
    """Measurements of all clients: seconds to the first tokens, seconds between tokens, and errors."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    answers: int = 0
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def measure(
    url: str, load: Load, *, vocab_size: int | None = None, model: str | None = None, key: str | None = None
) -> Iterator[dict[str, Any]]:
    """Measure a server, and yield one row for each number of clients.

    Args:
        url: address of the server, without ``/v1``.
        vocab_size: the model's vocabulary size, if known.
        model: name of the model, for servers that require it; the server's first model when None.
        key: the server's API key.

    Returns:
        Rows with clients, seconds, tokens_per_second (generated tokens over the time of the whole load), answers,
        errors, and the 50th and 99th percentiles in seconds: first_p50, first_p99, between_p50, between_p99.

    Raises:
        Unsupported: for a server that cannot be reached, or that answered only with errors.
    """
    if model is None:
        model, known = _first_model(url, key)
        vocab_size = known if vocab_size is None else vocab_size
    ask(url, _body(load, model, _prompt(load, random.Random(-1), vocab_size)), key, _Seen())  # warm-up
    for clients in load.clients:
        seen, random_ = _Seen(), random.Random(f"{load.seed} {clients}")
        prompts = [[_prompt(load, random_, vocab_size) for _ in range(load.requests)] for _ in range(clients)]

        def client(own: list[list[int]], seen: _Seen = seen) -> None:
            for prompt in own:
                ask(url, _body(load, model, prompt), key, seen)

        threads = [threading.Thread(target=client, args=(own,), daemon=True) for own in prompts]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
        if not seen.answers:
            raise Unsupported(f"a measurement of {url}, which answered {seen.errors[0]}", supported="answers")
        yield {
            "clients": clients,
            "seconds": seconds,
            "tokens_per_second": seen.tokens / seconds,
            "answers": seen.answers,
            "errors": len(seen.errors),
            **{f"first_{name}": value for name, value in _percentiles(seen.first).items()},
            **{f"between_{name}": value for name, value in _percentiles(seen.between).items()},
        }


def ask(url: str, body: dict[str, Any], key: str | None, seen: _Seen) -> None:
    """Send one request, read its streamed answer and add its times, or its error, to `seen`."""
    began = time.perf_counter()
    try:
        with_key = {} if key is None else {"Authorization": f"Bearer {key}"}
        connection, path = _connection(url)
        try:
            headers = {"Content-Type": "application/json", **with_key}
            connection.request("POST", f"{path}/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise OSError(f"status {response.status}: {response.read(500).decode(errors='replace')}")
            times, told = _read_events(response)
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        with seen.lock:
            seen.errors.append(str(error))
        return
    with seen.lock:
        seen.answers += 1
        seen.tokens += len(times) if told is None else told
        seen.first += [times[0] - began] if times else []
        seen.between += [b - a for a, b in itertools.pairwise(times)]


def _read_events(response: http.client.HTTPResponse) -> tuple[list[float], int | None]:
    """Return when each piece of an answer arrived, and its number of tokens if the server reports it."""
    times: list[float] = []
    told = None
    for line in iter(response.readline, b""):
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            continue
        piece = json.loads(line[5:])
        if "error" in piece:
            raise OSError(str(piece["error"]))
        if piece.get("choices"):
            times.append(time.perf_counter())
        told = (piece.get("usage") or {}).get("completion_tokens", told)
    return times, told


def _body(load: Load, model: str, prompt: list[int]) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": load.new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


def _prompt(load: Load, draws: random.Random, vocab_size: int | None) -> list[int]:
    tokens = FOREIGN_TOKENS if vocab_size is None else range(vocab_size)
    shared = random.Random(load.seed).choices(tokens, k=load.shared_tokens)
    return shared + draws.choices(tokens, k=load.prompt_tokens - load.shared_tokens)


def _first_model(url: str, key: str | None) -> tuple[str, int | None]:
    """Return a server's first model, and its vocabulary size if the server reports it, as regard's does."""
    try:
        connection, path = _connection(url)
        try:
            connection.request(
                "GET", f"{path}/v1/models", headers={} if key is None else {"Authorization": f"Bearer {key}"}
            )
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status in (401, 403):
            raise Unsupported(
                f"{url} without its key (status {response.status})",
                supported="the key in the environment",
                nearest="REGARD_API_KEY",
            )
        first = json.loads(text)["data"][0]
        return first["id"], first.get("vocab_size")
    except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
        raise Unsupported(
            f"{url}, where no server tells its models ({error})",
            supported="the address of one that speaks OpenAI's API",
        ) from None


def _connection(url: str) -> tuple[http.client.HTTPConnection, str]:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Unsupported(f"the address {url!r}", supported="http://HOST:PORT", nearest="http://127.0.0.1:8000")
    if parts.scheme == "https":
        return (
            http.client.HTTPSConnection(parts.hostname, parts.port, context=ssl.create_default_context(), timeout=600),
            parts.path.rstrip("/"),
        )
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=600), parts.path.rstrip("/")


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None}
    low, high = np.percentile(values, [50, 99]).tolist()
    return {"p50": low, "p99": high}


def _drawn(row: dict[str, Any], column: str) -> float | None:
    """Return a row's value as the charts show it: times, which are stored in seconds, are drawn in milliseconds."""
    value: float | None = row[column]
    return 1e3 * value if column in TIMES and value is not None else value


def save(rows: Sequence[dict[str, Any]], load: Load, folder: Path, model: str = "the model") -> Path:
    """Write the figures as JSON and as a page with charts; return the path of the page."""
    clients = Axis("clients at one time →", units.count, log=True, base=2)
    time_axis = Axis("less is better ↓", units.milliseconds, log=True)
    wanted = [
        ("Tokens per second", Axis("more is better ↑", units.count), [("all", "tokens_per_second")]),
        ("Time to the first token", time_axis, [("half", "first_p50"), ("99 of 100", "first_p99")]),
        ("Time between tokens", time_axis, [("half", "between_p50"), ("99 of 100", "between_p99")]),
    ]
    notes = ("of all clients together", "half and 99 of 100 answers were faster", "half and 99 of 100 were faster")
    figures = [
        charts.Figure(
            caption,
            charts.lines(
                f"load-{i}",
                f"{caption} against load",
                "One point for each number of clients.",
                [
                    charts.Series(n + 1, name, [(row["clients"], _drawn(row, column)) for row in rows])
                    for n, (name, column) in enumerate(columns)
                ],
                clients,
                axis,
            ),
            note,
        )
        for i, ((caption, axis, columns), note) in enumerate(zip(wanted, notes, strict=True))
    ]
    record = {"model": model, "machine": provenance.fingerprint(), "load": load.as_record(), "rows": list(rows)}
    cells = [
        [
            row["clients"],
            units.count(row["tokens_per_second"]),
            *("—" if time is None else units.milliseconds(time) for time in (_drawn(row, name) for name in TIMES)),
            row["answers"],
            row["errors"],
        ]
        for row in rows
    ]
    template = pages(Path(__file__).parent / "templates").get_template("load.html.j2")
    page = template.render(**record, figures=figures, cells=cells)
    write_text_atomically(folder / PAGE, page)
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n"
    write_text_atomically(folder / FIGURES, text)
    return folder / PAGE
