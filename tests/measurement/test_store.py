"""The store of results: stored rows survive whatever happens to the process, the file or the disk; and provenance."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from regard.contract import Unsupported
from regard.measurement import provenance
from regard.measurement.store import SCHEMA_VERSION, Store, canonical_key

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.sqlite"


def put(path, *payloads):
    """Make a store with rows of the kind "run"."""
    with Store(path) as store:
        for index, payload in enumerate(payloads):
            store.put("run", {"run": index}, payload)
    return path


def start(script, *arguments):
    """Start a Python process that runs `script`, with the package importable."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)


def test_what_was_put_is_got(path):
    key = {"task": "copy", "mechanism": "softmax", "seed": random.randrange(1000), "lr": random.random()}
    payload = {"items": [[random.random(), 1.0] for _ in range(50)], "solved": None, "text": "Δ √ <b>"}
    with Store(path, run="r1", command="regard compare x") as store:
        assert store.get("quality", key) is None
        assert store.put("quality", key, payload)
    with Store(path) as store:
        row = store.get("quality", key)
    assert (row.key, row.payload) == (key, payload)
    assert (row.kind, row.run, row.command) == ("quality", "r1", "regard compare x")
    assert row.machine["machine_id"] == provenance.fingerprint()["machine_id"]
    assert row.git_revision == provenance.git_revision()


@pytest.mark.skipif(shutil.which("bash") is None, reason="reads the command")
def test_a_command_with_any_name_in_it_is_stored_as_a_shell_takes_it(path, monkeypatch):
    words = [b"compare", b"a b.txt", b"it's\xff\x1b[2J.txt", "é中".encode(), b"back\\slash\n"]
    monkeypatch.setattr("sys.argv", ["bin/regard", *map(os.fsdecode, words)])
    with Store(path) as store:
        store.put("run", {}, 1)
        (row,) = store.rows("run")
    row.command.encode()
    assert row.command.isprintable()
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {row.command}"], capture_output=True, check=True).stdout
    assert said.split(b"\0")[:-1] == [b"regard", *words]


def test_a_key_is_written_once_however_it_is_written(path):
    with Store(path) as first, Store(path) as second:
        assert first.put("cost", {"a": 1, "b": [1, 2]}, 1)
        assert not first.put("cost", {"b": (np.int64(1), 2), "a": 1.0}, 2)
        assert not second.put("cost", {"a": 1, "b": [1, 2]}, 3)
        assert second.put("profile", {"a": 1, "b": [1, 2]}, 4)
        assert [row.payload for row in first.rows("cost")] == [1]
    assert canonical_key({"a": 1e-3}) == canonical_key({"a": 0.001})
    assert canonical_key({"a": 1}) != canonical_key({"a": "1"})


def test_rows_come_in_order_and_by_run_and_a_machine_is_stored_once(path):
    path.touch()  # as after an interrupted creation
    for run in ("r1", "r2"):
        with Store(path, run=run) as store:
            for index in range(3):
                store.put("search", {"run": run, "i": index}, index)
    with Store(path) as store:
        assert [row.payload for row in store.rows("search")] == [0, 1, 2, 0, 1, 2]
        assert [row.key["run"] for row in store.rows("search", run="r2")] == ["r2"] * 3
        assert store.rows("cost") == []
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM machines").fetchone() == (1,)


def test_numbers_that_are_not_finite_are_read_back_as_null(path):
    payload = {"loss": math.nan, "curve": np.array([[1.0, np.inf]]), "n": np.int64(3), "t": torch.tensor([1.5])}
    with Store(path) as store:
        store.put("quality", {}, payload)
        assert store.get("quality", {}).payload == {"loss": None, "curve": [[1.0, None]], "n": 3, "t": [1.5]}


@pytest.mark.parametrize("key", [{"a": math.nan}, {1: 2}, {"a": object()}])
def test_settings_that_are_no_key_and_unknown_kinds_are_refused(path, key):
    with Store(path) as store:
        with pytest.raises(Unsupported):
            store.put("quality", key, 1)
        with pytest.raises(Unsupported, match="try quality"):
            store.put("qualty", {}, 1)


def text(path):
    path.write_bytes(b"task,score\n" * 500)
    return path


def songs(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")
    return path


def later_version(path):
    Store(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE meta SET value = ?", (str(SCHEMA_VERSION + 7),))
    return path


def below_a_file(path):
    path.touch()
    return path / "store.sqlite"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (text, "not a store"),
        (songs, "not a store"),
        (later_version, rf"schema version {SCHEMA_VERSION + 7}; .*{SCHEMA_VERSION}.*--output"),
        (below_a_file, "cannot be written.*--output"),
        (lambda path: path.parent, "folder"),
    ],
)
def test_what_is_no_store_is_refused_and_left_alone(path, make, told):
    made = make(path)
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(Unsupported, match=told):
        Store(made)
    assert before is None or path.read_bytes() == before


def test_an_error_before_the_first_row_leaves_no_file_and_no_folder(tmp_path):
    def fails(path, *rows):
        with suppress(KeyError), Store(path) as store:
            for row in rows:
                store.put("run", {"run": row}, row)
            raise KeyError
        return path.exists()

    assert not fails(tmp_path / "made" / "here" / "store.db") and not list(tmp_path.iterdir())
    there = tmp_path / "there"
    there.mkdir()
    assert not fails(there / "store.db") and there.exists()
    assert fails(there / "row.db", 1)
    empty = there / "empty.db"
    Store(empty).close()
    assert fails(empty)


def test_an_error_leaves_a_store_that_another_has_open(path):
    with suppress(KeyError), Store(path):
        other = Store(path)
        raise KeyError
    other.put("run", {}, 1)
    other.close()
    with Store(path) as store:
        assert len(store.rows("run")) == 1


def test_a_full_disk_is_said_and_keeps_the_rows(path):
    with Store(put(path, 0)) as store:
        store._connection.execute("PRAGMA max_page_count = 1")  # makes SQLite behave as on a full disk
        told = r"cannot be written \(database or disk is full\); .*rows that it has are kept"
        with pytest.raises(Unsupported, match=told):
            store.put("run", {"run": 1}, "x" * 10**6)
        assert [row.key["run"] for row in store.rows("run")] == [0]


def test_a_damaged_store_is_said_to_be_one(path):
    whole = put(path, *["x" * 3000] * 40).read_bytes()
    page = len(whole) // 2 // 4096 * 4096
    damages = [whole[: len(whole) // 2], whole[:page] + os.urandom(4096 * 8) + whole[page + 4096 * 8 :]]
    damages.append(whole.replace(b'"xxx', b"?xxx"))
    for damaged in damages:
        path.write_bytes(damaged)
        for options in ({}, {"read_only": True}):
            told = pytest.raises(Unsupported, match=r"damaged .*try sqlite3 .* \.recover")
            with told, Store(path, **options) as store:
                store.rows("run")


def test_a_store_is_read_beside_its_writer_and_left_as_it_is(path):
    with Store(put(path, 0)) as writer, Store(path, read_only=True) as reader:
        assert [row.payload for row in reader.rows("run")] == [0]
        writer.put("run", {"run": 1}, 2)
        assert [row.payload for row in reader.rows("run")] == [0, 2]
        with pytest.raises(Unsupported, match=r"cannot be written \(attempt to write a readonly database\)"):
            reader.put("run", {"run": 2}, 3)
    missing = path.with_name("missing.db")
    with pytest.raises(Unsupported, match="cannot be read"):
        Store(missing, read_only=True)
    assert not missing.exists()


def test_a_store_on_a_disk_that_cannot_be_written_is_read(path, monkeypatch):
    put(path, 0)
    access = os.access  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda p, mode: mode != os.W_OK and access(p, mode))
    with Store(path, read_only=True) as store:
        assert [row.payload for row in store.rows("run")] == [0]
        assert [file.name for file in path.parent.iterdir()] == [path.name], "SQLite makes no files beside it"


WRITE_FOREVER = """
    import itertools, sys
    from regard.measurement.store import Store
    with Store(sys.argv[1]) as store:
        for index in itertools.count():
            store.put("quality", {"writer": sys.argv[2], "index": index}, {"items": [[index, 1.0]] * 200})
            print(index, flush=True)
"""


def test_killed_writer_leaves_every_completed_row(path):
    writer = start(WRITE_FOREVER, path, "a")
    with writer, Store(path) as reader:
        wanted = random.randrange(10, 30)
        for line in writer.stdout:
            if int(line) == wanted:
                break
        assert len(reader.rows("quality")) > wanted  # reads while the other process writes
        time.sleep(random.random() / 50)
        writer.send_signal(signal.SIGKILL)
        said = [wanted, *map(int, writer.stdout.read().split())]
    completed = range(max(said) + 1)
    with Store(path) as store:
        rows = store.rows("quality")
        assert [row.key["index"] for row in rows][: len(completed)] == list(completed)
        assert len(rows) <= len(completed) + 1
        assert all(row.payload == {"items": [[row.key["index"], 1.0]] * 200} for row in rows)
        assert store.put("quality", {"writer": "a", "index": len(rows)}, {})


WRITE_MANY = """
    import sys
    from regard.measurement.store import Store
    with Store(sys.argv[1]) as store:
        written = [store.put("search", {"index": index}, sys.argv[2]) for index in range(25)]
        own = [store.put("cost", {"writer": sys.argv[2], "index": index}, index) for index in range(25)]
    print(sum(written), sum(own))
"""


def test_two_writers_open_a_new_store_and_share_it(path):
    writers = [start(WRITE_MANY, path, name) for name in "ab"]
    counts = [list(map(int, writer.communicate(timeout=600)[0].split())) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert sum(shared for shared, _ in counts) == 25
    assert [own for _, own in counts] == [25, 25]
    with Store(path) as store:
        assert len(store.rows("search")) == 25
        assert len(store.rows("cost")) == 50


def test_a_merged_store_has_the_rows_of_both_and_those_of_its_own_stay(path, tmp_path, monkeypatch):
    put(path, "first")
    monkeypatch.setattr(provenance, "fingerprint", lambda: {"cpu": "another"})
    other = put(tmp_path / "other.sqlite", "not this one", "second")
    with Store(other) as store:
        store.put("plan", {"run": 0}, "planned")
    before = other.read_bytes()
    with Store(path) as store:
        assert store.merge(other, ["run"]) == 1
        assert store.merge(other, ["run"]) == 0
        first, second = store.rows("run")
        assert (first.payload, second.payload) == ("first", "second")
        assert first.machine != second.machine == {"cpu": "another"}
        assert not store.rows("plan")
        assert store.merge(other) == 1
    assert other.read_bytes() == before
    (tmp_path / "text").write_text("no store")
    with Store(path) as store, pytest.raises(Unsupported, match="not a store"):
        store.merge(tmp_path / "text")


def test_a_fingerprint_is_plain_names_no_one_and_its_machine_is_that_of_the_hardware():
    facts = provenance.fingerprint()
    text = json.dumps(facts)
    assert facts == json.loads(text)
    assert facts["threads"] == torch.get_num_threads()
    assert facts["memory_bytes"] is None or facts["memory_bytes"] > 2**20
    for private in {str(Path.home()), os.environ.get("USER", ""), str(REPOSITORY)} - {"", "/", "root"}:
        assert private not in text
    assert provenance.machine_id({**facts, "torch": "0.0", "threads": 99}) == facts["machine_id"]
    assert provenance.machine_id({**facts, "cpu": "another"}) != facts["machine_id"]


def test_time_is_utc_and_the_revision_that_of_this_checkout_alone(monkeypatch, tmp_path):
    assert provenance.now().endswith("+00:00")
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    assert provenance.git_revision() is None
