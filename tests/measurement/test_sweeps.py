"""Sweeps: remote results equal those computed here. Ray itself is started if it is installed."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from elsewhere import NO_PLUGINS, Elsewhere
from support import refused

from regard.catalogue import run_file
from regard.contract import Unsupported
from regard.measurement.store import Store
from regard.measurement.sweeps import RESULTS, Plugins, RaySweep


def a_cell(shared, cell, store, folder):
    (folder / "models").mkdir()
    (folder / "models" / f"{cell}.txt").write_text(shared)
    store.put("quality", {"cell": cell}, {"threads": torch.get_num_threads(), "score": cell + 0.5})


def test_rows_and_files_come_back_as_they_were_made(tmp_path):
    before = torch.get_num_threads()
    with Store(tmp_path / RESULTS, run="one", command="regard sweep") as store:
        Elsewhere().run(a_cell, "weights", [1, 2], store, threads=1)
        rows = {row.key["cell"]: row for row in store.rows("quality", "one")}
    assert {cell: row.payload for cell, row in rows.items()} == {n: {"threads": 1, "score": n + 0.5} for n in (1, 2)}
    assert all(row.command == "regard sweep" and row.machine["cpu"] for row in rows.values())
    assert (tmp_path / "models" / "2.txt").read_text() == "weights"
    assert torch.get_num_threads() == before
    assert not list(tmp_path.glob("regard-*"))


def test_plugins_are_entered_once_from_what_was_sent(tmp_path):
    (tmp_path / "mine.py").write_text("VALUE = 1\n")
    entered = []
    plugins = Plugins.read(entered.append, [tmp_path / "mine.py", Path(f"{tmp_path / 'mine.py'}:Class")])
    (tmp_path / "mine.py").unlink()
    plugins.enter()
    plugins.enter()
    ((first, second),) = entered
    assert first.read_text() == "VALUE = 1\n" and str(second).endswith("mine.py:Class")


def test_files_that_a_plugin_imports_from_beside_it_are_sent_along(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "mine"
    (folder / "sent_along").mkdir(parents=True)
    (folder / "mine.py").write_text("from sent_along.part import VALUE\n")
    (folder / "sent_along" / "__init__.py").touch()
    (folder / "sent_along" / "part.py").write_text("VALUE = 1\n")
    (folder / "not_needed.py").touch()
    run_file(folder / "mine.py")
    entered = []
    plugins = Plugins.read(lambda paths: entered.extend(map(run_file, paths)), [folder / "mine.py"])
    assert {path for path, _ in plugins.files[0][2]} == {"mine.py", "sent_along/__init__.py", "sent_along/part.py"}
    shutil.rmtree(folder)
    plugins.enter()
    assert entered[0].VALUE == 1
    assert sys.modules["sent_along.part"].__file__.startswith(str(Path(entered[0].__file__).parent))


def test_a_refusal_is_the_same_after_a_journey():
    refusal = Unsupported("this", supported="that", nearest="those")
    again = pickle.loads(pickle.dumps(refusal))
    assert (str(again), again.asked, again.nearest) == (str(refusal), "this", "those")


def test_addresses_where_no_cluster_is_are_refused_at_once():
    pytest.importorskip("ray")
    for address in ("nowhere", "127.0.0.1:1", "127.0.0.1:99999"):
        refused("address|cannot be reached", RaySweep(address, NO_PLUGINS).__enter__)


@pytest.mark.filterwarnings("ignore")
def test_a_cell_whose_worker_is_lost_runs_again(tmp_path):
    """On a real cluster of two processors: plugins, threads, a kill, a refusal and a cell that always kills its worker."""
    ray = pytest.importorskip("ray")
    (tmp_path / "mine.py").write_text("VALUE = 20.5\n")

    def load(paths):
        import runpy

        os.environ["SENT"] = str(runpy.run_path(str(paths[0]))["VALUE"])

    def make(shared, cell, store, folder):
        once = Path(shared) / "killed"
        if cell == "killed" and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if cell == "refused":
            raise Unsupported("this cell", nearest="another")
        if cell == "always killed":
            os.kill(os.getpid(), signal.SIGKILL)
        store.put("quality", {"cell": cell}, {"sent": float(os.environ["SENT"]), "process": os.getpid()})

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        plugins = Plugins.read(load, [tmp_path / "mine.py"])
        left = []
        with Store(tmp_path / RESULTS) as store, RaySweep(None, plugins) as sweep:
            sweep.run(make, str(tmp_path), ["killed", "other"], store, on_done=lambda cell, n: left.append(n))
            rows = [row.payload for row in store.rows("quality", store.run)]
            assert left == [1, 0] and (tmp_path / "killed").exists()
            assert [row["sent"] for row in rows] == [20.5, 20.5]
            assert all(row["process"] != os.getpid() for row in rows)
            refused("this cell; try another", sweep.run, make, "", ["refused"], store)
            refused("worker was lost 4 times", sweep.run, make, "", ["always killed"], store)
            refused("99 processors", sweep.run, make, "", ["other"], store, threads=99)
        assert ray.is_initialized()  # it was running before
    finally:
        ray.shutdown()
