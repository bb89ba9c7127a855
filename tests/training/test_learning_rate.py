from __future__ import annotations

import dataclasses
import time
import warnings

import pytest
import torch
from small_runs import Repeat, build_model

from regard.contract import Unsupported
from regard.training import TrainConfig, evaluate, search, train

CONFIG = TrainConfig(steps=100, batch_size=8, learning_rate=123.0, measure_memory=False)


def test_the_best_rate_has_the_lowest_loss_on_the_slice(task, build):
    seen = []
    found = search(build, task, CONFIG, (1e-2, 1e-5, 1e2), steps=15, items=16, on_trial=seen.append)
    assert [trial.rate for trial in found.trials] == [1e-5, 1e-2, 1e2]
    assert tuple(seen) == found.trials
    assert (found.best, found.on_edge, found.scored_items) == (1e-2, False, 16)
    model = build()
    train(model, task, dataclasses.replace(CONFIG, steps=15, learning_rate=1e-2))
    again = evaluate(model, task, 8, last=16)
    assert (again.loss, again.score) == (found.trials[1].loss, found.trials[1].score)


def test_a_best_rate_on_the_edge_warns():
    task = Repeat()
    with pytest.warns(UserWarning, match="edge of the grid"):
        found = search(lambda: build_model(task), task, CONFIG, (1e-5, 1e-2), steps=15, items=16)
    assert found.on_edge and found.best == 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not search(lambda: build_model(task), task, CONFIG, (1e-2,), steps=1, items=8).on_edge


def test_models_start_from_the_same_weights():
    drawn = []

    def draw():
        drawn.append(torch.rand(3))
        raise InterruptedError

    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        with pytest.raises(InterruptedError):
            search(draw, Repeat(), CONFIG, (1e-3, 1e-2), steps=1)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])


def test_nothing_to_try_is_refused(task, build):
    with pytest.raises(Unsupported, match="no rates"):
        search(build, task, CONFIG, ())
    with pytest.raises(Unsupported, match="deadline"):
        search(build, task, CONFIG, deadline=time.monotonic())
