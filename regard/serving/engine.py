"""The scheduler, with continuous batching: requests join and leave the batch between steps.

A step adds one token to every sequence that is decoding, then reads one chunk of a prompt, so that long prompts do not
hold up the other sequences. Each sequence owns pages for the tokens it has so far; when pages run out, the newest
sequence gives back its own and is read again later. The output for a request does not depend on the rest of the batch:
each request has its own random generator, and a model computes the same for a row alone as for the row in a batch, up
to rounding.

Plain Python without threads or HTTP::

    engine = Engine(reader, Limits(rows=8))
    engine.submit(Request("a", prompt, max_tokens=20))
    while engine.busy:
        for event in engine.step():
            ...
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from regard.contract import Unsupported, at_least
from regard.core.precision import wide
from regard.models.generation import check_sampling, sample
from regard.serving.fairness import Lines
from regard.serving.pages import Pages
from regard.serving.prefixes import Block, Prefixes

STOP, LENGTH, FAILED = "stop", "length", "error"
"""Why a sequence has ended: at a stop token, at its maximum length, or with the error that the event holds."""


class Busy(Exception):
    """The queue is full; try again later."""


@dataclass(frozen=True)
class Limits:
    """Limits of an engine.

    Attributes:
        rows: maximum sequences in the batch.
        waiting: maximum requests in the queue.
        chunk: maximum prompt tokens that a step reads.
        context: maximum tokens of a prompt and its answer; the reader's when None.
        prefix_cache: whether prefixes that were read are kept for other requests.
    """

    rows: int = 16
    waiting: int = 128
    chunk: int = 256
    context: int | None = None
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        for name in ("rows", "chunk"):
            at_least(name, getattr(self, name), 1)
        at_least("waiting", self.waiting, 0)
        if self.context is not None:
            at_least("context", self.context, 2)

    @property
    def places(self) -> int:
        """Maximum number of requests, running and waiting."""
        return self.rows + self.waiting


@dataclass(frozen=True)
class Request:
    """A prompt, and how to continue it.

    Attributes:
        key: name of the request in its events.
        prompt: tokens, at least one.
        max_tokens: maximum number of new tokens.
        temperature, top_k, top_p: as in :meth:`regard.models.LanguageModel.generate_stream`.
        seed: seed for sampling; drawn by the system when None.
        stop_tokens: tokens that end the answer.
        logprobs: number of likeliest tokens to report with each token; None to report no log-probabilities at all.
        client: name of the client that its tokens are charged to.
    """

    key: str
    prompt: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None
    client: str = ""

    def __post_init__(self) -> None:
        at_least("max_tokens", self.max_tokens, 1)
        check_sampling(self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class Event:
    """One new token of a request.

    Attributes:
        key: the request's key.
        token: the token; None if `finish` is ``error``.
        logprob: the token's log-probability under the model, at temperature 1; None if not requested.
        top: the likeliest tokens and their log-probabilities.
        finish: why the request ends with this token: ``stop``, ``length`` or ``error``; None while it goes on.
        error: error message.
    """

    key: str
    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    error: str = ""


@dataclass(eq=False)
class Row:
    """A request that is queued or running, with its state.

    Attributes:
        number: number in order of submission, by which readers identify the row.
        tokens: the prompt and the generated tokens.
        length: how many of the tokens the model has read.
        pages: the pages with their keys and values.
        block: the row's last block in the prefix tree, at depth `blocks`; None once that block was evicted.
        stops: lengths at which a snapshot of the row's states is kept for other requests.
    """

    request: Request
    number: int
    tokens: list[int]
    generator: torch.Generator | None
    length: int = 0
    pages: list[int] = field(default_factory=list)
    block: Block | None = None
    blocks: int = 0
    stops: tuple[int, ...] = ()

    @property
    def unread(self) -> int:
        """Number of tokens that have not been read yet."""
        return len(self.tokens) - self.length

    @property
    def writing(self) -> bool:
        """True if the row is decoding: only its newest token is left to be read."""
        return self.unread == 1 and self.length > 0


class Reader(Protocol):
    """The interface of a model to the scheduler.

    Attributes:
        vocab_size: number of tokens in the vocabulary.
        context: maximum tokens of a sequence.
        pages: number of pages in its pool; 0 if it has none.
        page_size: tokens of a page, and of a block of the prefix tree.
        page_bytes: bytes of a page.
        held_bytes: bytes of the states outside the pages.
        holds: whether it has states outside the pages, which are saved and restored as a whole.
        at_once: whether it reads a prompt in one call, with no part of it from another request: because it runs on the
            whole sequence again for each new token, or because what its cache keeps depends on the whole prompt.
        device: device of the logits and of sampling.
    """

    vocab_size: int
    context: int
    pages: int
    page_size: int
    page_bytes: int
    holds: bool
    at_once: bool
    device: torch.device

    @property
    def held_bytes(self) -> int: ...

    def read(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Read more tokens of each row; return the logits (B, vocab) for the token after the last.

        A call never mixes rows that have read nothing yet with other rows. Each row already owns pages for its new
        tokens.
        """
        ...

    def save(self, row: Row) -> tuple[Any, int]:
        """Return the states of a row that are not in pages, and their size in bytes."""
        ...

    def restore(self, row: Row, saved: Any) -> None:
        """Let a row that has read nothing yet continue from saved states."""
        ...

    def forget(self, row: Row) -> None:
        """Drop the states of a row that has ended or will be read from its start again."""
        ...


class Engine:
    """The scheduler; see :mod:`regard.serving.engine`.

    Args:
        reader: the model.
        limits: see :class:`Limits`.

    Attributes:
        prompt_tokens: tokens of prompts that were read.
        shared_tokens: tokens of prompts that were found in the prefix cache instead.
        new_tokens: generated tokens.
        preempted: how often a sequence was preempted: it gave back its pages and was queued to be read again.
    """

    def __init__(self, reader: Reader, limits: Limits | None = None) -> None:
        self.reader, self.limits = reader, limits or Limits()
        self.context = min(reader.context, self.limits.context or reader.context)
        self.waiting: Lines[Row] = Lines()
        self.active: list[Row] = []
        self.prefixes: Prefixes | None = None
        self.pages: Pages | None = None
        if reader.pages:
            self.pages = Pages(reader.pages, reader.page_size, self._evict)
            self.context = min(self.context, self.pages.count * self.pages.size)
        if self.limits.prefix_cache and (reader.pages or reader.holds) and not reader.at_once:
            self.prefixes = Prefixes(reader.page_size, self.pages)
        self.prompt_tokens = self.shared_tokens = self.new_tokens = self.preempted = 0
        self._numbers = itertools.count()
        self._turn = 0

    @property
    def busy(self) -> bool:
        """True if any request runs or waits."""
        return bool(self.active or len(self.waiting))

    def submit(self, request: Request) -> None:
        """Put a request into the queue.

        Raises:
            Busy: if the queue is full.
            Unsupported: for a prompt that is empty, has unknown tokens, or is too long.
        """
        self.check(request)
        if len(self.waiting) + len(self.active) >= self.limits.places:
            raise Busy(f"{len(self.waiting)} requests are waiting")
        generator = None
        if request.temperature > 0:
            generator = torch.Generator(self.reader.device)
            generator.seed() if request.seed is None else generator.manual_seed(request.seed)
        self.waiting.push(request.client, Row(request, next(self._numbers), list(request.prompt), generator))

    def check(self, request: Request) -> None:
        """Raise Unsupported for a request that can never be answered."""
        n = len(request.prompt)
        if not n:
            raise Unsupported("a prompt without tokens", supported="one token or more")
        if n + request.max_tokens > self.context:
            raise Unsupported(
                f"a prompt of {n} tokens with max_tokens={request.max_tokens}",
                supported=f"{self.context} tokens in all",
                nearest=f"max_tokens={self.context - n}" if n < self.context else "a shorter prompt",
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < self.reader.vocab_size:
            raise Unsupported("tokens that the model does not know", supported=f"0 to {self.reader.vocab_size - 1}")

    def cancel(self, key: str) -> bool:
        """Drop a request; return whether it was found."""
        for row in [*self.active, *self.waiting]:
            if row.request.key == key:
                if row in self.active:
                    self._end(row)
                else:
                    self.waiting.remove(row.request.client, row)
                return True
        return False

    def step(self) -> list[Event]:
        """Admit requests, add a token to every decoding sequence, read a chunk of a prompt; return the new events."""
        self._admit()
        events = []
        writing = self._with_room([row for row in self.active if row.writing])
        if writing:
            events += self._read(writing, [1] * len(writing))
        reading, counts = self._chunk()
        if reading:
            self.prompt_tokens += sum(counts)
            events += self._read(reading, counts)
        return events

    def _admit(self) -> None:
        while len(self.active) < self.limits.rows:
            found = self.waiting.peek()
            if found is None or not self._start(found[1]):
                return
            client, row = found
            self.waiting.remove(client, row)
            self.active.append(row)
            self.waiting.forget({active.request.client for active in self.active})

    def _start(self, row: Row) -> bool:
        """Give a row pages for its tokens, reusing the cached part of its prefix; return whether there was room."""
        path = [] if self.prefixes is None else self.prefixes.path(row.tokens)
        usable = path
        if self.reader.holds:
            kept = [depth for depth, block in enumerate(path, 1) if block.snapshot is not None]
            usable = path[: kept[-1]] if kept else []
        if self.pages is not None:
            shared = [block.page for block in usable if block.page is not None]
            self.pages.share(shared)  # before `take`, which could evict them
            more = self.pages.take(self.pages.needed(len(row.tokens)) - len(shared))
            if more is None:
                self.pages.give_back(shared)
                return False
            row.pages = shared + more
        row.blocks, row.length = len(usable), len(usable) * self.reader.page_size
        row.block = None if self.prefixes is None else (usable[-1] if usable else self.prefixes.root)
        if usable and self.reader.holds:
            self.reader.restore(row, usable[-1].snapshot)
        ends = {
            len(path) * self.reader.page_size,
            (len(row.tokens) - 1) // self.reader.page_size * self.reader.page_size,
        }
        row.stops = tuple(sorted(n for n in ends if self.reader.holds and self.prefixes is not None and n > row.length))
        self.shared_tokens += row.length
        return True

    def _with_room(self, rows: list[Row]) -> list[Row]:
        """Give each row a page for its next token if needed; return the rows that were not preempted for older ones."""
        if self.pages is None:
            return rows
        for row in sorted(rows, key=lambda row: row.number):
            while row in self.active and len(row.pages) < self.pages.needed(len(row.tokens)):
                page = self.pages.take(1)
                if page is not None:
                    row.pages += page
                else:
                    self._preempt(max(self.active, key=lambda row: row.number))
        return [row for row in rows if row in self.active]

    def _preempt(self, row: Row) -> None:
        self._end(row)
        self.preempted += 1
        row.length, row.pages, row.block, row.blocks = 0, [], None, 0
        self.waiting.push(row.request.client, row, first=True)

    def _chunk(self) -> tuple[list[Row], list[int]]:
        """Return the rows whose prompts are read next, and the number of tokens to read of each.

        The choice alternates between the oldest row, so that no row starves, and the row that has read least, so that
        short prompts do not wait for a long one. Short prompts that have not been started are read together.
        """
        rows = [row for row in self.active if not row.writing]
        if not rows:
            return [], []
        self._turn += 1
        chosen = rows[0] if self._turn % 2 else min(rows, key=lambda row: row.length)
        if self.reader.at_once:
            return [chosen], [chosen.unread]
        self._look_again(chosen)
        count = self._until_stop(chosen, min(chosen.unread, self.limits.chunk))
        together, counts = [chosen], [count]
        if chosen.length == 0 and count == chosen.unread:
            for row in rows:
                longest = max(*counts, row.unread)
                fits = longest * (len(together) + 1) <= self.limits.chunk
                if row is not chosen and row.length == 0 and fits and self._until_stop(row, row.unread) == row.unread:
                    together.append(row)
                    counts.append(row.unread)
        return together, counts

    def _look_again(self, row: Row) -> None:
        """Let a row that has read nothing yet continue from a prefix that others have read since it was admitted."""
        if self.prefixes is None or row.length or not self.prefixes.path(row.tokens):
            return
        if self.pages is not None:
            self.pages.give_back(row.pages)
        if not self._start(row):
            raise AssertionError("pages that were just given back are there")

    def _until_stop(self, row: Row, count: int) -> int:
        """Return `count`, or fewer tokens if the row's next snapshot is due earlier."""
        return min([count, *(stop - row.length for stop in row.stops if stop > row.length)])

    def _read(self, rows: list[Row], counts: list[int]) -> list[Event]:
        given = [row.tokens[row.length : row.length + count] for row, count in zip(rows, counts, strict=True)]
        try:
            logits = self.reader.read(rows, given)
        except (Unsupported, RuntimeError, MemoryError) as error:  # a failing read ends its own rows, not the engine
            for row in rows:
                self._end(row)
            return [Event(row.request.key, None, finish=FAILED, error=str(error)) for row in rows]
        for row, count in zip(rows, counts, strict=True):
            row.length += count
            self.waiting.charge(row.request.client, count)
            self._record(row)
        done = [i for i, row in enumerate(rows) if not row.unread]
        return self._write([rows[i] for i in done], logits[done]) if done else []

    def _record(self, row: Row) -> None:
        """Add the blocks that a row has read to the prefix tree."""
        if self.prefixes is None or row.block is None:
            return
        size = self.reader.page_size
        while (row.blocks + 1) * size <= row.length:
            if not self.prefixes.alive(row.block):
                row.block = None
                return
            start = row.blocks * size
            page = row.pages[row.blocks] if self.pages is not None else None
            row.block = self.prefixes.add(row.block, tuple(row.tokens[start : start + size]), page)
            row.blocks += 1
        if row.length in row.stops and row.block.snapshot is None:
            self.prefixes.keep(row.block, *self.reader.save(row))

    def _write(self, rows: list[Row], logits: Tensor) -> list[Event]:
        """Choose the next token of each row; return the events."""
        good = torch.isfinite(logits.amax(-1)).tolist()  # -inf may mask single tokens; NaN or inf makes the row useless
        likeliest = logits.argmax(-1).tolist()
        events = []
        for i, row in enumerate(rows):
            request = row.request
            if not good[i]:
                self._end(row)
                events.append(Event(request.key, None, finish=FAILED, error="the model's scores are not finite"))
                continue
            token = likeliest[i]
            if request.temperature > 0:
                drawn = sample(
                    logits[i : i + 1],
                    temperature=request.temperature,
                    top_k=request.top_k,
                    top_p=request.top_p,
                    generator=row.generator,
                )
                token = int(drawn)
            row.tokens.append(token)
            self.new_tokens += 1
            written = len(row.tokens) - len(request.prompt)
            finish = STOP if token in request.stop_tokens else LENGTH if written >= request.max_tokens else None
            events.append(Event(request.key, token, *_told(logits[i], token, request.logprobs), finish))
            if finish:
                self._end(row)
        return events

    def _end(self, row: Row) -> None:
        self.active.remove(row)
        self.reader.forget(row)
        if self.pages is not None:
            self.pages.give_back(row.pages)

    def _evict(self, missing: int) -> None:
        if self.prefixes is not None:
            self.prefixes.evict(missing)


def _told(logits: Tensor, token: int, count: int | None) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Return the log-probability of a token, and the `count` likeliest tokens with theirs."""
    if count is None:
        return None, ()
    nats = wide(logits).log_softmax(-1)
    best = nats.topk(min(count, len(nats))) if count else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return float(nats[token]), top
