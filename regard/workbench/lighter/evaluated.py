"""Quality, size and time of transformers and timm models, compressed or not, on a user's data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard.compression import text_windows
from regard.compression.folders import load_causal_model
from regard.compression.tokens.applied import read_in_turn
from regard.contract import Unsupported
from regard.integrations.encoders import positions_of
from regard.integrations.timm_places import is_of_timm
from regard.measurement.statistics import score_of_items
from regard.measurement.timing import calm_clock, interleaved
from regard.models.weights import weights_bytes
from regard.tasks.documents import Paths, names_of
from regard.workbench.lighter.subjects import known_kind
from regard.workbench.lighter.subjects.answering import Answering
from regard.workbench.lighter.subjects.base import LENGTH, SPREAD
from regard.workbench.lighter.subjects.language import CausalModel, nats_of_windows, read_ids
from regard.workbench.lighter.subjects.opened import open_encoder, open_vision
from regard.workbench.lighter.subjects.scores import CrossEntropy

TIMING_SECONDS = 2.0
"""Timing budget of a model, for all its timings."""

WANTED = {
    "language": "a text: files or folders",
    "masked": "a text: files or folders",
    "classes": "texts with their classes, as reviews.csv with the columns text and label",
    "images": "a folder of images with a sub-folder for each class of the model",
}
"""The data needed to know which answers are right, by the kind of model."""

COMPARED = "regard compress ORIGINAL --recipes ..., which compares answers with the original's"
"""The alternative to suggest if it is not known which answers are right."""


@dataclass(frozen=True)
class Evaluated:
    """The results of a model on data.

    Attributes:
        described: model and data in words.
        metric, score, standard_error: its quality, and the error over the items (nan for a single one).
        loss: mean nats of the right answers.
        items: number of scored items.
        bytes: size of the weights; shared ones count once.
        milliseconds: time of each action, by name.
    """

    described: str
    metric: str
    score: float
    standard_error: float
    loss: float
    items: int
    bytes: int
    milliseconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The results for JSON; an unknown error becomes None."""
        error = None if math.isnan(self.standard_error) else self.standard_error
        return {**asdict(self), "standard_error": error}


def evaluate(
    place: Path,
    data: Paths | None,
    *,
    device: str = "cpu",
    on_items: Callable[[int, int], None] = lambda done, count: None,
) -> Evaluated:
    """Score a transformers or timm model on all of the data; on windows spread over it if it is a long text.

    Args:
        place: a folder, compressed or not, a GGUF file, or ``timm:NAME``.
        device: for causal language models that are not compressed; others run on the CPU.
        on_items: called with the number of scored items and their total.

    Raises:
        Unsupported: if there are no data, or they do not tell which answers are right.
    """
    kind = "images" if is_of_timm(place) else known_kind(place)
    if kind == "bare":
        raise Unsupported(
            f"a score of {place}, an encoder without a head, of which nothing says what is right",
            supported="encoders that say masked tokens, classifiers, language models",
            nearest=COMPARED,
        )
    if not data:
        raise Unsupported(f"a score of {place} without data", supported=f"behind it {WANTED[kind]}")
    if kind == "language":
        return _language(place, data, device, on_items)
    if device != "cpu":
        raise Unsupported(
            f"an encoder or model of images on {device}", supported="the processor", nearest="--device cpu"
        )
    if kind == "images":
        subject = open_vision(place, data, None, held_out=1.0)
    else:
        subject = open_encoder(place, kind, data, None, held_out=1.0)
    if not subject.score.known:
        raise Unsupported(
            f"a score of {place} on {names_of(data)}, of which nothing says what is right",
            supported=WANTED[kind],
            nearest=COMPARED,
        )
    model, count = subject.load(), subject.items
    sums = subject.score.begin(), CrossEntropy()
    subject.scored(model, count, *sums, on_items=lambda done: on_items(done, count))
    (score, error), (loss, _) = (one.value() for one in sums)
    return _evaluated(subject, model, score, error, loss, count)


def _language(place: Path, data: Paths, device: str, on_items: Callable[[int, int], None]) -> Evaluated:
    """The perplexity of a causal language model on a text. If its cache keeps only part of a prompt, the first half of
    each window is read as a prompt."""
    subject = CausalModel(place, (), None)
    ids = read_ids(data, subject.tokenizer)
    model = load_causal_model(place, device=device)
    subject.length = min(LENGTH, positions_of(model) or LENGTH, max(len(ids), 2))
    subject.held_out = ids.to(device)
    subject.described = f"{place.name} on {names_of(data)}, windows of {subject.length} tokens"
    windows = text_windows(subject.held_out, subject.length, SPREAD)
    read, nats = read_in_turn(model), []
    for window in windows:
        nats += nats_of_windows(read, [window])
        on_items(len(nats), len(windows))
    loss, error = score_of_items(nats)
    perplexity = math.exp(min(loss, 700.0))
    return _evaluated(subject, model, perplexity, perplexity * error, loss, len(windows), device)


def _evaluated(
    subject: Answering | CausalModel,
    model: nn.Module,
    score: float,
    error: float,
    loss: float,
    items: int,
    device: str = "cpu",
) -> Evaluated:
    """The results of a model: its scores, size and times."""
    where = torch.device(device)
    timed = interleaved(subject.timed(model), seconds=TIMING_SECONDS, device=where, clock=calm_clock(where))
    milliseconds = {name: 1e3 * timing.median for name, timing in timed.items()}
    return Evaluated(subject.described, subject.metric, score, error, loss, items, weights_bytes(model), milliseconds)
