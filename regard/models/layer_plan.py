"""The plan of a model: the mechanism of each layer, with its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regard.catalogue import get_mechanism, resolve
from regard.contract import Kind, Mechanism, Pattern, Unsupported
from regard.layers.options import shell_options
from regard.models.variants import read_variant

Plan = tuple[tuple[str, Mapping[str, Any]], ...]
"""Mechanism and options of each layer."""


def keeps_state(*plans: Plan) -> bool:
    """Whether every mechanism of these plans can continue a sequence from a state, as a user's module cannot."""
    return all(resolve(name)[0].state is not None for plan in plans for name, _ in plan)


def read_plan(plan: str | Sequence[Any], num_layers: int | None) -> Plan:
    """Read the plan of a model: one (name, options) for each layer.

    Args:
        plan: a mechanism for all layers or a pattern of several, as :func:`regard.models.variants.read_variant` reads
            it, or a list with such a string or a (name, options) for each layer.
        num_layers: number of layers: how often to repeat a single name (4 when None), a multiple of a pattern's length,
            or a list's length.

    Raises:
        Unsupported: for an entry of another form, an unknown name, or a length that does not fit.
    """
    entries: list[Any]
    if isinstance(plan, str):
        variant = read_variant(plan)
        repeated = 4 if len(variant.layers) == 1 else len(variant.layers)
        entries = list(variant.plan(repeated if num_layers is None else num_layers))
    elif not isinstance(plan, Sequence):
        raise Unsupported(f"plan={plan!r}", supported="a mechanism, or a list with one (and options) for each layer")
    else:
        entries = [
            part for entry in plan for part in (read_variant(entry).layers if isinstance(entry, str) else [entry])
        ]
    if not entries or (num_layers is not None and len(entries) != num_layers):
        raise Unsupported(
            f"a plan of {len(entries)} layers with num_layers={num_layers}",
            supported="one name for all layers, or as many entries as layers (at least one)",
            nearest=f"num_layers={max(len(entries), 1)}",
        )
    layers = []
    for entry in entries:
        name, options = _read_entry(entry)
        card, options = resolve(name, options)
        stands_alone = name in card.aliases and name not in card.alias_options
        name, kind = name if stands_alone else card.name, card.kind
        if kind in (Kind.POOLING, Kind.PROJECTION):
            elsewhere = {
                Kind.PROJECTION: f'("softmax", {{"linear": "{name}"}})',
                Kind.POOLING: f'EncoderConfig(pool="{name}")',
            }
            raise Unsupported(
                f"{name}, a {kind.value}, as a layer of a model",
                supported="kinds attention, mixer and wrapper",
                nearest=elsewhere[kind],
            )
        layers.append((name, dict(options)))
    return tuple(layers)


def _read_entry(entry: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(entry, Sequence) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], Mapping):
        return entry[0], entry[1]
    raise Unsupported(f"plan entry {entry!r}", supported='"name" or ("name", {"option": value})')


def check_plan(plan: Plan, pattern: Pattern, where: str) -> None:
    """Raise Unsupported if a mechanism of the plan lacks the pattern or inserts tokens; `where` goes into the error."""
    for name, options in plan:
        for card in (get_mechanism(name), mixing_card(name, options)):
            card.require_pattern(pattern)
            if card.prepare is not None:
                raise Unsupported(f"{card.name}, which inserts tokens, in {where}", supported="language models")


def mixing_card(name: str, options: Mapping[str, Any]) -> Mechanism:
    """Return the card that decides about positions: a wrapper's inner mechanism if its options name one."""
    card = get_mechanism(name)
    return resolve(options["mechanism"])[0] if card.kind is Kind.WRAPPER and "mechanism" in options else card


def layer_accepts(card: Mechanism, option: str) -> bool:
    """Return whether the mechanism's layer has an option of the attention shell (its own module may not)."""
    return card.module is None or option in shell_options(card.module)
