"""Shared parts of training cells: tasks, models, training and scores."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from regard.contract import Pattern
from regard.models import Encoder, EncoderConfig, LanguageModel, LanguageModelConfig
from regard.tasks import Batch, Task, counter_generator, create_task
from regard.tasks.protocol import IGNORED
from regard.training import TrainConfig, runner_of

BIGRAMS = 2.49
"""Held-out loss, in nats, of a bigram model of the text task's training documents (unigrams: 3.19, trigrams: 1.91). A
model below it has learned more than which byte follows which."""
DIGIT_SIDE = 8


@functools.cache
def cached_task(name: str, **options: Any) -> Task:
    """Return a task by name, read once per process."""
    return create_task(name, **options)


def digit_pixels(items: int) -> Task:
    """Return the task of scikit-learn's digits as 64 pixel tokens; half are held out, of which `items` are scored."""
    return cached_task("images", data="digits", patch=1, held_out=0.5, evaluation_items=items)


class Windows(Task):
    """Images seen through square windows: at random places in training, in the middle in evaluation."""

    name, pattern, objective = "windows", Pattern.NONCAUSAL_SELF, "classification"

    def __init__(self, images: Task, side: int) -> None:
        self.images, self.side, self.grid, self.length = images, side, (side, side), side**2
        self.features, self.num_classes = images.features, images.num_classes

    def describe(self) -> str:
        return f"windows of {self.side} x {self.side} into {self.images.name}"

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        batch = self.images.training_batch(step, seed, batch_size)
        corners = counter_generator(seed, step, stream=7).integers(0, DIGIT_SIDE - self.side + 1, (batch_size, 2))
        return self.cut(batch, torch.from_numpy(corners))

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for batch in self.images.evaluation_batches(batch_size):
            yield self.cut(batch, torch.full((batch.size, 2), (DIGIT_SIDE - self.side) // 2))

    def cut(self, batch: Batch, corners: Tensor) -> Batch:
        """Cut out the windows with these upper left corners (B, 2)."""
        rows, columns = (corners[:, axis, None] + torch.arange(self.side) for axis in (0, 1))  # (B, side)
        chosen = (rows[:, :, None] * DIGIT_SIDE + columns[:, None]).flatten(1)
        return Batch(batch.inputs.take_along_dim(chosen[..., None], 1), batch.targets, grid=self.grid)


def digit_windows(items: int, side: int) -> Windows:
    """Return windows into :func:`digit_pixels`: only the relative positions of a digit's pixels tell its class."""
    return Windows(digit_pixels(items), side)


class SaidTwice(Task):
    """Windows of text whose second half repeats the first. Only the second half has targets, so that the answer is
    always half a window back, never near.

    The distance is constant, so positions alone tell where to read: the task tests whether a pattern carries
    information over that distance, not whether a model finds it.
    """

    name = "text said twice"

    def __init__(self, text: Task) -> None:
        self.text, self.length, self.distance = text, text.length, text.length // 2
        self.pattern, self.objective, self.vocab_size = text.pattern, text.objective, text.vocab_size
        self.metric, self.higher_is_better = text.metric, text.higher_is_better

    def describe(self) -> str:
        return f"{self.distance} tokens and the same again, of {self.text.describe()}"

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        return self.repeat(self.text.training_batch(step, seed, batch_size))

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for batch in self.text.evaluation_batches(batch_size):
            yield self.repeat(batch)

    def score(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.text.score(logits, batch)

    def repeat(self, batch: Batch) -> Batch:
        """Repeat the first half of each window; the last target is the first token again."""
        inputs = batch.inputs[:, : self.distance].repeat(1, 2)
        targets = inputs.roll(-1, dims=1)
        targets[:, : self.distance - 1] = IGNORED
        return Batch(inputs, targets)


def said_twice(length: int, items: int) -> SaidTwice:
    """Return :class:`SaidTwice` on windows of the text task, of which `items` are scored."""
    return SaidTwice(cached_task("text", length=length, evaluation_items=items))


SAID_TWICE = {"steps": 1000, "batch_size": 16, "learning_rate": 1e-2, "items": 64}
"""Default training options for :func:`said_twice_score`."""


def said_twice_score(setting: Mapping[str, Any], seed: int, **options: Any) -> dict[str, Any]:
    """Return the :func:`trained_score` of two layers of the setting's mixer, width 64, on 40 bytes said twice."""
    task = said_twice(80, setting["items"])
    layers = [(setting["mixer"], setting.get("options", {}))] * 2
    return {**trained_score(language_model(task, layers, dim=64, num_heads=4, **options), task, setting, seed)}


class PixelLevels(Task):
    """Grey images as text: each pixel is predicted from the pixels before it, row by row, after a start token.

    Even at a small size, distant tokens help more than in text: the pixel above is a row back.
    """

    name, pattern, objective = "pixel levels", Pattern.CAUSAL_SELF, "next-token"

    def __init__(self, images: Task) -> None:
        self.images, self.length = images, images.length
        self.levels = torch.cat([batch.inputs for batch in images.evaluation_batches(256)]).unique()
        self.vocab_size = len(self.levels) + 1

    def describe(self) -> str:
        return f"pixel by pixel, {len(self.levels)} levels, of {self.images.describe()}"

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        return self.read(self.images.training_batch(step, seed, batch_size))

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for batch in self.images.evaluation_batches(batch_size):
            yield self.read(batch)

    def read(self, batch: Batch) -> Batch:
        """Return the levels of all pixels (B, N) as targets, and shifted by one as inputs."""
        targets = torch.bucketize(batch.inputs[..., 0], self.levels).clamp(max=len(self.levels) - 1)
        return Batch(F.pad(targets[:, :-1], (1, 0), value=len(self.levels)), targets)


@functools.cache
def digit_levels(items: int) -> PixelLevels:
    """Return :class:`PixelLevels` of :func:`digit_pixels`: 64 tokens in rows of eight."""
    return PixelLevels(digit_pixels(items))


def language_model(task: Task, plan: Any, **options: Any) -> LanguageModel:
    """Return a language model for the task; `plan` lists a name or (name, options) for each layer."""
    return LanguageModel(LanguageModelConfig(vocab_size=task.vocab_size or 0, plan=plan, **options))


def classifier(task: Task, plan: Any, **options: Any) -> Encoder:
    """Return an encoder that classifies the task's items."""
    config = EncoderConfig(
        num_classes=task.num_classes or 0, vocab_size=task.vocab_size, features=task.features, plan=plan, **options
    )
    return Encoder(config)


def placed_classifier(task: Task, plan: Any, **options: Any) -> Encoder:
    """Return a classifier (default width 32) with learned positions that start as large as the embeddings."""
    places = {"positions": "learned", "max_length": task.length, "position_options": {"std": 1.0}}
    return classifier(task, plan, **({"dim": 32, "num_heads": 2} | places | options))


def fit(model: nn.Module, task: Task, setting: Mapping[str, Any], seed: int, *, steps: int | None = None) -> bool:
    """Train in place with the setting's ``steps``, ``batch_size``, ``learning_rate``; return False if it diverged."""
    config = TrainConfig(
        steps=setting["steps"] if steps is None else steps,
        batch_size=setting["batch_size"],
        learning_rate=setting["learning_rate"],
        seed=seed,
        measure_memory=False,
    )
    return not runner_of(task).train(model, task, config).diverged


def score(model: nn.Module, task: Task) -> dict[str, float]:
    """Return ``score`` and ``loss`` on the held-out items."""
    found = runner_of(task).evaluate(model, task, 32)
    return {"score": found.score, "loss": found.loss}


def trained_score(model: nn.Module, task: Task, setting: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Train by :func:`fit`; return :func:`score` (nan if the run diverged) and the number of ``parameters``."""
    parameters = float(sum(p.numel() for p in model.parameters()))
    scores = score(model, task) if fit(model, task, setting, seed) else {"score": math.nan, "loss": math.nan}
    return {**scores, "parameters": parameters}


def digits_score(setting: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return :func:`trained_score` on :func:`digit_pixels` of two layers of the setting's ``mixer``."""
    task = digit_pixels(setting["items"])
    model = classifier(task, [(setting["mixer"], setting["options"])] * 2, dim=64, num_heads=4)
    return {**trained_score(model, task, setting, seed)}


def state_bytes(state: Any) -> int:
    """Return the bytes of all tensors of a state."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


@torch.no_grad()
def loss_in_pieces(model: nn.Module, task: Task, pieces: int) -> float:
    """Return the mean loss of a language model on held-out windows, each read as `pieces` independent pieces.

    This compares contexts of different lengths on the same predictions.
    """
    losses = []
    for batch in task.evaluation_batches(1):
        logits = model(batch.inputs.view(pieces, -1)).output
        losses.append(float(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())))
    return sum(losses) / len(losses)
