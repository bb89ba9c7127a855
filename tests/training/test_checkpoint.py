from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from regard.contract import Unsupported
from regard.models.weights import read_tensors
from regard.training.checkpoint import load_checkpoint, restore, save_checkpoint
from regard.training.optimizer import make_optimizer


def trained(width=3, steps=3):
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    optimizer = make_optimizer(model, learning_rate=0.01, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 2)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    return model.state_dict()


def test_a_restored_run_takes_the_same_next_step(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path / "c", model, optimizer, {"step": 3, "curve": [1.5, float("nan")]})
    other, other_optimizer = trained(steps=1)
    found = load_checkpoint(tmp_path / "c")
    assert found.record["step"] == 3 and found.record["curve"][1] != found.record["curve"][1]
    restore(found, other, other_optimizer)
    x = torch.randn(5, 2)
    expected, actual = step(model, optimizer, x), step(other, other_optimizer, x)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    save_checkpoint(tmp_path / "c", *trained(), {})
    found = load_checkpoint(tmp_path / "c")
    model, optimizer = trained(width=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Unsupported, match="whose 0"):
        restore(found, model, optimizer)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(Unsupported, match="float64"):
        restore(found, trained()[0].double(), optimizer)
    short = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(Unsupported, match="unknown"):
        restore(found, short, make_optimizer(short, learning_rate=0.1, weight_decay=0.0))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("x" * 100)
    with pytest.raises(Unsupported, match="safetensors"):
        load_checkpoint(tmp_path / "text")
    save_file({"a": torch.ones(1)}, tmp_path / "tensors")
    with pytest.raises(Unsupported, match="format None"):
        load_checkpoint(tmp_path / "tensors")


def test_a_damaged_checkpoint_is_said_to_be_one(tmp_path):
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
    path.write_bytes(path.read_bytes()[:300])
    for file in (path, tmp_path / "missing", tmp_path):
        with pytest.raises(Unsupported, match="a safetensors file"):
            load_checkpoint(file)
