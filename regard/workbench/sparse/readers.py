"""Language models as readers of prompts: their tokens, and replies token by token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from regard.contract import Unsupported, an_instance
from regard.integrations.encoders import architecture_of, kind_of, read_config
from regard.integrations.timm_places import is_of_timm
from regard.models import LanguageModel
from regard.positions.learned import Learned
from regard.tasks.tokenizer import Tokenizer
from regard.workbench.trained.folder import RECORD, open_trained, trained_length

MODELS = "a folder of `regard train` on text, a causal language model of transformers (a folder, or a .gguf file)"


class Reader(Protocol):
    """A model that reads text and answers it.

    Attributes:
        name: description of the model.
        model: the module whose attention is made sparse.
        longest: most tokens that it can read; None for no limit.
        trained: the sequence length that it was trained on; None if unknown.
        stops: tokens that end a reply.
    """

    name: str
    model: nn.Module
    longest: int | None
    trained: int | None
    stops: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without the model's start tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text."""
        ...

    def prompt(self, text: str) -> str:
        """Format a prompt as the model expects it, for example with a chat template."""
        ...

    def check_positions(self, tokens: int) -> None:
        """Raise Unsupported for more tokens, prompt and reply together, than the model has positions."""
        ...

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits (vocab,) after new tokens (1, n), and the state after these tokens."""
        ...


@dataclass
class Reply:
    """A model's reply.

    Attributes:
        tokens: its token ids.
        prefill, decode: seconds for the prompt, and for all tokens after the first together.
        steps: number of tokens after the first.
    """

    tokens: list[int]
    prefill: float
    decode: float
    steps: int


@torch.inference_mode()
def reply(reader: Reader, prompt: Sequence[int], most: int, *, forced: Sequence[int] = (), until: str = "") -> Reply:
    """Reply greedily to a prompt.

    Args:
        most: maximum number of tokens.
        forced: tokens to read instead of the model's own; the reply still holds the model's choices.
        until: a text that ends the reply.
    """
    ids, chosen = torch.tensor([list(prompt)]), list[int]()
    started = time.perf_counter()
    logits, state = reader.step(ids, None)
    after = time.perf_counter()
    prefill = after - started
    while True:
        token = int(logits.argmax())
        if not forced and token in reader.stops:
            break
        chosen.append(token)
        if len(chosen) >= most or (until and until in reader.decode(chosen[-16:]).lstrip()):
            break
        new = forced[len(chosen) - 1] if forced else token
        logits, state = reader.step(torch.tensor([[new]]), state)
    return Reply(chosen, prefill, time.perf_counter() - after, max(len(chosen) - 1, 0))


class OfTransformers:
    """A causal language model of transformers."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        from regard.integrations import transformers as bridge
        from regard.integrations.transformers.folders import stop_tokens

        self.cache_name, self.cache_class = bridge.CACHE, bridge.GrowingCache
        self.name, self.tokenizer = name, tokenizer
        self.model: nn.Module = model
        self.longest: int | None = getattr(model.config, "max_position_embeddings", None)
        self.trained = self.longest
        self.config = model.config
        self.stops = frozenset(stop_tokens(model))
        self.chats = getattr(self.tokenizer, "chat_template", None) is not None

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def prompt(self, text: str) -> str:
        if not self.chats:
            return text
        turn = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def check_positions(self, tokens: int) -> None:
        from regard.integrations.transformers.folders import check_positions

        check_positions(self.model, tokens)

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = self.cache_class(config=self.config) if state is None else state
        found = self.model(ids, **{self.cache_name: state}, use_cache=True, logits_to_keep=1)
        return found.logits[0, -1], getattr(found, self.cache_name)


class OfRegard:
    """A regard language model with its tokenizer."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, name: str, trained: int | None = None) -> None:
        self.model: nn.Module = model
        self.tokenizer, self.name, self.trained = tokenizer, name, trained
        positions = model.positions
        self.longest: int | None = positions.max_length if isinstance(positions, Learned) else None
        self.stops: frozenset[int] = frozenset()
        self.read = model.reader()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode([text.encode()]).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def prompt(self, text: str) -> str:
        return text

    def check_positions(self, tokens: int) -> None:
        if self.longest is not None and tokens > self.longest:
            raise Unsupported(
                f"{tokens} tokens, prompt and reply together, of {self.name}",
                supported=f"as many as it has positions, {self.longest}",
                nearest="a shorter text or fewer tokens",
            )

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = self.read(ids, torch.tensor([ids.shape[1] - 1]), None, state)
        return logits[0], state


def open_reader(path: Path) -> Reader:
    """Open the model in a folder or a GGUF file.

    Raises:
        Unsupported: for anything else, for models that do not continue a text, and for those with a cheaper cache by a
            recipe's step ``tokens``.
    """
    from regard.compression.folders import check_no_tokens, load_causal_model

    if not path.exists():
        raise Unsupported(f"{path}, which does not exist", supported=MODELS)
    if (path / RECORD).is_file():
        trained = open_trained(path)
        model, tokenizer = trained.model(), trained.tokenizer
        if not isinstance(model, LanguageModel):
            raise Unsupported(f"{path}, which holds {an_instance(model)}", supported=MODELS)
        check_no_tokens(path, "sparse attention")
        return OfRegard(model, tokenizer, f"{path.name} ({trained.record['mechanism']})", trained_length(path, model))
    from regard.integrations.transformers.folders import load_tokenizer

    _check_writes(path)
    check_no_tokens(path, "sparse attention")
    tokenizer = load_tokenizer(path, supported=MODELS)
    return OfTransformers(load_causal_model(path, supported=MODELS), tokenizer, path.name)


def _check_writes(path: Path) -> None:
    """Raise Unsupported for timm models and for encoders of transformers, which cannot continue a text."""
    if is_of_timm(path):
        raise Unsupported(f"{path}, a model of images", supported=MODELS)
    if (path / "config.json").is_file() and kind_of(path) != "language":
        name = architecture_of(read_config(path)) or "encoder"
        raise Unsupported(f"{path}, a {name}, which does not go on from a text", supported=MODELS)
