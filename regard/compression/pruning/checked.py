"""Cuts of models of transformers, checked: their layers may have more that belongs to a head, neuron or branch than
:mod:`regard.compression.pruning.foreign` knows, such as a norm over all heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.compression.layers import comes_from_transformers
from regard.compression.pruning.anatomy import BRANCHES, Cut, Host, Undo, check_cuts
from regard.compression.pruning.masks import masked
from regard.compression.pruning.records import why_not_built
from regard.contract import Unsupported, an_instance
from regard.models.evaluating import evaluation_mode

CLOSE = {torch.float64: 1e-3, torch.float32: 1e-3}
"""The largest difference between the masked and the compacted model, relative to the largest output; 0.1 for others."""

FAILURES = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""What transformers raises where sizes do not fit together."""


def compact(host: Host, cuts: Sequence[Cut], hidden: Sequence[int] = ()) -> Undo:
    """Make a model smaller, in place, also by dimensions of its stream; one of transformers must answer a few tokens as
    the masked model does, and have weights that fit its config.

    Raises:
        Unsupported: where it does not; the model is then as it was.
    """
    if not comes_from_transformers(host.model):
        return host.compact(cuts, hidden)
    check_cuts(host.layers, cuts)
    checked = why_not_built(host.model) is None
    expected = _answer(host, cuts, hidden)
    try:
        undo = host.compact(cuts, hidden)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise _refusal(host, cuts, hidden, _words(error)) from error
    why = why_not_built(host.model) if checked else None
    if why is None and expected is not None:
        why = _difference(host.model, expected)
    if why is not None:
        undo()
        raise _refusal(host, cuts, hidden, why)
    return undo


def note_fixed(host: Host, parts: Sequence[str] = ("heads", "neurons", *BRANCHES)) -> None:
    """Note at the layers of a transformers model which parts cannot be removed, as one of each in the first layer shows."""
    if not comes_from_transformers(host.model):
        return
    for part in parts:
        first = Cut(**{part: True if part in BRANCHES else (0,)})  # type: ignore[arg-type]
        try:
            compact(host, [first, *[Cut()] * (len(host.layers) - 1)])()
        except Unsupported as error:
            why = error.asked.partition(": ")[2] or error.asked
            host.layers = [replace(layer, fixed={part: why, **layer.fixed}) for layer in host.layers]


def _answer(host: Host, cuts: Sequence[Cut], hidden: Sequence[int]) -> Tensor | None:
    """Outputs of the masked model for a few tokens; None where it cannot run on tokens alone, or they are not finite."""
    try:
        with masked(host, cuts, hidden):
            found = _outputs(host.model)
    except FAILURES:
        return None
    return found if bool(found.isfinite().all()) else None


def _difference(model: Any, expected: Tensor) -> str | None:
    try:
        found = _outputs(model)
    except FAILURES as error:
        return _words(error)
    size = CLOSE.get(expected.dtype, 0.1) * expected.abs().max()
    if found.shape == expected.shape and bool((found - expected).abs().max() <= size):
        return None
    return "the smaller model computes something else"


@torch.no_grad()
def _outputs(model: Any) -> Tensor:
    table = model.get_input_embeddings().num_embeddings
    ids = ((torch.arange(16) + table // 2) % table).view(2, 8).to(model.device)
    with evaluation_mode(model):
        found: Tensor = model(ids)[0]
    return found


def _words(error: Exception) -> str:
    return f"what is left does not fit together ({(str(error).strip() or type(error).__name__).splitlines()[0][:120]})"


def _refusal(host: Host, cuts: Sequence[Cut], hidden: Sequence[int], why: str) -> Unsupported:
    parts = {
        "layers": any(cut.layer for cut in cuts),
        "attention": any(cut.attention for cut in cuts),
        "feed-forward networks": any(cut.feed_forward for cut in cuts),
        "heads": any(cut.heads for cut in cuts),
        "neurons": any(cut.neurons for cut in cuts),
        "dimensions of the stream": bool(hidden),
    }
    gone = [name for name, there in parts.items() if there] or ["keys"]
    return Unsupported(
        f"taking {' and '.join(gone)} out of {an_instance(host.model)}: {why}",
        supported="parts without which it runs and loads",
        nearest="" if parts["layers"] else "structured:layers=1",
    )
