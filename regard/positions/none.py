"""No positions: for mechanisms whose order of computation already tells tokens apart (recurrences, causal masks)."""

from __future__ import annotations

from regard.positions.protocol import Positions


class NoPositions(Positions):
    """Acts nowhere."""

    name = "none"
