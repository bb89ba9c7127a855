"""The folder of a trained model: its record, and from it the model, the task and the score."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard.compression.folders import copy_training, load_own
from regard.contract import Unsupported
from regard.core.files import write_text_atomically
from regard.models import save_pretrained
from regard.tasks import TASKS, Scored, Task, create_task
from regard.tasks.documents import nearest_path
from regard.tasks.images import ImageReader
from regard.tasks.segmentation import MaskReader
from regard.tasks.segmentation_3d import VolumeReader
from regard.tasks.text import TextTask
from regard.tasks.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer
from regard.training import Evaluation, runner_of

RECORD, CHECKPOINT, TOKENIZER, CARD = "training.json", "checkpoint.safetensors", "tokenizer.json", "README.md"
LAST = "last"
"""The subfolder with the last weights, if earlier ones were better."""
FINISHED, DIVERGED, BEGUN = "finished", "diverged", "begun"
SUPPORTED = "a folder written by `regard train`"
UNFINISHED = {"retrofit": (".retrofit", "retrofit.json"), "compress": (".work", "compression.json")}
"""Commands that keep their work in a folder until they are done: the work's name, and the file that is written last."""
STATISTICS = ("mean", "deviation", "scale")
"""Fields of a reader used for normalisation."""
SAID = {"span": "bits of a pixel"}
"""Words for a reader's fields whose names do not say what they are."""


@dataclass(frozen=True)
class TrainedModel:
    """A folder with a trained model.

    Attributes:
        folder: the path of the folder.
        record: the contents of ``training.json``.
    """

    folder: Path
    record: Mapping[str, Any]

    def model(self, device: torch.device | str = "cpu") -> nn.Module:
        """Load the model in evaluation mode."""
        return load_own(self.folder, device=device)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with; raises Unsupported if the task does not read text."""
        name = self.record["tokenizer"]
        if name is None:
            raise Unsupported(
                f"text for the model in {self.folder}, which was trained on {self.record['task']['name']}",
                supported="models trained on a task that reads text",
            )
        return ByteTokenizer() if name == ByteTokenizer.name else BpeTokenizer.load(self.folder / TOKENIZER)

    @property
    def reader(self) -> ImageReader | VolumeReader:
        """The reader that turns image or volume files into inputs; raises Unsupported if the task reads no images."""
        record = self.record.get("reader")
        if record is None:
            raise Unsupported(
                f"images for the model in {self.folder}, which was trained on {self.record['task']['name']}",
                supported="models trained on the tasks images, segmentation and segmentation_3d",
            )
        if "overlap" in record:
            return VolumeReader.of_record(record)
        return (MaskReader if "colours" in record else ImageReader).of_record(record)

    def task(self, data: str | list[str] | None = None, *, skip_unreadable: bool = False) -> Task:
        """The task that the model was trained on, with `data` in place of its held-out items if given.

        If the data of the training are missing, new images, volumes or text are read without them: the task then has no
        `shared` items and no `baseline`. `skip_unreadable` leaves out images that cannot be read, in training data and
        new data.

        Raises:
            Unsupported: for a plugin's task, for data that have moved, and for new data if the task generates its own.
        """
        name, options = self.record["task"]["name"], self.record["task"]["options"]
        if options is None:
            raise Unsupported(f"the task {name} of a plugin", supported="the plugin's task, given to `score`")
        reader = None if self.record.get("reader") is None else self.reader
        missing = self.missing_data(("data",) if data is not None else ("data", "validation"))
        if missing is not None and (data is None or not (reader or issubclass(TASKS[name], TextTask))):
            raise Unsupported(
                f"{self.folder} without the data of its training, {missing}, which are not there any more",
                supported="data in their old place"
                + ("" if data is None else ": what of other data was trained on is looked for there"),
                nearest=f"ln -s WHERE_THEY_ARE_NOW {missing}",
            )
        if data is not None:
            options = {**options, "validation": data} | ({} if missing is None else {"data": data})
        if self.record["tokenizer"] not in (None, ByteTokenizer.name):
            options = {**options, "tokenizer": str(self.folder / TOKENIZER)}
        if skip_unreadable:
            if "skip_unreadable" not in inspect.signature(TASKS[name]).parameters:
                raise Unsupported(f"--skip-unreadable with {name}", supported="tasks that read images")
            options = {**options, "skip_unreadable": True}
        span = (self.record.get("reader") or {}).get("span")
        if span is not None:
            options = {**options, "span": span}
        scored = None if data is None else Scored(reader, self.record["task"].get("fitted", {}))
        task = create_task(name, scored=scored, **options)
        if missing is not None:  # the new data stand in for those of the training
            task.shared, task.baseline = 0, None
        if reader is not None:
            self._read_as_trained(task)
        return task

    def missing_data(self, parts: Sequence[str] = ("data",)) -> str | None:
        """The first path among the data of the training that is not there any more; None if all are.

        `parts` are ``data``, ``validation`` or both.
        """
        name, options = self.record["task"]["name"], self.record["task"]["options"] or {}
        for part in parts:
            given = options.get(part)
            for path in [given] if isinstance(given, str) else given or ():
                if path not in TASKS[name].named and os.path.isabs(path) and not os.path.exists(path):
                    return str(path)
        return None

    def _read_as_trained(self, task: Any) -> None:
        """Make a task normalise as in training, since the split into training and held-out data may differ now."""
        known, now = self.reader, task.reader
        statistics = {name: getattr(known, name) for name in STATISTICS if hasattr(known, name)}
        now = dataclasses.replace(now, **statistics)
        names = [field.name for field in dataclasses.fields(now)]
        others = [SAID.get(name, name) for name in names if getattr(now, name) != getattr(known, name)]
        if others:
            raise Unsupported(
                f"the data of {self.folder}, whose {' and '.join(others)} differ from what it was trained on",
                supported="the data as they were",
            )
        task.reader = known

    @property
    def chosen_by(self) -> int:
        """Number of the first held-out items, which the weights were chosen by; they never count in scores."""
        return int(self.record["settings"]["first_item"])

    def save_as(self, folder: Path | str, model: nn.Module) -> TrainedModel:
        """Write another model for the same task, such as one that has learned which patches to keep, to a folder of its
        own, with the files that `regard evaluate`, `predict` and `explain` read."""
        copy_training(self.folder, folder)
        save_pretrained(model, folder)
        return open_trained(folder)

    def score(
        self,
        task: Task | None = None,
        *,
        own: bool = False,
        device: torch.device | str = "cpu",
        model: nn.Module | None = None,
    ) -> Evaluation:
        """Score and loss on the held-out items of `task`, or by default on those items of its own task that did not
        choose weights, as with `own` of `task`; of `model`, if given, in place of the folder's."""
        first = self.chosen_by if task is None or own else 0
        chosen = self.task() if task is None else task
        return runner_of(chosen).evaluate(
            self.model(device) if model is None else model, chosen, self.record["settings"]["batch_size"], first=first
        )


def open_trained(folder: Path | str, *, supported: str = SUPPORTED) -> TrainedModel:
    """Open the folder of a finished :func:`regard.workbench.trained.run.train_model`; `supported` is used in the error
    for other folders.

    Raises:
        Unsupported: if there is no trained model, or its training is not finished.
    """
    found = read_record(Path(folder))
    if found is None:
        raise _not_trained(Path(folder), supported)
    if found["state"] != FINISHED:
        ended = {DIVERGED: "diverged", BEGUN: "is not finished"}[found["state"]]
        nearest = "a smaller --learning-rate" if found["state"] == DIVERGED else "the same `regard train` again"
        raise Unsupported(f"{folder}, whose training {ended}", supported="a finished run", nearest=nearest)
    return TrainedModel(Path(folder), found)


def trained_length(folder: Path, model: nn.Module) -> int | None:
    """The sequence length that a folder's model was trained on, from its record or config; None if neither has it."""
    if (folder / RECORD).is_file():
        return open_trained(folder).record["settings"].get("length")
    return getattr(model.config, "max_position_embeddings", None)


def beyond(trained: int | None, asked: int) -> str:
    """A warning if a model is run on more tokens than it was trained on; otherwise empty."""
    if trained is None or asked <= trained:
        return ""
    return f"The model was trained on {trained} tokens at a time: it has not learned to handle {asked}."


def read_record(place: Path) -> dict[str, Any] | None:
    """Read the record of a folder; None if it has none, and Unsupported if it is invalid."""
    file = place / RECORD
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not {"state", "task", "mechanism", "layers", "tokenizer", "settings"} <= set(found):
            raise ValueError("parts are missing")
    except (ValueError, TypeError) as error:
        raise Unsupported(f"{file}, which cannot be read ({error})", supported="a file of `regard train`") from None
    return found


def write_record(place: Path, record: Mapping[str, Any]) -> None:
    """Replace the record of a folder atomically."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_text_atomically(place / RECORD, text)


def _not_trained(place: Path, supported: str) -> Unsupported:
    """The error for a path without a training record."""
    if not place.exists():
        return Unsupported(f"{place}, which does not exist", supported=supported, nearest=nearest_path(place))
    if not place.is_dir():
        return Unsupported(f"{place}, which is not a folder", supported=supported)
    for command, (work, last) in UNFINISHED.items():
        if (place / work).is_dir() and not (place / last).is_file():
            return Unsupported(
                f"{place}, whose {command} is not finished",
                supported="a finished run",
                nearest=f"the same `regard {command}` again",
            )
    beside = ": it holds " + ", ".join(sorted(path.name for path in place.iterdir())[:4])
    return Unsupported(f"{place} without {RECORD}" + (beside if any(place.iterdir()) else ""), supported=supported)
