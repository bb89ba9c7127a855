"""Small decoders in three sizes, trained here on the tasks that need no text, in the brief wording.

A token is a word. Only answers have a loss, and prompts grow from about a hundred tokens to 512 during training. A
trained model is kept in its folder, and an interrupted training resumes from its checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from regard.contract import Unsupported
from regard.core.files import write_text_atomically
from regard.models import LanguageModel, LanguageModelConfig
from regard.models.pretrained import CONFIG, from_pretrained, save_pretrained
from regard.tasks.long_context import LONG_TASKS, brief_words, create_long_task
from regard.tasks.long_context.samples import draws
from regard.training.checkpoint import load_checkpoint, restore, save_checkpoint
from regard.training.optimizer import scheduled_rate
from regard.workbench.sparse.readers import OfRegard

SHORTEST, LONGEST = 112, 512
"""Prompt length in tokens, at the start and at the end of the training."""
GROWING = 0.6
"""Share of the training during which prompts grow."""
BATCH, RATE, WARMUP = 16, 2e-3, 0.05
CHECK_EVERY = 50
FIRST = 1 << 20
"""Numbers of training samples start here; evaluation uses those below."""
END = "."
TRAINED = "training.json"
TINY_TASKS = tuple(name for name in LONG_TASKS if not name.startswith("qa_"))


@dataclass(frozen=True)
class Size:
    """The size of a decoder with rotary positions and two query heads per key/value head."""

    dim: int
    layers: int

    def config(self, vocabulary: int) -> LanguageModelConfig:
        """The config of a model with a given vocabulary size."""
        return LanguageModelConfig(
            vocab_size=vocabulary, dim=self.dim, plan="softmax", num_layers=self.layers, num_heads=4, num_kv_heads=2
        )


SIZES = {"S": Size(64, 2), "M": Size(128, 2), "L": Size(192, 3)}
PRESETS = {"tiny": (1500, 120.0), "small": (20000, 3600.0)}
"""Steps for each size, and seconds after which training stops."""


class Words:
    """A tokenizer of whole words: those in the brief wording."""

    name = "words"

    def __init__(self) -> None:
        self.words = ["\n", *brief_words()]
        self.numbers = {word: number for number, word in enumerate(self.words)}
        self.vocab_size = len(self.words)

    def ids(self, text: str) -> list[int]:
        """Token ids; a new line is a token, and unknown words are dropped."""
        parts = text.replace("\n", " \n ").split(" ")
        return [self.numbers[word] for word in parts if word in self.numbers]

    def decode(self, ids: Sequence[int]) -> str:
        """The words joined by spaces, whatever separated them in the original."""
        return " ".join(self.words[number] for number in ids)


class WordReader(OfRegard):
    """A decoder of words whose replies end with a full stop."""

    def __init__(self, model: LanguageModel, name: str) -> None:
        self.model, self.name, self.words = model, name, Words()
        self.longest = self.trained = None
        self.stops = frozenset([self.words.numbers[END]])
        self.read = model.reader()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; unknown words are dropped."""
        return self.words.ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.words.decode(ids)


def training_batch(step: int, length: int, words: Words) -> tuple[Tensor, Tensor]:
    """Prompts with answers for one task, and targets that are -100 everywhere except at the answers."""
    name = TINY_TASKS[step % len(TINY_TASKS)]
    task = create_long_task(name, "brief")
    rows, targets = [], []
    for i in range(BATCH):
        sample = task.sample(FIRST + step * BATCH + i, length, lambda text: len(words.ids(text)))
        prompt, answer = words.ids(sample.prompt), words.ids(f"{sample.answer} {END}")
        rows.append(torch.tensor(prompt + answer[:-1]))
        targets.append(torch.tensor([-100] * (len(prompt) - 1) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(targets, batch_first=True, padding_value=-100)


def length_at(step: int, steps: int) -> int:
    """Prompt length at a step: drawn between the shortest and the curriculum's current maximum."""
    reached = SHORTEST + (LONGEST - SHORTEST) * min(1.0, step / max(GROWING * steps, 1))
    return round(draws(step, "length").uniform(SHORTEST, reached))


def train(
    size: str,
    folder: Path,
    steps: int,
    *,
    seconds: float | None = None,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> LanguageModel:
    """The trained decoder of a size, loaded from its folder if it is there.

    Args:
        seconds: time after which the training stops, and counts as finished.

    Raises:
        Unsupported: for a folder with a different training.
    """
    words = Words()
    settings = {"size": size, "steps": steps, "seed": seed, "vocabulary": words.vocab_size}
    record = folder / TRAINED
    if record.is_file() and (folder / CONFIG).is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        if before["settings"] != settings:
            raise Unsupported(f"{folder}, which has another training", supported="another --output")
        found = from_pretrained(folder)
        assert isinstance(found, LanguageModel)
        return found
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel(SIZES[size].config(words.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    path, first = folder / "checkpoint.safetensors", 0
    if path.is_file():
        checkpoint = load_checkpoint(path)
        if checkpoint.record.get("settings") != settings:
            raise Unsupported(f"{folder}, which has another training", supported="another --output")
        restore(checkpoint, model, optimizer)
        first = int(checkpoint.record["step"])
    model.train()
    began, loss, step = time.monotonic(), float("nan"), first
    for step in range(first, steps):
        if seconds is not None and time.monotonic() - began > seconds:
            break
        ids, targets = training_batch(step, length_at(step, steps), words)
        for group in optimizer.param_groups:
            group["lr"] = scheduled_rate(step, steps, peak=RATE, warmup=WARMUP, schedule="cosine")
        found_loss = model.loss(ids, targets)
        found_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = float(found_loss.detach())
        on_step(step, loss)
        if (step + 1) % CHECK_EVERY == 0:
            save_checkpoint(path, model, optimizer, {"settings": settings, "step": step + 1})
    model.eval()
    save_pretrained(model, folder)
    told = json.dumps({"settings": settings, "done": step + 1, "loss": loss}, indent=2) + "\n"
    write_text_atomically(record, told)
    return model
