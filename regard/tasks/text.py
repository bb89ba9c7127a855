"""Language modelling on a user's text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from regard.contract import Pattern, Unsupported
from regard.measurement.units import counted
from regard.tasks.documents import (
    Document,
    Paths,
    names_of,
    overlap_note,
    printable,
    read_documents,
    read_standard_library,
)
from regard.tasks.overlap import overlap
from regard.tasks.protocol import (
    SPLIT,
    TRAINING,
    Batch,
    Task,
    bits_per_byte,
    check_fraction,
    check_integer,
    counter_generator,
    in_batches,
)
from regard.tasks.tokenizer import BYTES, create_tokenizer

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class TextTask(Task):
    """Predict the next token of text; scored in bits per byte, which is comparable across tokenizers.

    The split is by document: no held-out document is ever trained on, and duplicates count once. The share of the
    held-out text that also occurs in training documents is measured and reported. Training windows start anywhere in
    the concatenated training documents; held-out windows are evenly spread over the held-out documents, and no token is
    predicted twice.

    Args:
        data: a text file, a folder, JSON lines or a list of them (see :mod:`regard.tasks.documents`); None for the
            sources of Python's standard library.
        validation: held-out data in the same forms; documents that also occur in `data` are not trained on.
        tokenizer: ``bytes``, ``bpe:SIZE`` (trained on the training documents) or a saved ``.json``.
        length: tokens per window, 1 to 1048576.
        field: field of JSON lines that holds the text.
        held_out: fraction of the bytes held out when there is no `validation`, 0.01 to 0.5.
        evaluation_items: largest number of held-out windows, 1 to 65536.
        seed: seed of the split.
    """

    name = "text"
    cut_from_stream = True
    pattern = Pattern.CAUSAL_SELF
    objective = "next-token"
    metric = "bits per byte"
    higher_is_better = False
    chance = 8.0

    def __init__(
        self,
        *,
        data: Paths | None = None,
        validation: Paths | None = None,
        tokenizer: str = "bytes",
        length: int = 256,
        field: str = "text",
        held_out: float = 0.1,
        evaluation_items: int = 64,
        seed: int = 0,
    ) -> None:
        self.length = check_integer("length", length, 1, 1 << 20)
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)
        check_integer("evaluation_items", evaluation_items, 1, 1 << 16)
        check_fraction("held_out", held_out, 0.01, 0.5)
        if not isinstance(field, str) or not field:
            raise Unsupported(f"field={field!r}", supported="the name of a field of JSON lines", nearest="field=text")

        documents, self._notes = read_standard_library() if data is None else read_documents(data, field)
        documents, repeated = _distinct(documents)
        if repeated:
            self._notes.append(f"{counted(repeated, 'repeated document')} left out")
        if validation is None:
            self.training_documents, self.held_out_documents, self._split = split(documents, held_out, seed)
        else:
            given, notes = read_documents(validation, field)
            self._notes += notes
            self._use_validation(documents, _distinct(given)[0], validation)

        texts = [document.text for document in self.training_documents]
        self.overlap = overlap(texts, [document.text for document in self.held_out_documents])
        self.tokenizer = create_tokenizer(tokenizer, texts)
        self.vocab_size: int = self.tokenizer.vocab_size
        self._source = "Python's standard library" if data is None else names_of(data)
        self._training = self.tokenizer.encode(texts)
        self._held_out = self.tokenizer.encode([document.text for document in self.held_out_documents])
        self._check_length()
        windows = (len(self._held_out) - 1) // self.length
        kept = min(windows, evaluation_items)
        self._starts = np.arange(kept) * windows // kept * self.length

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        check_integer("batch_size", batch_size, 1, 1 << 20)
        last = len(self._training) - self.length
        return self._windows(self._training, counter_generator(seed, step, TRAINING).integers(0, last, batch_size))

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in in_batches(len(self._starts), batch_size):
            yield self._windows(self._held_out, self._starts[rows])

    def score(self, logits: Float[Tensor, "b n v"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Bits spent and bytes predicted, for each window."""
        return bits_per_byte(logits, batch, self.tokenizer.token_bytes)

    def describe(self) -> str:
        lines = [f"text: {self._source}, windows of {self.length} tokens, tokenizer {self.tokenizer.name}"]
        if self.vocab_size != BYTES:
            lines[0] += f" ({self.vocab_size} tokens)"
        for name, documents, tokens in (
            ("training", self.training_documents, self._training),
            ("held out", self.held_out_documents, self._held_out),
        ):
            size = sum(len(document.text) for document in documents)
            each = "" if self.vocab_size == BYTES else f", {len(tokens):,} tokens of {size / len(tokens):.2f} bytes"
            lines.append(f"{name}: {counted(len(documents), 'document')}, {counted(size, 'byte')}{each}")
        lines += [f"split: {self._split}", str(self.overlap)]
        lines.append(f"scored on {len(self._starts)} held-out windows that predict no token twice, in bits per byte")
        lines += [f"note: {note}" for note in self._notes]
        lines.append("sample: " + printable(self.tokenizer.decode(self._training[: self.length])[:200]))
        return "\n".join(lines)

    def _windows(self, tokens: Int[np.ndarray, " n"], starts: Int[np.ndarray, " b"]) -> Batch:
        window = torch.from_numpy(tokens[starts[:, None] + np.arange(self.length + 1)].astype(np.int64))
        return Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous())

    def _use_validation(self, training: list[Document], held_out: list[Document], validation: Paths) -> None:
        self.training_documents, self.held_out_documents = training, held_out
        self._split = "held-out documents as given"
        if self.scored is not None:
            return
        taken = {document.digest for document in held_out}
        self.training_documents = [document for document in training if document.digest not in taken]
        shared = [document for document in training if document.digest in taken]
        if not self.training_documents:
            raise Unsupported(
                f"held-out data that holds all of the training data: {names_of(validation)}",
                supported="separate held-out text, or no validation: a part is then split off",
            )
        if shared:
            self._notes.append(overlap_note(len(shared), "document", validation, shared[0].name))

    def _check_length(self) -> None:
        shorter = min(("training", self._training), ("held-out", self._held_out), key=lambda part: len(part[1]))
        largest = len(shorter[1]) - 1
        if largest < self.length:
            raise Unsupported(
                f"length={self.length} with only {len(shorter[1])} {shorter[0]} tokens",
                supported=f"length from 1 to {largest}, or more text" if largest > 0 else "more text",
                nearest=f"length={largest}" if largest > 0 else "",
            )


def split(documents: list[Document], share: float, seed: int) -> tuple[list[Document], list[Document], str]:
    """Split documents; returns the training documents, the held-out documents, and the rule in words.

    Documents are held out in an order drawn from `seed` as long as that brings the held-out bytes closer to their
    share; if the result is less than a quarter of the share, the smallest document of at least that size is held out
    instead. A document with more than half of all bytes is cut: its last part, from a blank line on, is held out.
    Training documents keep the drawn order.
    """
    order = counter_generator(seed, 0, SPLIT).permutation(len(documents))
    shuffled = [documents[i] for i in order]
    total = sum(len(document.text) for document in documents)
    wanted = share * total
    largest = max(documents, key=lambda document: len(document.text))
    if 2 * len(largest.text) > total:
        cut = _border(largest.text, len(largest.text) - round(min(wanted, len(largest.text) / 2)))
        head = Document(largest.name, largest.text[:cut])
        tail = Document(f"{largest.name} (end)", largest.text[cut:])
        rule = f"the last {len(tail.text) / total:.1%} of the text, the end of {largest.name}, is held out"
        return [head if document is largest else document for document in shuffled], [tail], rule

    held_out: list[Document] = []
    size = 0
    for document in shuffled:
        if abs(size + len(document.text) - wanted) < abs(size - wanted):
            held_out.append(document)
            size += len(document.text)
    if size < wanted / 4:
        held_out = [min((d for d in shuffled if len(d.text) >= wanted / 4), key=lambda d: len(d.text))]
        size = len(held_out[0].text)
    chosen = {id(document) for document in held_out}
    training = [document for document in shuffled if id(document) not in chosen]
    return training, held_out, f"by document, {size / total:.1%} of the bytes held out (seed {seed})"


def _border(text: bytes, near: int) -> int:
    """The cut in `text`: after the blank line closest to `near`, else after a newline, else between characters."""
    reach = max(1, len(text) // 20)
    low, high = max(1, near - reach), min(len(text) - 1, near + reach)
    for mark in (b"\n\n", b"\n"):
        before, after = text.rfind(mark, low, near), text.find(mark, near, high)
        cuts = [place + len(mark) for place in (before, after) if place >= 0 and place + len(mark) < len(text)]
        if cuts:
            return min(cuts, key=lambda cut: abs(cut - near))
    while near < len(text) - 1 and text[near] & 0xC0 == 0x80:
        near += 1
    return near


def _distinct(documents: list[Document]) -> tuple[list[Document], int]:
    unique = list({document.digest: document for document in reversed(documents)}.values())[::-1]
    return unique, len(documents) - len(unique)
