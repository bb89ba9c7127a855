"""The pool of a model's attention workers: messages to them, their answers, and their replacement when lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.serving.offload.backends import Backend, Link, Lost
from regard.serving.offload.messages import NAMES, Message
from regard.serving.offload.splits import Rows, Share, Split, put_together
from regard.serving.offload.worker import FAILED

if TYPE_CHECKING:
    from jaxtyping import Float


class WorkerLost(RuntimeError):
    """An attention worker was lost.

    Attributes:
        worker: its number.
    """

    def __init__(self, worker: int, why: Lost) -> None:
        super().__init__(f"attention worker {worker}: {why}")
        self.worker = worker


@dataclass
class Traffic:
    """Bytes of tensors between a model worker and its attention workers.

    Attributes:
        sent: queries, keys and values of decoding steps.
        received: outputs and log-sum-exps of decoding steps.
        prefilled: keys and values of prompts, whose attention the model worker computed itself.
    """

    sent: int = 0
    received: int = 0
    prefilled: int = 0


class AttentionPool:
    """Attention workers that hold the keys and values of some layers.

    Args:
        backend: starts the workers.
        split: assigns keys and values to workers.
        layers: sizes of each layer, from :func:`regard.serving.offload.layers.sizes_of`.
        dtype: dtype of keys and values.
        pages, page_size: number of pages in each worker's cache, and tokens of a page.

    Attributes:
        traffic: traffic so far.
        replaced: number of workers that were replaced.
        busy: seconds that each worker has worked so far.
    """

    def __init__(
        self,
        backend: Backend,
        split: Split,
        layers: Sequence[Mapping[str, Any]],
        *,
        dtype: torch.dtype,
        pages: int,
        page_size: int,
    ) -> None:
        self.split, self.traffic, self.replaced = split, Traffic(), 0
        self._backend, self._layers = backend, layers
        self._cache = {"dtype": NAMES[dtype], "pages": pages, "page_size": page_size}
        self.links: list[Link] = list(backend.start(split.workers))
        self._open, self.busy = [0] * split.workers, [0.0] * split.workers
        try:
            for a in range(split.workers):
                self._begin(a)
        except RuntimeError:
            self.close()
            raise

    def place(self, keys: Sequence[int], tokens: Sequence[int]) -> None:
        """Assign new rows to workers, by the number of tokens that each will have; the longest rows come first."""
        for key, count in sorted(zip(keys, tokens, strict=True), key=lambda row: -row[1]):
            self.split.place(key, count)

    def append(self, layer: int, rows: Rows, k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n v"]) -> None:
        """Send keys and values without queries, and without waiting; see :meth:`settle`."""
        k, v = k.cpu(), v.cpu()
        for a, share in self.split.shares(rows).items():
            if not any(share.counts):
                continue
            message = Message("append", _named(layer, rows, share), (share.fresh(k), share.fresh(v)))
            self.send(a, message)
            self.traffic.prefilled += message.nbytes

    def settle(self) -> None:
        """Wait until the workers have answered everything that was sent."""
        for a in range(len(self.links)):
            while self._open[a]:
                self.receive(a)

    def exchange(self, layer: int, rows: Rows, shares: dict[int, Share]) -> Exchange:
        """Return the exchange for attention of some rows in a layer; `shares` come from the split."""
        return Exchange(self, layer, rows, shares, self._layers[layer]["kv_heads"])

    def free(self, keys: Iterable[int]) -> None:
        """Drop rows. A lost worker is ignored here; it is noticed when it is next needed."""
        message = Message("free", {"rows": list(keys)})
        for a in range(len(self.links)):
            try:
                self.send(a, message)
                self.receive(a)
            except WorkerLost:
                continue
        for key in message.fields["rows"]:
            self.split.remove(key)

    def replace(self, worker: int) -> None:
        """Replace a lost worker by a new one with an empty cache."""
        self.links[worker].close()
        self._open[worker], self.replaced = 0, self.replaced + 1
        (self.links[worker],) = self._backend.start(1)
        self._begin(worker)

    def drain(self) -> None:
        """Receive and discard outstanding answers to a step that was given up."""
        for a in range(len(self.links)):
            while self._open[a]:
                try:
                    self.receive(a)
                except WorkerLost:
                    break
                except RuntimeError:
                    continue

    def stats(self) -> list[Mapping[str, Any]]:
        """Return each worker's statistics: bytes of cache, number of rows, bytes of parameters in its process."""
        found = []
        for a in range(len(self.links)):
            self.send(a, Message("stats"))
            found.append(self.receive(a).fields)
        return found

    @property
    def framing(self) -> int:
        """Bytes of messages apart from their tensors, both ways."""
        return sum(link.framing for link in self.links)

    def close(self) -> None:
        for link in self.links:
            link.close()

    def _begin(self, worker: int) -> None:
        self.send(worker, Message("begin", {"layers": self._own_layers(worker), **self._cache}))
        self.receive(worker)

    def _own_layers(self, worker: int) -> list[dict[str, Any]]:
        own = self.split.heads(worker)
        return [{**layer, "kv_heads": len(range(layer["kv_heads"])[own])} for layer in self._layers]

    def send(self, worker: int, message: Message) -> None:
        """Send a message to a worker; raises WorkerLost."""
        try:
            self.links[worker].send(message)
        except Lost as why:
            raise WorkerLost(worker, why) from None
        self._open[worker] += message.op != "early"

    def receive(self, worker: int) -> Message:
        """Receive a worker's answer; raises WorkerLost, and RuntimeError if the worker reports an error."""
        try:
            answer = self.links[worker].receive()
        except Lost as why:
            raise WorkerLost(worker, why) from None
        self._open[worker] -= 1
        self.busy[worker] = answer.fields["busy"]
        if answer.op == FAILED:
            raise RuntimeError(answer.fields["why"])
        return answer


class Exchange:
    """One exchange with the workers of some rows: sends queries, new keys and new values, and receives the outputs.

    ``tell(k, v, q)`` sends all at once. With ``ask(q)`` before ``tell(k, v)``, workers attend to the earlier tokens
    while the new keys are computed.
    """

    def __init__(self, pool: AttentionPool, layer: int, rows: Rows, shares: dict[int, Share], kv_heads: int) -> None:
        self._pool, self._layer, self._rows, self._shares, self._kv_heads = pool, layer, rows, shares, kv_heads

    def ask(self, q: Float[Tensor, "b h 1 d"]) -> None:
        """Send the queries of one token per row before its keys and values are computed."""
        q = q.cpu()
        for a, share in self._shares.items():
            self._send(
                a, "early" if any(share.counts) else "attend", self._queries(share), share.queries(q, self._kv_heads)
            )

    def tell(
        self, k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n v"], q: Float[Tensor, "b h n d"] | None = None
    ) -> None:
        """Send keys and values, with the queries if they were not sent before."""
        k, v = k.cpu(), v.cpu()
        for a, share in self._shares.items():
            new = (share.fresh(k), share.fresh(v)) if any(share.counts) else ()
            named = _named(self._layer, self._rows, share)
            if q is not None:
                self._send(a, "attend", named | self._queries(share), share.queries(q.cpu(), self._kv_heads), *new)
            elif new:
                self._send(a, "attend", named, *new)

    def receive(self) -> Float[Tensor, "b h n v"]:
        """Receive the output of all rows, on the CPU."""
        answers = {a: self._pool.receive(a) for a in self._shares}
        self._pool.traffic.received += sum(answer.nbytes for answer in answers.values())
        tensors = {a: answer.tensors for a, answer in answers.items()}
        return put_together(self._shares, tensors, len(self._rows.keys), self._kv_heads)

    def _queries(self, share: Share) -> dict[str, Any]:
        return _named(self._layer, self._rows, share) | {"ranks": share.ranks, "parts": share.parts}

    def _send(self, worker: int, op: str, fields: dict[str, Any], *tensors: Tensor) -> None:
        message = Message(op, fields, tensors)
        self._pool.send(worker, message)
        self._pool.traffic.sent += message.nbytes


def _named(layer: int, rows: Rows, share: Share) -> dict[str, Any]:
    return {"layer": layer, "rows": [rows.keys[i] for i in share.rows], "counts": share.counts}
