"""Options written after a name, ``name:option=value,option=value``: their parsing, and its inverse."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from regard.contract.errors import Unsupported

_SIGNS = r"[,\[\]{}]"
"""What :func:`split_list` looks at, escaped where it is part of a word."""


def read_options(text: str, name: str, before: str | None = None) -> dict[str, Any]:
    """Parse the options ``option=value,option=value`` of `name`; errors show them after `before` (``name:`` when None).

    Values are JSON, whose numbers may also begin or end with the point (``.7``, ``7.``); anything else is a string.

    Raises:
        Unsupported: for a part without a value.
    """
    before = f"{name}:" if before is None else before
    options = {}
    for part in filter(None, split_list(text)):
        key, equals, value = part.partition("=")
        if not equals:
            raise Unsupported(
                f"option {part!r} of {name}", supported=f"{before}option=value,option=value", nearest=f"{before}{key}=1"
            )
        options[key.strip()] = _literal(value.strip())
    return options


def written_options(name: str, options: Mapping[str, Any]) -> str:
    """Write ``name:option=value,option=value`` such that :func:`read_options` reads the same options.

    Args:
        options: JSON-compatible values.
    """
    said = ",".join(f"{option}={_word(value)}" for option, value in options.items())
    return f"{name}:{said}" if said else name


def split_list(text: str) -> list[str]:
    """Split a string at the commas that are outside brackets, which may be nested."""
    depth, parts = 0, [""]
    for sign in text:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _word(value: Any) -> str:
    plain = isinstance(value, str) and value != "" and value == value.strip() and not re.search(_SIGNS, value)
    if plain and _literal(value) == value:
        return value
    word = json.dumps(value, separators=(",", ":"), default=str)
    return re.sub(
        r'"(?:[^"\\]|\\.)*"', lambda said: re.sub(_SIGNS, lambda sign: f"\\u{ord(sign[0]):04x}", said[0]), word
    )


def _literal(text: str) -> Any:
    words = {"True": "true", "False": "false", "None": "null"}
    pointed = re.sub(r"(?<!\d)\.(?=\d)", "0.", re.sub(r"(?<=\d)\.(?!\d)", ".0", text))
    for spelling in (words.get(text, text), pointed):
        with suppress(json.JSONDecodeError):
            return json.loads(spelling)
    return text
