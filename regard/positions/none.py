"""No positions: for mechanisms that already distinguish the order of tokens (recurrences, causal masks)."""

from __future__ import annotations

from regard.positions.protocol import Positions


class NoPositions(Positions):
    """The scheme without positions, which does nothing."""

    name = "none"
