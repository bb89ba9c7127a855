"""Remote training runs are exactly those that the comparison asks for."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from elsewhere import Elsewhere
from safetensors.torch import load_file

from regard import Unsupported
from regard.measurement.budget import Budget
from regard.measurement.store import Store
from regard.tasks import create_task
from regard.workbench.comparison.ahead import make_ahead
from regard.workbench.comparison.compare import compare
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.comparison.trainer import Trainer
from regard.workbench.comparison.work import Work

SETTINGS = CompareSettings(
    ("softmax", "linear"), Budget.parse("20 steps"), seeds=3, dim=16, layers=1, heads=2, batch_tokens=256, lengths=(16,)
)
BEST = {"softmax": 3e-3, "linear": 1.0}
"""Best learning rates: one within the rates tried first, the other beyond all that are tried."""


def recall():
    return create_task("recall", length=16, pairs=2, queries=4, vocab_size=16, evaluation_items=8)


def test_the_runs_are_those_that_a_comparison_asks_for(tmp_path, monkeypatch):
    asked = []

    def measured(self, work, name, rate, seed):
        asked.append((name, rate, seed))
        loss = abs(math.log(rate / BEST[name]))
        choice = {"score": 0.0, "loss": loss, "diverged": False}
        return {
            "task": "recall",
            "mechanism": name,
            "frame": "convolution",
            "lr": rate,
            "seed": seed,
            "search": choice,
            "solved": True,
        }

    monkeypatch.setattr(Trainer, "_measure", measured)
    work = Work(recall(), SETTINGS)
    work.steps = work.step_seconds = work.evaluation_seconds = dict.fromkeys(work.configs, 1)
    seen, sweep, found = [], Elsewhere(), []
    for place in ("here", "there"):
        with Store(tmp_path / f"{place}.db") as store:
            trainer = Trainer(
                store, SETTINGS, tmp_path, "", lambda progress: seen.append(dataclasses.replace(progress)), print, None
            )
            if place == "there":
                make_ahead(sweep, trainer, work, work.settings.names)
                assert sorted(sweep.cells) == sorted(asked)
                before = trainer.progress.done
            found.append(trainer.train(work, work.settings.names))
            if place == "here":
                alone, asked = sorted(asked), []
    assert sorted(asked) == sorted(sweep.cells) == alone, "each once, and none that is not asked for"
    assert found[0] == found[1] and len({rate for name, rate, _ in alone if name == "linear"}) == 6
    assert trainer.progress.done == before == 2 * len(alone)  # not counted twice
    assert any("of 6 runs came back" in one.doing for one in seen)


def test_longer_runs_of_seeds_that_failed_are_made_elsewhere_too(tmp_path, monkeypatch):
    def measured(self, work, name, rate, seed):
        asked.append((name, seed, work.steps[name]))
        solved = name == "softmax" and (seed == 0 or work.steps[name] > 1)
        row = {"task": "recall", "mechanism": name, "frame": "convolution", "lr": rate, "seed": seed, "solved": solved}
        return row | {"search": {"score": 0.0, "loss": abs(math.log(rate / 3e-3)), "diverged": False}}

    monkeypatch.setattr(Trainer, "_measure", measured)
    work = Work(recall(), dataclasses.replace(SETTINGS, rates=(3e-3,)))
    work.steps = work.step_seconds = work.evaluation_seconds = dict.fromkeys(work.configs, 1)
    asked, told = [], []
    with Store(tmp_path / "runs.db") as store:
        trainer = Trainer(store, work.settings, tmp_path, "", lambda progress: None, print, None)
        make_ahead(Elsewhere(), trainer, work, work.settings.names)
        assert sorted(asked)[-3:] == [("softmax", 1, 2), ("softmax", 2, 1), ("softmax", 2, 2)]
        elsewhere = len(asked)
        told = trainer.train(work, work.settings.names).longer
    assert len(asked) == elsewhere == 8, "nothing is left to be made here"
    assert "some runs of 1 steps; seeds 1 and 2 did not and had 2." in told[0]


def test_a_comparison_elsewhere_concludes_as_one_here_and_keeps_the_model(tmp_path):
    chosen = dataclasses.replace(
        SETTINGS, seeds=1, rates=(3e-3,), frames=("bare",), keep_models=True, mechanisms=("linear",)
    )
    here, there = (
        compare([recall()], chosen, tmp_path / place, sweep=sweep)
        for place, sweep in (("here", None), ("there", Elsewhere()))
    )
    for outcome in (here, there):
        (entry,) = outcome.summary["recall"]
        assert entry["mean"] == here.summary["recall"][0]["mean"]
        own, first = (load_file(one.models["recall"] / "model.safetensors") for one in (outcome, here))
        assert own.keys() == first.keys() and all(torch.equal(own[name], first[name]) for name in first)
    timed = dataclasses.replace(chosen, budget=Budget.parse("1m"))
    with pytest.raises(Unsupported, match="differ in speed"):
        compare([recall()], timed, tmp_path / "refused", sweep=Elsewhere())
    assert not (tmp_path / "refused").exists()
