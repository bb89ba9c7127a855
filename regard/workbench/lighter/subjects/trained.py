"""Models made by `regard train`, on their task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard.compression import Compressed, Recipe
from regard.compression.folders import copy_training, is_compressed
from regard.compression.layers import run_batch
from regard.compression.steps import Distil
from regard.compression.tokens.applied import read_in_turn
from regard.contract import Context, Unsupported, an_instance
from regard.measurement.timing import Action
from regard.models import LanguageModel
from regard.tasks.documents import Paths
from regard.training import runner_of
from regard.training.step import batch_context, run_model
from regard.workbench.lighter.subjects.base import CHOOSING, SHARE
from regard.workbench.sparse.readers import OfRegard, Reader
from regard.workbench.trained.folder import open_trained
from regard.workbench.trained.teacher import check_inputs


class Trained:
    """A `regard train` model on its task; implements :class:`regard.workbench.lighter.subjects.base.Subject`."""

    run = staticmethod(run_batch)

    def __init__(self, folder: Path, data: Paths | None, length: int | None, recipes: Sequence[Recipe] = ()) -> None:
        self.folder, self.trained = folder, open_trained(folder)
        if length is not None:
            raise Unsupported(f"length={length} of a model of `regard train`", supported="the length of its task")
        given = data if data is None or isinstance(data, str) else [str(path) for path in _listed(data)]
        self.task = self.trained.task(given)
        self.first = self.trained.chosen_by if data is None else 0
        self.batch_size = int(self.trained.record["settings"]["batch_size"])
        self.metric, self.higher_is_better = self.task.metric, self.task.higher_is_better
        self.described = f"{folder}: {self.trained.record['mechanism']} on {self.task.name}"
        for teacher in {step.teacher for recipe in recipes for _, step in recipe.steps if isinstance(step, Distil)}:
            if teacher is not None and not is_compressed(teacher):
                check_inputs(teacher, self.task)
        searching = any("loss" in recipe.needs for recipe in recipes)
        batches = self.task.evaluation_batches(self.batch_size)
        held_out = sum(batch.size for batch in batches)
        if searching and not self.first:
            self.first = int(SHARE * held_out)
        self.items = held_out - self.first
        self.length = self.trained.record["settings"].get("length")

    def load(self) -> nn.Module:
        return self.trained.model()

    def calibration(self, count: int) -> list[Any]:
        size = min(count, self.batch_size)
        return [self.task.training_batch(step, 0, size) for step in range(-(-count // size))]

    def training(self, steps: int) -> list[Any]:
        return [self.task.training_batch(step, 0, self.batch_size) for step in range(steps)]

    def choosing(self) -> list[Any]:
        found, seen = [], 0
        for batch in self.task.evaluation_batches(self.batch_size):
            last = min(batch.size, min(self.first, CHOOSING) - seen)
            if last <= 0:
                break
            found.append(batch.items(0, last))
            seen += last
        return found

    def looked_at(self) -> Any:
        return self.calibration(self.batch_size), list(self.task.evaluation_batches(self.batch_size))

    def quality(self, model: nn.Module, items: int) -> float:
        last = self.first + items
        read = read_in_turn(model)
        return runner_of(self.task).evaluate(read, self.task, self.batch_size, first=self.first, last=last).score

    def timed(self, model: nn.Module) -> dict[str, Action]:
        batch = self.task.training_batch(0, 1, 1)
        if isinstance(model, LanguageModel):
            ids = batch.inputs
            stream = model.generate_stream(ids, 1 << 30)
            next(stream)

            def prefill() -> Any:
                with torch.inference_mode():
                    return model.features(ids, context=Context(want=frozenset({"state"})))

            return {"decode": lambda: next(stream), "prefill": prefill}
        several = self.task.training_batch(0, 1, 16)

        def run(given: Any) -> Action:
            def action() -> Any:
                with torch.inference_mode():
                    return run_model(model, given, batch_context(given))

            return action

        return {"one item": run(batch), "16 items": run(several)}

    def reader(self, model: nn.Module) -> Reader:
        if not isinstance(model, LanguageModel):
            raise Unsupported(f"side effects of {an_instance(model)}", supported="models that write text")
        return OfRegard(model, self.trained.tokenizer, self.folder.name)

    def save(self, compressed: Compressed, folder: Path) -> None:
        copy_training(self.folder, folder)
        compressed.save(folder)


def _listed(data: Paths) -> list[Any]:
    return [data] if isinstance(data, str | Path) else list(data)
