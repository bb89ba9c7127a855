"""The terminal, and functions that many commands share."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.text import Text

console = Console()
errors = Console(stderr=True)


def plain(text: str) -> Text:
    """Text from a user's files, with its control characters made harmless to the terminal."""
    from regard.tasks.documents import printable

    return Text("\n".join(printable(line) for line in text.split("\n")))


def emit(value: Any) -> None:
    """Print a value as JSON. Infinite numbers and NaN, which JSON lacks, become null."""
    from regard.measurement.store import plain_values

    print(json.dumps(plain_values(value), indent=2, ensure_ascii=False, allow_nan=False, default=str))
