"""`benchmarks/resolution.py`: positions in images larger than in training, and cells that are kept."""

import json
import sys
from pathlib import Path

import pytest
import torch
from support import close

pytest.importorskip("sklearn")

STEPS, ITEMS = 7, 5


@pytest.fixture
def resolution(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import resolution

    return resolution


def test_interpolated_places_of_a_larger_grid_reach_from_the_first_trained_place_to_the_last(resolution):
    model = resolution.model_of(resolution.tasks_of("digits", ITEMS)[0], "seqpe").double().eval()
    trained, larger = (
        model.positions.vectors(torch.cartesian_prod(torch.arange(side), torch.arange(side))).view(side, side, -1)
        for side in (14, 27)
    )
    again = resolution.interpolated(model, 14).positions.vectors
    close(again(torch.cartesian_prod(torch.arange(14), torch.arange(14))).view(14, 14, -1), trained)
    vectors = resolution.interpolated(model, 27).positions.vectors
    found = vectors(torch.cartesian_prod(torch.arange(27), torch.arange(27))).view(27, 27, -1)
    close(found[::2, ::2], trained, 1e-5)  # 27 places are 14 and the 13 between them
    close(found[1::2, ::2], (trained[1:] + trained[:-1]) / 2, 1e-5)
    assert not torch.allclose(found, larger) and model.positions.interpolation == 1


def test_cells_that_have_all_scores_are_kept_and_one_that_lacks_some_is_trained_again(
    resolution, monkeypatch, tmp_path
):
    table, ran = tmp_path / "resolution.json", []

    def cell(positions, **accuracy):
        return {"positions": positions, "seed": 0, "steps": STEPS, "items": ITEMS, "accuracy": accuracy}

    kept = [cell("none", **dict.fromkeys(("28", "42", "56"), 0.5)), cell("rotary", **{"28": 0.1})]
    kept[1]["steps"] += 1
    table.write_text(json.dumps({"cells": [cell("seqpe", **{"28": 0.9, "42": 0.8, "56": 0.7}), *kept]}))

    def run_cell(tasks, positions, seed, *_):
        ran.append((positions, seed))
        return dict.fromkeys(resolution.readings(positions), 0.25)

    monkeypatch.setattr(resolution, "TABLE", table)
    monkeypatch.setattr(resolution, "tasks_of", lambda *_: [])
    monkeypatch.setattr(resolution, "run_cell", run_cell)
    asked = ["--positions", "seqpe,rotary,none", "--seeds", "1", "--steps", str(STEPS), "--items", str(ITEMS)]
    monkeypatch.setattr(sys, "argv", ["resolution.py", *asked])
    for _ in range(2):
        resolution.main()
    assert ran == [("seqpe", 0), ("rotary", 0)]
    cells = json.loads(table.read_text())["cells"]
    assert cells[:2] == kept
    assert [(one["positions"], set(one["accuracy"])) for one in cells[2:]] == [
        ("seqpe", {"28", "42", "56", "42 interpolated", "56 interpolated"}),
        ("rotary", {"28", "42", "56"}),
    ]


def test_a_model_is_scored_at_each_size_as_it_is_and_changed(resolution, monkeypatch, tmp_path):
    scored = []

    def score(model, task):
        scored.append((task.grid[0], getattr(getattr(model, "positions", None), "interpolation", None)))
        return {"score": 0.5}

    monkeypatch.setattr(resolution, "score", score)
    resolution.run_cell(resolution.tasks_of("digits", ITEMS), "seqpe", 0, 1, tmp_path)
    assert scored == [(14, 1.0), (21, 1.0), (28, 1.0), (21, 20 / 13), (28, 27 / 13)] and not list(tmp_path.iterdir())


def test_rotary_positions_of_two_axes_are_told_the_grid_of_each_size(resolution, monkeypatch, tmp_path):
    scored = []

    def score(model, task):
        scored.append((model.positions, model.blocks[0].mixer.positions.axes, task.grid))
        return {"score": 0.5}

    monkeypatch.setattr(resolution, "score", score)
    found = resolution.run_cell(resolution.tasks_of("digits", ITEMS), "rotary of two axes", 0, 1, tmp_path)
    assert scored == [(None, 2, (side, side)) for side in (14, 21, 28)] and set(found) == {"28", "42", "56"}
