"""Models in folders that can be compressed: read, given calibration data, scored and timed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.compression import Compressed, Recipe, text_windows
from regard.compression.folders import copy_training, is_compressed, load_causal_model
from regard.compression.tokens.applied import read_in_turn
from regard.contract import Context, Unsupported, at_least
from regard.measurement.timing import Action
from regard.models import LanguageModel
from regard.models.generation import sample
from regard.tasks.documents import Paths, names_of, read_documents
from regard.training import runner_of
from regard.training.step import batch_context, run_model
from regard.workbench.sparse.readers import OfRegard, OfTransformers, Reader
from regard.workbench.trained.run import RECORD as TRAINING
from regard.workbench.trained.run import open_trained

HELD_OUT = 0.5
"""Share of a text that is scored; calibration has the part before it."""

LENGTH = 512
"""Tokens of a window."""

CHOOSING, SHARE = 512, 0.25
"""Items that a search goes by at the most, and their share of held-out ones where none were set aside in training."""


class Subject(Protocol):
    """A model that is compressed.

    Attributes:
        metric: of its quality.
        higher_is_better: which way.
        described: model and data in words.
        items: how many items its quality can be measured on.
    """

    metric: str
    higher_is_better: bool
    described: str
    items: int

    def load(self) -> nn.Module:
        """The model in floating point, in evaluation mode."""
        ...

    def calibration(self, count: int) -> list[Any]:
        """Batches, at most so many items in all."""
        ...

    def training(self, steps: int) -> list[Any]:
        """Batches to train on, one a step, or as many as there are."""
        ...

    def choosing(self) -> list[Any]:
        """Batches that a search may go by: of items that the model was not trained on, and that its quality leaves out."""
        ...

    def quality(self, model: nn.Module, items: int) -> float:
        """By the first items that are held out."""
        ...

    def timed(self, model: nn.Module) -> dict[str, Action]:
        """What is timed, by name; the first decides what is fastest."""
        ...

    def reader(self, model: nn.Module) -> Reader:
        """The model, as it is or compressed, as one that reads text and answers; raises Unsupported where it does not."""
        ...

    def save(self, compressed: Compressed, folder: Path) -> None:
        """Write a compressed model so that it can be used as this one."""
        ...


def open_subject(model: Path, data: Paths | None, length: int | None, recipes: Sequence[Recipe] = ()) -> Subject:
    """The model of a folder of `regard train`, or a causal language model of transformers.

    Args:
        model: a folder, or a GGUF file.
        data: text to calibrate with and to score on; None for that of a folder of `regard train`; empty for none, with which a
            model of transformers can be loaded and saved alone.
        length: tokens of a window; the model's or :data:`LENGTH` when None.
        recipes: what is going to be done to it: for those that search, items are set aside.

    Raises:
        Unsupported: for another folder.
    """
    if not model.exists():
        raise Unsupported(f"{model}, which does not exist", supported=MODELS)
    if model.is_dir() and is_compressed(model):
        raise Unsupported(f"{model}, which is compressed already", supported="a model in floating point")
    if (model / TRAINING).is_file():
        return Trained(model, data, length, searching=any("loss" in recipe.needs for recipe in recipes))
    return CausalModel(model, data, LENGTH if length is None else length)


MODELS = "a folder of `regard train`, or a causal language model of transformers (config.json, or a .gguf file)"


class Trained:
    """A model that `regard train` made, on its task."""

    def __init__(self, folder: Path, data: Paths | None, length: int | None, *, searching: bool = False) -> None:
        self.folder, self.trained = folder, open_trained(folder)
        if length is not None:
            raise Unsupported(f"length={length} of a model of `regard train`", supported="the length of its task")
        given = data if data is None or isinstance(data, str) else [str(path) for path in _listed(data)]
        self.task = self.trained.task(given)
        self.first = self.trained.record["settings"]["first_item"] if data is None else 0
        self.batch_size = int(self.trained.record["settings"]["batch_size"])
        self.metric, self.higher_is_better = self.task.metric, self.task.higher_is_better
        self.described = f"{folder}: {self.trained.record['mechanism']} on {self.task.name}"
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
            raise Unsupported(f"side effects of a {type(model).__name__}", supported="models that write text")
        return OfRegard(model, self.trained.tokenizer, self.folder.name)

    def save(self, compressed: Compressed, folder: Path) -> None:
        copy_training(self.folder, folder)
        compressed.save(folder)


class CausalModel:
    """A causal language model of transformers, on text."""

    metric = "perplexity"
    higher_is_better = False

    def __init__(self, path: Path, data: Paths | None, length: int) -> None:
        at_least("length", length, 2)
        self.length = length
        from regard.integrations.transformers.folders import load_tokenizer

        self.path, self.tokenizer = path, load_tokenizer(path, supported=MODELS)
        self.described = path.name
        if data == ():
            return
        if data is None:
            raise Unsupported(
                f"{path} without a text", supported="--data my_corpus.txt, to calibrate with and to score on"
            )
        documents, _ = read_documents(data, "text")
        text = b"".join(document.text for document in documents).decode()
        ids = encode(self.tokenizer, text)
        if len(ids) < 2 * length:
            raise Unsupported(
                f"{names_of(data)} of {len(ids)} tokens for windows of {length}",
                supported=f"{2 * length} tokens or more: one window to calibrate with, one to score on",
                nearest=f"--length {len(ids) // 2}" if len(ids) >= 4 else "more text",
            )
        border = max(length, min(len(ids) - length, int((1 - HELD_OUT) * len(ids))))
        self.before, self.held_out = ids[:border], ids[border:]
        self.items = len(self.held_out) // length
        self.described = f"{path.name} on {names_of(data)} ({len(ids):,} tokens, windows of {length})"

    def load(self) -> nn.Module:
        from regard.integrations.transformers.folders import load_model

        model: nn.Module = load_model(self.path, supported=MODELS)
        return model

    def calibration(self, count: int) -> list[Any]:
        return text_windows(self.before, self.length, count)

    def training(self, steps: int) -> list[Any]:
        return text_windows(self.before, self.length, steps)

    def choosing(self) -> list[Any]:
        return text_windows(self.before, self.length, max(1, CHOOSING * 64 // self.length))

    def quality(self, model: nn.Module, items: int) -> float:
        return perplexity(read_in_turn(model), text_windows(self.held_out, self.length, items))

    def timed(self, model: nn.Module) -> dict[str, Action]:
        from regard.integrations.transformers import CACHE, GrowingCache

        ids = text_windows(self.held_out, self.length, 1)[0]
        with torch.inference_mode():
            cache = GrowingCache.of(getattr(model(ids, use_cache=True), CACHE))

        def decode() -> Any:
            with torch.inference_mode():
                return model(ids[:, :1], **{CACHE: cache}, use_cache=True)

        def prefill() -> Any:
            with torch.inference_mode():
                return model(ids, use_cache=True, logits_to_keep=1)

        return {"decode": decode, "prefill": prefill}

    def reader(self, model: nn.Module) -> Reader:
        return OfTransformers(model, self.tokenizer, self.path.name)

    def save(self, compressed: Compressed, folder: Path) -> None:
        compressed.save(folder, tokenizer=self.tokenizer)


def perplexity(model: nn.Module, windows: list[Tensor]) -> float:
    """``exp`` of the mean nats of each token but the first of each window."""
    nats, tokens = map(sum, zip(*nats_of_windows(model, windows), strict=True))
    return math.exp(min(nats / tokens, 700.0))


def nats_of_windows(model: nn.Module, windows: list[Tensor]) -> list[tuple[float, int]]:
    """For each window the nats of all tokens but the first, and how many these are."""
    found = []
    with torch.inference_mode():
        for ids in windows:
            logits = model(ids, use_cache=False).logits[0, :-1].float()
            found.append((float(F.cross_entropy(logits, ids[0, 1:], reduction="sum")), ids.shape[1] - 1))
    return found


def encode(tokenizer: Any, text: str) -> Tensor:
    """Tokens of a text, without a beginning or an end of its own."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def stream_text(
    model: Any, ids: Tensor, tokens: int, *, generator: torch.Generator, **sampling: Any
) -> Iterator[Tensor]:
    """New tokens of a causal language model of transformers, one at a time, through its cache.

    Args:
        ids: (1, N).
        sampling: of :func:`regard.models.generation.sample`.
    """
    from regard.integrations.transformers import CACHE, GrowingCache
    from regard.integrations.transformers.folders import stop_tokens

    stops = stop_tokens(model)
    cache, new = None, ids
    for _ in range(tokens):
        with torch.inference_mode():
            found = model(new, **{CACHE: cache}, use_cache=True)
        cache = GrowingCache.of(getattr(found, CACHE))
        token = sample(found.logits[:, -1], generator=generator, **sampling)
        if int(token) in stops:
            return
        yield token
        new = token[:, None]


def open_of_transformers(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """Model and tokenizer of a causal language model of transformers, compressed or not."""
    from regard.integrations.transformers.folders import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return load_causal_model(folder, device=device), tokenizer


def _listed(data: Paths) -> list[Any]:
    return [data] if isinstance(data, str | Path) else list(data)
