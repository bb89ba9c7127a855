"""The teacher in a run of `regard train`: a model that an earlier run left in a folder."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard.compression.distillation import AnswerCache, Method, Taught, read_method
from regard.compression.distillation.teaching import TASKS
from regard.contract import Unsupported
from regard.core.files import check_folder
from regard.models.weights import weights_digest
from regard.tasks import Task
from regard.tasks.images import ImageReader
from regard.tasks.tokenizer import Tokenizer
from regard.workbench.trained.folder import TOKENIZER, TrainedModel, open_trained


@dataclass(frozen=True)
class Teacher:
    """A trained model for a task, and how a student learns from it.

    Attributes:
        trained: the teacher's folder.
        method: the distillation method.
        written: the method as the user wrote it.
        task: the task of teacher and student.
        device: the device for training.
        cache: folder for the teacher's answers, see :class:`regard.compression.distillation.AnswerCache`; None to
            compute them at every step.
    """

    trained: TrainedModel
    method: Method
    written: str
    task: Task
    device: str = "cpu"
    cache: Path | None = None

    @classmethod
    def read(
        cls, folder: Path | str, written: str, task: Task, device: str = "cpu", cache: Path | None = None
    ) -> Teacher:
        """Read a teacher from a folder and a method, as the user wrote them.

        Raises:
            Unsupported: for an unknown method, a folder without a finished run, a task with its own training, a
                teacher that reads other images or has other classes than the task, and a cache for a task whose training
                items do not repeat.
        """
        method, own = read_method(written), getattr(task, "reader", None)
        if cache is not None:
            _check_repeating(task)
            check_folder(cache)
        if task.objective == "next-token" and hasattr(task, "tokenizer"):
            return cls(_of_text(folder, task), method, written, task, device)
        if getattr(task, "runner", None) is not None or not isinstance(own, ImageReader):
            raise Unsupported(
                f"a teacher on the task {task.name}",
                supported=TASKS,
            )
        trained = _of_images(folder, own)
        return cls(trained, method, written, task, device, cache)

    @functools.cached_property
    def model(self) -> nn.Module:
        """The teacher model."""
        return self.trained.model(self.device)

    def teach(self, student: nn.Module, seed: int) -> Taught:
        """The student together with parts that are trained along with it, whose initial weights are set by the seed."""
        teacher = self.model  # load before setting the seed, since loading draws random numbers too
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            cache = None if self.cache is None else AnswerCache(self.cache, teacher)
            return Taught(student, teacher, self.method, self.task, cache=cache)

    @property
    def settings(self) -> dict[str, str]:
        """Settings of a run that depend on the teacher."""
        weights = weights_digest(self.model)
        return {"teacher": str(self.trained.folder.resolve()), "teacher_weights": weights, "distil": self.written}

    @property
    def described(self) -> dict[str, Any]:
        """Facts about the teacher, for the student's record."""
        record = self.trained.record
        return {key: record[key] for key in ("mechanism", "parameters", "score", "metric")}


def check_inputs(folder: Path | str, task: Task) -> None:
    """Raise Unsupported if the model in a folder was trained on other tokens, images or classes than the task's."""
    own = getattr(task, "reader", None)
    if hasattr(task, "tokenizer"):
        _of_text(folder, task)
    elif isinstance(own, ImageReader):
        _of_images(folder, own)


def _check_repeating(task: Task) -> None:
    """Raise Unsupported unless training items come again as they were."""
    if not task.repeats:
        raise Unsupported(
            f"a cache of the teacher's answers on the task {task.name}, whose training items are new at every step",
            supported="images and segmentation of files, with augment=none and no flip or mix",
            nearest="the same without --teacher-cache",
        )


def _of_images(folder: Path | str, own: ImageReader) -> TrainedModel:
    trained = open_trained(folder)
    told = trained.reader
    if not isinstance(told, ImageReader):
        raise Unsupported(f"the teacher {folder}, which reads volumes", supported="a teacher trained on the same task")
    for name in ("classes", "height", "width", "channels", "patch"):
        if getattr(own, name) != getattr(told, name):
            raise Unsupported(
                f"the teacher {folder} with {_said(name, told)}, where the task has {_said(name, own)}",
                supported="a teacher trained on the same task",
            )
    pairs = zip((*own.mean, *own.deviation), (*told.mean, *told.deviation), strict=True)
    if not all(math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-4) for one, other in pairs):
        raise Unsupported(
            f"the teacher {folder}, whose inputs were normalised by other images than the task's",
            supported="a teacher trained on the same data",
        )
    return trained


def _of_text(folder: Path | str, task: Any) -> TrainedModel:
    trained = open_trained(folder)
    other = trained.record["task"]["name"]
    if other != task.name:
        raise Unsupported(f"the teacher {folder}, trained on {other}", supported=f"a teacher trained on {task.name}")
    if _tokens(trained.tokenizer) != _tokens(task.tokenizer):
        own = trained.folder / TOKENIZER
        raise Unsupported(
            f"the teacher {folder} with other tokens than the task's",
            supported="a teacher trained with the same tokenizer",
            nearest=f"--tokenizer {own if own.is_file() else trained.tokenizer.name}",
        )
    return trained


def _tokens(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]


def _said(name: str, reader: Any) -> str:
    value = getattr(reader, name)
    if name != "classes":
        return f"{name} {value}"
    return f"the classes {', '.join(value[:5])}" + (f" and {len(value) - 5} more" if len(value) > 5 else "")
