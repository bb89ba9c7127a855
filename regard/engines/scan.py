"""Sequential steps along an axis: a Python loop or, in an exported program, one looping operator, so that the program
has the size of one step and takes sequences of any length. Programs for a fixed length unroll a few steps, which
exports far faster."""

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
"""Maximum number of steps that a program unrolls."""


def fold(
    step: Step, carry: tuple[Tensor, ...], tensors: Sequence[Shaped[Tensor, ...] | None], axis: int
) -> tuple[tuple[Tensor, ...], Shaped[Tensor, ...]]:
    """Run `step` on each piece of `tensors` along `axis`; return the last carry and the stacked outputs."""
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
    """:func:`fold` for chunks of `size` along an axis with at least one token; outputs are concatenated.

    Args:
        fills: for each of `tensors`, a value with which a token changes nothing, used as padding in a program.
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
    """Split `axis` into (count, size), padding it at the end.

    Without any padding, `F.pad` keeps a tensor's strides, but a compiler with a symbolic length assumes a contiguous
    result: hence the input is made contiguous.
    """
    padding = (*(0, 0) * (x.ndim - 1 - axis), 0, count * size - x.shape[axis])
    return F.pad(x.contiguous(), padding, value=fill).unflatten(axis, (count, size))


def chunk_count(n: int, size: int) -> int:
    """Number of chunks for n tokens; at least two when exporting for any length, as a size of one would be fixed."""
    return n // size + 2 if loops_in_graph(n, size) else -(-n // size)


def loops_in_graph(n: int, size: int) -> bool:
    """Return whether chunks of `size` of n tokens become one looping operator: for more than a few, in an export."""
    if not torch.compiler.is_exporting():
        return False
    # dynamo shows symbolic sizes as the example's numbers
    fixed = isinstance(n, int) and not torch.compiler.is_dynamo_compiling()
    return not fixed or n > MOST_IN_A_ROW * size


def _fold_in_graph(
    step: Step, carry: tuple[Tensor, ...], tensors: Sequence[Tensor | None], axis: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    from torch._higher_order_ops.scan import scan  # imports the compiler, which is large

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
