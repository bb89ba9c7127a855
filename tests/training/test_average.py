"""The running mean of the weights: its definition, and its resumption after a run was stopped."""

from __future__ import annotations

import pytest
import torch
from small_runs import LastToken, assert_same, build_model, train_until, weights
from torch import nn

from regard.contract import Unsupported
from regard.training import TrainConfig, WeightAverage, train

CONFIG = TrainConfig(steps=9, batch_size=4, learning_rate=3e-3, checkpoint_every=4, measure_memory=False)


def test_it_is_the_mean_of_the_definition_and_forgets_the_first_weights_early():
    model = nn.BatchNorm1d(3)
    average, expected = WeightAverage(model, 0.6), {name: t.clone() for name, t in model.state_dict().items()}
    for step in range(20):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.copy_(torch.randn(tensor.shape) if tensor.dtype.is_floating_point else tensor + 1)
        average.update(model)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            old = expected[name]
            expected[name] = decay * old + (1 - decay) * tensor if tensor.dtype.is_floating_point else tensor.clone()
    for name, tensor in expected.items():
        torch.testing.assert_close(average.tensors[name], tensor)


def test_it_stands_in_for_the_weights_and_gives_them_back_also_after_an_error():
    model = nn.Linear(3, 3)
    average = WeightAverage(model, 0.9)
    mean = {name: tensor.clone() for name, tensor in average.tensors.items()}
    nn.init.ones_(model.weight)
    own = weights(model)

    def fail():
        with average.in_place_of(model):
            assert_same(model, mean)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert_same(model, own)


def test_training_is_the_same_with_it_and_a_stopped_run_goes_on_to_the_same_mean(tmp_path):
    task = LastToken()
    plain, whole, parts = (build_model(task) for _ in range(3))
    expected = WeightAverage(whole, 0.8)
    train(plain, task, CONFIG)
    train(whole, task, CONFIG, average=expected)
    assert_same(plain, whole)
    before, path = WeightAverage(parts, 0.8), tmp_path / "run"

    def interrupt(point):
        if point.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parts, task, CONFIG, checkpoint=path, average=before, on_step=interrupt)
    again = build_model(task)
    with pytest.raises(Unsupported, match="ema"):
        train(again, task, CONFIG, checkpoint=path, average=WeightAverage(again, 0.9))
    with pytest.raises(Unsupported, match="ema"):
        train(again, task, CONFIG, checkpoint=path)
    after = WeightAverage(again, 0.8)
    train(again, task, CONFIG, checkpoint=path, average=after)
    assert_same(again, whole)
    assert_same(after.tensors, expected.tensors)
    assert after.updates == 9


def test_a_run_without_it_is_not_gone_on_with(tmp_path):
    task, model = LastToken(), build_model(LastToken())
    train_until(3, model, task, CONFIG, tmp_path / "run")
    with pytest.raises(Unsupported, match="ema"):
        train(model, task, CONFIG, checkpoint=tmp_path / "run", average=WeightAverage(model, 0.8))


@pytest.mark.parametrize("decay", [0, 1, -0.5, True, "much"])
def test_other_decays_are_refused(decay):
    with pytest.raises(Unsupported, match=r"try ema=0\.999"):
        WeightAverage(nn.Linear(2, 2), decay)


def test_a_checkpoint_is_due_after_a_minute_whatever_the_steps(tmp_path, monkeypatch):
    task, model, path = LastToken(), build_model(LastToken()), tmp_path / "run"
    monkeypatch.setattr("regard.training.loop.LONGEST_UNSAVED", 0.0)
    seen = []
    train(model, task, CONFIG, checkpoint=path, on_step=lambda point: seen.append(path.exists()))
    assert seen == [False] + [True] * 8
