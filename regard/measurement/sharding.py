"""Dividing work among processes that share a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from regard.contract import Unsupported

T = TypeVar("T")


def shard(cells: Sequence[T], text: str | None) -> list[T]:
    """Return share i of n of the cells for ``"i/n"``, with i from 1 to n; all cells when None.

    Raises:
        Unsupported: for a text of another form.
    """
    if text is None:
        return list(cells)
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise Unsupported(f"shard {text!r}", supported="i/n with i from 1 to n", nearest="1/2")
    return list(cells[int(first) - 1 :: int(second)])
