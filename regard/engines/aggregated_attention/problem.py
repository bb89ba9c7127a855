"""The arguments of aggregated attention besides queries, keys and values, shared by the engine's forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Problem:
    """Which keys a query attends to, and the learned parameters.

    Attributes:
        grid: rows and columns of the map, whose places, row by row, are the queries.
        factor: side of the square of places that is pooled into one; divides rows and columns.
        window: side of the window around each place, odd; it has P = window^2 places.
        moved: added to the directions of the queries.
        slope: factor on the scores, in addition to the logarithm of the number of keys.
        near_bias: bias on the scores of each place of the window.
        near_tokens, near_weights: t and b, the window's learned weights.
        table: biases of pooled places by their offset: place y, x and pooled place a, b use the entry y - factor a +
            rows - factor, x - factor b + columns - factor.
    """

    grid: tuple[int, int]
    factor: int
    window: int
    moved: Float[Tensor, "h d"]
    slope: Float[Tensor, " h"]
    near_bias: Float[Tensor, "h p"]
    near_tokens: Float[Tensor, "h d p"]
    near_weights: Float[Tensor, "h p"]
    table: Float[Tensor, "h down across"]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors that may have gradients."""
        return self.moved, self.slope, self.near_bias, self.near_tokens, self.near_weights, self.table

    @property
    def table_shape(self) -> tuple[int, int]:
        """Rows and columns of the table."""
        rows, columns = self.grid
        return 2 * rows - self.factor, 2 * columns - self.factor
