"""Checkpoints as their authors saved them: the weights inside, under plain names, and what does not fit a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from regard.contract import Unsupported, an_instance

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What `DistributedDataParallel`, `torch.compile` and Lightning put before every name."""


def load_released(network: Any, checkpoint: Any) -> None:
    """Load a checkpoint into a network that has a `config` and whose class can `translate` names, all of it and nothing else.

    Raises:
        Unsupported: where names or shapes do not fit; nothing is changed then.
    """
    weights = weights_of(checkpoint)
    try:
        weights = network.translate(weights, network.config)
    except (
        IndexError,
        KeyError,
        RuntimeError,
        ValueError,
    ) as error:  # the same names mean something else there, as parts of another shape
        name = type(network).__name__
        raise Unsupported(
            f"weights of another network than a {name} ({error})", supported=f"weights of a {name}"
        ) from error
    check_fit(network, weights)
    network.load_state_dict(weights)


def weights_of(checkpoint: Any) -> dict[str, Tensor]:
    """The weights of a checkpoint: of a state dict itself, or of the only state dict among its entries.

    Raises:
        Unsupported: for anything else, and for a checkpoint of several, such as weights beside their moving average.
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


def check_fit(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise Unsupported for weights of other names or shapes than the network's; nearest is another number of classes where
    only that differs."""
    own = network.state_dict()
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
    classes = getattr(network, "num_classes", None)  # backbones have one, with a head that can be another
    heads = all(name.startswith(("head.", "distillation_head.")) for name in missing | unknown | other)
    head = weights.get("head.weight")
    theirs = len(head) if head is not None and head.ndim else 0
    raise Unsupported(
        f"weights {'; '.join(wrong)} for this {type(network).__name__}",
        supported="the weights of a model of the same size, classes and channels",
        nearest=""
        if classes is None or not heads or classes == theirs
        else f"num_classes={theirs}, and reset_classifier({classes}) after loading",
    )


def _is_state(entry: Any) -> bool:
    return isinstance(entry, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in entry.items())


def _some(word: str, names: Iterable[str]) -> list[str]:
    """The first of the names, and how many others there are."""
    first, *others = sorted(names) or [""]
    more = f" and {len(others)} other{'s' if len(others) > 1 else ''}" if others else ""
    return [f"{word}{first}{more}"] if first else []
