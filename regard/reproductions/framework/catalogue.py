"""Finds the reproductions: the modules in the parent folder."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from pathlib import Path

from regard.catalogue import resolve
from regard.contract import Unsupported, closest
from regard.reproductions.framework.protocol import Reproduction

FOLDER = Path(__file__).parents[1]


@functools.cache
def list_reproductions() -> tuple[str, ...]:
    """Return the names of all reproductions, sorted."""
    return tuple(sorted(entry.name for entry in pkgutil.iter_modules([str(FOLDER)]) if not entry.ispkg))


def get_reproduction(name: str) -> Reproduction:
    """Return a reproduction by its name, or by the name or alias of a mechanism that it is about.

    Raises:
        Unsupported: for an unknown name.
    """
    names = list_reproductions()
    if name not in names:
        try:
            mechanism = resolve(name)[0].name
        except Unsupported:
            mechanism = name
        about = [n for n in names if mechanism in _load(n).mechanisms]
        if not about:
            raise Unsupported(
                f"reproduction {name!r}", supported=", ".join(("all", *names)), nearest=closest(name, names)
            )
        name = mechanism if mechanism in names else about[0]
    return _load(name)


def _load(name: str) -> Reproduction:
    return importlib.import_module(f"regard.reproductions.{name}").REPRODUCTION
