"""The one place through which every projection is built.

A *kind* names a factory ``factory(in_features, out_features, *, bias, **options) -> nn.Module`` that maps the last axis
from `in_features` to `out_features`. ``dense`` is torch's own linear layer; whoever has other kinds registers them
(the catalogue its projection mechanisms), so that layers need not know them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from regard.contract import Unsupported, at_least, closest


def _dense(in_features: int, out_features: int, *, bias: bool) -> nn.Module:
    return nn.Linear(in_features, out_features, bias=bias)


FACTORIES: dict[str, Callable[..., nn.Module]] = {"dense": _dense}

SOURCES: list[Callable[[], None]] = []
"""Functions that register more kinds, called when all kinds, or one that is not registered, are asked for."""


def register_linear(kind: str, factory: Callable[..., nn.Module]) -> None:
    """Make projections of a kind available to :func:`make_linear`. The same kind and factory may be given again.

    Raises:
        Unsupported: when the kind belongs to another factory.
    """
    if FACTORIES.setdefault(kind, factory) is not factory:
        raise Unsupported(f"a second factory for linear kind {kind!r}", supported="one factory a kind")


def list_linears() -> list[str]:
    """Names of the kinds."""
    _register_all()
    return list(FACTORIES)


def _register_all() -> None:
    for register in SOURCES:
        register()


def make_linear(
    in_features: int, out_features: int, *, bias: bool = False, kind: str = "dense", **options: Any
) -> nn.Module:
    """A projection (..., in_features) -> (..., out_features).

    Args:
        in_features, out_features: widths.
        bias: whether it adds a learned vector; a factory that cannot refuses.
        kind: one of :func:`list_linears`.
        options: the kind's own.

    Raises:
        Unsupported: for an unknown kind or options that its factory does not take.
    """
    if kind not in FACTORIES:
        _register_all()
    if kind not in FACTORIES:
        raise Unsupported(
            f"linear kind {kind!r}", supported=", ".join(FACTORIES), nearest=closest(str(kind), FACTORIES) or "dense"
        )
    at_least("in_features", in_features, 1)
    at_least("out_features", out_features, 1)
    factory = FACTORIES[kind]
    parameters = inspect.signature(factory).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        own = [p for p in list(parameters)[2:] if p != "bias"]
        for option in options:
            if option not in own:
                raise Unsupported(
                    f"option {option!r} of linear kind {kind!r}",
                    supported=", ".join(own) or "no options",
                    nearest=closest(option, own),
                )
    return factory(in_features, out_features, bias=bias, **options)
