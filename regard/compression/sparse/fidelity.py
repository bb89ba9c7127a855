"""How near a selection is to dense attention, before any task is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.compression.sparse.scores import last_weights

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from regard.compression.sparse.selection import Selection


def kept_mass(q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], selection: Selection, scale: float) -> float:
    """The dense weights on the selected pairs, a mean over queries: 1 where nothing that matters is left out. Takes the whole
    matrix of weights."""
    weights = last_weights(q, k, k.shape[2], scale)
    return float((weights * selection.mask()).sum(-1).mean())


def relative_error(output: Tensor, dense: Tensor) -> float:
    """The norm of what is wrong over that of what would be right."""
    return float((output - dense).norm() / dense.norm())
