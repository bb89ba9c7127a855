"""JSON, TOML and YAML that users write: variants, recipes, device tables, machines."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from regard.contract import Unsupported


def read_data(path: Path, what: str) -> Any:
    """The contents of a file, by its ending: ``.json``, ``.toml``, and YAML for every other.

    Args:
        what: the file in words, as an error begins with.

    Raises:
        Unsupported: for what cannot be read, and for YAML without PyYAML, which regard does not need otherwise.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if path.suffix == ".json":
            return json.loads(text)
    except (OSError, ValueError) as error:  # ValueError: of text, TOML and JSON alike
        raise _unreadable(what, error) from None
    try:
        import yaml
    except ImportError:
        raise Unsupported(f"{what} without PyYAML", supported="pip install pyyaml", nearest="a .json file") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _unreadable(what, error) from None


def _unreadable(what: str, error: Exception) -> Unsupported:
    said = " ".join(str(error).split())
    return Unsupported(f"{what}, which cannot be read ({said})", supported="valid JSON, TOML or YAML")
