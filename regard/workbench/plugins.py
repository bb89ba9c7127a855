"""Plugins, as `--plugin` takes them: files that define mechanisms, tasks or models, and torch modules of a user's file."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regard.catalogue import load_plugin
from regard.contract import Unsupported


@dataclass(frozen=True)
class Entered:
    """What plugins added to this process.

    Attributes:
        files: the plugins as they were given, with absolute paths.
        mechanisms: names of the mechanisms.
        tasks: the tasks, or their classes.
    """

    files: list[str] = field(default_factory=list)
    mechanisms: list[str] = field(default_factory=list)
    tasks: list[Any] = field(default_factory=list)


def enter_plugins(given: Iterable[str | Path] | None) -> Entered:
    """Add what plugins define to the catalogue and the registry of models of this process.

    Args:
        given: ``file.py``, which defines a MECHANISM, a TASK or a MODEL, or ``file.py:Class``, a torch module, which
            enters with the patterns that it is found to have (:func:`regard.workbench.detection.adopted.adopt`).

    Raises:
        Unsupported: as for :func:`regard.load_plugin` and `adopt`, and for a MODEL that is not a pair of classes.
    """
    entered = Entered()
    for one in given or ():
        from regard.workbench.detection.adopted import adopt  # imported only if there are plugins
        from regard.workbench.detection.suspects import FILE

        entered.files.append(str(Path(one).absolute()))
        module = FILE.fullmatch(str(one))
        if module is not None and module["name"]:
            entered.mechanisms.append(adopt(module["path"], module["name"]).name)
            continue
        found = load_plugin(one)
        if hasattr(found, "MECHANISM"):
            entered.mechanisms.append(found.MECHANISM.name)
        if hasattr(found, "TASK"):
            entered.tasks.append(found.TASK)
        if hasattr(found, "MODEL"):
            _register_model(found.MODEL, one)
    return entered


def _register_model(pair: Any, file: str | Path) -> None:
    from regard.models import register_model

    if not isinstance(pair, tuple) or [isinstance(part, type) for part in pair] != [True, True]:
        raise Unsupported(
            f"MODEL of type {type(pair).__name__} in {file}",
            supported="MODEL = (the model's class, its config's class)",
        )
    register_model(*pair)


def plugin_words(files: Iterable[str]) -> str:
    """The arguments by which a command takes these plugins, with a space before each."""
    return "".join(f" --plugin {shlex.quote(file)}" for file in files)
