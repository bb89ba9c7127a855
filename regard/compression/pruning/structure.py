"""The recipe step that removes parts of a model for good."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard.compression.layers import Run
from regard.compression.pruning.anatomy import Cut, Host, Layer, Undo, find_host
from regard.compression.pruning.axformer import Trial, search
from regard.compression.pruning.checked import compact, note_fixed
from regard.compression.pruning.gates import learn_gates
from regard.compression.pruning.losses import Losses
from regard.compression.pruning.records import structure
from regard.compression.pruning.scores import choose
from regard.compression.pruning.steps import AxFormer, GateLearning, Structured
from regard.contract import Unsupported
from regard.core.files import write_text_atomically

TRIALS, GATES = "trials.json", "gates.safetensors"


def take_parts(
    model: nn.Module,
    step: Structured | AxFormer | GateLearning,
    batches: Sequence[Any],
    run: Run,
    losses: Losses,
    keep: Callable[[str, nn.Module], bool],
    on_trial: Callable[[str, int, int], None],
    work: Path | None = None,
) -> tuple[Undo, list[str]]:
    """Make a model smaller in place; return a function that undoes it, and sentences that say what was done.

    Args:
        keep: as in :func:`regard.compression.compress`, called for whole layers.
        work: folder where a search saves its trials, and learned gates their state, to resume from.
        on_trial: called with the name of each part that is tried, the number of finished trials, and their maximum.
    """
    host = find_host(model)
    kept = frozenset(i for i, layer in enumerate(host.layers) if keep(layer.name, layer.module))
    before = sum(parameter.numel() for parameter in model.parameters())
    if isinstance(step, GateLearning):
        if kept:
            raise Unsupported(
                "layers to keep while gates are learned for all", supported="keep with structured or axformer"
            )
        note_fixed(host)
        undo, cuts, notes = _by_gates(host, step, batches, run, losses, on_trial, work)
    elif isinstance(step, Structured):
        note_fixed(host, [part for part in ("heads", "neurons") if getattr(step, part)])
        cuts, notes = choose(host, step, batches, run, kept), []
        undo = compact(host, cuts)
    else:
        note_fixed(host)
        file = None if work is None else work / TRIALS
        known = [] if file is None or not file.is_file() else json.loads(file.read_text(encoding="utf-8"))

        def remember(trial: Trial) -> None:
            known.append(asdict(trial))
            if file is not None:
                write_text_atomically(file, json.dumps(known))

        found = search(
            host,
            step,
            batches,
            run=run,
            losses=losses,
            kept=kept,
            known=list(known),
            on_trial=on_trial,
            remember=remember,
        )
        cuts, notes = found.cuts, [str(found)]
        undo = compact(host, cuts)
    after = sum(parameter.numel() for parameter in model.parameters())
    said = [f"{after:,} of {before:,} parameters are left ({after / before:.1%})"]
    if structure(model) is not None:
        said.append("the model's own library cannot represent the pruned sizes: only regard can load the saved model")
    return undo, [
        *notes,
        *said,
        *(words(layer, cut) for layer, cut in zip(host.layers, cuts, strict=True) if cut != Cut()),
    ]


def _by_gates(
    host: Host,
    step: GateLearning,
    batches: Sequence[Any],
    run: Run,
    losses: Losses,
    on_step: Callable[[str, int, int], None],
    work: Path | None,
) -> tuple[Undo, list[Cut], list[str]]:
    """Learn gates, and cut what they close; return how to undo it, the cuts, and sentences on the result."""
    with torch.enable_grad():
        gates = learn_gates(
            host,
            lambda number: batches[number % len(batches)],
            step.share,
            step.steps,
            rate=step.learning_rate,
            run=run,
            losses=losses,
            hidden=step.hidden,
            file=None if work is None else work / GATES,
            on_step=lambda number, found: on_step("step", number + 1, step.steps),
        )
    cuts, gone = gates.cuts(), gates.closed()
    notes = [
        f"gates learned in {step.steps} steps on {len(batches)} batches: an expected share of "
        f"{float(gates.expected_share().detach()):.1%} of the branches' parameters"
    ]
    if step.hidden:
        width = host.stream().width
        notes.append(f"the residual stream has {width - len(gone)} of {width} dimensions left")
    return gates.finish(), cuts, notes


def words(layer: Layer, cut: Cut) -> str:
    """Describe what was removed from a layer."""
    cut = cut.settled(layer)
    parts = ["all of it"] if cut.layer else []
    if not cut.layer:
        parts += [name.replace("_", "-") for name in ("attention", "feed_forward") if getattr(cut, name)]
        parts += [f"{len(cut.heads)} of {layer.units} heads"] if cut.heads else []
        parts += [f"{len(cut.neurons)} of {layer.neurons} neurons"] if cut.neurons else []
    said = f"taken from {layer.name}: {', '.join(parts)}" if parts else layer.name
    return said + (f"; each query reads {cut.hard} keys" if cut.hard is not None else "")
