"""Type checks of options against their annotations."""

from __future__ import annotations

import functools
import numbers
import types
import typing
from collections.abc import Collection, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.contract.errors import Unsupported, an_instance


class Types:
    """Types of options by name, taken from annotations."""

    def __init__(self, hints: Mapping[str, Any]) -> None:
        self.hints = hints
        self.exact = {name: frozenset(_exact(hint)) for name, hint in hints.items()}

    def check(self, owner: str, options: Mapping[str, Any]) -> None:
        """Raise Unsupported for an option of the wrong type. Skips options without a type; no-op while compiling."""
        if torch.compiler.is_compiling():
            return
        for name, value in options.items():
            exact = self.exact.get(name)
            if exact is None or type(value) in exact or _fits(value, self.hints[name]):
                continue
            what = f"{name}={value!r}" if isinstance(value, str | int | float) else f"{name} of {type(value).__name__}"
            raise Unsupported(f"{what} of {owner}", supported=_type_name(self.hints[name]))


@functools.cache
def types_of(annotated: Any) -> Types:
    """The type annotations of a class or of a function's parameters."""
    try:
        return Types(typing.get_type_hints(annotated))
    except (NameError, AttributeError):  # names imported for type checkers only
        return Types({})


def check_types(config: Any) -> None:
    """Raise Unsupported if a field of the dataclass `config` does not have its annotated type."""
    kind: Any = type(config)
    types_of(kind).check(an_instance(config), vars(config))


def _exact(hint: Any) -> set[type]:
    """Built-in types all of whose values fit the annotation, so that no closer check is needed."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*map(_exact, typing.get_args(hint)))
    if hint in (Set, Collection):
        return {set, frozenset}
    return {float, int} if hint is float else {hint} & {int, bool, str, type(None), Tensor}


NUMBERS: Mapping[Any, tuple[type, ...]] = {
    bool: (bool, np.bool_),
    int: (numbers.Integral, torch.SymInt),
    float: (numbers.Real, torch.SymInt, torch.SymFloat),
}
"""Types accepted where a number type is annotated."""


def _fits(value: Any, hint: Any) -> bool:
    arms, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arm) for arm in arms)
    if origin is tuple and isinstance(value, tuple | list):
        if arms[1:] == (...,):
            return all(_fits(item, arms[0]) for item in value)
        return len(value) == len(arms) and all(map(_fits, value, arms))
    if hint is Any:
        return True
    if hint in NUMBERS:
        return isinstance(value, NUMBERS[hint]) and (hint is bool or not isinstance(value, bool | np.bool_))
    expected = origin or hint
    return not isinstance(expected, type) or isinstance(value, expected)


def _type_name(hint: Any) -> str:
    arms, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type_name, arms))
    if origin is tuple and arms[1:] == (...,):
        return f"a tuple of {_type_name(arms[0])}"
    if origin is tuple:
        return f"({', '.join(map(_type_name, arms))})"
    return "None" if hint is type(None) else getattr(origin or hint, "__name__", str(hint))
