"""The model worker: one of regard's language models without its KV cache, whose attention is computed by attention
workers.

Each layer of a step sends queries, keys and values to the workers and continues when the outputs are back. Rows are
read in alternating micro-batches: while the workers compute attention for one, the model computes another.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from regard.contract import Context, Mask, State, Unsupported, at_least
from regard.engines.linear import FrozenWeights
from regard.layers.attention import AttentionLayer, LayerState
from regard.models import LanguageModel, ModelState
from regard.models.blocks import Block
from regard.models.evaluating import evaluation_mode
from regard.serving.engine import Row
from regard.serving.language import context_of, without
from regard.serving.offload.backends import Backend, LocalBackend
from regard.serving.offload.layers import Inputs, keys_values, offloadable, queries, sizes_of
from regard.serving.offload.pool import AttentionPool, Exchange, WorkerLost
from regard.serving.offload.splits import LONG, Rows, create_split
from regard.serving.pools import PAGE_SIZE, default_tokens, padded
from regard.serving.states import Held

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CHUNK = 256
"""Tokens per chunk when a sequence is read again."""
MOST_LOSSES = 5
"""Maximum number of workers lost in one step before it is given up."""


@dataclass
class Clock:
    """Seconds of the model worker: of its own work, and of waiting for attention."""

    model: float = 0.0
    waiting: float = 0.0


@dataclass
class Text:
    """A sequence that is being read.

    Attributes:
        expected: its maximum length.
        tokens: tokens read so far.
    """

    expected: int
    tokens: list[int] = field(default_factory=list)


Pass = Generator[None, None, Tensor]
"""One micro-batch's forward pass: yields where it waits for attention; returns logits."""


class OffloadedReader:
    """A :class:`regard.models.LanguageModel` as :class:`regard.serving.engine.Reader`, with its keys and values on
    attention workers. The model computes the attention of prompts itself and then ships their keys and values.

    A lost worker is replaced, and the sequences that had keys and values on it are read again.

    Args:
        model: the model, in evaluation mode. Layers with a state of constant size stay with it.
        workers: number of attention workers.
        backend: starts the workers; :class:`regard.serving.offload.backends.LocalBackend` when None.
        split, long: as for :func:`regard.serving.offload.splits.create_split`.
        micro_batches: number of alternating parts of a step's rows; 1 for a single batch.
        overlap: whether queries are sent before keys and values are computed.
        rows, context, cache_tokens: as for :class:`regard.serving.language.LanguageReader`; `cache_tokens` is per
            worker.

    Attributes:
        clock: times of the steps after the prompts.
        in_turn: whether micro-batches alternate. False reads them one after the other, to measure the gain.
        pool: the workers.
        offloaded: layers whose attention the workers compute.

    Raises:
        Unsupported: for layers that keep keys and values in another way than plain softmax attention.
    """

    pages, page_size, page_bytes, holds, at_once = 0, PAGE_SIZE, 0, False, False

    def __init__(
        self,
        model: LanguageModel,
        workers: int = 1,
        *,
        backend: Backend | None = None,
        split: str = "auto",
        long: int = LONG,
        micro_batches: int = 2,
        overlap: bool = True,
        rows: int = 16,
        context: int | None = None,
        cache_tokens: int | None = None,
    ) -> None:
        at_least("micro_batches", micro_batches, 1)
        self.model, self.micro_batches, self.overlap, self.in_turn = model, micro_batches, overlap, True
        self.vocab_size, self.device = model.config.vocab_size, model.embedding.weight.device
        self.context = context_of(model, context)
        self.clock = Clock()
        self._modules, self._weights = list(model.modules()), FrozenWeights()
        self.offloaded, self._holds = offloadable(model)
        self._held = Held()
        self._texts: dict[int, Text] = {}
        self._dead: set[int] = set()  # lost workers
        self._stale: set[int] = set()  # rows that had keys and values on them
        layers = [sizes_of(model.blocks[i].mixer) for i in self.offloaded]  # type: ignore[arg-type]
        dtype = model.embedding.weight.dtype
        token = sum(x["kv_heads"] * (x["key_width"] + x["value_width"]) for x in layers) * dtype.itemsize
        tokens = default_tokens(rows, self.context, token) if cache_tokens is None else cache_tokens
        at_least("cache_tokens", tokens, PAGE_SIZE)
        self.pool = AttentionPool(
            LocalBackend() if backend is None else backend,
            create_split(split, workers, [layer["kv_heads"] for layer in layers], long),
            layers,
            dtype=dtype,
            pages=-(-tokens // PAGE_SIZE) + rows,  # each row's last page may be partly empty
            page_size=PAGE_SIZE,
        )

    @torch.no_grad()
    def read(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> Tensor:
        new = {row.number: Text(len(row.request.prompt) + row.request.max_tokens) for row in rows if not row.length}
        self._texts |= new
        self.pool.place(list(new), [text.expected for text in new.values()])
        read = Rows([row.number for row in rows], [row.length for row in rows], [len(some) for some in tokens])
        logits = self._surely(read, tokens)
        for row, some in zip(rows, tokens, strict=True):
            self._texts[row.number].tokens += some
        return logits

    def save(self, row: Row) -> tuple[State, int]:
        raise Unsupported("states of offloaded sequences", supported="reading them")

    def restore(self, row: Row, saved: State) -> None:
        raise Unsupported("states of offloaded sequences", supported="reading them")

    def forget(self, row: Row) -> None:
        if self._texts.pop(row.number, None) is None:
            return
        self._held.drop(row.number)
        self._stale.discard(row.number)
        self.pool.free([row.number])

    @property
    def held_bytes(self) -> int:
        """Bytes of the states of layers that stay with the model."""
        return self._held.nbytes

    def close(self) -> None:
        """End the workers."""
        self.pool.close()

    def _surely(self, rows: Rows, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Read tokens, and replace workers that are lost on the way."""
        for losses in itertools.count(1):
            try:
                self._repair(rows)
                return self._advance(rows, tokens)
            except WorkerLost as lost:
                self._dead.add(lost.worker)
                self._stale |= {key for key in self._texts if lost.worker in self.pool.split.owners(key)}
                self._stale |= {key for key in rows.keys if self._texts[key].tokens}
                if losses > MOST_LOSSES:
                    self.pool.drain()
                    raise
            except BaseException:
                self.pool.drain()
                raise
        raise AssertionError("unreachable")

    def _repair(self, rows: Rows) -> None:
        """Replace lost workers, and read their rows again."""
        if self._dead:
            for worker in sorted(self._dead):
                self.pool.replace(worker)
                self._dead.discard(worker)
            self.pool.drain()
            again = sorted(self._stale | set(rows.keys))  # the workers may hold only some layers of `rows`
            self.pool.free(again)
            self.pool.place(again, [self._texts[key].expected for key in again])
        for key in sorted(self._stale):
            self._read_again(key)
            self._stale.discard(key)

    def _read_again(self, number: int) -> None:
        tokens = self._texts[number].tokens
        for start in range(0, len(tokens), CHUNK):
            some = tokens[start : start + CHUNK]
            self._advance(Rows([number], [start], [len(some)]), [some])

    def _advance(self, rows: Rows, tokens: Sequence[Sequence[int]]) -> Tensor:
        started, waited = time.perf_counter(), self.clock.waiting
        with evaluation_mode(self.model, self._modules), self._weights:
            if rows.starts[0] == 0:
                return self._prefill(rows, tokens)
            groups = self._micro_batches(rows)
            logits = self._run([self._pass(_some(rows, group), [tokens[i] for i in group]) for group in groups])
        self.clock.model += time.perf_counter() - started - (self.clock.waiting - waited)
        order = torch.tensor([i for group in groups for i in group], device=self.device)
        return torch.cat(logits)[order.argsort()]

    def _micro_batches(self, rows: Rows) -> list[list[int]]:
        """Divide rows into micro-batches by length, so that the workers have about as much work for each."""
        longest_first = sorted(range(len(rows.keys)), key=lambda i: -rows.starts[i])
        groups: list[list[int]] = [[] for _ in range(min(self.micro_batches, len(rows.keys)))]
        for turn, i in enumerate(longest_first):
            there, back = divmod(turn, len(groups))
            groups[-1 - back if there % 2 else back].append(i)
        return [sorted(group) for group in groups]

    def _run(self, passes: Sequence[Pass]) -> list[Tensor]:
        """Run all passes, switching to the next at each pause if `in_turn`; return their logits."""
        found: dict[int, Tensor] = {}
        turns = deque(enumerate(passes))
        while turns:
            i, work = turns.popleft()
            try:
                next(work)
            except StopIteration as done:
                found[i] = done.value
            else:
                turns.append((i, work)) if self.in_turn else turns.appendleft((i, work))
        return [found[i] for i in range(len(passes))]

    def _prefill(self, rows: Rows, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Read the start of prompts with the model's own attention; send keys and values to the workers."""
        ids, lengths = padded(tokens, self.device)
        mask = None if min(rows.counts) == ids.shape[1] else Mask(lengths=lengths)
        result = self.model.features(ids, context=Context(mask=mask, want=frozenset({"state"})))
        for layer, i in enumerate(self.offloaded):
            cache = result.state.layers[i].mechanism
            self.pool.append(layer, rows, cache.k, cache.v)
        self.pool.settle()
        if self._holds:
            self._held.put(rows.keys, without(result.state, self.offloaded))
        return self._logits(result.output, lengths)

    def _pass(self, rows: Rows, tokens: Sequence[Sequence[int]]) -> Pass:
        """Read more tokens of rows that were begun, with attention on the workers."""
        model = self.model
        ids, lengths = padded(tokens, self.device)
        mask = None if min(rows.counts) == ids.shape[1] else Mask(lengths=lengths)
        past = torch.tensor(list(rows.starts), device=self.device)
        held: Sequence[Any] = self._held.get(rows.keys).layers if self._holds else ()  # type: ignore[attr-defined]
        after: list[Any] = [None] * len(model.blocks)
        shares = self.pool.split.shares(rows)
        x, context, _ = model.embed(ids, past, Context(mask=mask, want=frozenset({"state"})))
        where = past[:, None] + torch.arange(ids.shape[1], device=self.device)
        for i, block in enumerate(cast(list[Block], list(model.blocks))):
            if i in self.offloaded:
                exchange = self.pool.exchange(self.offloaded.index(i), rows, shares)
                caches = list(held[i].convolutions) if self._holds else []
                given = Inputs(block.mixer_norm(x), where, None if mask is None else lengths, caches)
                x = yield from self._attended(block, x, given, context, exchange)
                if self._holds:
                    after[i] = LayerState(None, past + lengths, tuple(caches))
            else:
                result = block(x, context=context, state=held[i])
                x, after[i] = result.output, result.state
        if self._holds:
            self._held.put(rows.keys, ModelState(tuple(after), past + lengths))
        return self._logits(model.norm(x), lengths)

    def _attended(self, block: Block, x: Tensor, given: Inputs, context: Context, exchange: Exchange) -> Pass:
        """Compute a block whose attention is offloaded."""
        layer = cast(AttentionLayer, block.mixer)
        q = queries(layer, given)
        early = self.overlap and x.shape[1] == 1
        if early:
            exchange.ask(q)
        exchange.tell(*keys_values(layer, given), None if early else q)
        yield
        started = time.perf_counter()
        y = exchange.receive()
        self.clock.waiting += time.perf_counter() - started
        y = layer.output(layer.gated(y.to(x.device).transpose(1, 2), given.x))
        x = x + block.mixer_end(y)
        return x if block.feed_forward is None else x + block.feed(x, context=context)

    def _logits(self, features: Float[Tensor, "b n c"], lengths: Int[Tensor, " b"]) -> Float[Tensor, "b vocab"]:
        rows = torch.arange(len(lengths), device=lengths.device)
        return self.model.logits(features[rows, lengths - 1])


def _some(rows: Rows, group: Sequence[int]) -> Rows:
    return Rows(*([values[i] for i in group] for values in (rows.keys, rows.starts, rows.counts)))
