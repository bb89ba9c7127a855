from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from small_runs import assert_same, weights
from torch import nn

from regard.contract import Unsupported
from regard.models.weights import read_tensors
from regard.training.checkpoint import load_checkpoint, restore, save_checkpoint
from regard.training.optimizer import make_optimizer


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    return model.state_dict()


def trained(width=3, steps=3):
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    optimizer = make_optimizer(model, learning_rate=0.01, weight_decay=0.1)
    for _ in range(steps):
        step(model, optimizer, torch.randn(5, 2))
    return model, optimizer


def test_a_restored_run_takes_the_same_next_step(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path / "c", model, optimizer, {"step": 3, "curve": [1.5, float("nan")]})
    other, other_optimizer = trained(steps=1)
    found = load_checkpoint(tmp_path / "c")
    assert found.record["step"] == 3 and found.record["curve"][1] != found.record["curve"][1]
    restore(found, other, other_optimizer)
    x = torch.randn(5, 2)
    assert_same(step(model, optimizer, x), step(other, other_optimizer, x))


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    save_checkpoint(tmp_path / "c", *trained(), {})
    found = load_checkpoint(tmp_path / "c")
    model, optimizer = trained(width=4)
    before = weights(model)
    with pytest.raises(Unsupported, match="whose 0"):
        restore(found, model, optimizer)
    assert_same(before, model)
    with pytest.raises(Unsupported, match="float64"):
        restore(found, trained()[0].double(), optimizer)
    short = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(Unsupported, match="unknown"):
        restore(found, short, make_optimizer(short, learning_rate=0.1, weight_decay=0.0))


def test_a_damaged_checkpoint_and_other_files_are_said_to_be_what_they_are(tmp_path):
    model, optimizer = trained()
    path = tmp_path / "c"
    save_checkpoint(path, model, optimizer, {"step": 3})
    tensors, metadata = read_tensors(path)
    for change in ({}, {"record": '{"step": '}, {"record": "[" * 10**5}):
        save_file(tensors, path, metadata={"format": metadata["format"]} | change)
        with pytest.raises(Unsupported, match=r"a checkpoint that is damaged .*try resume=False"):
            load_checkpoint(path)
    save_file(tensors | {"optimizer.0.weight.exp_avg": torch.ones(5)}, path, metadata=metadata)
    with pytest.raises(Unsupported, match=r"whose exp_avg of 0.weight is \(5,\); supported: \(3, 2\)"):
        restore(load_checkpoint(path), model, optimizer)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(Unsupported, match="format None"):
        load_checkpoint(path)
    path.write_bytes(path.read_bytes()[:50])
    for file in (path, tmp_path / "missing", tmp_path):
        with pytest.raises(Unsupported, match="a safetensors file"):
            load_checkpoint(file)
