"""Messages between a model worker and attention workers: a JSON header that describes the tensors, then their bytes.

Nothing is unpickled. On a socket, a message is a prefix (mark, bytes of the header, bytes of the tensors that follow),
the header, and the tensors. If the processes share memory, the tensors are put there instead.
"""

from __future__ import annotations

import json
import mmap
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

PREFIX = struct.Struct("<4sIQ")
MARK = b"RGO1"
LONGEST_HEADER, LARGEST = 1 << 24, 1 << 33
"""Bytes of the header and of the tensors beyond which a message is refused as garbled."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Garbled(ValueError):
    """Received bytes that are not a message."""


@dataclass(frozen=True)
class Message:
    """A request to an attention worker, or its answer.

    Attributes:
        op: name of the operation or answer.
        fields: numbers, strings, and lists of them.
        tensors: floating-point tensors on the CPU.
    """

    op: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(x.numel() * x.element_size() for x in self.tensors)


class Ring:
    """A ring buffer in shared memory for one direction: one process writes, the other copies out in the same order.

    Args:
        memory: the shared memory.
        offset, size: the part of the memory that belongs to this direction.

    Attributes:
        taken: position up to which this process has read; positions count all bytes ever written.
        free_from: position up to which the other process has read, as last reported.
    """

    def __init__(self, memory: mmap.mmap, offset: int, size: int) -> None:
        self._memory, self._offset, self._size = memory, offset, size
        self._written = self.taken = self.free_from = 0

    def put(self, data: Sequence[memoryview], count: int) -> int | None:
        """Write `count` bytes; return their position, or None without room until the other process reads more."""
        start = self._written
        if start % self._size + count > self._size:  # no wrapping inside a message
            start += self._size - start % self._size
        if start + count - self.free_from > self._size:
            return None
        at = self._offset + start % self._size
        for part in data:
            self._memory[at : at + len(part)] = part
            at += len(part)
        self._written = start + count
        return start

    def get(self, start: int, count: int) -> bytearray:
        """Copy out the bytes that the other process wrote at position `start`, and free their space.

        Raises:
            Garbled: for bytes that the ring cannot hold there, or that were read before.
        """
        at = self._offset + start % self._size
        if not (self.taken <= start and count >= 0 and start % self._size + count <= self._size):
            raise Garbled(f"{count} bytes at {start} of a ring of {self._size}")
        found = bytearray(self._memory[at : at + count])
        self.taken = start + count
        return found


class Channel:
    """Messages in both directions over a connected socket.

    Args:
        connection: a stream socket.
        outgoing, incoming: shared memory for tensors; if it is None or full, they go through the socket.

    Attributes:
        framing: bytes of prefixes and headers sent and received, without tensors.
    """

    def __init__(self, connection: socket.socket, outgoing: Ring | None = None, incoming: Ring | None = None) -> None:
        self._connection, self._outgoing, self._incoming = connection, outgoing, incoming
        self.framing = 0

    def send(self, message: Message) -> None:
        """Send a message; raises OSError if the other end has closed."""
        parts = [_bytes_of(x) for x in message.tensors]
        count = sum(len(part) for part in parts)
        header: dict[str, Any] = {
            "op": message.op,
            "fields": message.fields,
            "tensors": [[NAMES[x.dtype], list(x.shape)] for x in message.tensors],
        }
        if self._outgoing is not None and count:
            header["at"] = self._outgoing.put(parts, count)
        if self._incoming is not None:
            header["taken"] = self._incoming.taken
        inline = parts if header.get("at") is None else []
        text = json.dumps(header, separators=(",", ":")).encode()
        self.framing += PREFIX.size + len(text)
        self._connection.sendall(b"".join((PREFIX.pack(MARK, len(text), count if inline else 0), text, *inline)))

    def receive(self) -> Message:
        """Receive a message; raises OSError or EOFError if the other end has closed, Garbled for other bytes."""
        mark, length, inline = PREFIX.unpack(self._exactly(PREFIX.size))
        if mark != MARK or length > LONGEST_HEADER or inline > LARGEST:
            raise Garbled("no message")
        self.framing += PREFIX.size + length
        try:
            header = json.loads(self._exactly(length))
            op, fields = str(header["op"]), dict(header["fields"])
            shapes = [(DTYPES[name], [int(n) for n in shape]) for name, shape in header["tensors"]]
            at, taken = header.get("at"), header.get("taken")
        except (ValueError, KeyError, TypeError) as error:
            raise Garbled(f"a header that cannot be read ({error})") from None
        sizes = [prod(shape) * dtype.itemsize for dtype, shape in shapes]
        if any(n < 0 for _, shape in shapes for n in shape) or sum(sizes) > LARGEST:
            raise Garbled("tensors of impossible sizes")
        if self._outgoing is not None and isinstance(taken, int):
            self._outgoing.free_from = taken
        if isinstance(at, int) and self._incoming is not None:
            data = self._incoming.get(at, sum(sizes))
        elif inline == sum(sizes):
            data = self._exactly(inline)
        else:
            raise Garbled(f"{inline} bytes for tensors of {sum(sizes)}")
        return Message(op, fields, tuple(_tensors(data, shapes, sizes)))

    def close(self) -> None:
        self._connection.close()

    def _exactly(self, count: int) -> bytearray:
        data, at = bytearray(count), 0
        view = memoryview(data)
        while at < count:
            got = self._connection.recv_into(view[at:])
            if not got:
                raise EOFError("the other end has closed")
            at += got
        return data


def _bytes_of(x: Tensor) -> memoryview:
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _tensors(data: bytearray, shapes: Sequence[tuple[torch.dtype, list[int]]], sizes: Sequence[int]) -> list[Tensor]:
    found, at = [], 0
    for (dtype, shape), size in zip(shapes, sizes, strict=True):
        if size:
            flat = torch.frombuffer(data, dtype=dtype, count=size // dtype.itemsize, offset=at)
            found.append(flat.view(shape))
        else:
            found.append(torch.empty(shape, dtype=dtype, device="cpu"))
        at += size
    return found
