"""What a model's last calls left, kept apart for each thread."""

from __future__ import annotations

import threading
from typing import Any


class PerThread:
    """A base class whose `_run` has attributes of each thread's own; copies and pickles are made without them."""

    def __init__(self) -> None:
        self._run = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        """All but what the last calls left."""
        return {name: value for name, value in self.__dict__.items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._run = threading.local()
