"""Feature maps phi of linear attention and its relatives, by name."""

from __future__ import annotations

from regard.backends.torch.feature_maps import FEATURE_MAPS, NONNEGATIVE

__all__ = ["FEATURE_MAPS", "NONNEGATIVE"]
