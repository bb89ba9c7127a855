"""Read a user's table (CSV, TSV, JSON, Parquet), and report clearly what is wrong with it and on which line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.contract import Unsupported, closest
from regard.measurement.units import counted
from regard.tasks.documents import JSON_LINES, Paths, file_name, json_objects, names_of, nearest_path

if TYPE_CHECKING:
    from jaxtyping import Float

PARQUET = (".parquet", ".pq")
TABLE_SUFFIXES = (".csv", ".tsv", ".tab", ".json", *JSON_LINES, *PARQUET)
_KINDS = "CSV, TSV, JSON lines, a list of objects in JSON, or Parquet"
SHEETS = (".xlsx", ".xls", ".ods")
_OTHERS = {
    **dict.fromkeys(SHEETS, "save the sheet as CSV"),
    ".gz": "decompress it",
    ".zip": "decompress it",
    ".xz": "decompress it",
    ".zst": "decompress it",
}
_EMPTY = frozenset({"", "na", "n/a", "nan", "null", "none"})
_DELIMITERS = ",\t;|"
_SNIFFED = 1 << 16
_LONGEST_FIELD = 1 << 30
_YEAR_LAST = re.compile(r"\s*(\d\d?)([./-])(\d\d?)\2(\d{4})((?:[ T].*)?)$")
_LARGEST_NUMBER = float(np.finfo(np.float32).max)
_FIRST_SECONDS, _FIRST_MILLISECONDS, _LAST_MILLISECONDS = 10**8, 10**11, 10**14


@dataclass(frozen=True)
class Table:
    """Rows of named columns.

    Attributes:
        columns: cells of each column: text from delimited files, otherwise whatever the file holds; None where a record
            lacks the field.
        places: location of each row, such as ``demand.csv, line 5``.
        notes: notes on what was left out or assumed.
        name: name of the file or files.
    """

    columns: dict[str, Sequence[Any]]
    places: Sequence[str]
    notes: list[str] = field(default_factory=list)
    name: str = "the table"

    def __len__(self) -> int:
        return len(self.places)

    def column(self, name: Any, option: str) -> Sequence[Any]:
        """Cells of a column; raises Unsupported, with the nearest name, if there is no such column.

        Args:
            option: task option that named the column.
        """
        if str(name) not in self.columns:
            near = closest(str(name), self.columns)
            unnamed = not all(map(self.is_named, self.columns))
            raise Unsupported(
                f"{option}={name}, which is not a column of {self.name}",
                supported=", ".join(self.columns),
                nearest=f"{option}={near}" if near else "a first line that names the columns" if unnamed else "",
            )
        return self.columns[str(name)]

    def is_named(self, column: str) -> bool:
        """Return whether a column's name is not a number or time, as it would be if the first line held data."""
        return _number(column) is None and _time(column) is None

    def left_out(self, kept: Sequence[bool], lacking: str) -> list[str]:
        """A note on the rows that are not kept because they lack something; empty if all are kept."""
        if all(kept):
            return []
        count, first = len(kept) - sum(kept), self.places[list(kept).index(False)]
        return [f"{self.name}: {counted(count, 'row')} without {lacking} left out, the first: {first}"]

    def numbers(self, name: Any, option: str) -> Float[np.ndarray, " n"]:
        """A column of numbers, nan where a cell is empty; refuses text and infinities, naming the line."""
        cells = self.column(name, option)
        found = np.empty(len(cells))
        for i, cell in enumerate(cells):
            number = _number(cell)
            if number is None:
                comma = isinstance(cell, str) and _number(cell.replace(",", ".")) is not None
                raise Unsupported(
                    f"{self.places[i]}, where the column {name} has {_shown(cell)}",
                    supported="numbers, or empty cells",
                    nearest=f"a decimal point: {cell.strip().replace(',', '.')}" if comma else "",
                )
            found[i] = number
        return found

    def texts(self, name: Any, option: str) -> list[str]:
        """A column of text, "" where a cell is empty; numbers as they are written. Refuses anything else."""
        cells = self.column(name, option)
        found = []
        for i, cell in enumerate(cells):
            if isinstance(cell, dict | list | tuple | bytes):
                raise Unsupported(f"{self.places[i]}, where the column {name} has {_shown(cell)}", supported="text")
            text = "" if cell is None or cell != cell else str(cell)
            try:
                text.encode()
            except UnicodeEncodeError:
                raise Unsupported(
                    f"{self.places[i]}, where the column {name} has half of a surrogate pair",
                    supported="text that UTF-8 can write",
                ) from None
            found.append(text)
        return found

    def times(self, name: Any, option: str) -> np.ndarray:
        """A column of times as ``datetime64[s]``; those with a zone are converted to UTC.

        Accepts ISO 8601 (also with ``/`` between year, month and day, and months without a day), seconds or
        milliseconds since 1970, and dates such as 31/12/2024 or 12/31/2024 if the column shows which number is the day.
        """
        cells = year_first(self.column(name, option))
        found = np.empty(len(cells), dtype="datetime64[s]")
        zoned = set()
        for i, cell in enumerate(cells):
            time = _time(cell)
            if time is None:
                raise Unsupported(
                    f"{self.places[i]}, where the column {name} has {_shown(cell)}",
                    supported="times as 2024-01-31 18:30:00 (ISO 8601), seconds since 1970, or 31/01/2024 where a row "
                    "tells which is the day",
                )
            zoned.add(time.tzinfo is not None)
            if len(zoned) == 2:
                raise Unsupported(
                    f"{self.places[i]}, where the column {name} begins to mix times with and without a zone",
                    supported="a zone on each time, or on none",
                )
            found[i] = time.replace(tzinfo=None)
        return found

    def numeric_columns(self) -> list[str]:
        """Names of the columns whose non-empty cells are mostly numbers; :meth:`numbers` reports the others."""
        found = []
        for name, cells in self.columns.items():
            numbers = [number for number in map(_number, cells) if number is None or number == number]
            if 2 * sum(number is not None for number in numbers) > len(numbers):
                found.append(name)
        return found

    def time_columns(self) -> list[str]:
        """Names of the columns whose cells are mostly dates and times, not counting seconds since 1970."""
        return [
            name
            for name, cells in self.columns.items()
            if 2 * sum(_number(c) is None and _time(c) is not None for c in year_first(cells)) > len(cells)
        ]


def read_table(data: Paths, *, names: tuple[str, ...] = ()) -> Table:
    """Read the table in a file, or in several files with the same columns, concatenated.

    Delimited text is UTF-8, with or without a byte order mark; its first line names the columns, and the delimiter
    (comma, tab, semicolon or bar) is detected. Blank lines are skipped.

    Args:
        data: a file or a list of files; .json, .jsonl, .ndjson, .parquet and .pq files are read as such, others as
            delimited text.
        names: names for columns of delimited text without a header: used if the first line has as many columns and none
            of these names.

    Raises:
        Unsupported: for data that are missing, empty, broken or not a table, naming the line where possible.
    """
    paths = [data] if isinstance(data, str | Path) else list(data) if isinstance(data, Sequence) else [data]
    for path in paths:
        if not isinstance(path, str | Path) or not str(path):
            raise Unsupported(f"data={path!r}", supported=f"a table ({_KINDS}), or a list of them")
    if not paths:
        raise Unsupported("no data at all", supported=f"a table ({_KINDS}), or a list of them")
    tables = [_read(Path(path), names) for path in paths]
    first = tables[0]
    if len(tables) == 1:
        return replace(first, name=names_of(data))
    for path, table in zip(paths, tables, strict=True):
        if set(table.columns) != set(first.columns):
            odd = sorted(set(table.columns) ^ set(first.columns))
            raise Unsupported(
                f"{path}, whose columns differ from those of {paths[0]} ({', '.join(odd[:5])})",
                supported="tables with the same columns: " + ", ".join(first.columns),
            )
    return Table(
        {name: [cell for table in tables for cell in table.columns[name]] for name in first.columns},
        [place for table in tables for place in table.places],
        [note for table in tables for note in table.notes],
        names_of(data),
    )


def _read(path: Path, names: tuple[str, ...]) -> Table:
    suffix = path.suffix.lower()
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in TABLE_SUFFIXES)
        raise Unsupported(
            f"the folder {path} as a table",
            supported=f"a file ({_KINDS}), or several",
            nearest=str(path / inside[0]) if inside else "",
        )
    if not path.exists():
        raise Unsupported(f"{path}, which does not exist", supported=f"a file ({_KINDS})", nearest=nearest_path(path))
    if not path.is_file():
        raise Unsupported(f"{path}, which is not a file", supported=f"a file ({_KINDS})")
    if suffix in _OTHERS:
        raise Unsupported(f"{path} as a table", supported=f"{_KINDS}", nearest=_OTHERS[suffix])
    if suffix in PARQUET:
        table = _read_parquet(path)
    else:
        text = _decode(path)
        if suffix in JSON_LINES:
            table = _of_records(path, "line", json_objects(path, text.split("\n")))
        elif suffix == ".json":
            table = _of_records(path, "record", enumerate(_json_list(path, text), start=1))
        else:
            table = _read_delimited(path, text, names)
    if not len(table):
        raise Unsupported(f"{path}, which holds no rows", supported="a table with some rows in it")
    return table


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise Unsupported(f"{path}, which cannot be read ({error.strerror})", supported="a readable file") from None
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Unsupported(
            f"{path}, which is UTF-16", supported="UTF-8", nearest=f"iconv -f UTF-16 -t UTF-8 {path.name}"
        )
    if (zero := raw.find(b"\0")) >= 0:
        raise Unsupported(f"{path}, which is not text (a zero byte at offset {zero})", supported=_KINDS)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        told = f"{path}, whose line {line} is not UTF-8 (byte 0x{raw[error.start]:02x})"
    other = next((n for n, part in enumerate(raw.split(b"\n"), 1) if not part.isascii() and _is_utf8(part)), None)
    raise Unsupported(
        told + ("" if other is None else f", while line {other} is: it mixes encodings"),
        supported="UTF-8 throughout",
        nearest=f"iconv -f LATIN1 -t UTF-8 {path.name}" if other is None else f"repair line {line}",
    )


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_delimited(path: Path, text: str, names: tuple[str, ...]) -> Table:
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else _find_delimiter(text)
    named, notes = file_name(path.name), []
    try:
        rows = list(_rows(path, text, delimiter, csv.QUOTE_MINIMAL))
    except Unsupported:
        # Parallel text is often tab-separated, with quotation marks that are part of the text.
        if delimiter != "\t":
            raise
        rows = list(_rows(path, text, delimiter, csv.QUOTE_NONE))
        notes.append(f"{named}: quotation marks read as plain characters")
    if not rows:
        return Table({}, [])
    header = [cell.strip() or f"column {i + 1}" for i, cell in enumerate(rows[0][1])]
    if names and len(header) == len(names) and not set(names) & set(header):
        header = list(names)
        notes.append(f"{named}: no column is named {' or '.join(names)}, so its first line is data too")
    else:
        rows = rows[1:]
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        raise Unsupported(f"{path}, which names the column {repeated[0]} twice", supported="a name for each column")
    cells = zip(*(row for _, row in rows), strict=True) if rows else ([] for _ in header)
    columns: dict[str, Sequence[Any]] = dict(zip(header, cells, strict=True))
    return Table(columns, [f"{named}, line {line}" for line, _ in rows], notes)


def _rows(path: Path, text: str, delimiter: str, quoting: int) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row; all rows have as many cells as the first."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    line, width = 1, 0
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                width = width or len(row)
                if len(row) != width:
                    raise Unsupported(
                        f"{path}, whose line {line} has {len(row)} cells", supported=f"{width}, as the first line has"
                    )
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise Unsupported(
            f"{path}, whose line {line} cannot be read ({error})", supported="quotation marks in pairs"
        ) from None
    finally:
        csv.field_size_limit(before)


def _find_delimiter(text: str) -> str:
    """The delimiter that gives the first lines the most columns, equally many on each line."""
    sample = text[:_SNIFFED]
    if len(text) > _SNIFFED:
        sample = sample[: sample.rfind("\n") + 1] or sample
    found = {}
    for delimiter in _DELIMITERS:
        widths = {len(row) for row in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter) if row}
        if len(widths) == 1:
            found[delimiter] = widths.pop()
    if found and max(found.values()) > 1:
        return max(found, key=lambda delimiter: found[delimiter])
    first = sample.partition("\n")[0]
    return max(_DELIMITERS, key=first.count)


def _json_list(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        told = "nested too deep" if isinstance(error, RecursionError) else error
        raise Unsupported(f"{path}, which is not JSON ({told})", supported="a list of objects") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise Unsupported(f"{path}, which is not a list of objects", supported='[{"column": ...}, ...]')
    return records


def _of_records(path: Path, each: str, numbered: Iterable[tuple[int, dict[str, Any]]]) -> Table:
    records, named = list(numbered), file_name(path.name)
    fields = list(dict.fromkeys(name for _, record in records for name in record))
    columns: dict[str, Sequence[Any]] = {name: [record.get(name) for _, record in records] for name in fields}
    return Table(columns, [f"{named}, {each} {number}" for number, _ in records])


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise Unsupported(
            f"{path} without pyarrow, which reads Parquet",
            supported="CSV, TSV or JSON lines, or the extra",
            nearest="pip install 'regard[tables]'",
        ) from None
    try:
        table = parquet.read_table(path)
        columns: dict[str, Sequence[Any]] = {}
        for name, column in zip(table.column_names, table.columns, strict=True):
            if pyarrow.types.is_timestamp(column.type):  # nanoseconds would need pandas
                column = column.cast(pyarrow.timestamp("us", tz=column.type.tz), safe=False)
            columns[str(name)] = column.to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise Unsupported(f"{path}, which cannot be read as Parquet ({error})", supported=_KINDS) from None
    named = file_name(path.name)
    return Table(columns, [f"{named}, row {i + 1}" for i in range(table.num_rows)])


def _number(cell: Any) -> float | None:
    """A cell's number; nan for an empty cell, None for anything that is not a finite float32 number."""
    if cell is None:
        return np.nan
    if isinstance(cell, str):
        if cell.strip().lower() in _EMPTY:
            return np.nan
        if "_" in cell:  # float() would read 1_000
            return None
    elif isinstance(cell, date) or not hasattr(cell, "__float__"):
        return None
    try:
        number = float(cell)
    except (ValueError, OverflowError):
        return None
    return None if abs(number) > _LARGEST_NUMBER else number


def year_first(cells: Sequence[Any]) -> Sequence[Any]:
    """Rewrite a column's dates such as 31/12/2024 as 2024-12-31, unless the column does not show which is the day.

    In dates with full stops the day is first; otherwise the day is the number that exceeds 12 somewhere, if the other
    never does.
    """
    parts = [_YEAR_LAST.match(cell) if isinstance(cell, str) else None for cell in cells]
    dates = [part for part in parts if part is not None]
    if not dates:
        return cells
    day_first = any(part[2] == "." or int(part[1]) > 12 for part in dates)
    if day_first == any(int(part[3]) > 12 for part in dates):
        return cells
    day, month = (1, 3) if day_first else (3, 1)
    return [
        cell if part is None else f"{part[4]}-{part[month]:0>2}-{part[day]:0>2}{part[5]}"
        for cell, part in zip(cells, parts, strict=True)
    ]


def _time(cell: Any) -> datetime | None:
    """A cell's time, in UTC if it has a time zone; None for anything else, and outside the years 1 to 9999."""
    time = _local_time(cell)
    try:
        return time if time is None or time.tzinfo is None else time.astimezone(UTC)
    except OverflowError:
        return None


def _local_time(cell: Any) -> datetime | None:
    if isinstance(cell, datetime):
        return cell.replace(microsecond=0)
    if isinstance(cell, date):
        return datetime(cell.year, cell.month, cell.day)
    if isinstance(cell, str):
        text = re.sub(r"^(\d{4})/(\d\d?)/(\d\d?)", lambda m: f"{m[1]}-{m[2]:0>2}-{m[3]:0>2}", cell.strip())
        text = re.sub(r"^\d{4}-\d\d$", r"\g<0>-01", text)
        text = re.sub(r"([ T])(\d:)", r"\g<1>0\2", text)
        if "-" in text:
            try:
                return datetime.fromisoformat(text).replace(microsecond=0)
            except ValueError:
                return None
    number = _number(cell)
    if number is None or not _FIRST_SECONDS <= number < _LAST_MILLISECONDS:
        return None
    seconds = number / 1000 if number >= _FIRST_MILLISECONDS else number
    return datetime.fromtimestamp(int(seconds), UTC).replace(tzinfo=None)


def _shown(cell: Any) -> str:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return "nothing"
    text = repr(cell)
    return text if len(text) <= 60 else text[:57] + "..."
