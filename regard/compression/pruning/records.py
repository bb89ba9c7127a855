"""What is left of each layer of a model, where the model's own config cannot express it.

:func:`structure` returns a record of the sizes; :func:`restore` recreates them before the weights are loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from regard.compression.pruning.anatomy import Cut, Layer, Undo, find_host, left
from regard.contract import Unsupported
from regard.integrations.conv1d import replace_conv1d

RECORD = "_regard_structure"
"""Attribute of models that their config cannot describe: the record that :func:`structure` returns."""


def check_whole(model: nn.Module) -> None:
    """Raise Unsupported for a model that has such a record."""
    if hasattr(model, RECORD):
        raise Unsupported("a model that is pruned already", supported="a model as it was", nearest="undo()")


def note(model: Any, entries: Sequence[Mapping[str, Any]], hidden: int | None = None) -> Undo:
    """Attach a record of its layers to a model, each entry as from :func:`entry_of`, and of its narrower stream."""
    setattr(model, RECORD, {"layers": list(entries)} | ({} if hidden is None else {"hidden": hidden}))
    return lambda: delattr(model, RECORD)


def structure(model: nn.Module) -> dict[str, Any] | None:
    """The record of what is left of each layer, if the config does not describe it; None for other models."""
    return getattr(model, RECORD, None)


def restore(model: nn.Module, record: Mapping[str, Any], *, source: str) -> None:
    """Give a model built from its config the sizes of `record`; its weights are loaded afterwards.

    Args:
        model: one of transformers within :func:`regard.integrations.conv1d.conv1d_as_linear`.
        source: where the record comes from, for error messages.

    Raises:
        Unsupported: for a record that does not belong to the model.
    """
    host = find_host(model)
    entries = record.get("layers")
    if not isinstance(entries, list) or len(entries) != len(host.layers):
        raise Unsupported(f"{source}, whose layers are not those of the model", supported="the model that was pruned")
    cuts = []
    for layer, entry in zip(host.layers, entries, strict=True):
        if not isinstance(entry, Mapping) or set(entry) != {f.name for f in fields(Entry)}:
            raise Unsupported(f"{source}, in which a layer is {entry!r}", supported="a record of `regard compress`")
        found = Entry(**entry)
        cuts.append(
            Cut(
                attention=not found.attention,
                feed_forward=not found.feed_forward,
                heads=tuple(range(found.units, layer.units)),
                neurons=tuple(range(found.neurons, layer.neurons)),
                hard=found.hard,
            )
        )
    hidden, gone = record.get("hidden"), range(0)
    if hidden is not None:
        width = host.stream().width
        if not isinstance(hidden, int) or not 0 < hidden < width:
            raise Unsupported(f"{source}, in which the hidden width is {hidden!r}", supported=f"1 to {width - 1}")
        gone = range(hidden, width)
    host.compact(cuts, gone)


def why_not_built(model: Any) -> str | None:
    """Why the weights of a transformers model cannot be loaded into the one that its config and record describe; None
    if they can."""
    from transformers.initialization import no_init_weights

    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), no_init_weights():
            built = type(model)(copy.deepcopy(model.config))
            replace_conv1d(built)
            if (record := structure(model)) is not None:
                restore(built, record, source="the record")
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        return f"its config describes no model ({str(error).strip() or type(error).__name__})"
    shapes = {name: parameter.shape for name, parameter in built.named_parameters()}
    own = {name: parameter.shape for name, parameter in model.named_parameters()}
    other = next((name for name, shape in own.items() if shapes.get(name, shape) != shape), None)
    return None if other is None else f"its config describes another size of {other}"


@dataclass(frozen=True)
class Entry:
    """What is left of a layer, in the record of :func:`structure`."""

    attention: bool
    feed_forward: bool
    units: int
    neurons: int
    hard: int | None


def entry_of(cut: Cut, layer: Layer) -> dict[str, Any]:
    """The entry for what a settled cut leaves of a layer."""
    return {
        "attention": not cut.attention,
        "feed_forward": not cut.feed_forward,
        "units": len(left(layer.units, cut.heads)[0]),
        "neurons": len(left(layer.neurons, cut.neurons)[0]),
        "hard": cut.hard,
    }
