"""How close a selection is to dense attention, without running any task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.compression.sparse.scores import last_weights

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from regard.compression.sparse.selection import Selection


def kept_mass(q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], selection: Selection, scale: float) -> float:
    """The dense attention weight on the selected pairs, averaged over queries: 1 if nothing that matters is left out.
    Computes the full matrix of weights."""
    weights = last_weights(q, k, k.shape[2], scale)
    return float((weights * selection.mask()).sum(-1).mean())


def relative_error(output: Tensor, dense: Tensor) -> float:
    """The norm of the error relative to the norm of the dense output."""
    return float((output - dense).norm() / dense.norm())
