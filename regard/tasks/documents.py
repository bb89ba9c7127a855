"""Reading a user's text: files, folders, JSON lines, the default corpus; and saying plainly what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from regard.contract import Unsupported, closest

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
"""Suffixes that are read in a folder; a file that is named itself may have any."""

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One unit of text, never divided between training and held-out data.

    Attributes:
        name: where it comes from.
        text: UTF-8, ending with a newline.
    """

    name: str
    text: bytes

    @property
    def digest(self) -> bytes:
        return hashlib.blake2b(self.text, digest_size=16).digest()


def read_documents(data: Paths, field: str) -> tuple[list[Document], list[str]]:
    """Documents of files and folders in a fixed order, and notes on what was left out.

    A file is a document; in JSON lines (``.jsonl``, ``.ndjson``) each line is one. Folders are read recursively in
    sorted order, without hidden files and without following links to folders; of their files, those with a suffix of
    :data:`TEXT_SUFFIXES`. Documents are strict UTF-8; a missing last newline is added.

    Args:
        field: of the JSON objects that holds the text.

    Raises:
        Unsupported: for what is missing, empty, binary or unreadable.
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
            found = _read_file(_existing(path), path.name, field)
            if not found:
                raise Unsupported(f"{path}, which holds no text", supported="a file with some text in it")
            documents += found
    return documents, notes


def read_standard_library() -> tuple[list[Document], list[str]]:
    """The sources of this Python's standard library without its tests: about 12 MB of code and documentation strings.

    It differs between versions of Python, so scores on it compare within one installation only.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    skipped = 0
    for path in _walk(root, _NOT_LIBRARY):
        if path.suffix != ".py":
            continue
        text = path.read_bytes()
        if _why_not_text(text):
            skipped += 1
        elif text.strip():
            documents.append(Document(path.relative_to(root).as_posix(), _end_with_newline(text)))
    if not documents:
        raise Unsupported(
            "the default corpus, since this Python has no standard library sources on disk",
            supported="data=FILE or data=FOLDER",
        )
    return documents, [f"{skipped} files that are not UTF-8 left out"] if skipped else []


def names_of(data: Paths) -> str:
    """The names of some files, without their folders."""
    names = [Path(path).name or str(path) for path in ([data] if isinstance(data, str | Path) else data)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def printable(text: str) -> str:
    """Text on one line that is safe on a terminal: newlines as a mark, other control characters as dots."""
    return "".join("\u23ce" if c == "\n" else c if c.isprintable() else "\u00b7" for c in text)


def shortened(text: str) -> str:
    """The beginning of a text in quotation marks, on one line."""
    return repr(printable(text if len(text) <= 40 else text[:39] + "…"))


def overlap_note(count: int, what: str, validation: Paths | None, first: str) -> str:
    """What is said when training data are also held out.

    Args:
        count: of training items that are.
        what: they are, in the plural.
        validation: the held-out data, None for those of a packaged data set.
        first: the first of them.
    """
    named = "the held-out data" if validation is None else f"the held-out data ({names_of(validation)})"
    return f"{count} {what} of {named} are also in the training data: not trained on; the first: {shortened(first)}"


def nearest_path(path: Path) -> str:
    """An existing path spelled like `path`: in its folder, or in the nearest folder above that exists."""
    missing, parent = path, path.parent
    while not parent.is_dir() and parent != parent.parent:
        missing, parent = parent, parent.parent
    try:
        names = sorted(os.listdir(parent))
    except OSError:
        return ""
    name = closest(missing.name, names)
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


def _walk(root: Path, without: frozenset[str] = frozenset()) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise Unsupported(f"{error.filename}, which cannot be read ({error.strerror})", supported="readable folders")

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in without)
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name)


def _read_folder(root: Path, field: str) -> tuple[list[Document], list[str]]:
    documents: list[Document] = []
    others: Counter[str] = Counter()
    empty = 0
    for path in _walk(root):
        if path.suffix.lower() not in TEXT_SUFFIXES:
            others[path.suffix or "no suffix"] += 1
            continue
        found = _read_file(_existing(path), path.relative_to(root).as_posix(), field)
        empty += not found
        documents += found
    counted = ", ".join(f"{suffix}: {count}" for suffix, count in others.most_common(5))
    if not documents:
        raise Unsupported(
            f"the folder {root}, which holds no text" + (f" (other files: {counted})" if others else ""),
            supported="files ending in " + " ".join(sorted(TEXT_SUFFIXES)),
            nearest="name the files themselves, with any suffix" if others else "",
        )
    notes = []
    if others:
        notes.append(f"{root.name}: {others.total()} files with other suffixes not read ({counted})")
    if empty:
        notes.append(f"{root.name}: {empty} empty files left out")
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


def _parse_json_lines(text: bytes, path: Path, name: str, field: str) -> list[Document]:
    documents = []
    for number, line in enumerate(text.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise Unsupported(
                f"{path}, whose line {number} is not JSON ({error})", supported="one JSON object on each line"
            ) from None
        if not isinstance(record, dict):
            raise Unsupported(f"{path}, whose line {number} is not a JSON object", supported=f'{{"{field}": "..."}}')
        value = record.get(field)
        if not isinstance(value, str):
            fields = [key for key, item in record.items() if isinstance(item, str)]
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


def _why_not_text(text: bytes) -> str:
    zero = text.find(b"\0")
    if zero >= 0:
        return f"a zero byte at offset {zero}"
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return f"byte 0x{text[error.start]:02x} at offset {error.start}"
    return ""


def _end_with_newline(text: bytes) -> bytes:
    return text if text.endswith(b"\n") else text + b"\n"
