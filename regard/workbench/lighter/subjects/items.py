"""A user's data as inputs for transformers and timm models: windows of text, texts with classes, images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from regard.contract import Unsupported
from regard.retrofit.pictures import Some, View
from regard.tasks.document_classes import read_items
from regard.tasks.documents import Paths, class_folders, names_of
from regard.tasks.labelled import Labelled
from regard.tasks.matching import read_pairs
from regard.tasks.recognise import recognise

if TYPE_CHECKING:
    from jaxtyping import Int

LABELS = "labels"
"""The key for right answers in a batch, as in transformers."""
TABLES = (
    "a table with the columns text and label (or first, second and label), a folder with a sub-folder for each class, or text "
    "without classes"
)


class Items(Protocol):
    """Items on which a model is run."""

    def __len__(self) -> int: ...

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Model arguments for the items with these numbers, and :data:`LABELS` if right answers are known."""
        ...


@dataclass(frozen=True)
class Windows:
    """Windows of a text, with special tokens, and the target for each token if some are masked."""

    ids: Int[Tensor, "w n"]
    targets: Int[Tensor, "w n"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        chosen = torch.tensor(numbers)
        found = {"input_ids": self.ids[chosen]}
        return found if self.targets is None else {**found, LABELS: self.targets[chosen]}


@dataclass(frozen=True)
class Texts:
    """Texts, or pairs of texts, truncated to `length` tokens, and their classes if these matter."""

    items: Sequence[Labelled]
    classes: Sequence[int] | None
    tokenizer: Any
    length: int

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        columns = zip(*(self.items[i].texts for i in numbers), strict=True)
        found = self.tokenizer(
            *map(list, columns),
            truncation=True,
            max_length=self.length,
            padding=len(numbers) > 1,
            return_tensors="pt",
            verbose=False,
        )
        labels = {} if self.classes is None else {LABELS: torch.tensor([self.classes[i] for i in numbers])}
        return {**found, **labels}


@dataclass(frozen=True)
class Images:
    """Images as a timm model reads them, and their classes if they are the model's."""

    some: Some
    view: View
    labelled: bool

    def __len__(self) -> int:
        return len(self.some)

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        chosen = self.some.at(torch.tensor(numbers))
        return {"x": self.view.normal(chosen.pixels), **({LABELS: chosen.labels} if self.labelled else {})}


def read_labelled(data: Paths) -> list[Labelled] | None:
    """Read texts with classes, without duplicates; None if the data are text without classes.

    Raises:
        Unsupported: for tables without such columns, and for files that are not text.
    """
    places = [data] if isinstance(data, str | Path) else list(data)
    options: dict[str, Any] = {}
    if len(places) == 1 and Path(places[0]).is_dir() and len(class_folders(Path(places[0]))) > 1:
        task = "documents"
    else:
        try:
            task, options = recognise(data)
        except Unsupported as error:
            if "--task" not in str(error):
                raise
            raise Unsupported(f"{names_of(data)} without such columns", supported=TABLES) from None
    if task == "text":
        return None
    if task not in ("documents", "matching"):
        raise Unsupported(f"{names_of(data)}, which are data for the task {task}", supported=TABLES)
    whole = places[0] if len(places) == 1 else data
    items, _ = read_items(whole, **options) if task == "documents" else read_pairs(whole, **options)
    return list({item.texts: item for item in items}.values())


def classes_of(items: Sequence[Labelled], config: Any) -> list[int]:
    """The class indices of texts in a transformers model, looked up by class name or number.

    Raises:
        Unsupported: for classes that the model does not know.
    """
    names = {str(name).casefold(): int(number) for number, name in config.id2label.items()}
    names |= {str(number): int(number) for number in config.id2label}
    unknown = sorted({item.label for item in items if item.label.casefold() not in names})
    if unknown:
        told = [str(config.id2label[number]) for number in sorted(config.id2label)]
        raise Unsupported(
            f"the class {unknown[0]}, which the model does not know",
            supported=", ".join(told[:20]) + f" or their numbers, 0 to {len(told) - 1}",
            nearest="the texts without classes, which are compared with the original's answers",
        )
    return [names[item.label.casefold()] for item in items]
