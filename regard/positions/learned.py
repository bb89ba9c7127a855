"""A learned vector for each position, added to the input embedding (Gehring et al., arXiv 1705.03122, section 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.contract import Unsupported, at_least, one_of
from regard.core.precision import wide
from regard.positions.protocol import Positions, check_positions

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Learned(Positions):
    """Adds row p of a table (max_length, C) to the input embedding.

    A position outside the table raises Unsupported, even for padding: give padding tokens position 0. (A compiled graph
    cannot inspect the values; there torch's own index check applies.)

    Args:
        dim: width C of the embedding.
        max_length: number of positions.
        std: standard deviation of the initial table.
    """

    name = "learned"

    def __init__(self, *, dim: int, max_length: int | None, std: float = 0.02) -> None:
        super().__init__()
        if max_length is None:
            raise Unsupported(
                "learned positions without max_length",
                supported="max_length=<number of positions>",
                nearest="sinusoidal",
            )
        at_least("dim", dim, 1)
        at_least("max_length", max_length, 1)
        at_least("std", std, 0.0)
        self.max_length, self.std = max_length, std
        self.table = nn.Parameter(torch.empty(max_length, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=self.std)

    def embed(self, x: Float[Tensor, "b n c"], positions: Int[Tensor, "#b n"]) -> Float[Tensor, "b n c"]:
        """Add the vectors of the positions to `x`, in the dtype of `x`."""
        check_positions(positions, x.shape[0], x.shape[1])
        if x.shape[-1] != self.table.shape[1]:
            raise Unsupported(f"learned positions on a width of {x.shape[-1]}", supported=f"dim={self.table.shape[1]}")
        if not torch.compiler.is_compiling() and positions.numel():
            first, last = (int(p) for p in positions.aminmax())
            if first < 0 or last >= self.max_length:
                raise Unsupported(
                    f"position {last if first >= 0 else first} of a learned table",
                    supported=f"0 to max_length - 1 = {self.max_length - 1}",
                    nearest=f"max_length={last + 1} or a table extended to it, or sinusoidal or rotary positions"
                    if first >= 0
                    else "position 0",
                )
        return x + nn.functional.embedding(positions, self.table).to(x.dtype)

    def check_extension(self, length: int, how: str) -> None:
        """Raise Unsupported for arguments that :meth:`extend` does not accept."""
        one_of("how", how, ("tile", "interpolate"))
        if length <= self.max_length:
            raise Unsupported(
                f"a table of {self.max_length} positions extended to {length}", supported="a greater length"
            )

    def extend(self, length: int, how: str = "tile") -> None:
        """Lengthen the table, for inputs longer than those of training.

        Args:
            length: new number of positions, above `max_length`.
            how: ``tile`` repeats the table, so that the old positions keep their vectors; ``interpolate`` stretches the
                table linearly from its first row to its last, so that positions keep their order.

        The table is a new parameter, with the old one's requires_grad and weight decay: rebuild the optimizer.

        Raises:
            Unsupported: for an unknown `how`, or a length that is not greater.
        """
        self.check_extension(length, how)
        old = self.table.detach()
        if how == "tile":
            rows = old[torch.arange(length, device=old.device) % self.max_length]
        else:
            rows = stretched(old, length)
        table = nn.Parameter(rows, requires_grad=self.table.requires_grad)
        if getattr(self.table, "_no_weight_decay", False):
            table._no_weight_decay = True  # type: ignore[attr-defined]
        self.table, self.max_length = table, length

    def extra_repr(self) -> str:
        return f"max_length={self.max_length}, dim={self.table.shape[1]}"


def stretched(table: Float[Tensor, "n c"], length: int) -> Float[Tensor, "length c"]:
    """A table of positions with another number of rows, linearly interpolated from its first to its last."""
    found = nn.functional.interpolate(wide(table).T[None], size=length, mode="linear", align_corners=True)
    return found[0].T.contiguous().to(table.dtype)
