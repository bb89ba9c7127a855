"""Tasks: what a comparison trains on. `create_task` makes one by name; your own tasks derive from `Task`."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from regard.contract import Unsupported, closest
from regard.tasks.algorithmic import AlgorithmicTask
from regard.tasks.completion import CompletionTask
from regard.tasks.copying import CopyingTask
from regard.tasks.dataset import DatasetTask
from regard.tasks.document_classes import DocumentsTask
from regard.tasks.documents import Paths
from regard.tasks.events import EventsTask
from regard.tasks.forecast import ForecastTask
from regard.tasks.images import ImagesTask
from regard.tasks.in_context_functions import InContextFunctionsTask
from regard.tasks.listops import ListOpsTask
from regard.tasks.long_range import LongRangeTask
from regard.tasks.masked import MaskedTask
from regard.tasks.matching import MatchingTask
from regard.tasks.paraphrase import ParaphraseTask
from regard.tasks.pathfinder import PathfinderTask
from regard.tasks.pixels import PixelsTask
from regard.tasks.protocol import (
    IGNORED,
    Baseline,
    Batch,
    Objective,
    Scored,
    Task,
    absolute_error,
    accuracy,
    bits_per_byte,
    check_task,
    counter_generator,
    cross_entropy_by_item,
    mean_loss,
    register_objective,
    squared_error_by_item,
)
from regard.tasks.recall import RecallTask
from regard.tasks.replaced import ReplacedTask
from regard.tasks.segmentation import SegmentationTask
from regard.tasks.segmentation_3d import Segmentation3DTask
from regard.tasks.speech import SpeechTask
from regard.tasks.summarize import SummarizeTask
from regard.tasks.text import TextTask
from regard.tasks.time_series import TimeSeriesTask
from regard.tasks.upscale import UpscaleTask

_TASKS = (
    TextTask,
    MaskedTask,
    ReplacedTask,
    RecallTask,
    CopyingTask,
    ListOpsTask,
    PathfinderTask,
    LongRangeTask,
    AlgorithmicTask,
    InContextFunctionsTask,
    EventsTask,
    ImagesTask,
    PixelsTask,
    SegmentationTask,
    Segmentation3DTask,
    UpscaleTask,
    DocumentsTask,
    MatchingTask,
    ParaphraseTask,
    SummarizeTask,
    TimeSeriesTask,
    ForecastTask,
    CompletionTask,
    SpeechTask,
)
TASKS: dict[str, type[Task]] = {task.name: task for task in _TASKS}
"""The tasks by name; the docstring of each class describes its options and their ranges."""


def list_tasks() -> list[str]:
    """Names that :func:`create_task` accepts."""
    return list(TASKS)


def create_task(
    name: str,
    *,
    length: int | None = None,
    data: Paths | None = None,
    validation: Paths | None = None,
    tokenizer: str = "bytes",
    seed: int = 0,
    scored: Scored | None = None,
    **options: Any,
) -> Task:
    """Create a task by name. Nothing is downloaded.

    Args:
        name: one of :func:`list_tasks`.
        length: tokens per item; None for the task's default.
        data: what to read, for tasks that read data.
        validation: held-out data, given explicitly.
        tokenizer: tokenizer of the text task: ``bytes``, ``bpe:SIZE`` or a saved ``.json``.
        seed: seed of splits and held-out items; training has its own seed.
        scored: a trained model, if the task is made to score it on `validation`.
        **options: options of the task (see its class).

    Raises:
        Unsupported: for an unknown name or option, a value out of range, or data that cannot be used.
    """
    if name not in TASKS:
        raise Unsupported(f"task {name!r}", supported=", ".join(TASKS), nearest=closest(str(name), TASKS))
    accepted = inspect.signature(TASKS[name]).parameters
    given = {"length": length, "data": data, "validation": validation}
    given = {option: value for option, value in given.items() if value is not None} | options | {"seed": seed}
    if tokenizer != "bytes":
        given["tokenizer"] = tokenizer
    for option in given:
        if option not in accepted:
            raise Unsupported(
                f"option {option!r} of the task {name}",
                supported=", ".join(accepted),
                nearest=closest(option, accepted),
            )
        _check_kind(name, option, given[option], str(accepted[option].annotation))
    if not (scored is None or isinstance(scored, Scored)):
        raise Unsupported(f"scored={scored!r} of the task {name}", supported="a regard.tasks.Scored, in Python")
    kind = TASKS[name]
    task: Task = kind.__new__(kind)
    task.scored = scored  # before its data are read
    task.__init__(**given)  # type: ignore[misc]
    task.registered = name
    task.origin = {option: _lasting(option, value, TASKS[name].named) for option, value in given.items()}
    return task


def _check_kind(task: str, option: str, value: Any, kind: str) -> None:
    """Raise Unsupported for a value of another kind than a switch, a number or a single path where one is expected."""
    single, *others = kind.split(" | ")
    if value is None and "None" in others:
        return
    if single == "bool" and not isinstance(value, bool):
        raise Unsupported(f"{option}={value!r} of the task {task}", supported="true or false")
    if single == "int" and isinstance(value, bool):
        raise Unsupported(f"{option}={value!r} of the task {task}", supported="an integer")
    if "Path" in others and isinstance(value, list | tuple) and len(value) != 1:
        raise Unsupported(f"{len(value)} paths as {option} of the task {task}", supported="one folder")


def _lasting(option: str, value: Any, named: tuple[str, ...]) -> Any:
    """An option's value for JSON, with paths made absolute; values in `named` are names of data, not paths."""
    if value in named:
        return value
    if option in ("data", "validation"):
        return os.path.abspath(value) if isinstance(value, str | Path) else [os.path.abspath(path) for path in value]
    if option == "tokenizer" and str(value).endswith(".json"):
        return os.path.abspath(value)
    return list(value) if isinstance(value, tuple) else value


__all__ = [
    "IGNORED",
    "TASKS",
    "Baseline",
    "Batch",
    "DatasetTask",
    "Objective",
    "Scored",
    "Task",
    "absolute_error",
    "accuracy",
    "bits_per_byte",
    "check_task",
    "counter_generator",
    "create_task",
    "cross_entropy_by_item",
    "list_tasks",
    "mean_loss",
    "register_objective",
    "squared_error_by_item",
]
