"""The one exception for what cannot be honoured, and checks of options that raise it."""

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
        nearest: the nearest alternative, ready to use.
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
        """Its parts, of which it is made again in another process."""
        return _unsupported, (type(self), self.asked, self.supported, self.nearest)


def _unsupported(kind: type[Unsupported], asked: str, supported: str, nearest: str) -> Unsupported:
    return kind(asked, supported=supported, nearest=nearest)


def closest(word: str, choices: Iterable[str]) -> str:
    """The choice spelled most like `word`, or ``""`` when none is close.

    Close are spellings that share three fifths of their letters, in order, and names that begin with the same word or
    hold all words of `word`. Fewer letters in common are common by chance. Capitals and small letters are the same.
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
    """Raise Unsupported for a name that is no option of a config class; `of` says in words whose it would be."""
    names = [f.name for f in dataclasses.fields(config)]
    for name in given:
        if name not in names:
            raise Unsupported(f"option {name!r} of {of}", supported=", ".join(names), nearest=closest(name, names))


def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Check an option in a Config's ``__post_init__``."""
    accepted = list(choices)
    if value not in accepted:
        raise Unsupported(
            f"{name}={value!r}",
            supported=", ".join(map(str, accepted)),
            nearest=closest(str(value), map(str, accepted)),
        )


def at_least(name: str, value: float, low: float) -> None:
    """Check an option in a Config's ``__post_init__``."""
    try:
        enough = value >= low  # NaN is neither
    except TypeError:
        enough = False
    if not enough:
        raise Unsupported(f"{name}={value}", supported=f"{name} >= {low}", nearest=f"{name}={low}")


NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed", "out of memory")
"""What torch, CUDA and the native library say."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was too little memory, on whatever device."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    )


def an_instance(value: object) -> str:
    """The type of a value with its article, as "an Encoder"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def spelled(options: Mapping[str, Any]) -> str:
    """Options as a call has them."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
