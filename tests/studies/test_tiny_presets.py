"""Every cell of every study's smallest preset, from the command line, with a user's mechanism."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import answer
from support import ALL, refused

from regard import catalogue
from regard.reproductions.framework import runs
from regard.studies import (
    architecture_search,
    get_study,
    in_context_functions,
    list_studies,
    softmax_regression,
    training_dynamics,
    wide_attention,
)
from regard.studies.cab import cells as cab

PLUGIN = Path(__file__).parents[2] / "docs/examples/mechanisms/rectified.py"
ENTER = {
    "architecture-search": "softmax,rectified",
    "attention-passes": "softmax,linear,rectified",
    "cab": "softmax,rectified",
    "in-context-functions": "softmax,gated_linear,rectified",
    "softmax-regression": "softmax,linear,rectified",
    "training-dynamics": "softmax,rectified",
    "wide-attention": "softmax,linear,rectified",
}

SHORTER = {
    "architecture-search": [(architecture_search.SIZES, {"steps": 8, "retrain": 8, "evaluations": 40, "items": 16})],
    "cab": [
        (cab.PRESETS, {name: one | {"steps": 4, "items": 4} for name, one in cab.PRESETS["tiny"].items()}),
        (cab.COSTS, {"seconds": 0.02}),
    ],
    "in-context-functions": [(in_context_functions.SIZES, {"steps": 8, "items": 16})],
    "softmax-regression": [(softmax_regression.PRESETS, {"steps": 8, "items": 64, "draws": 30})],
    "training-dynamics": [
        (training_dynamics.PRESETS, {"seeds": 2, "ratios": [1, 10], "batches": [8, 64]}),
        (training_dynamics.TEXTS, {"steps": 12}),
    ],
    "wide-attention": [
        (
            wide_attention.SIZES,
            {"training": wide_attention.SIZES["tiny"].training | {"steps": 4, "items": 16}, "timed": {"seconds": 0.02}},
        ),
    ],
}
"""Presets reduced for `make test`, which does not check what was learned; `make test-all` has the full presets."""


def told(asked, *given):
    """The answer of a command; the plugin is unregistered afterwards, as in a new process."""
    try:
        return asked(*given)
    finally:
        catalogue.unregister("rectified")


def test_these_are_all_studies_with_a_tiny_preset():
    assert set(ENTER) == {name for name in list_studies() if "tiny" in get_study(name).presets}


@pytest.mark.parametrize("name", ENTER)
def test_a_tiny_preset_runs_whole_and_shows_the_mechanism_of_the_user(capsys, tmp_path, monkeypatch, name):
    if not ALL:
        monkeypatch.setattr("regard.workbench.search.predictor.STEPS", 20)
        for sizes, fewer in SHORTER.get(name, []):
            size = sizes["tiny"]
            monkeypatch.setitem(sizes, "tiny", size | fewer if isinstance(size, dict) else replace(size, **fewer))
    line = f"study {name} --preset tiny --output {tmp_path}"
    line += f" --plugin {PLUGIN} --mechanisms {ENTER[name]}"
    found = told(answer, capsys, line)
    assert found["done"] == found["planned"] > 0 and not found["missing"]
    judged = [*found["findings"], *found["needs"]]
    assert judged and all(one["seeds"] >= 2 for one in judged)
    untimed = [one for one in judged if "efficiency length" not in one["says"]]  # none may come out of 0.02 seconds
    assert all(one["mean"] is not None for one in untimed)
    assert "rectified" in str([part["rows"] for part in found["sections"]])
    page = (tmp_path / f"{name}.html").read_text()
    assert page.count("<svg") >= 2 and page.count("<table") >= sum(bool(part["rows"]) for part in found["sections"])
    monkeypatch.delattr(runs, "run_cell")
    assert told(answer, capsys, line) == found, "what is done is not run again"


def test_a_study_that_is_not_about_mechanisms_says_so():
    bare = replace(get_study("wide-attention"), mechanisms=())
    for given in ({"mechanisms": "softmax"}, {"entered": ("rectified",)}):
        refused("not about them", bare.choose, "tiny", **given)


KILLED = """
import os, signal, sys
from regard.cli import main
from regard.reproductions.framework import runs

whole, left = runs.run_cell, [3]

def run_cell(*cell):
    measured = whole(*cell)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return measured

runs.run_cell = run_cell
main()
"""


def test_a_study_that_was_killed_in_a_cell_goes_on_with_the_same_command(capsys, tmp_path, monkeypatch):
    line = f"study attention-passes --mechanisms softmax --no-timings --seeds 1 --output {tmp_path}"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *line.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    made, whole = [], runs.run_cell

    def run_cell(*cell):
        made.append(cell)
        return whole(*cell)

    monkeypatch.setattr(runs, "run_cell", run_cell)
    found = answer(capsys, line)
    assert len(made) == found["planned"] - 3, (
        "a timing is planned and left out, two cells were kept, the third is made again"
    )
    assert found["missing"] == ["this processor 0"]
