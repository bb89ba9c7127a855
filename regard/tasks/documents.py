"""Read a user's text (files, folders, JSON lines, the default corpus) and report clearly what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.contract import Unsupported, closest
from regard.measurement.units import counted

Paths = str | Path | Sequence[str | Path]

JSON_LINES = (".jsonl", ".ndjson")
_PROSE = {".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".srt", ".po"}
_RECORDS = {
    ".html",
    ".htm",
    ".xml",
    ".csv",
    ".tsv",
    ".json",
    ".yaml",
    ".yml",
    ".toml",
    ".ini",
    ".cfg",
    ".log",
    ".ipynb",
}
_NATIVE_CODE = {".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".rs", ".go", ".swift", ".cs", ".f90", ".java", ".kt"}
_SCRIPTS = {".py", ".pyi", ".js", ".mjs", ".ts", ".tsx", ".jsx", ".css", ".sql", ".sh", ".rb", ".php", ".pl", ".lua"}
_SCIENCE = {".scala", ".r", ".jl", ".hs", ".ml", ".m"}
TEXT_SUFFIXES = frozenset(_PROSE | _RECORDS | _NATIVE_CODE | _SCRIPTS | _SCIENCE | set(JSON_LINES))
"""Suffixes of the files read from a folder that has any of them; a file named directly may have any suffix."""

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_COPIES = frozenset({"encodings", "distutils"})
"""Parts of the library whose files are near copies of each other, which would leak training text into held-out text."""


OWN, RECORDS = ("results.db", "retrofit.json", "retrofits.json"), ("training.json", "compression.json")
"""Files in the output folders of commands; the last two names others may use too."""


@dataclass(frozen=True)
class Document:
    """A unit of text that is never divided between training and held-out data.

    Attributes:
        name: the source of the text.
        text: UTF-8, ending with a newline.
    """

    name: str
    text: bytes

    @property
    def digest(self) -> bytes:
        """A 16-byte hash of the text."""
        return hashlib.blake2b(self.text, digest_size=16).digest()


def read_documents(data: Paths, field: str) -> tuple[list[Document], list[str]]:
    """Documents from files and folders, in a fixed order, and notes on what was left out.

    A file is a document; in JSON lines (``.jsonl``, ``.ndjson``) each line is one. Folders are read recursively in
    sorted order, without hidden files and without following links to folders or out of the folder. In a folder, files
    with a suffix of :data:`TEXT_SUFFIXES` are read or, if there are none, all files that hold text. Documents must be
    valid UTF-8; a missing final newline is added.

    Args:
        field: field of the JSON objects that holds the text, or a conversation (see :func:`text_of`).

    Raises:
        Unsupported: for data that are missing, empty, binary or unreadable.
    """
    paths = [data] if isinstance(data, str | Path) else list(data) if isinstance(data, Sequence) else [data]
    for path in paths:
        if not isinstance(path, str | Path) or not str(path):
            raise Unsupported(f"data={path!r}", supported="a text file, a folder, or a list of them")
    if not paths:
        raise Unsupported("no data at all", supported="a text file, a folder, or a list of them")
    documents: list[Document] = []
    notes: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            found, note = _read_folder(path, field)
            documents += found
            notes += note
        else:
            found = _read_file(_existing(path), file_name(path.name), field)
            if not found:
                raise Unsupported(f"{path}, which holds no text", supported="a file with some text in it")
            documents += found
    return documents, notes


def read_standard_library() -> tuple[list[Document], list[str]]:
    """The sources of this Python's standard library, without tests: about 10 MB of code and docstrings.

    They differ between Python versions, so scores on them are comparable only within one installation.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    skipped = 0
    for path in walk(root, _NOT_LIBRARY | _COPIES)[0]:
        if path.suffix != ".py":
            continue
        text = path.read_bytes()
        if _why_not_text(text):
            skipped += 1
        elif text.strip():
            documents.append(Document(file_name(path.relative_to(root)), _end_with_newline(text)))
    if not documents:
        raise Unsupported(
            "the default corpus, since this Python has no standard library sources on disk",
            supported="data=FILE or data=FOLDER",
        )
    return documents, [f"{skipped} files that are not UTF-8 left out"] if skipped else []


def names_of(data: Paths) -> str:
    """The names of files, without their folders."""
    names = [file_name(Path(path).name or path) for path in ([data] if isinstance(data, str | Path) else data)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def file_name(path: str | Path) -> str:
    """The path in a form that any terminal and database accepts: unprintable or non-UTF-8 characters are escaped."""
    return "".join(
        c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in Path(path).as_posix()
    )


def printable(text: str) -> str:
    """Text on one line, safe for a terminal: newlines become a mark, other control characters dots."""
    return "".join("\u23ce" if c == "\n" else c if c.isprintable() else "\u00b7" for c in text)


def shortened(text: str) -> str:
    """The beginning of a text, quoted and on one line."""
    return repr(printable(text if len(text) <= 40 else text[:39] + "…"))


def overlap_note(count: int, what: str, validation: Paths | None, first: str) -> str:
    """The warning about held-out items that also occur in the training data.

    Args:
        count: number of training items that are also held out.
        what: what one of the items is.
        validation: the held-out data; None for those of a packaged data set.
        first: the first of these items.
    """
    named = "the held-out data" if validation is None else f"the held-out data ({names_of(validation)})"
    told = f"{counted(count, what)} of {named} also in the training data"
    return f"{told}: not trained on; the first: {shortened(first)}"


def nearest_path(path: Path) -> str:
    """An existing path with a name similar to `path`: in its folder, or in the nearest existing folder above."""
    missing, parent = path, path.parent
    while not parent.is_dir() and parent != parent.parent:
        missing, parent = parent, parent.parent
    try:
        names = sorted(os.listdir(parent))
    except OSError:
        return ""
    name = closest(missing.name, (name for name in names if name != missing.name))
    return str(parent / name) if name else ""


def _existing(path: Path) -> Path:
    if not path.exists():
        raise Unsupported(
            f"{path}, which does not exist", supported="a text file, a folder or JSON lines", nearest=nearest_path(path)
        )
    if not path.is_file():
        raise Unsupported(
            f"{path}, which is neither a file nor a folder", supported="a text file, a folder or JSON lines"
        )
    return path


def one_folder(data: Paths, holds: str) -> Path:
    """The single folder that `data` names; raises Unsupported for anything else. `holds` says what should be in it."""
    paths = [data] if isinstance(data, str | Path) else list(data)
    if len(paths) != 1 or not Path(paths[0]).is_dir():
        named = ", ".join(map(str, paths)) or "nothing"
        raise Unsupported(f"data={named}, which is not a folder", supported=f"one folder of {holds}")
    return Path(paths[0])


def walk(root: Path, without: frozenset[str] = frozenset()) -> tuple[list[Path], list[str]]:
    """The files of a folder and its sub-folders, in sorted order, and notes on links that are not followed and on
    sub-folders with results of regard, which are no data.

    Leaves out hidden files, links to folders and links out of `root`.
    """
    files: list[Path] = []
    outside = results = 0
    waiting = [str(root)]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                listed = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            raise Unsupported(
                f"{folder}, which cannot be read ({error.strerror})", supported="readable folders"
            ) from None
        if folder != str(root) and any(_is_of_results(entry) for entry in listed):
            results += 1
            continue
        inside = []
        for entry in listed:
            if entry.is_symlink() and not leads_inside(entry.path, root):
                outside += 1
            elif entry.is_dir(follow_symlinks=False):
                inside += [entry.path] if entry.name not in without else []
            elif not entry.is_dir():
                files.append(Path(entry.path))
        waiting += reversed(inside)
    notes = [f"{names_of(root)}: {counted(outside, 'link')} out of it not followed"] if outside else []
    if results:
        notes.append(f"{names_of(root)}: {counted(results, 'folder')} with results of regard not read")
    return files, notes


def _is_of_results(entry: os.DirEntry[str]) -> bool:
    """Whether a file is the record that a command keeps in its output folder."""
    if entry.name not in (*OWN, *RECORDS) or not entry.is_file(follow_symlinks=False):
        return False
    if entry.name in OWN:
        return True
    with suppress(OSError), open(entry.path, "rb") as file:
        return b'"regard' in file.read(256)
    return False


def leads_inside(path: str | Path, root: Path) -> bool:
    """Return whether a link leads into the folder `root`."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def class_folders(folder: Path) -> list[Path]:
    """The sub-folders of a folder, in sorted order, without hidden ones; refuses links that lead out of the folder."""
    try:
        entries = sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise Unsupported(f"{folder}, which cannot be read ({error.strerror})", supported="a readable folder") from None
    classes = [Path(entry.path) for entry in entries if entry.is_dir()]
    for path in classes:
        if path.is_symlink() and not leads_inside(path, folder):
            raise Unsupported(
                f"{path}, a link that leads out of {folder}",
                supported="sub-folders that lie in it",
                nearest=f"a copy of {os.path.realpath(path)}",
            )
    return classes


def _read_folder(root: Path, field: str) -> tuple[list[Document], list[str]]:
    documents: list[Document] = []
    others: Counter[str] = Counter()
    empty = 0
    paths, notes = walk(root)
    by_suffix = any(path.suffix.lower() in TEXT_SUFFIXES for path in paths)
    for path in paths:
        if not (path.suffix.lower() in TEXT_SUFFIXES if by_suffix else _is_text(path)):
            others[printable(path.suffix) or "no suffix"] += 1
            continue
        found = _read_file(_existing(path), file_name(path.relative_to(root)), field)
        empty += not found
        documents += found
    listed = ", ".join(f"{suffix}: {count}" for suffix, count in others.most_common(5))
    if not documents:
        raise Unsupported(
            f"the folder {root}, which holds no text" + (f" (other files: {listed})" if others else ""),
            supported="UTF-8 text, best in files ending in " + " ".join(sorted(TEXT_SUFFIXES)),
        )
    if not by_suffix:
        notes.append(f"{names_of(root)}: no file has a suffix of text, so that all were read which are UTF-8 text")
    if others:
        what = (
            counted(others.total(), "file") + " with other suffixes"
            if by_suffix
            else counted(others.total(), "other file")
        )
        notes.append(f"{names_of(root)}: {what} not read ({listed})")
    if empty:
        notes.append(f"{names_of(root)}: {counted(empty, 'empty file')} left out")
    return documents, notes


def _read_file(path: Path, name: str, field: str) -> list[Document]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise Unsupported(
            f"{path}, which cannot be read ({error.strerror})", supported="a readable text file"
        ) from None
    text = text.removeprefix(b"\xef\xbb\xbf")
    reason = _why_not_text(text)
    if reason:
        wide = text.startswith((b"\xff\xfe", b"\xfe\xff"))
        encoding = "UTF-16" if wide else "LATIN1"
        raise Unsupported(
            f"{path}, which is not UTF-8 text ({reason})",
            supported="UTF-8 text; decompress or convert it first",
            nearest=f"iconv -f {encoding} -t UTF-8 {path.name}" if wide or b"\0" not in text else "",
        )
    if path.suffix.lower() in JSON_LINES:
        return _parse_json_lines(text, path, name, field)
    return [Document(name, _end_with_newline(text))] if text.strip() else []


def json_objects(path: Path, lines: Iterable[str | bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line of JSON lines; blank lines are skipped."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            told = "nested too deep" if isinstance(error, RecursionError) else error
            raise Unsupported(
                f"{path}, whose line {number} is not JSON ({told})", supported="one JSON object on each line"
            ) from None
        if not isinstance(record, dict):
            raise Unsupported(f"{path}, whose line {number} is not a JSON object", supported="one on each line")
        yield number, record


def _parse_json_lines(text: bytes, path: Path, name: str, field: str) -> list[Document]:
    documents = []
    for number, record in json_objects(path, text.split(b"\n")):
        value = text_of(record.get(field))
        if value is None:
            fields = [key for key, item in record.items() if text_of(item) is not None]
            raise Unsupported(
                f"{path}, whose line {number} has no text in the field {field!r}",
                supported="a field with text: " + (", ".join(fields) or "none on this line"),
                nearest=f"field={closest(field, fields) or fields[0]}" if fields else "",
            )
        try:
            encoded = value.encode()
        except UnicodeEncodeError:
            raise Unsupported(
                f"{path}, whose line {number} holds half of a surrogate pair", supported="text that UTF-8 can write"
            ) from None
        if value.strip():
            documents.append(Document(f"{name}:{number}", _end_with_newline(encoded)))
    return documents


def text_of(value: Any) -> str | None:
    """Text of a JSON field: a string, or the turns of a conversation; None for anything else.

    A turn is an object with its text, or with parts that are such objects, in ``content``, ``text`` or ``value``, and
    the speaker in ``role`` or ``from``. A turn whose text is null (a tool call) is left out.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        return None
    turns = []
    for turn in value:
        name = next((n for n in ("content", "text", "value") if n in turn), None) if isinstance(turn, dict) else None
        if name is None:
            return None
        if turn[name] is None:
            continue
        words = text_of(turn[name])
        if words is None:
            return None
        speaker = turn.get("role", turn.get("from"))
        turns.append(f"{speaker}: {words}" if isinstance(speaker, str) else words)
    return "\n".join(turns)


def _why_not_text(text: bytes) -> str:
    zero = text.find(b"\0")
    if zero >= 0:
        return f"a zero byte at offset {zero}"
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return f"byte 0x{text[error.start]:02x} at offset {error.start}"
    return ""


def _is_text(path: Path) -> bool:
    """Return whether a file holds UTF-8 text; reading stops early if there is a zero byte near its beginning."""
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
            return b"\0" not in head and not _why_not_text(head + file.read())
    except OSError:
        return False


def _end_with_newline(text: bytes) -> bytes:
    return text if text.endswith(b"\n") else text + b"\n"
