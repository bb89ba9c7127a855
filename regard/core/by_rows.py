"""Runs a definition, which takes unpadded tokens, on padded rows: one row at a time, cut to its valid tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import Call, Mechanism, Tensors, Unsupported

BESIDE = ("bias", "blocks", "grid", "roles")


def by_rows(card: Mechanism, call: Call, tensors: Tensors) -> Tensor:
    """Run the ``reference`` form on right-padded tensors; rows without queries or without keys give 0.

    Raises:
        Unsupported: if the call has per-token arguments other than lengths, if the form returns more than an output,
            and in a compiled program, which cannot cut rows by their lengths.
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
        empty = 0 in own.values()  # a definition need not handle empty inputs
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
    """One row of an input, cut to its valid tokens."""
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
