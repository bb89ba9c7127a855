"""Reading JSON, TOML and YAML files written by users: variants, recipes, device tables, machines."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from regard.contract import Unsupported


def read_data(path: Path, what: str) -> Any:
    """Read a file, by its suffix: ``.json``, ``.toml``, and YAML for any other.

    Args:
        what: a description of the file, with which error messages begin.

    Raises:
        Unsupported: for a file that cannot be read, and for YAML without PyYAML, which regard does not otherwise need.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if path.suffix == ".json":
            return json.loads(text)
    except (OSError, ValueError) as error:  # ValueError: invalid UTF-8, TOML or JSON
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
