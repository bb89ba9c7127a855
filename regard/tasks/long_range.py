"""The five tasks of Long Range Arena under one name, at lengths that a small machine can train on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from regard.contract import Pattern, Unsupported, one_of
from regard.tasks.document_classes import DocumentsTask
from regard.tasks.documents import Paths
from regard.tasks.idx import has_idx
from regard.tasks.image_sets import NAMED
from regard.tasks.images import ImagesTask
from regard.tasks.listops import ListOpsTask
from regard.tasks.matching import MatchingTask
from regard.tasks.pathfinder import PathfinderTask
from regard.tasks.protocol import Baseline, Batch, Task, check_integer

TASKS: dict[str, tuple[type[Task], dict[str, Any]]] = {
    "listops": (ListOpsTask, {"length": 512, "depth": 6, "arguments": 6}),
    "text": (DocumentsTask, {}),
    "retrieval": (MatchingTask, {}),
    "image": (ImagesTask, {"size": 32, "patch": 1}),
    "pathfinder": (PathfinderTask, {"size": 32}),
}
"""Task and options, by the name in Long Range Arena."""
GENERATED = ("listops", "pathfinder")


class LongRangeTask(Task):
    """The five tasks of Long Range Arena (Tay et al., arXiv 2011.04006); each is also a task of its own (in brackets)::

        listops      nested list operations up to 512 tokens (listops)
        text         classes of documents, byte by byte, up to 1024 bytes (documents)
        retrieval    do two passages say the same? bytes of both, up to 512 (matching)
        image        classes of images of 32x32 pixels, pixel by pixel (images)
        pathfinder   are two dots the ends of one curve? 32x32 pixels, pixel by pixel (pathfinder)

    Images are sequences here: no layer is told where a row ends. The original items are longer (listops 2048, text
    4096, retrieval 8000), and the original data are IMDb, AAN and CIFAR-10; `data` accepts such files.

    Args:
        which: ``listops``, ``text``, ``retrieval``, ``image`` or ``pathfinder``.
        data: data for the task in brackets, in the form that it accepts.
        validation: held-out data in the same form.
        length: tokens per item; for images the number of pixels, a square number.
        evaluation_items: largest number of held-out items that are scored.
        seed: seed of splits and held-out items.
    """

    name = "long_range"
    pattern = Pattern.NONCAUSAL_SELF
    objective = "classification"
    named = NAMED

    def __init__(
        self,
        *,
        which: str = "listops",
        data: Paths | None = None,
        validation: Paths | None = None,
        length: int | None = None,
        evaluation_items: int = 512,
        seed: int = 0,
    ) -> None:
        one_of("which", which, TASKS)
        kind, options = TASKS[which]
        if which in GENERATED and (data is not None or validation is not None):
            raise Unsupported(
                f"data for long_range which={which}, whose items are generated",
                supported="which=text, retrieval or image",
            )
        given = {"data": data, "validation": validation, **_lengths(which, length)}
        options = options | {name: value for name, value in given.items() if value is not None}
        if which == "image" and isinstance(data, str | Path) and Path(data).is_dir() and not has_idx(Path(data)):
            options["channels"] = 1
        self.task: Task = kind.__new__(kind)
        self.task.scored = self.scored  # before its data are read
        self.task.__init__(**options, evaluation_items=evaluation_items, seed=seed)  # type: ignore[misc]
        self.shared, self.overlap = self.task.shared, getattr(self.task, "overlap", None)
        self.fitted = self.task.fitted
        self.name = f"{type(self).name}_{which}"
        self.length = self.task.length
        self.vocab_size, self.features = self.task.vocab_size, self.task.features
        self.num_classes = self.task.num_classes
        self.chance, self.solved = self.task.chance, self.task.solved
        self.baseline: Baseline | None = self.task.baseline

    @property
    def reader(self) -> Any:
        """The reader of images, for which=image; None for others."""
        return getattr(self.task, "reader", None)

    @reader.setter
    def reader(self, reader: Any) -> None:
        self.task.reader = reader  # type: ignore[attr-defined]

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        return replace(self.task.training_batch(step, seed, batch_size), grid=None)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for batch in self.task.evaluation_batches(batch_size):
            yield replace(batch, grid=None)

    def describe(self) -> str:
        return f"{self.name}, as the task {self.task.describe()}"


def _lengths(which: str, length: int | None) -> dict[str, int | None]:
    """The options that give a task's items `length` tokens.

    Raises:
        Unsupported: for a number of pixels that is not a square.
    """
    if which not in ("image", "pathfinder"):
        return {"length": length}
    if length is None:
        return {}
    check_integer("length", length, 16, 1 << 16)
    side = math.isqrt(length)
    if side**2 != length:
        raise Unsupported(
            f"length={length} of long_range which={which}",
            supported="the number of pixels of a square",
            nearest=f"length={side**2}",
        )
    return {"size": side}
