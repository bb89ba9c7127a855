"""The terminal, and functions that many commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from regard.catalogue import load_plugin
from regard.contract import Unsupported

console = Console()
errors = Console(stderr=True)


def load_plugins(plugins: list[Path] | None) -> list[Any]:
    """Run plugin files; what they define is then in the catalogue and the registry of models."""
    modules = [load_plugin(path) for path in plugins or ()]
    for module in modules:
        pair = getattr(module, "MODEL", None)
        if pair is not None:
            if not isinstance(pair, tuple) or [isinstance(part, type) for part in pair] != [True, True]:
                raise Unsupported(
                    f"MODEL of type {type(pair).__name__} in {module.__file__}",
                    supported="MODEL = (the model's class, its config's class)",
                )
            from regard.models import register_model

            register_model(*pair)
    return modules


def plain(text: str) -> Text:
    """Text from a user's files, with its control characters made harmless to the terminal."""
    from regard.tasks.documents import printable

    return Text("\n".join(printable(line) for line in text.split("\n")))


def emit(value: Any) -> None:
    """Print a value as JSON. Infinite numbers and NaN, which JSON lacks, become null."""
    from regard.measurement.store import plain_values

    print(json.dumps(plain_values(value), indent=2, ensure_ascii=False, allow_nan=False, default=str))
