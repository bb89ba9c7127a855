"""What a run leaves in its folder: a record of its settings and results, and the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from regard.catalogue import plugin_code
from regard.core.files import write_atomically, write_text_atomically
from regard.measurement import provenance
from regard.measurement.statistics import score_of_items
from regard.models import count_parameters, save_pretrained
from regard.tasks import Task
from regard.tasks.tokenizer import BpeTokenizer
from regard.training import Evaluation, History
from regard.version import VERSION
from regard.workbench.comparison.summary import by_tokens, thin
from regard.workbench.comparison.work import Work
from regard.workbench.trained.card import card
from regard.workbench.trained.folder import CARD, DIVERGED, FINISHED, TOKENIZER, TrainedModel, write_record


def described(work: Work, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Facts about a run that are known before its first step."""
    task, variant = work.task, work.settings.variants[name]
    tokenizer = getattr(task, "tokenizer", None)
    sizes = () if variant.backbone is not None else ("dim", "layers", "heads")
    own = {
        "frame": work.frame,
        "learning_rate": rate,
        "seed": seed,
        "batch_size": work.batch_size,
        "precision": work.settings.precision,
        "device": work.settings.device,
        "stack": work.settings.stack.changed or None,
        "first_item": work.search_items,
    }
    return {
        "regard": VERSION,
        "task": {
            "name": getattr(task, "registered", None) or task.name,
            "options": getattr(task, "origin", None),
            "data": work.identity["data"],
            "fitted": dict(getattr(task, "fitted", {})),
        },
        "described": task.describe(),
        "plugins": list(work.settings.plugins),
        "code": plugin_code(task, variant.record(), work.configs[name]),
        "mechanism": name,
        **variant.record(),
        **({} if variant.backbone is None else {"backbone": [variant.backbone[0], dict(variant.backbone[1])]}),
        "tokenizer": None if tokenizer is None else tokenizer.name,
        "reader": None if (reader := getattr(task, "reader", None)) is None else reader.as_record(),
        "settings": own | {key: work.identity[key] for key in ("length", *sizes, "parameters")},
    }


def outcome(work: Work, model: nn.Module, history: History, found: Evaluation | None) -> dict[str, Any]:
    """The results of a run; `found` is None if it diverged."""
    task, rule = work.task, work.baseline
    return {
        "state": DIVERGED if found is None else FINISHED,
        **ran(task, model, history),
        "score": None if found is None else found.score,
        "loss": None if found is None else found.loss,
        "figures": figures_of(found),
        "baseline": None if rule is None else {"name": rule.name, "score": rule.score},
        "machine": provenance.fingerprint()["cpu"],
    }


def figures_of(found: Evaluation | None) -> dict[str, list[float]]:
    """Figures that a task reports in addition to its score: mean over the held-out items and standard error."""
    return {} if found is None else {name: list(score_of_items(items)) for name, items in found.figures.items()}


def ran(task: Task, model: nn.Module, history: History) -> dict[str, Any]:
    """The metric, size, duration and loss curve of a run."""
    return {
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "parameters": count_parameters(model),
        "steps": len(history.curve),
        "tokens": history.tokens,
        "seconds": history.seconds,
        "curve": thin([[tokens, point.loss] for tokens, point in by_tokens(history)]),
    }


def keep(folder: Path, model: nn.Module, task: Task, record: Mapping[str, Any]) -> TrainedModel:
    """Write a model, or only the record if it diverged, into its folder. The record is written last."""
    if record["state"] == FINISHED:
        save_pretrained(model, folder)
        tokenizer = getattr(task, "tokenizer", None)
        if isinstance(tokenizer, BpeTokenizer):
            write_atomically(folder / TOKENIZER, tokenizer.save)
    write_text_atomically(folder / CARD, card(folder, record))
    write_record(folder, record)
    return TrainedModel(folder, record)
