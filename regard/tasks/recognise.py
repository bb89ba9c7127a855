"""Choose the task that fits a user's files, if none is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.contract import Unsupported
from regard.tasks.documents import JSON_LINES, TEXT_SUFFIXES, Paths, json_objects, text_of, walk
from regard.tasks.idx import has_idx
from regard.tasks.image_files import IMAGE_SUFFIXES
from regard.tasks.segmentation.folders import holds_volumes
from regard.tasks.tables import SHEETS, TABLE_SUFFIXES, Table, read_table
from regard.tasks.ts_files import is_series_file

Chosen = tuple[str, dict[str, Any]]

LABELS = ("label", "class", "category", "target", "topic", "intent", "sentiment", "rating", "stars", "score")
_LONG = 20
"""Mean number of characters from which a column counts as text; classes are shorter."""
_MOST_CLASSES = 100
_NEEDS = (
    "--task documents:text=COLUMN,label=COLUMN (classes), --task matching:first=COLUMN,second=COLUMN,label=COLUMN, "
    "--task paraphrase:source=COLUMN,target=COLUMN, --task forecast:time=COLUMN,target=COLUMN, "
    "or --task text for the file as it is"
)


@dataclass(frozen=True)
class _Columns:
    """Names of a table's columns by content; a numeric column with few distinct values also counts as classes."""

    times: list[str]
    numbers: list[str]
    texts: list[str]
    classes: list[str]

    @classmethod
    def of(cls, table: Table) -> _Columns:
        times, numbers = table.time_columns(), table.numeric_columns()
        found = cls(times, [name for name in numbers if name not in times], [], [])
        for name, cells in table.columns.items():
            words = [str(cell).strip() for cell in cells if isinstance(cell, str | int | float)]
            counts = Counter(word for word in words if word)
            if name in times or not counts:
                continue
            length = sum(len(word) * count for word, count in counts.items()) / counts.total()
            if min(counts.values()) > 1 and 2 <= len(counts) <= _MOST_CLASSES and length < _LONG:
                found.classes.append(name)
            elif name not in numbers and length >= _LONG and 2 * len(counts) > counts.total():
                found.texts.append(name)
        return found


def recognise(data: Paths) -> Chosen:
    """The task that fits the files, and the options that it needs.

    Files are text unless they are tables (see :mod:`regard.tasks.tables`), for which the columns decide, series
    (``.ts``), or folders of images. A folder with sub-folders images and masks is for segmentation, of volumes if it
    has NIfTI files.

    Raises:
        Unsupported: for a table whose columns fit no task or several tasks, with what to add.
    """
    paths = [Path(path) for path in ([data] if isinstance(data, str | Path) else data)]
    if len(paths) == 1 and all((paths[0] / part).is_dir() for part in ("images", "masks")):
        return "segmentation_3d" if holds_volumes(paths[0]) else "segmentation", {}
    if len(paths) == 1 and paths[0].is_dir():
        suffixes = [path.suffix.lower() for path in walk(paths[0])[0]]
        images, texts = (sum(suffix in kind for suffix in suffixes) for kind in (IMAGE_SUFFIXES, TEXT_SUFFIXES))
        return ("images" if images > texts or has_idx(paths[0]) else "text"), {}
    if all(path.suffix.lower() in IMAGE_SUFFIXES for path in paths):
        return "images", {}
    if all(is_series_file(path) for path in paths):
        return "time_series", {}
    if not all(path.suffix.lower() in (*TABLE_SUFFIXES, *SHEETS) for path in paths) or not _is_list(paths[0]):
        return "text", {}
    if all(path.suffix.lower() in JSON_LINES for path in paths) and (field := _field_of_text(paths[0])):
        return "text", {} if field == "text" else {"field": field}
    table = read_table(data)
    for name, cells in table.columns.items():
        if name in cells or not table.is_named(name):
            raise Unsupported(
                f"{table.name} without --task, where {name!r} is the name of a column and looks like a cell of it",
                supported="a first line that names the columns, as in text,label or date,sales",
            )
    return _named(table) or _by_contents(table)


def _is_list(path: Path) -> bool:
    """Return whether a file is a JSON list or not JSON at all; other JSON files are read as text."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return True
    with path.open("rb") as file:
        return file.read(1 << 10).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _field_of_text(path: Path) -> str | None:
    """The field of the first line that holds a conversation; else ``text``, if it is text with no class next to it."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        _, first = next(json_objects(path, file), (0, {}))
    talks = [name for name, value in first.items() if isinstance(value, list) and text_of(value) is not None]
    if len(talks) == 1:
        return talks[0]
    others = {name for name, value in first.items() if name != "text" and isinstance(value, str | int | float)}
    return "text" if isinstance(first.get("text"), str) and not others & set(LABELS) else None


def _named(table: Table) -> Chosen | None:
    """Choose a task by the column names that tasks use by default."""
    for task, names in (
        ("matching", ("first", "second", "label")),
        ("documents", ("text", "label")),
        ("paraphrase", ("source", "target")),
    ):
        if set(names) <= set(table.columns):
            return task, {}
    return None


def _by_contents(table: Table) -> Chosen:
    columns = _Columns.of(table)
    usual = [name for name in columns.classes if name.lower() in LABELS]
    labels = usual if len(usual) == 1 else columns.classes
    texts = columns.texts
    if len(texts) in (1, 2) and len(labels) == 1:
        if len(texts) == 1:
            return "documents", {"text": texts[0], "label": labels[0]}
        return "matching", {"first": texts[0], "second": texts[1], "label": labels[0]}
    if len(texts) in (1, 2) and labels:
        which = "documents:text=" if len(texts) == 1 else "matching:first="
        rest = "" if len(texts) == 1 else f",second={texts[1]}"
        raise _undecided(
            columns,
            table,
            "label=COLUMN with one of " + ", ".join(labels),
            f"{which}{texts[0]}{rest},label={labels[0]}",
        )
    if len(texts) == 2:
        return "paraphrase", {"source": texts[0], "target": texts[1]}
    if len(columns.times) == 1 and columns.numbers:
        return _forecast(table, columns)
    raise _undecided(columns, table, _NEEDS, "text")


def _forecast(table: Table, columns: _Columns) -> Chosen:
    """Forecasting: the only possible target, and a column of groups if times occur twice."""
    times = table.columns[columns.times[0]]
    options: dict[str, Any] = {}
    if len(set(times)) < len(times):
        apart = [
            name for name in columns.classes if len(set(zip(times, table.columns[name], strict=True))) == len(times)
        ]
        options = {"groups": apart[0]} if apart else {}
    targets = [name for name in columns.numbers if name not in options.values()]
    if len(targets) != 1:
        known = "".join(f",{option}={name}" for option, name in options.items())
        likely = next((name for name in targets if _is_measured(table.columns[name])), targets[0])
        raise _undecided(
            columns, table, "target=COLUMN with one of " + ", ".join(targets), f"forecast:target={likely}{known}"
        )
    return "forecast", options


def _is_measured(cells: Sequence[Any]) -> bool:
    """Return whether any number has a fraction, unlike row numbers, years and hours."""
    return any("." in str(cell).strip().removesuffix(".0") for cell in cells)


def _undecided(columns: _Columns, table: Table, supported: str, nearest: str) -> Unsupported:
    kinds = {
        "times": columns.times,
        "numbers": columns.numbers,
        "text": columns.texts,
        "classes": [name for name in columns.classes if name not in columns.numbers],
    }
    told = {name: kind for kind, names in kinds.items() for name in names}
    listed = ", ".join(f"{name} ({told.get(name, 'other')})" for name in table.columns)
    return Unsupported(
        f"{table.name} without --task, whose columns are {listed}", supported=supported, nearest=f"--task {nearest}"
    )
