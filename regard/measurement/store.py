"""The store: every measurement is a row in a SQLite file.

A row is committed as soon as it is made, so a killed process loses at most the row it was working on, and other
processes can read and write at the same time. The key of a row is the settings that define it. A key is written only
once, which is how an interrupted comparison continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import sqlite3
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from regard.contract import Unsupported, closest
from regard.measurement import provenance
from regard.version import VERSION

SCHEMA_VERSION = 1
KINDS = (
    "plan",
    "match",
    "search",
    "quality",
    "cost",
    "profile",
    "verify",
    "run",
    "reproduction",
    "sparse",
    "side_effects",
    "attention_error",
)
SECONDS_TO_WAIT = 60.0
"""Timeout for another writer to finish its row."""

_TABLES = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE machines (id TEXT PRIMARY KEY, fingerprint TEXT NOT NULL)",
    """CREATE TABLE rows (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL,
        key TEXT NOT NULL,
        created TEXT NOT NULL,
        run TEXT NOT NULL,
        regard_version TEXT NOT NULL,
        git_revision TEXT,
        machine TEXT NOT NULL REFERENCES machines (id),
        command TEXT NOT NULL,
        payload TEXT NOT NULL,
        UNIQUE (kind, key)
    )""",
    "CREATE INDEX rows_of_run ON rows (run, kind)",
)


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        kind: one of `KINDS`.
        key: the settings that define it.
        created: time of creation, ISO 8601 in UTC.
        run: id of the run that made the row.
        regard_version: version of the code that made the row.
        git_revision: revision of the code that made the row; None for an installed package.
        machine: :func:`regard.measurement.provenance.fingerprint` of the machine that made the row.
        command: the command line that made the row.
        payload: what was measured.
    """

    kind: str
    key: dict[str, Any]
    created: str
    run: str
    regard_version: str
    git_revision: str | None
    machine: dict[str, Any]
    command: str
    payload: Any


class Store:
    """A store of rows in a SQLite file, which is created if it does not exist.

    A store is used by the thread that opened it; other threads and processes open their own. As a context manager, it
    removes a file that it created and that has no rows, with the folders created for it, if the block ends with an
    error.

    Args:
        path: the file. Its folder is created if missing.
        read_only: only read an existing store, possibly on a read-only disk.
        run: run id of the rows of this process; a new one when None.
        command: command line of the rows of this process; that of the process when None.

    Raises:
        Unsupported: if the file is not a store, has another schema version, is damaged, or cannot be written; also
            later, if a row cannot be read or written.
    """

    def __init__(
        self, path: str | Path, *, read_only: bool = False, run: str | None = None, command: str | None = None
    ) -> None:
        self.path = Path(path)
        self.run = run or uuid.uuid4().hex[:12]
        self.command = command or " ".join(map(_quoted, [Path(sys.argv[0]).name, *sys.argv[1:]]))
        self._git_revision = provenance.git_revision()
        self._machine: str | None = None
        self._made = [] if read_only else [path for path in (self.path, *self.path.parents) if not path.exists()]
        self._connection = _open_to_read(self.path) if read_only else _open(self.path)

    def put(self, kind: str, key: Mapping[str, Any], payload: Any) -> bool:
        """Append a row and commit it.

        Args:
            kind: one of `KINDS`.
            key: the settings that define the row. If the row depends on the machine, the key must include the machine.
            payload: what was measured, as JSON; numpy and torch values become lists and numbers, and non-finite numbers
                become null, so a diverged measurement is read back as None.

        Returns:
            False if the store already has this key; nothing is written then, and the first row stays.
        """
        _require_kind(kind)
        named, said = canonical_key(key), json.dumps(plain_values(payload), ensure_ascii=False, allow_nan=False)
        with _told_plainly(self.path, "written"):
            machine = self._machine or self._record_machine()
            who = (provenance.now(), self.run, VERSION, self._git_revision, machine, self.command)
            written = self._connection.execute(
                "INSERT INTO rows (kind, key, created, run, regard_version, git_revision, machine, command, payload)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (kind, key) DO NOTHING",
                (kind, named, *who, said),
            )
            return written.rowcount == 1

    def get(self, kind: str, key: Mapping[str, Any]) -> Row | None:
        """Return the row with these settings, whichever run made it; None if it was not measured yet."""
        _require_kind(kind)
        return next(iter(self._select("kind = ? AND key = ?", kind, canonical_key(key))), None)

    def rows(self, kind: str, run: str | None = None) -> list[Row]:
        """Return all rows of a kind in the order they were made, or only those made by `run` if given."""
        _require_kind(kind)
        if run is None:
            return self._select("kind = ?", kind)
        return self._select("kind = ? AND run = ?", kind, run)

    def merge(self, other: str | Path, kinds: Iterable[str] = KINDS) -> int:
        """Copy the rows of another store whose keys this store lacks, including their provenance.

        Args:
            other: the other store's file, which is not changed.
            kinds: kinds of rows to copy, from `KINDS`.

        Returns:
            The number of copied rows.

        Raises:
            Unsupported: if `other` is not a store, or is damaged.
        """
        taken = 0
        columns = "kind, key, created, run, regard_version, git_revision, machine, command, payload"
        with closing(_open_to_read(Path(other))) as source, _told_plainly(Path(other), "read"):
            machines = source.execute("SELECT id, fingerprint FROM machines").fetchall()
            for kind in kinds:
                _require_kind(kind)
                rows = source.execute(f"SELECT {columns} FROM rows WHERE kind = ? ORDER BY id", (kind,)).fetchall()
                with _told_plainly(self.path, "written"):
                    self._connection.execute("BEGIN IMMEDIATE")
                    self._connection.executemany("INSERT INTO machines VALUES (?, ?) ON CONFLICT DO NOTHING", machines)
                    taken += self._connection.executemany(
                        f"INSERT INTO rows ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (kind, key) DO NOTHING",
                        rows,
                    ).rowcount
                    self._connection.execute("COMMIT")
        return taken

    def close(self) -> None:
        """Close the file; the store cannot be used afterwards."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._made and not self._is_shared_or_has_rows():
            self.path.unlink()
            self.close()
            with suppress(OSError):  # other files may be there
                for folder in self._made[1:]:
                    folder.rmdir()
        self.close()

    def _is_shared_or_has_rows(self) -> bool:
        try:
            self._connection.execute("PRAGMA busy_timeout = 0")
            self._connection.execute("PRAGMA journal_mode = DELETE")  # only possible without other connections
            self._connection.execute("BEGIN EXCLUSIVE")
            return self._connection.execute("SELECT 1 FROM rows LIMIT 1").fetchone() is not None
        except sqlite3.Error:
            return True

    def _select(self, where: str, *values: str) -> list[Row]:
        with _told_plainly(self.path, "read"):
            found = self._connection.execute(
                "SELECT kind, key, created, run, regard_version, git_revision, fingerprint, command, payload"
                f" FROM rows JOIN machines ON machines.id = rows.machine WHERE {where} ORDER BY rows.id",
                values,
            )
            return [
                Row(
                    kind,
                    json.loads(key),
                    created,
                    run,
                    version,
                    revision,
                    json.loads(machine),
                    command,
                    json.loads(payload),
                )
                for kind, key, created, run, version, revision, machine, command, payload in found
            ]

    def _record_machine(self) -> str:
        """Store the facts about this process once, at its first row, by when torch's number of threads has been set."""
        facts = json.dumps(provenance.fingerprint(), sort_keys=True, ensure_ascii=False)
        self._machine = hashlib.sha256(facts.encode()).hexdigest()[:16]
        self._connection.execute(
            "INSERT INTO machines (id, fingerprint) VALUES (?, ?) ON CONFLICT DO NOTHING", (self._machine, facts)
        )
        return self._machine


def _quoted(word: str) -> str:
    """Quote a word for a shell; words that are not printable or not UTF-8 are escaped between $' and '."""
    if word.isprintable():
        return shlex.quote(word)
    plain = (chr(b) if 32 <= b < 127 and chr(b) not in "\\'" else f"\\x{b:02x}" for b in os.fsencode(word))
    return f"$'{''.join(plain)}'"


def canonical_key(key: Mapping[str, Any]) -> str:
    """Return the settings as canonical JSON, the same for equal settings: names sorted, 1.0 as 1, tuples as lists.

    Raises:
        Unsupported: for a name that is not a string, or a number that is not finite.
    """
    return json.dumps(_settings(key, "key"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _settings(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise Unsupported(f"{where} with the name {name!r}", supported="names that are strings")
        return {name: _settings(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_settings(item, where) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise Unsupported(f"{where} = {value}", supported="finite numbers")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tolist"):
        return _settings(value.tolist(), where)
    raise Unsupported(f"{where} of type {type(value).__name__}", supported="text, numbers, lists and mappings")


def plain_values(value: Any) -> Any:
    """Convert `value` to what JSON can represent, with non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(name): plain_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return plain_values(value.tolist()) if hasattr(value, "tolist") else value


def _require_kind(kind: str) -> None:
    if kind not in KINDS:
        raise Unsupported(f"rows of kind {kind!r}", supported=", ".join(KINDS), nearest=closest(kind, KINDS))


def _open(path: Path) -> sqlite3.Connection:
    if path.is_dir():
        raise Unsupported(
            f"{path} as a store: it is a folder", supported="a file", nearest=f"--output {path / 'regard.sqlite'}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Autocommit: every statement outside an explicit BEGIN is its own transaction.
        connection = sqlite3.connect(path, timeout=SECONDS_TO_WAIT, isolation_level=None)
    except (OSError, sqlite3.OperationalError) as error:
        raise _unusable(path, "written", error) from error
    try:
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    with _told_plainly(path, "written"):
        # Checked before anything is written, so that a file that is not a store is left unchanged.
        if _tables(connection):
            _check_schema(connection, path)
        _use_write_ahead_log(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("BEGIN IMMEDIATE")
        if not _tables(connection):
            for statement in _TABLES:
                connection.execute(statement)
            connection.execute("INSERT INTO meta VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),))
        _check_schema(connection, path)
        connection.execute("COMMIT")


def _open_to_read(path: Path) -> sqlite3.Connection:
    """Open a store for reading. SQLite creates files next to it; where it cannot, the store is read as immutable."""
    alone = not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists()
    address = f"{path.absolute().as_uri()}?mode=ro" + "&immutable=1" * alone
    with _told_plainly(path, "read"):
        connection = sqlite3.connect(address, timeout=SECONDS_TO_WAIT, isolation_level=None, uri=True)
        try:
            _check_schema(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


@contextmanager
def _told_plainly(path: Path, doing: str) -> Iterator[None]:
    """Turn errors of SQLite, or of the JSON in a row, into Unsupported."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise _unusable(path, doing, error) from error
    except (sqlite3.DatabaseError, json.JSONDecodeError) as error:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_NOTADB":
            raise _not_a_store(path) from error
        raise Unsupported(
            f"{path}, a store that is damaged ({error})",
            supported="a store as regard left it",
            nearest=f"sqlite3 {path} .recover | sqlite3 {path.with_name('recovered.db')}",
        ) from error


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    if not {"meta", "machines", "rows"} <= _tables(connection):
        raise _not_a_store(path)
    with closing(connection.execute("SELECT value FROM meta WHERE name = 'schema_version'")) as found:
        (version,) = found.fetchone() or ("none",)
    if version != str(SCHEMA_VERSION):
        raise Unsupported(
            f"{path}, a store of schema version {version}",
            supported=f"schema version {SCHEMA_VERSION}",
            nearest=_another_output(path),
        )


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log, retrying: SQLite does not wait if two processes open a new file at once."""
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _unusable(path: Path, doing: str, error: Exception) -> Unsupported:
    return Unsupported(
        f"{path} as a store: it cannot be {doing} ({error})",
        supported="a file in a folder that can be written, on a disk with room; the rows that it has are kept",
        nearest="another --output",
    )


def _not_a_store(path: Path) -> Unsupported:
    return Unsupported(
        f"{path} is not a store of regard",
        supported="a store made by regard, or a file that does not exist yet",
        nearest=_another_output(path),
    )


def _another_output(path: Path) -> str:
    return f"--output {path.with_name(path.stem + '-new.sqlite')}"
