"""A definition, which is one of unpadded tokens, on padded rows: each alone, cut to its tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import Call, Mechanism, Tensors, Unsupported

BESIDE = ("bias", "blocks", "grid", "roles")


def by_rows(card: Mechanism, call: Call, tensors: Tensors) -> Tensor:
    """The ``reference`` form on right-padded tensors; rows without queries or without keys give 0.

    Raises:
        Unsupported: where the call has more of single tokens than lengths, where the form returns more than an output, and
            in a compiled program, which cannot cut by lengths.
    """
    if torch.compiler.is_compiling():
        raise _too_much(card, "a compiled program")
    for name in BESIDE:
        if getattr(call, name) is not None:
            raise _too_much(card, name)
    lengths = {"n": call.lengths, "m": call.memory_lengths}
    counts = {letter: x.tolist() for letter, x in lengths.items() if x is not None}
    alone = call.replace(lengths=None, memory_lengths=None)
    outputs = []
    for row in range(len(next(iter(counts.values())))):
        own = {letter: count[row] for letter, count in counts.items()}
        empty = 0 in own.values()  # the definition need not know what is of no token
        cut = {name: _cut(x, card.axes[name], row, {} if empty else own) for name, x in tensors.items()}
        output = card.forms["reference"](alone, **cut)
        if not isinstance(output, Tensor):
            raise _too_much(card, "more than an output")
        if "n" in card.output:
            axis = card.output.index("n")
            missing = 0 if empty else _size(card, tensors, "n") - output.shape[axis]
            output = F.pad(output, (*(0, 0) * (output.ndim - 1 - axis), 0, missing))
        outputs.append(torch.zeros_like(output) if empty else output)
    return torch.cat(outputs, card.output.index("b"))


def _cut(x: Tensor, axes: str, row: int, counts: dict[str, int]) -> Tensor:
    """One row of an input, and as many of its tokens as count."""
    for letter, first, count in (("b", row, 1), *((letter, 0, count) for letter, count in counts.items())):
        if letter in axes:
            x = x.narrow(axes.index(letter), first, count)
    return x


def _size(card: Mechanism, tensors: Tensors, letter: str) -> int:
    return next(x.shape[card.axes[name].index(letter)] for name, x in tensors.items() if letter in card.axes[name])


def _too_much(card: Mechanism, what: str) -> Unsupported:
    return Unsupported(
        f"padded or packed tokens with {what} in {card.name}, which has its definition alone",
        supported="rows of equal length, or a parallel or chunked form on its card",
    )
