"""The states of combiner: open and finished rows, or all tokens and the blocks of each level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from regard.contract import State, state_field

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class CombinerState(State):
    """The part that both kinds of state share: the number of tokens of each batch row so far."""

    length: Int[Tensor, " b"] = state_field()


@dataclass(frozen=True)
class RowState(CombinerState):
    """Open and finished rows of s tokens: token t of the open row is in slot t, finished row g in slot g.

    For each finished row, `keys` and `values` have one entry (`fixed`), one per column (`axial_rowmajor`), or those of
    its tokens, then of the parts left of each column, then of the parts right of it (axial). `asked` and `told` are the
    running reductions, by column, of the queries and keys of finished rows; `column_values` are the values of these
    summaries.
    """

    q: Float[Tensor, "b h s d"] = state_field()
    k: Float[Tensor, "b h s d"] = state_field()
    v: Float[Tensor, "b h s v"] = state_field()
    residual: Float[Tensor, "b s c"] | None = state_field()
    keys: Float[Tensor, "b h rows parts d"] = state_field()
    values: Float[Tensor, "b h rows parts v"] = state_field()
    asked: Float[Tensor, "b h s d"] | None = state_field()
    told: Float[Tensor, "b h s d"] | None = state_field()
    column_values: Float[Tensor, "b h s v"] | None = state_field()


@dataclass(frozen=True)
class BlockState(CombinerState):
    """State of `logn`: all keys and values, with the rank of each slot (-1: empty), and for each level the last block
    of even index: running reductions of its queries and keys, and its value."""

    k: Float[Tensor, "b h past d"] = state_field()
    v: Float[Tensor, "b h past v"] = state_field()
    ranks: Int[Tensor, "b past"] = state_field(fill=-1)
    asked: Float[Tensor, "b h levels d"] = state_field()
    told: Float[Tensor, "b h levels d"] = state_field()
    values: Float[Tensor, "b h levels v"] = state_field()
