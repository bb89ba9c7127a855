"""Classification of token sequences: the common base of the tasks documents and matching."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from regard.contract import Pattern, Unsupported
from regard.measurement.units import counted
from regard.tasks.documents import Paths, names_of, overlap_note, printable
from regard.tasks.overlap import overlap
from regard.tasks.protocol import (
    SPLIT,
    Baseline,
    Batch,
    Task,
    check_fraction,
    check_integer,
    counter_generator,
    in_batches,
)
from regard.tasks.sampling import in_epochs, one_of_each_in_turn
from regard.tasks.tokenizer import BYTES, create_tokenizer

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass(frozen=True)
class Labelled:
    """An item: one text or two texts side by side, and their class."""

    texts: tuple[str, ...]
    label: str


class LabelledTask(Task):
    """Classify token sequences; the texts of an item are separated by a separator token.

    Each text is cut after its share of `length`; shorter sequences are padded. The default length is `longest`, or less
    if the longest text needs less. An epoch shows each training item once or, if balanced, each class as often as the
    largest one; the held-out items that are scored then have equally many of each class.

    Subclasses set `name` and `longest`, read training and held-out items, and call :meth:`_prepare`.
    """

    longest: int

    pattern = Pattern.NONCAUSAL_SELF
    objective = "classification"

    def __init__(self, *, length: int | None, held_out: float, evaluation_items: int, seed: int) -> None:
        self._given = length is not None
        self.length = check_integer("length", self.longest if length is None else length, 3, 1 << 20)
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)
        self._most_scored = check_integer("evaluation_items", evaluation_items, 1, 1 << 16)
        self._share = check_fraction("held_out", held_out, 0.01, 0.5)
        self._notes: list[str] = []

    def _split(self, items: list[Labelled], named: str) -> tuple[list[Labelled], list[Labelled]]:
        """Split items with the same share of each class; repeated texts count once."""
        distinct = self._distinct(items)
        held_out: set[int] = set()
        for number, label in enumerate(sorted({item.label for item in distinct})):
            members = [i for i, item in enumerate(distinct) if item.label == label]
            if len(members) < 2:
                raise Unsupported(
                    f"the class {label} of {named} with {counted(len(members), 'different item')}",
                    supported="2 or more in each class, to train on and to hold out",
                )
            order = counter_generator(self.seed, number, SPLIT).permutation(members)
            held_out.update(order[: max(1, round(self._share * len(members)))].tolist())
        self._rule = f"by item, the same share of each class (seed {self.seed})"
        training = [item for i, item in enumerate(distinct) if i not in held_out]
        return training, [distinct[i] for i in sorted(held_out)]

    def _use_validation(
        self, training: list[Labelled], held_out: list[Labelled], validation: Paths | None = None
    ) -> tuple[list[Labelled], list[Labelled]]:
        """Remove training items that are also held out, unless a trained model is scored; repeated texts count once."""
        if validation is not None and not held_out:
            raise Unsupported(f"{names_of(validation)}, which holds no items", supported="held-out items")
        scored = self._distinct(held_out)
        taken = {item.texts for item in scored}
        kept = self._distinct(training)
        self.shared: int = sum(item.texts in taken for item in kept)
        if self.scored is None:
            kept = [item for item in kept if item.texts not in taken]
        if self.shared and not kept:
            raise Unsupported(
                "held-out data that holds all of the training data"
                + (f": {names_of(validation)}" if validation else ""),
                supported="separate held-out items, or no validation: a part is then split off",
            )
        if self.shared and self.scored is None:
            first = next(item for item in training if item.texts in taken)
            self._notes.append(overlap_note(self.shared, "item", validation, first.texts[0]))
        unknown = sorted({item.label for item in scored} - {item.label for item in kept})
        if unknown:
            raise Unsupported(
                f"held-out items of the class {unknown[0]}, which training lacks",
                supported="the classes " + ", ".join(sorted({item.label for item in kept})),
            )
        return kept, scored

    def _distinct(self, items: list[Labelled]) -> list[Labelled]:
        first: dict[tuple[str, ...], Labelled] = {}
        conflicts = 0
        for item in items:
            conflicts += first.setdefault(item.texts, item).label != item.label
        if repeated := len(items) - len(first):
            told = f"{counted(repeated, 'repeated item')} left out"
            self._notes.append(told + (f", {conflicts} of them with another class" if conflicts else ""))
        return list(first.values())

    def _prepare(
        self, training: list[Labelled], held_out: list[Labelled], *, tokenizer: str, balance: bool, named: str
    ) -> None:
        self._named = named
        self.classes = tuple(sorted({item.label for item in training}))
        if len(self.classes) < 2:
            raise Unsupported(f"{named} with {counted(len(self.classes), 'class')}", supported="2 or more classes")
        if not held_out:
            raise Unsupported(f"{named} without held-out items", supported="some items to score")
        self.num_classes: int = len(self.classes)
        texts, held = ([t.encode() for item in items for t in item.texts] for items in (training, held_out))
        self.overlap = overlap(texts, held)
        self.tokenizer = create_tokenizer(tokenizer, texts)
        parts = len(training[0].texts)
        self._separator = self.tokenizer.vocab_size
        self.vocab_size: int = self.tokenizer.vocab_size + (parts > 1)
        tokens = [
            [self.tokenizer.encode_each([item.texts[i].encode() for item in items]) for i in range(parts)]
            for items in (training, held_out)
        ]
        if self.scored is not None and "length" in self.scored.fitted:
            self.length = self.scored.fitted["length"]
        elif not self._given:
            most = max(len(text) for columns in tokens for column in columns for text in column)
            self.length = min(self.length, max(parts * most + parts - 1, 3))
        self.fitted = {"length": self.length}
        self._share_of_text = (self.length - (parts - 1)) // parts
        self._balance = balance
        self._training, self._training_labels = self._laid_out("training", training, tokens[0])
        self._held_out, self._held_out_labels = self._laid_out("held-out", held_out, tokens[1])

        members = [np.flatnonzero(self._training_labels == label) for label in range(self.num_classes)]
        most = max(map(len, members))
        repeated = [np.resize(one, most) for one in members]
        self._order = np.concatenate(repeated) if balance else np.arange(len(self._training))
        scored = counter_generator(self.seed, self.num_classes, SPLIT).permutation(len(self._held_out))
        if balance:
            present = np.bincount(self._held_out_labels)
            present = present[present > 0]
            scored = one_of_each_in_turn(scored, self._held_out_labels)[: present.min() * len(present)]
        self._scored = scored[: self._most_scored]
        scored_labels = self._held_out_labels[self._scored]
        self.chance = float(np.bincount(scored_labels).max() / len(scored_labels))
        self.baseline: Baseline | None = Baseline.majority_class(self._training_labels, scored_labels)
        self._sample = training[0]

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        chosen = in_epochs(self._order, step, seed, batch_size)
        return self._batch([self._training[i] for i in chosen], self._training_labels[chosen])

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in in_batches(len(self._scored), batch_size):
            chosen = self._scored[rows]
            yield self._batch([self._held_out[i] for i in chosen], self._held_out_labels[chosen])

    def describe(self) -> str:
        tokens = f" ({self.tokenizer.vocab_size} tokens)" if self.tokenizer.vocab_size != BYTES else ""
        counts = Counter(self._training_labels.tolist())
        named = ", ".join(f"{name} {counts[i]}" for i, name in enumerate(self.classes[:20]))
        lines = [
            f"{self.name}: {self._named}, up to {self.length} tokens, tokenizer {self.tokenizer.name}{tokens}",
            f"training: {counted(len(self._training), 'item')} of {self.num_classes} classes ({printable(named)}"
            + (", ...)" if self.num_classes > 20 else ")")
            + ("; each class is shown as often as the largest" if self._balance else ""),
            f"held out: {counted(len(self._held_out), 'item')}, {len(self._scored):,} of them scored"
            + (", the same number of each class" if self._balance else "")
            + f"; chance {self.chance:.3f}",
            f"split: {self._rule}",
            str(self.overlap),
        ]
        lines += [f"note: {note}" for note in self._notes]
        lines.append(f"sample: {printable(self._sample.label)}")
        lines += [f"  {printable(text[:200])}" for text in self._sample.texts]
        return "\n".join(lines)

    def _laid_out(
        self, part: str, items: list[Labelled], columns: list[list[np.ndarray]]
    ) -> tuple[list[np.ndarray], Int[np.ndarray, " n"]]:
        """Sequences and classes of items, given the tokens of their first (and second) texts as columns."""
        dtype = np.uint8 if self.vocab_size <= BYTES else np.uint16 if self.vocab_size <= 1 << 16 else np.int32
        sequences = []
        for texts in zip(*columns, strict=True):
            pieces: list[Sequence[int] | np.ndarray] = []
            for text in texts:
                pieces += [[self._separator], text[: self._share_of_text]] if pieces else [text[: self._share_of_text]]
            sequences.append(np.concatenate([np.asarray(piece, dtype=dtype) for piece in pieces]))
        if cut := sum(any(len(text) > self._share_of_text for text in texts) for texts in zip(*columns, strict=True)):
            told = counted(cut, f"{part} item")
            self._notes.append(f"{told} cut: texts after {self._share_of_text} tokens")
        number = {label: i for i, label in enumerate(self.classes)}
        return sequences, np.array([number[item.label] for item in items], dtype=np.int64)

    def _batch(self, sequences: list[np.ndarray], labels: Int[np.ndarray, " b"]) -> Batch:
        inputs = np.zeros((len(sequences), self.length), dtype=np.int64)
        for row, tokens in enumerate(sequences):
            inputs[row, : len(tokens)] = tokens
        lengths = np.array([[len(tokens)] for tokens in sequences])
        valid = torch.from_numpy(np.arange(self.length) < lengths)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), valid)
