"""Create layers by name: the one place that turns a catalogue name into a module."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, cast, overload

from torch import nn

from regard.catalogue import get_mechanism, list_mechanisms, resolve
from regard.contract import Kind, Mechanism, Pattern, Types, Unsupported, at_least, closest
from regard.layers import linear
from regard.layers.attention import AttentionLayer
from regard.layers.base import Layer
from regard.layers.options import in_groups, shell_options, shell_types
from regard.layers.plain import PlainLayer
from regard.layers.projection import ProjectionLayer, projection_factory

SIZES = Types({"dim": int, "num_heads": int | None})


@overload
def create_layer(
    name: str,
    dim: int,
    num_heads: int | None = None,
    *,
    pattern: str | Pattern = Pattern.CAUSAL_SELF,
    plain: Literal[False] = False,
    **options: Any,
) -> Layer: ...
@overload
def create_layer(
    name: str,
    dim: int,
    num_heads: int | None = None,
    *,
    pattern: str | Pattern = Pattern.CAUSAL_SELF,
    plain: Literal[True],
    **options: Any,
) -> PlainLayer: ...
def create_layer(
    name: str,
    dim: int,
    num_heads: int | None = None,
    *,
    pattern: str | Pattern = Pattern.CAUSAL_SELF,
    plain: bool = False,
    **options: Any,
) -> Layer | PlainLayer:
    """Create a layer by the name of its mechanism.

    A layer returns a ``Result``: the state to continue from and the losses to add up come with the output, because they
    belong to the call and not to the module. Where modules pass only tensors on, as in ``nn.Sequential``,
    ``plain=True`` makes a layer that returns the output tensor. It is chosen at creation, so that a reader of the code
    knows what a call returns and no state or loss is lost by accident.

    Args:
        name: name or alias in the catalogue, optionally with options, as in ``local:window=32``; an alias may itself
            stand for options (:func:`regard.catalogue.resolve`).
        dim: width of the input.
        num_heads: number of heads; required by mechanisms that have heads.
        pattern: one of the mechanism's patterns.
        plain: see :class:`regard.layers.plain.PlainLayer`.
        options: options of the layer (head_dim, num_kv_heads, memory_dim, positions, dropout, ...: see
            :mod:`regard.layers.options`) and of the mechanism (its ``Config``).

    Returns:
        A module called as ``layer(x, memory=None, *, context=None, state=None)`` that returns a ``Result``; with
        `plain`, one called as ``layer(x, memory=None, *, context=None)`` that returns a tensor.

    Raises:
        Unsupported: for unknown names and options, or a pattern that the mechanism lacks.
    """
    card, options = resolve(name, options)
    layer = build_layer(card, dim, num_heads, pattern=pattern, **options)
    return PlainLayer(layer) if plain else layer


def build_layer(
    card: Mechanism,
    dim: int,
    num_heads: int | None = None,
    *,
    pattern: str | Pattern = Pattern.CAUSAL_SELF,
    **options: Any,
) -> Layer:
    """Like :func:`create_layer`, for a card that need not be in the catalogue."""
    wanted = card.require_pattern(pattern)
    own = [f.name for f in dataclasses.fields(card.config)]
    shell = _shell(card)
    of_shell = _shell_options(card)
    accepted = layer_options(card)
    for option in options:
        if option not in accepted:
            raise Unsupported(
                f"option {option!r} of {card.name}", supported=", ".join(accepted), nearest=closest(option, accepted)
            )
    what = f"a {card.name} layer"
    SIZES.check(what, {"dim": dim, "num_heads": num_heads})
    at_least("dim", dim, 1)
    config = card.options(**{n: v for n, v in options.items() if n in own})
    chosen = {n: v for n, v in card.layer_defaults.items() if n not in options and n in of_shell}
    chosen |= {n: v for n, v in options.items() if n in of_shell and n not in own}
    shell_types(shell).check(what, chosen)
    chosen = {"pattern": wanted, "config": config, **in_groups(shell, chosen)}
    if card.module is None and num_heads is None:
        raise Unsupported(f"{what} without num_heads", supported="num_heads >= 1", nearest="a divisor of dim")
    if card.kind is Kind.PROJECTION:
        return ProjectionLayer(card, dim, **chosen)
    if card.kind is Kind.WRAPPER:
        chosen["create"] = create_layer
    return cast(Layer, shell(card, dim, num_heads, **chosen))


def layer_options(card: Mechanism) -> list[str]:
    """Names of all options that the mechanism's layer takes: the layer's own and the mechanism's."""
    return sorted({*(f.name for f in dataclasses.fields(card.config)), *_shell_options(card)} - {"pattern"})


def _shell(card: Mechanism) -> type[nn.Module]:
    if card.module is None:
        return AttentionLayer
    return ProjectionLayer if card.kind is Kind.PROJECTION else card.module


def _shell_options(card: Mechanism) -> tuple[str, ...]:
    return tuple(n for n in shell_options(_shell(card)) if n not in ("card", "dim", "num_heads", "config", "create"))


def register_projections() -> None:
    """Register every projection mechanism as a kind of :func:`regard.layers.linear.make_linear`."""
    for name in list_mechanisms(kind=Kind.PROJECTION):
        if name not in linear.FACTORIES:
            card = get_mechanism(name)
            linear.register_linear(name, projection_factory(card), aliases=card.aliases)


linear.SOURCES.append(register_projections)
