"""Causal language models of transformers on text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.compression import Compressed, text_windows
from regard.compression.folders import load_causal_model
from regard.compression.layers import run_batch
from regard.compression.tokens.applied import read_in_turn
from regard.contract import Unsupported, at_least
from regard.integrations.encoders import positions_of
from regard.measurement.timing import Action
from regard.models.generation import sample
from regard.tasks.documents import Paths, names_of, read_documents
from regard.workbench.lighter.subjects.base import CHOOSING, HELD_OUT, LENGTH, MODELS
from regard.workbench.sparse.readers import OfTransformers, Reader


class CausalModel:
    """A causal transformers model on text; implements :class:`regard.workbench.lighter.subjects.base.Subject`."""

    metric = "perplexity"
    higher_is_better = False
    run = staticmethod(run_batch)

    def __init__(self, path: Path, data: Paths | None, length: int | None) -> None:
        from regard.integrations.transformers.folders import known_positions, load_tokenizer

        self.path, self.tokenizer = path, load_tokenizer(path, supported=MODELS)
        self.described, self.items = path.name, 0
        if length is None:
            length = min(LENGTH, known_positions(path, supported=MODELS) or LENGTH)
        at_least("length", length, 2)
        self.length = length
        if data == ():
            return
        if data is None:
            raise Unsupported(
                f"{path} without a text", supported="--data my_corpus.txt, to calibrate with and to score on"
            )
        self.before, self.held_out = halves(data, self.tokenizer, length)
        tokens = len(self.before) + len(self.held_out)
        self.items = len(self.held_out) // length
        self.described = f"{path.name} on {names_of(data)} ({tokens:,} tokens, windows of {length})"

    def load(self) -> nn.Module:
        from regard.integrations.transformers.folders import has_positions

        model: nn.Module = load_causal_model(self.path, supported=MODELS)
        if self.items and not has_positions(model, self.length):
            longest = positions_of(model)
            raise Unsupported(
                f"length={self.length} of a model of {longest} positions",
                supported=f"{longest} or less",
                nearest=f"--length {longest}",
            )
        return model

    def calibration(self, count: int) -> list[Any]:
        return text_windows(self.before, self.length, count)

    def training(self, steps: int) -> list[Any]:
        return text_windows(self.before, self.length, steps)

    def choosing(self) -> list[Any]:
        return text_windows(self.before, self.length, max(1, CHOOSING * 64 // self.length))

    def looked_at(self) -> Any:
        return self.before, self.held_out

    def quality(self, model: nn.Module, items: int) -> float:
        return perplexity(read_in_turn(model), text_windows(self.held_out, self.length, items))

    def timed(self, model: nn.Module) -> dict[str, Action]:
        from regard.integrations.transformers import CACHE, GrowingCache
        from regard.integrations.transformers.folders import has_positions

        ids = text_windows(self.held_out, self.length, 1)[0]
        longest = positions_of(model)
        table = longest is not None and not has_positions(model, longest + 1)  # then no place is beyond the window
        place = {"position_ids": ids.new_tensor([[ids.shape[1] - 1]])} if table else {}
        with torch.inference_mode():
            cache = GrowingCache.of(getattr(model(ids, use_cache=True), CACHE))

        def decode() -> Any:
            with torch.inference_mode():
                return model(ids[:, :1], **{CACHE: cache}, **place, use_cache=True)

        def prefill() -> Any:
            with torch.inference_mode():
                return model(ids, use_cache=True, logits_to_keep=1)

        return {"decode": decode, "prefill": prefill}

    def reader(self, model: nn.Module) -> Reader:
        return OfTransformers(model, self.tokenizer, self.path.name)

    def save(self, compressed: Compressed, folder: Path) -> None:
        compressed.save(folder, tokenizer=self.tokenizer)


def halves(data: Paths, tokenizer: Any, length: int) -> tuple[Tensor, Tensor]:
    """Split a text into tokens for calibration and tokens for scoring, each at least one window long.

    Raises:
        Unsupported: if the text is too short.
    """
    ids = read_ids(data, tokenizer)
    if len(ids) < 2 * length:
        raise Unsupported(
            f"{names_of(data)} of {len(ids)} tokens for windows of {length}",
            supported=f"{2 * length} tokens or more: one window to calibrate with, one to score on",
            nearest=f"--length {len(ids) // 2}" if len(ids) >= 4 else "more text",
        )
    border = max(length, min(len(ids) - length, int((1 - HELD_OUT) * len(ids))))
    return ids[:border], ids[border:]


def read_ids(data: Paths, tokenizer: Any) -> Tensor:
    """The tokens of a text in files or folders."""
    documents, _ = read_documents(data, "text")
    return encode(tokenizer, b"".join(document.text for document in documents).decode())


def perplexity(model: nn.Module, windows: list[Tensor]) -> float:
    """``exp`` of the mean nats over all tokens except the first in each window."""
    nats, tokens = map(sum, zip(*nats_of_windows(model, windows), strict=True))
    return math.exp(min(nats / tokens, 700.0))


def nats_of_windows(model: nn.Module, windows: list[Tensor]) -> list[tuple[float, int]]:
    """For each window, the summed nats of all tokens except the first, and the number of these tokens."""
    found = []
    with torch.inference_mode():
        for ids in windows:
            logits = model(ids, use_cache=False).logits[0, :-1].float()
            found.append((float(F.cross_entropy(logits, ids[0, 1:], reduction="sum")), ids.shape[1] - 1))
    return found


def encode(tokenizer: Any, text: str) -> Tensor:
    """The tokens of a text, without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def stream_text(
    model: Any, ids: Tensor, tokens: int, *, generator: torch.Generator, **sampling: Any
) -> Iterator[Tensor]:
    """Yield new tokens from a causal transformers model one at a time, using its cache.

    Args:
        ids: prompt tokens (1, N).
        sampling: arguments of :func:`regard.models.generation.sample`.
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
    """The model and tokenizer of a causal transformers model, compressed or not."""
    from regard.integrations.transformers.folders import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return load_causal_model(folder, device=device), tokenizer
