"""The user's text as tokens of the model: training blocks, held-out blocks, and blocks from another source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract import Unsupported
from regard.tasks.documents import Document, Paths, names_of, read_documents, read_standard_library
from regard.tasks.text import split
from regard.training.loop import step_seed

if TYPE_CHECKING:
    from jaxtyping import Int

HELD_OUT = 0.1
"""Share of the data that is never trained on."""


@dataclass(frozen=True)
class Corpus:
    """The tokens of the user's text.

    Attributes:
        training, held_out: parts of the data.
        other: tokens of text from another source; None without one.
        name, other_name: names for the report.
    """

    training: Int[Tensor, " n"]
    held_out: Int[Tensor, " n"]
    other: Int[Tensor, " n"] | None
    name: str
    other_name: str | None

    @property
    def sources(self) -> dict[str, Int[Tensor, " n"]]:
        """The token sequences to evaluate on, by name."""
        found = {f"{self.name}, held out": self.held_out}
        if self.other is not None:
            found[f"{self.other_name}, another source"] = self.other
        return found

    @property
    def size(self) -> int:
        """Number of training tokens."""
        return len(self.training)

    def blocks(self, step: int, seed: int, batch: int, length: int) -> Int[Tensor, "b n"]:
        """The blocks of a training step, determined by the arguments alone."""
        generator = torch.Generator().manual_seed(step_seed(seed, step))
        starts = torch.randint(len(self.training) - length + 1, (batch,), generator=generator)
        return self.training[starts[:, None] + torch.arange(length)]

    def digest(self) -> str:
        """Hash the tokens to twelve hexadecimal digits."""
        found = hashlib.sha256()
        for part in (self.training, self.held_out, self.other):
            found.update(b"none" if part is None else part.numpy().tobytes())
        return found.hexdigest()[:12]


def even_blocks(ids: Int[Tensor, " n"], most: int, length: int) -> Int[Tensor, "w n"]:
    """Disjoint blocks, evenly spread over a text: at most `most`, fewer if the text is shorter."""
    there = len(ids) // length
    kept = min(there, most)
    starts = torch.arange(kept) * there // max(kept, 1) * length
    return ids[starts[:, None] + torch.arange(length)]


def read_corpus(
    data: Paths | Tensor | None,
    validation: Paths | Tensor | None,
    tokenizer: Any,
    *,
    length: int,
    vocabulary: int,
    seed: int,
) -> Corpus:
    """Read the tokens of text files and folders, or take given tokens.

    Args:
        data: anything that :func:`regard.tasks.documents.read_documents` reads, or token ids (n,); the sources of Python's
            standard library when None.
        validation: likewise, from another source; evaluated separately.
        tokenizer: a tokenizer of transformers; not needed for ids.
        length: tokens of a block.
        vocabulary: number of tokens in the model's vocabulary.

    Raises:
        Unsupported: for text that is missing or shorter than a block in any part, and for tokens outside the
            vocabulary.
    """
    if isinstance(data, Tensor):
        ids = _checked(data, vocabulary)
        border = len(ids) - max(round(HELD_OUT * len(ids)), min(length, len(ids)))
        training, held_out, name = ids[:border], ids[border:], "the data"
    else:
        documents, _ = read_standard_library() if data is None else read_documents(data, "text")
        distinct = list({document.digest: document for document in documents}.values())
        parts = split(distinct, HELD_OUT, seed)[:2]
        training, held_out = (_encode(part, tokenizer, vocabulary) for part in parts)
        name = "Python's standard library" if data is None else names_of(data)
    other = other_name = None
    if isinstance(validation, Tensor):
        other, other_name = _checked(validation, vocabulary), "the validation data"
    elif validation is not None:
        other, other_name = _encode(read_documents(validation, "text")[0], tokenizer, vocabulary), names_of(validation)
    for what, part in (("training", training), ("held-out", held_out), ("validation", other)):
        if part is not None and len(part) < length:
            raise Unsupported(
                f"a text with {len(part)} {what} tokens, shorter than a block of {length}",
                supported=f"{length} tokens or more in each part",
                nearest=f"length={len(part)}" if len(part) >= 32 else "more text",
            )
    return Corpus(training, held_out, other, name, other_name)


def _checked(ids: Tensor, vocabulary: int) -> Tensor:
    if ids.ndim != 1 or ids.is_floating_point():
        raise Unsupported(f"data of {ids.dtype} and shape {tuple(ids.shape)}", supported="token ids (n,), integers")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise Unsupported(f"token ids up to {int(ids.max())}", supported=f"ids from 0 to {vocabulary - 1}")
    return ids.long().cpu()


def _encode(documents: Sequence[Document], tokenizer: Any, vocabulary: int) -> Tensor:
    """The tokens of documents, each followed by an end-of-text token if the tokenizer has one."""
    if tokenizer is None:
        raise Unsupported(
            "text for a model without a tokenizer",
            supported="a folder with tokenizer.json, tokenizer=..., or data of token ids",
        )
    texts = [document.text.decode() for document in documents]
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    ends = [] if end is None else [end]
    found: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        found += ids + ends
    return _checked(torch.tensor(found, dtype=torch.long), vocabulary)
