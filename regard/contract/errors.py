"""The one exception for unsupported requests, and the option checks that raise it."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any


class Unsupported(ValueError):
    """The one exception for a request that cannot be honoured: what is wrong, what is accepted, what to try.

    Args:
        asked: what was asked for.
        supported: what is accepted instead, in words.
        nearest: the closest supported alternative, ready to use.
    """

    def __init__(self, asked: str, *, supported: str = "", nearest: str = "") -> None:
        self.asked, self.supported, self.nearest = asked, supported, nearest
        parts = [f"not supported: {asked.rstrip('.')}"]
        if supported:
            parts.append(f"supported: {supported}")
        if nearest:
            parts.append(f"try {nearest}")
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the three parts of the message, from which another process rebuilds the exception."""
        return _unsupported, (type(self), self.asked, self.supported, self.nearest)


def _unsupported(kind: type[Unsupported], asked: str, supported: str, nearest: str) -> Unsupported:
    return kind(asked, supported=supported, nearest=nearest)


def closest(word: str, choices: Iterable[str]) -> str:
    """The choice whose spelling is closest to `word`, or ``""`` when none is close.

    A spelling is close if it shares three fifths of its letters with `word`, in order, or if it is a name that begins
    with the same word as `word` or contains all of its words. With fewer letters in common, matches would often be
    accidental. Case is ignored.
    """
    word, names = str(word).lower(), {name.lower(): name for name in choices}
    words = _words(word)
    alike = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    kin = [name for name in names if words and (_words(name)[:1] == words[:1] or set(words) <= set(_words(name)))]
    found = alike or difflib.get_close_matches(word, kin, n=1, cutoff=0.0)
    return names[found[0]] if found else ""


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.lower())


def check_options(config: type[Any], given: Iterable[str], of: str) -> None:
    """Raise Unsupported for a name that is not an option of a config class; `of` names the owner in the message."""
    names = [f.name for f in dataclasses.fields(config)]
    for name in given:
        if name not in names:
            raise Unsupported(f"option {name!r} of {of}", supported=", ".join(names), nearest=closest(name, names))


def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Check in a Config's ``__post_init__`` that an option is one of the choices."""
    accepted = list(choices)
    if value not in accepted:
        raise Unsupported(
            f"{name}={value!r}",
            supported=", ".join(map(str, accepted)),
            nearest=closest(str(value), map(str, accepted)),
        )


def at_least(name: str, value: float, low: float) -> None:
    """Check in a Config's ``__post_init__`` that an option is at least `low`."""
    try:
        enough = value >= low  # False for NaN
    except TypeError:
        enough = False
    if not enough:
        raise Unsupported(f"{name}={value}", supported=f"{name} >= {low}", nearest=f"{name}={low}")


NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed", "out of memory")
"""Phrases in the out-of-memory errors of torch, CUDA and the native library."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on any device."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    )


def an_instance(value: object) -> str:
    """The type name of a value with its article, such as "an Encoder"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def spelled(options: Mapping[str, Any]) -> str:
    """Options written as in a call: ``name=value, name=value``."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
