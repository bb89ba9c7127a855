"""Steps that follow one another, along an axis of pieces: a loop, or in an exported program one operator that loops,
so that the program is as long as its step and takes sequences of every length. A program for one length has a few steps one
after the other, which takes the exporter far less time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import Unsupported

if TYPE_CHECKING:
    from jaxtyping import Shaped

Step = Callable[..., tuple[tuple[Tensor, ...], Tensor]]
"""(carry, *pieces) -> (carry, output)"""


MOST_IN_A_ROW = 8
"""Steps that a program has one after the other."""


def fold(
    step: Step, carry: tuple[Tensor, ...], tensors: Sequence[Shaped[Tensor, ...] | None], axis: int
) -> tuple[tuple[Tensor, ...], Shaped[Tensor, ...]]:
    """The last carry, and the outputs of all pieces stacked along `axis`, where `tensors` have the pieces."""
    count = next(x.shape[axis] for x in tensors if x is not None)
    if loops_in_graph(count, 1):
        return _fold_in_graph(step, carry, tensors, axis)
    outputs = []
    for i in range(count):
        carry, output = step(carry, *(None if x is None else x.select(axis, i) for x in tensors))
        outputs.append(output)
    return carry, torch.stack(outputs, axis)


def fold_chunks(
    step: Step,
    carry: tuple[Tensor, ...],
    tensors: Sequence[Tensor | None],
    fills: Sequence[float],
    size: int,
    axis: int,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same for chunks of `size` along an axis of at least one token; outputs side by side.

    Args:
        fills: for each of `tensors`, what a token has that changes nothing; a program has them after the last.
    """
    n = next(x.shape[axis] for x in tensors if x is not None)
    if loops_in_graph(n, size):
        count = chunk_count(n, size)
        padded = [
            None if x is None else in_chunks(x, axis, count, size, fill) for x, fill in zip(tensors, fills, strict=True)
        ]
        carry, output = _fold_in_graph(step, carry, padded, axis)
        return carry, output.flatten(axis, axis + 1).narrow(axis, 0, n)
    outputs = []
    for start in range(0, n, size):
        part = slice(start, start + size)
        carry, output = step(carry, *(None if x is None else x[(slice(None),) * axis + (part,)] for x in tensors))
        outputs.append(output)
    return carry, torch.cat(outputs, axis)


def in_chunks(x: Tensor, axis: int, count: int, size: int, fill: float = 0.0) -> Tensor:
    """`axis` as (count, size), filled up at its end.

    Padding by nothing keeps the strides of a tensor, but a compiler with a symbol for the length takes the result to be
    contiguous: so is what is padded here.
    """
    padding = (*(0, 0) * (x.ndim - 1 - axis), 0, count * size - x.shape[axis])
    return F.pad(x.contiguous(), padding, value=fill).unflatten(axis, (count, size))


def chunk_count(n: int, size: int) -> int:
    """Chunks that hold n tokens; in an exported program for every length at least two: one could not become several."""
    return n // size + 2 if loops_in_graph(n, size) else -(-n // size)


def loops_in_graph(n: int, size: int) -> bool:
    """Whether chunks of `size` of n tokens are to be one operator that loops: in an exported program for more than a few."""
    if not torch.compiler.is_exporting():
        return False
    # dynamo shows a symbol as the number that it is in the example
    fixed = isinstance(n, int) and not torch.compiler.is_dynamo_compiling()
    return not fixed or n > MOST_IN_A_ROW * size


def _fold_in_graph(
    step: Step, carry: tuple[Tensor, ...], tensors: Sequence[Tensor | None], axis: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    from torch._higher_order_ops.scan import scan  # the compiler is large

    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*carry, *tensors)):
        raise Unsupported(
            "a program of a recurrence with gradients",
            supported="torch.export.export within torch.no_grad(), regard.integrations.export",
            nearest="with torch.no_grad(): ...",
        )
    given = [i for i, x in enumerate(tensors) if x is not None]

    def body(held: tuple[Tensor, ...], pieces: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        arguments: list[Any] = [None] * len(tensors)
        for i, piece in zip(given, pieces, strict=True):
            arguments[i] = piece
        after, output = step(held, *arguments)
        return tuple(x.clone(memory_format=torch.contiguous_format) for x in after), output

    first = tuple(x.clone(memory_format=torch.contiguous_format) for x in carry)
    carry, output = scan(body, first, tuple(x.movedim(axis, 0) for x in tensors if x is not None))
    return carry, output.movedim(0, axis)
