"""Tokenizers: raw bytes, or byte-pair encoding (Sennrich et al., arXiv 1508.07909) trained on the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from regard.contract import Unsupported, closest
from regard.tasks.documents import nearest_path
from regard.tasks.protocol import check_integer

if TYPE_CHECKING:
    from jaxtyping import Int

BYTES = 256
LARGEST = 1 << 16
_BPE_TRAINING_BYTES = 16 << 20
_SUPPORTED = f"bytes, bpe:SIZE with a size from {BYTES + 1} to {LARGEST}, or a tokenizer's .json file"


class Tokenizer(Protocol):
    """A tokenizer in the form that the text task needs.

    Attributes:
        name: name for reports.
        vocab_size: number of tokens.
        token_bytes: number of bytes that each token stands for, int64 (vocab_size,).
    """

    name: str
    vocab_size: int
    token_bytes: Int[Tensor, " v"]

    def encode(self, texts: Sequence[bytes]) -> Int[np.ndarray, " n"]:
        """Tokens of the texts, concatenated, in the smallest dtype that holds them."""
        ...

    def encode_each(self, texts: Sequence[bytes]) -> list[Int[np.ndarray, " n"]]:
        """Tokens of each text."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Decode tokens; bytes that are not UTF-8 become replacement characters."""
        ...


class ByteTokenizer:
    """A tokenizer whose tokens are bytes."""

    name = "bytes"
    vocab_size = BYTES

    def __init__(self) -> None:
        self.token_bytes: Int[Tensor, " v"] = torch.ones(BYTES, dtype=torch.int64)

    def encode(self, texts: Sequence[bytes]) -> Int[np.ndarray, " n"]:
        return np.frombuffer(b"".join(texts), dtype=np.uint8)

    def encode_each(self, texts: Sequence[bytes]) -> list[Int[np.ndarray, " n"]]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(int(token) for token in tokens).decode(errors="replace")


class BpeTokenizer:
    """Byte-level byte-pair encoding: any text can be encoded, and each token stands for a known number of bytes."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        self.name = name
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self._dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.int32
        # In the byte-level alphabet, each character of a token is one byte.
        lengths = [len(tokenizer.id_to_token(token)) for token in range(self.vocab_size)]
        self.token_bytes: Int[Tensor, " v"] = torch.tensor(lengths, dtype=torch.int64)

    @classmethod
    def train(cls, texts: Sequence[bytes], size: int) -> BpeTokenizer:
        """Learn `size` tokens (fewer if the text has no more pairs to merge), the same in every process.

        If there is more than 16 MB of text, evenly spread parts of 16 MB in total are used.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
        )
        tokenizer.train_from_iterator((text.decode(errors="ignore") for text in _spread(texts)), trainer)
        return cls(tokenizer, f"bpe:{size}")

    @classmethod
    def load(cls, path: Path) -> BpeTokenizer:
        """Load a tokenizer saved by :meth:`save`, or any byte-level one in the format of the `tokenizers` library."""
        from tokenizers import Tokenizer

        if not path.is_file():
            raise Unsupported(
                f"the tokenizer {path}, which does not exist", supported=_SUPPORTED, nearest=nearest_path(path)
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise Unsupported(f"the tokenizer {path}, which cannot be loaded ({error})", supported=_SUPPORTED) from None
        alphabet = tokenizer.get_vocab(with_added_tokens=True)
        # Normalisers, prefix spaces, templates and gaps in the numbering would all make the byte counts wrong.
        probe = "a \n\u00e9\u4e2d  A"
        encoding = tokenizer.encode(probe)
        counted = sum(len(token) for token in encoding.tokens)
        if counted != len(probe.encode()) or sorted(alphabet.values()) != list(range(len(alphabet))):
            raise Unsupported(
                f"the tokenizer {path}, whose tokens do not stand for a countable number of bytes",
                supported="byte-level tokenizers without normaliser, prefix space or template",
                nearest=f"bpe:{min(max(len(alphabet), BYTES + 1), LARGEST)}",
            )
        return cls(tokenizer, path.name)

    def save(self, path: Path | str) -> None:
        """Save the tokenizer as JSON."""
        self._tokenizer.save(str(path))

    def encode(self, texts: Sequence[bytes]) -> Int[np.ndarray, " n"]:
        return np.concatenate(self.encode_each(texts) or [np.empty(0, self._dtype)])

    def encode_each(self, texts: Sequence[bytes]) -> list[Int[np.ndarray, " n"]]:
        encodings = self._tokenizer.encode_batch([text.decode() for text in texts], add_special_tokens=False)
        return [np.asarray(e.ids, dtype=self._dtype) for e in encodings]

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)


def create_tokenizer(spec: str, texts: Sequence[bytes]) -> ByteTokenizer | BpeTokenizer:
    """Create a tokenizer from ``bytes``, ``bpe:SIZE`` (trained on `texts`) or a ``.json`` file."""
    if spec == "bytes":
        return ByteTokenizer()
    if str(spec).endswith(".json"):
        return BpeTokenizer.load(Path(spec))
    kind, _, size = str(spec).partition(":")
    if kind != "bpe" or not size.isdecimal():
        nearest = "bpe:4096" if kind == "bpe" else closest(kind, ["bytes", "bpe:4096"])
        raise Unsupported(f"tokenizer {spec!r}", supported=_SUPPORTED, nearest=nearest)
    return BpeTokenizer.train(texts, check_integer("the size of tokenizer bpe", int(size), BYTES + 1, LARGEST))


def _spread(texts: Sequence[bytes]) -> Iterable[bytes]:
    total = sum(map(len, texts))
    if total <= _BPE_TRAINING_BYTES:
        yield from texts
        return
    share = _BPE_TRAINING_BYTES / total
    part = 1 << 16
    for text in texts:
        for start in range(0, len(text), part):
            yield text[start : start + int(share * min(part, len(text) - start))]
