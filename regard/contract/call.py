"""What a form receives beside its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract.context import BlockMask
from regard.contract.patterns import Pattern

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Call:
    """Everything that a form receives beside its tensors, which are dense and right-padded, with zeros in the padding.

    Attributes:
        pattern: one of the card's patterns.
        config: options of the mechanism.
        scale: multiplies the scores, already resolved from the card's default.
        lengths: valid queries of each row; None when all are.
        memory_lengths: valid keys of each row; None when all are.
        bias: additive scores of pairs, on ranks.
        blocks: block-sparse visibility of pairs, on ranks.
        state: to continue from; None at the start of a sequence.
        chunk_size: tokens a chunk in chunked forms; the form's own default when None.
        dropout: probability of dropping an attention weight.
        backend: requested by the user; None lets the device decide.
        position_bias: additive scores as a function of query ranks and key ranks, from a position scheme.
        rotate: rotary embedding as a function of (tensor, ranks), for mechanisms that place cached keys themselves.
        grid: sizes of the image or volume whose tokens are laid out row by row.
        valid: valid places of the grid; None when all are, or without a grid. On a grid tokens stay in their places,
            with zeros at invalid ones, and `lengths` is None.
    """

    pattern: Pattern
    config: Any = None
    scale: float = 1.0
    lengths: Int[Tensor, " b"] | None = None
    memory_lengths: Int[Tensor, " b"] | None = None
    bias: Float[Tensor, "#b #h n m"] | None = None
    blocks: BlockMask | None = None
    state: Any = None
    chunk_size: int | None = None
    dropout: float = 0.0
    generator: torch.Generator | None = None
    backend: str | None = None
    position_bias: Callable[[Tensor, Tensor], Tensor] | None = None
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None
    grid: tuple[int, ...] | None = None
    valid: Bool[Tensor, "b n"] | None = None
    roles: Int[Tensor, "b n"] | None = None
    training: bool = False
    progress: float | None = None
    teacher: Any = None
    want: frozenset[str] = frozenset()

    def replace(self, **changes: Any) -> Call:
        """The same call with other fields."""
        return dataclasses.replace(self, **changes)

    def after(self, state: Any, rotate: Callable[[Tensor, Tensor], Tensor] | None = None) -> Call:
        """The same call continuing from `state`, with this `rotate`, in a tenth of the time that :meth:`replace` takes to set
        every field: each layer asks for it at each token."""
        call = object.__new__(Call)
        vars(call).update(vars(self), state=state, rotate=rotate)
        return call

    def valid_queries(self, n: int) -> Bool[Tensor, "b n"] | None:
        """True at valid queries; None when all are valid."""
        return None if self.lengths is None else valid_from_lengths(self.lengths, n)

    def valid_keys(self, m: int) -> Bool[Tensor, "b m"] | None:
        """True at valid keys; None when all are valid."""
        return None if self.memory_lengths is None else valid_from_lengths(self.memory_lengths, m)


def lengths_after(
    before: Int[Tensor, " b"] | None, lengths: Int[Tensor, " b"] | None, batch: int, n: int, device: torch.device
) -> Int[Tensor, " b"]:
    """Tokens of each row after `lengths` new ones (all n when None) behind those `before` (none when None)."""
    if before is not None:
        return before + (n if lengths is None else lengths)
    return torch.full((batch,), n, device=device) if lengths is None else lengths


def valid_from_lengths(lengths: Int[Tensor, " b"], n: int) -> Bool[Tensor, "b n"]:
    """True at the first `lengths` of `n` places of each row, on their device."""
    return torch.arange(n, device=lengths.device) < lengths[:, None]
