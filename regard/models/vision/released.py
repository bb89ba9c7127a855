"""Loading of checkpoints as their authors saved them: finding the weights, cleaning their names, checking the fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Unsupported, an_instance

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
"""Prefixes that `DistributedDataParallel`, `torch.compile`, Lightning and `regard train` add to every name."""
HEADS = ("head.", "heads.", "distillation_head.")
"""Prefixes of the layers that make logits."""


def load_released(network: Any, checkpoint: Any) -> None:
    """Load a checkpoint into a network that has a `config` and can `translate` names; names must match exactly.

    Raises:
        Unsupported: if names or shapes do not fit; the network is then left unchanged.
    """
    weights = _translated(network, network.translate, checkpoint)
    check_fit(network, weights)
    network.load_state_dict(weights)


def load_encoder(network: Any, checkpoint: Any) -> None:
    """Load the encoder's weights in a checkpoint into a network that has `encoder_parts` and can `translate_encoder`
    names; the names of the encoder must match exactly.

    Raises:
        Unsupported: if names or shapes do not fit; the network is then left unchanged.
    """
    found = _translated(network, network.translate_encoder, checkpoint)
    weights = {name: value for name, value in found.items() if name.startswith(network.encoder_parts)}
    check_fit(network, weights, network.encoder_parts)
    network.load_state_dict(weights, strict=False)


def _translated(network: Any, translate: Callable[..., dict[str, Tensor]], checkpoint: Any) -> dict[str, Tensor]:
    """Return a checkpoint's weights under the network's names."""
    weights = weights_of(checkpoint)
    try:
        return translate(weights, network.config)
    except (
        IndexError,
        KeyError,
        RuntimeError,
        ValueError,
    ) as error:  # the same names mean something else in the checkpoint, such as tensors of another shape
        name = type(network).__name__
        raise Unsupported(
            f"weights that do not belong to a {name} ({error})", supported=f"weights of a {name}"
        ) from error


def weights_of(checkpoint: Any) -> dict[str, Tensor]:
    """Return the weights of a checkpoint: a state dict itself, or the only state dict among its entries.

    Raises:
        Unsupported: for anything else, and for a checkpoint with several, such as weights and their moving average.
    """
    if not isinstance(checkpoint, Mapping):
        nearest = "its state_dict()" if isinstance(checkpoint, nn.Module) else "torch.load(path, weights_only=True)"
        raise Unsupported(f"weights as {an_instance(checkpoint)}", supported="a state dict", nearest=nearest)
    state: Mapping[Any, Any] = checkpoint
    if not _is_state(checkpoint):
        states = [str(name) for name, entry in checkpoint.items() if _is_state(entry) and entry]
        if len(states) != 1:
            entries = ", ".join(map(str, list(checkpoint)[:6]))
            raise Unsupported(
                f"a checkpoint of {len(states)} state dicts: {', '.join(states)}"
                if states
                else f"a checkpoint without a state dict, of {entries}",
                supported="a state dict, whose values are all tensors, or a checkpoint with one",
                nearest=f"checkpoint[{states[0]!r}]" if states else "",
            )
        state = checkpoint[states[0]]
    while state and (prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None)):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def check_fit(network: nn.Module, weights: Mapping[str, Tensor], parts: tuple[str, ...] = ("",)) -> None:
    """Raise Unsupported for weights whose names or shapes differ from the network's.

    The error suggests the number of classes, and the options that the weights were made with, where these explain it.

    Args:
        parts: prefixes of the network's names that the weights are for, by default all.
    """
    own = {name: value for name, value in network.state_dict().items() if name.startswith(parts)}
    missing, unknown = own.keys() - weights.keys(), weights.keys() - own.keys()
    other = {name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape}
    if not (missing or unknown or other):
        return
    shapes = {name: f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}" for name in other}
    wrong = [
        *_some("without ", missing),
        *_some("with ", unknown),
        *_some("", shapes.values()),
    ]
    whole = parts == ("",)
    classes = getattr(network, "num_classes", None)  # networks have it if their head can be replaced
    heads = all(name.startswith(HEADS) for name in missing | unknown | other)
    told = {} if heads or not whole else _options_told(network, weights)
    head = weights.get("head.weight", weights.get("heads.0.weight"))
    theirs = len(head) if head is not None and head.ndim else 0
    raise Unsupported(
        f"weights {'; '.join(wrong)} for {'' if whole else 'the encoder of '}this {type(network).__name__}",
        supported=f"the weights of {'a model of the same size, classes' if whole else 'an encoder of the same size'} and channels",
        nearest=_way_to_load(told, theirs, classes) if heads or told else "",
    )


def _options_told(network: Any, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the options to change in a network's config for weights of other parts, if it then has their names and
    shapes, apart from tables of positions, which loading resizes, and heads."""
    told = network.options_told(weights) if hasattr(network, "options_told") else {}
    told = {name: value for name, value in told.items() if getattr(network.config, name) != value}
    if not told:
        return {}
    try:
        with torch.device("meta"):
            other = type(network)(replace(network.config, **told)).state_dict()
    except Unsupported:  # options of this network do not go together with those of the weights
        return {}
    shapes, wanted = (
        {name: "positions" in name or value.shape for name, value in each.items() if not name.startswith(HEADS)}
        for each in (weights, other)
    )
    return told if shapes == wanted else {}


def _way_to_load(told: Mapping[str, Any], theirs: int, classes: int | None) -> str:
    """Return what to try for weights of `theirs` classes, made with options that a network of `classes` does not have."""
    options = {**told, **({} if classes in (None, theirs) else {"num_classes": theirs})}
    after = f", and reset_classifier({classes}) after loading" if "num_classes" in options else ""
    return (
        "another model, with " * bool(told) + ", ".join(f"{name}={value!r}" for name, value in options.items()) + after
    )


def _is_state(entry: Any) -> bool:
    return isinstance(entry, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in entry.items())


def _some(word: str, names: Iterable[str]) -> list[str]:
    """Return the first of the names and the number of others, as a phrase."""
    first, *others = sorted(names) or [""]
    more = f" and {len(others)} other{'s' if len(others) > 1 else ''}" if others else ""
    return [f"{word}{first}{more}"] if first else []
