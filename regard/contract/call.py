"""The arguments that a form receives in addition to its tensors."""

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
    """The arguments of a form besides its tensors, which are dense and right-padded, with zeros in the padding.

    Attributes:
        pattern: one of the card's patterns.
        config: the mechanism's options.
        scale: factor on the scores, already resolved from the card's default.
        lengths: number of valid queries in each row; None when all are valid.
        memory_lengths: number of valid keys in each row; None when all are valid.
        bias: additive bias for each (query, key) pair, indexed by rank.
        blocks: block-sparse visibility of (query, key) pairs, indexed by rank.
        state: the state to continue from; None at the start of a sequence.
        chunk_size: tokens per chunk in chunked forms; None for the form's own default.
        dropout: probability of dropping an attention weight.
        backend: the backend that the user requested; None to choose by device.
        position_bias: additive scores as a function of query ranks and key ranks, from a position scheme.
        rotate: rotary embedding as a function of (tensor, ranks), for mechanisms that place cached keys themselves.
        grid: sides of the image or volume whose tokens are laid out row by row.
        valid: valid places of the grid; None when all are valid, or without a grid. On a grid, tokens stay in their
            places, with zeros at invalid ones, and `lengths` is None.
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
        """A copy of this call with some fields changed."""
        return dataclasses.replace(self, **changes)

    def after(self, state: Any, rotate: Callable[[Tensor, Tensor], Tensor] | None = None) -> Call:
        """A copy of this call with a new `state` and `rotate`. Ten times as fast as :meth:`replace`, since every layer
        needs one for every token."""
        call = object.__new__(Call)
        vars(call).update(vars(self), state=state, rotate=rotate)
        return call

    def valid_queries(self, n: int) -> Bool[Tensor, "b n"] | None:
        """Mask that is True at valid queries; None when all are valid."""
        return None if self.lengths is None else valid_from_lengths(self.lengths, n)

    def valid_keys(self, m: int) -> Bool[Tensor, "b m"] | None:
        """Mask that is True at valid keys; None when all are valid."""
        return None if self.memory_lengths is None else valid_from_lengths(self.memory_lengths, m)


def lengths_after(
    before: Int[Tensor, " b"] | None, lengths: Int[Tensor, " b"] | None, batch: int, n: int, device: torch.device
) -> Int[Tensor, " b"]:
    """Tokens in each row: the `before` earlier ones (None for 0) plus the `lengths` new ones (None for n)."""
    if before is not None:
        return before + (n if lengths is None else lengths)
    return torch.full((batch,), n, device=device) if lengths is None else lengths


def valid_from_lengths(lengths: Int[Tensor, " b"], n: int) -> Bool[Tensor, "b n"]:
    """Mask that is True at the first `lengths` of `n` positions in each row, on the device of `lengths`."""
    return torch.arange(n, device=lengths.device) < lengths[:, None]
