"""An attention worker: it stores keys and values of sequences in pages and computes softmax attention. It has no
weights.

It answers messages over any transport:

- ``begin``: sizes of the layers and of the cache; clears all rows;
- ``append``: new keys and values of rows, packed (T, G, D);
- ``attend``: queries (B, H, n, D), with new keys and values if this worker stores any; answered with outputs (B, H, n,
  V), and log-sum-exps (P, H, n) of the rows that are split over several workers;
- ``early``: queries of one token per row whose keys and values are still being computed. Attention to the earlier
  tokens starts at once; the ``attend`` that follows brings only keys and values, whose contribution is merged in;
- ``free``: drops rows;
- ``stats``: bytes of the cache and of parameters, and the number of rows.

:func:`main` is the entry point of the process that starts workers for :mod:`regard.serving.offload.backends`.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import queue
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.visibility import Visibility
from regard.engines.paged_cache import attend
from regard.serving.offload.messages import DTYPES, Channel, Garbled, Message, Ring
from regard.serving.pages import Pages

FAILED = "failed"
LOOPBACK = "127.0.0.1"
LONGEST_ORDER = 1 << 12
PROCESS = struct.Struct("<q")
"""Format of a process ID, the answer to an order."""
CAUSAL = Visibility(causal=True)


class AttentionWorker:
    """The caches of all layers and attention to them. It handles one message at a time."""

    def __init__(self) -> None:
        self._ops: dict[str, Callable[[Message], Message | None]] = {
            "begin": self._begin,
            "append": self._append,
            "attend": self._attend,
            "early": self._start_early,
            "free": self._free,
            "stats": self._stats,
        }
        self._pages = Pages(1, 1)
        self._layers: list[dict[str, Any]] = []
        self._pools: list[tuple[Tensor, Tensor]] = []
        self._owned: dict[int, list[int]] = {}
        self._lengths: dict[int, list[int]] = {}  # of each row, in each layer
        self._tables: dict[tuple[int, ...], Tensor] = {}
        self._early: tuple[Message, Message] | None = None
        self._busy = 0.0

    @torch.no_grad()
    def answer(self, message: Message) -> Message | None:
        """Answer a message, with total seconds of work as ``busy``; errors become ``failed``. None for ``early``."""
        started = time.perf_counter()
        try:
            answer = self._ops[message.op](message)
        except (RuntimeError, ValueError, LookupError, TypeError, MemoryError) as error:
            answer = Message(FAILED, {"why": str(error) or type(error).__name__})
            if message.op == "early":
                self._early, answer = (message, answer), None
        self._busy += time.perf_counter() - started
        return None if answer is None else Message(answer.op, {**answer.fields, "busy": self._busy}, answer.tensors)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the pages in use."""
        used = self._pages.count - self._pages.free
        return used * sum(x[0].numel() * x.element_size() for pools in self._pools for x in pools)

    def _begin(self, message: Message) -> Message:
        fields = message.fields
        size, count, dtype = fields["page_size"], fields["pages"], DTYPES[fields["dtype"]]
        self._pages, self._layers, self._early = Pages(count, size), fields["layers"], None
        self._owned, self._lengths, self._tables = {}, {}, {}
        self._pools = []
        for layer in self._layers:
            shapes = [(count, layer["kv_heads"], size, layer[width]) for width in ("key_width", "value_width")]
            k, v = (torch.zeros(shape, dtype=dtype, device="cpu") for shape in shapes)
            self._pools.append((k, v))
        return Message("begun")

    def _append(self, message: Message) -> Message:
        self._write(message, *message.tensors)
        return Message("appended")

    def _attend(self, message: Message) -> Message:
        early, self._early = self._early, None
        if early is None:
            q, *new = message.tensors
            if new:
                self._write(message, *new)
            return self._answered(message, *self._read(message, q))
        asked, found = early
        if found.op == FAILED:
            return found
        self._write(message, *message.tensors)
        return self._answered(asked, *self._merged(asked, found, message))

    def _start_early(self, message: Message) -> None:
        self._early = message, Message("state", {}, self._read(message, message.tensors[0]))

    def _merged(self, asked: Message, state: Message, new: Message) -> tuple[Tensor, Tensor]:
        """Merge attention to the earlier tokens with each row's new token. Alone, the new token has weight 1 and its
        score as log-sum-exp, so the two outputs are weighted by the exponentials of their log-sum-exps."""
        output, lse = state.tensors
        (q,), (k, v) = asked.tensors, new.tensors
        layer = self._layers[asked.fields["layer"]]
        fresh = [i for i, count in enumerate(new.fields["counts"]) if count]
        rows = slice(None) if len(fresh) == len(q) else fresh
        heads = (k.shape[1], q.shape[1] // k.shape[1])
        grouped = q[rows].to(lse.dtype).unflatten(1, heads)  # (B, G, queries of a key, 1, D)
        score = (grouped * k[:, :, None, None].to(lse.dtype)).sum(-1).flatten(1, 2) * layer["scale"]
        if layer["softcap"] is not None:
            score = layer["softcap"] * torch.tanh(score / layer["softcap"])
        share = torch.sigmoid(score - lse[rows])[..., None].unflatten(1, heads)
        before = output[rows].to(lse.dtype).unflatten(1, heads)
        both = torch.lerp(before, v[:, :, None, None].to(lse.dtype).expand_as(before), share)
        output[rows] = both.flatten(1, 2).to(output.dtype)
        if asked.fields["parts"]:
            lse[rows] = torch.logaddexp(score, lse[rows])
        return output, lse

    def _answered(self, asked: Message, output: Tensor, lse: Tensor) -> Message:
        parts = asked.fields["parts"]
        return Message("attended", {}, (output, lse[parts]) if parts else (output,))

    def _free(self, message: Message) -> Message:
        for row in message.fields["rows"]:
            self._pages.give_back(self._owned.pop(row, ()))
            self._lengths.pop(row, None)
        self._tables.clear()
        self._early = None  # left over from a step that was given up
        return Message("freed")

    def _stats(self, message: Message) -> Message:
        weights = sum(x.nbytes for x in gc.get_objects() if issubclass(type(x), nn.Parameter))
        return Message(
            "stats",
            {
                "cache_bytes": self.cache_bytes,
                "rows": len(self._owned),
                "parameter_bytes_of_process": weights,
            },
        )

    def _write(self, message: Message, k: Tensor, v: Tensor) -> None:
        """Append packed tokens (T, G, D) to their rows in a layer."""
        layer, size = message.fields["layer"], self._pages.size
        pages: list[int] = []
        slots: list[int] = []
        for row, count in zip(message.fields["rows"], message.fields["counts"], strict=True):
            if not count:
                continue
            lengths = self._lengths.setdefault(row, [0] * len(self._layers))
            owned = self._owned.setdefault(row, [])
            start, end = lengths[layer], lengths[layer] + count
            missing = self._pages.needed(end) - len(owned)
            if missing > 0:
                more = self._pages.take(missing)
                if more is None:
                    raise RuntimeError(f"an attention worker's cache of {self._pages.count * size} tokens is full")
                owned += more
                self._tables.clear()
            pages += [owned[at // size] for at in range(start, end)]
            slots += [at % size for at in range(start, end)]
            lengths[layer] = end
        where = torch.tensor(pages, device="cpu"), torch.tensor(slots, device="cpu")
        for pool, x in zip(self._pools[layer], (k, v), strict=True):
            pool[where[0], :, where[1]] = x.to(pool.dtype)

    def _read(self, message: Message, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp of queries over the stored keys; `ranks` count this worker's keys alone."""
        rows, at = message.fields["rows"], message.fields["layer"]
        layer, pools = self._layers[at], self._pools[at]
        none = [0] * len(self._layers)
        lengths = torch.tensor([self._lengths.get(row, none)[at] for row in rows], device="cpu")
        ranks = torch.tensor(message.fields["ranks"], device="cpu")
        return attend(
            q,
            (*pools, self._table(rows), lengths),
            ranks,
            visibility=CAUSAL,
            scale=layer["scale"],
            softcap=layer["softcap"],
            want_lse=True,
        )

    def _table(self, rows: Sequence[int]) -> Tensor:
        key = tuple(rows)
        found = self._tables.get(key)
        if found is None:
            owned = [self._owned.get(row, []) for row in rows]
            most = max(1, *map(len, owned))
            table = [pages + [-1] * (most - len(pages)) for pages in owned]
            found = self._tables[key] = torch.tensor(table, device="cpu")
        return found


def work(channel: Channel) -> None:
    """Answer messages until the other end closes.

    A separate thread reads them, so that the sender of a message never blocks because its last answer is still unread.
    """
    coming: queue.SimpleQueue[Message | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                coming.put(channel.receive())
        except (OSError, EOFError, Garbled):
            coming.put(None)

    threading.Thread(target=read, daemon=True).start()
    worker = AttentionWorker()
    while (message := coming.get()) is not None:
        answer = worker.answer(message)
        if answer is not None:
            try:
                channel.send(answer)
            except OSError:
                return


def start(order: Mapping[str, Any], inherited: Sequence[int]) -> None:
    """Run a worker, on an inherited socket and shared memory, or on a connection to a port of this machine.

    Args:
        order: ``threads``; ``core`` to run on, or None; ``bytes`` of the memory, or ``port`` and the ``secret`` to send
            there.
        inherited: file descriptors of the socket and of the memory, of which each direction has half.
    """
    torch.set_num_threads(order["threads"])
    if order["core"] is not None:
        os.sched_setaffinity(0, {order["core"]})
    if inherited:
        connection = socket.socket(fileno=inherited[0])
        with connection, mmap.mmap(inherited[1], order["bytes"]) as memory:
            half = len(memory) // 2
            work(Channel(connection, Ring(memory, half, half), Ring(memory, 0, half)))
        return
    with socket.create_connection((LOOPBACK, order["port"])) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(bytes.fromhex(order["secret"]))
        work(Channel(connection))


def main() -> None:
    """Wait for orders on the socket whose descriptor is the argument, and fork a worker for each: torch is imported
    only once, and workers start at once."""
    orders = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to end
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reap ended workers automatically
    while True:
        text, inherited, _, _ = socket.recv_fds(orders, LONGEST_ORDER, 2)
        if not text:
            return
        process = os.fork()
        if not process:
            orders.close()
            try:
                start(json.loads(text), inherited)
            except BaseException:
                traceback.print_exc()
            os._exit(0)  # nothing needs cleaning up, and torch's own cleanup is slow
        for descriptor in inherited:
            os.close(descriptor)
        orders.sendall(PROCESS.pack(process))
