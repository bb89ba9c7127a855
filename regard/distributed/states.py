"""How states of pieces of a sequence combine into that of the whole, for mechanisms that declare it on their card.

S is the state after a piece that began with an empty state, and A is the piece's effect on the state before it:

| `Mechanism.combines` | combination of an earlier and a later piece |
|---|---|
| sum | S + S' |
| diagonal | (A' A, A' S + S'), by elements |
| matrix | (A' A, A' S + S'), products of matrices (K, K) |
| softmax | (M, u e^(m-M) + u' e^(m'-M), w e^(m-M) + w' e^(m'-M)), M = max(m, m') |

A is found without subtraction: by absorbing the piece with values of zero from a state of ones, or from the identity
matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.apply import absorb, apply
from regard.contract import Mechanism, Pattern, State
from regard.engines.merging import merge_states

Tensors = Mapping[str, Tensor]
CROSS = Pattern.NONCAUSAL_CROSS


@dataclass(frozen=True)
class Piece:
    """The mechanism on the tokens of one rank.

    Attributes:
        before: number of tokens on the ranks before it.
        options: arguments of :func:`regard.apply.apply` besides tensors and state.
    """

    card: Mechanism
    before: int
    options: Mapping[str, Any]

    def run(self, tensors: Tensors, state: State | None) -> tuple[Tensor, State]:
        """Return the output, and the state after the piece."""
        result = apply(self.card, tensors, state=state, return_state=True, **self.options)
        return result.output, result.state

    def empty(self, tensors: Tensors) -> State:
        """The state of no tokens."""
        axes = {name: token_axis(self.card, name) for name in tensors}
        nothing = {name: x if (axis := axes[name]) is None else x.narrow(axis, 0, 0) for name, x in tensors.items()}
        return self.run(nothing, None)[1]

    @property
    def combines(self) -> str:
        """How states of pieces combine with these options: see :class:`regard.contract.Mechanism`."""
        return self.card.combines_with(self.options["config"])

    def summary(self, tensors: Tensors, *, first: bool = False) -> list[Tensor]:
        """What the other ranks need to know about this piece: A, where there is one, and S.

        Args:
            first: whether this is the first piece, with no state before it, so that A may be anything.
        """
        started = self._entered(tensors, self._memory(self.empty(tensors)))
        after = self._memory(self._absorbed(tensors, started))
        if not self.transitions:
            return after
        value = "v" if "v" in self.card.axes else "x"
        (memory,) = after
        start = self._unmoved(memory)
        if first:
            return [start, memory]
        zeros = torch.zeros_like(tensors[value])
        if self.combines == "matrix":
            zeros = zeros[..., :1].expand(*zeros.shape[:-1], memory.shape[-2])
        moved = self._absorbed({**tensors, value: zeros}, self._entered(tensors, [start]))
        return [*self._memory(moved), memory]

    def nothing(self, tensors: Tensors) -> list[Tensor]:
        """The summary of no tokens."""
        memory = self._memory(self.empty(tensors))
        return [self._unmoved(memory[0]), *memory] if self.transitions else memory

    @property
    def transitions(self) -> bool:
        """Whether a piece transforms the state before it."""
        return self.combines in ("diagonal", "matrix")

    def _unmoved(self, memory: Tensor) -> Tensor:
        """A for no tokens."""
        if self.combines == "diagonal":
            return torch.ones_like(memory)
        width = memory.shape[-2]
        return torch.eye(width, dtype=memory.dtype, device=memory.device).expand(*memory.shape[:-1], width)

    def state(self, tensors: Tensors, summary: Sequence[Tensor]) -> State:
        """The state before this piece, from the combined summary of all earlier pieces."""
        return self._entered(tensors, summary[1:] if self.transitions else summary)

    def combined(self, earlier: Sequence[Tensor], later: Sequence[Tensor]) -> list[Tensor]:
        """The summary of two consecutive pieces."""
        kind = self.combines
        if kind == "sum":
            return [a + b for a, b in zip(earlier, later, strict=True)]
        if kind == "softmax":
            stacked = [torch.stack(pair) for pair in zip(earlier, later, strict=True)]
            return [x for i in range(0, len(stacked), 3) for x in merge_states(*stacked[i : i + 3])]
        (before, memory), (after, written) = earlier, later
        if kind == "diagonal":
            return [after * before, after * memory + written]
        return [after @ before, after @ memory + written]

    def _memory(self, state: State) -> list[Tensor]:
        return [x for x in state.tensors().values() if x.is_floating_point()]

    def _entered(self, tensors: Tensors, memory: Sequence[Tensor]) -> State:
        """A state with `memory`, as after the tokens before this piece."""
        empty, given = self.empty(tensors), iter(memory)
        return empty.with_tensors(
            {
                name: next(given) if x.is_floating_point() else torch.full_like(x, self.before)
                for name, x in empty.tensors().items()
            }
        )

    def _absorbed(self, tensors: Tensors, state: State) -> State:
        taken = {n: x for n, x in tensors.items() if n in self.card.absorbed_inputs and n != "skip"}  # outputs only
        heads = tensors["q"].shape[1] if self.card.axes.get("q", "")[:2] == "bh" else None
        return absorb(self.card, taken, pattern=CROSS, state=state, heads=heads, **self.options)


def token_axis(card: Mechanism, name: str) -> int | None:
    """The axis of an input along which its tokens are; None if it has none."""
    axes = card.axes[name]
    found = [i for i, letter in enumerate(axes) if letter in "nm"]
    return found[0] if found else None
