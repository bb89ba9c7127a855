"""The sensitivity of layers, measured once for all retrofits of a model with the same data and mechanism."""

from __future__ import annotations

import math

import pytest
import torch
from small_llama import WORK, llama, tokens

import regard
from regard.retrofit import sensitivity
from regard.retrofit.sensitivity import Known

IDENTITY = {
    "model": "0123",
    "data": "4567",
    "mechanism": "local:window=4",
    "length": 32,
    "batch_size": 2,
    "transfer_rate": 0.02,
    "seed": 0,
    "budget": "60m",
}
FOUND = {0: 0.25, 2: math.inf, 5: -1e-7}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    monkeypatch.setattr(sensitivity, "user_cache", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "sensitivity"


def test_a_second_folder_measures_no_layer_again_and_comes_out_the_same(tmp_path, cache):
    model, data = llama(3, loud=(1,)), tokens()

    def run(name):
        told, done = [], []
        made = regard.retrofit(
            model,
            "gated_linear",
            keep_layers="auto:1",
            data=data,
            budget="54 steps",
            **WORK,
            output=tmp_path / name,
            watch=lambda progress: done.append(progress.doing),
            say=told.append,
        )
        taken = [line for line in told if "as an earlier retrofit" in line]
        assert bool(taken) is ("sensitivity of each layer" not in done) is ("first steps of all layers" not in done)
        return made, taken

    first, taken = run("first")
    (file,) = cache.iterdir()
    assert not taken
    second, taken = run("second")
    assert len(taken) == 1 and str(file) in taken[0]
    assert second.record["sensitivity"] == first.record["sensitivity"] and second.swapped == first.swapped
    assert second.record["losses"] == first.record["losses"]
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor)


def test_what_was_measured_is_read_again():
    Known(IDENTITY, [0, 2, 5]).write(FOUND, 10, 4)
    assert Known({**IDENTITY, "budget": "5m"}, [0, 2, 5]).read(10, 4) == FOUND


@pytest.mark.parametrize("name", ["model", "data", "mechanism", "length", "batch_size", "transfer_rate", "seed"])
def test_what_was_measured_with_something_else_does_not_count(name):
    Known(IDENTITY, [0, 2, 5]).write(FOUND, 10, 4)
    other = "local:window=8" if name == "mechanism" else 7
    assert Known({**IDENTITY, name: other}, [0, 2, 5]).read(10, 4) is None


def test_what_was_measured_of_other_layers_or_by_another_version_does_not_count(monkeypatch):
    Known(IDENTITY, [0, 2, 5]).write(FOUND, 10, 4)
    assert Known(IDENTITY, [0, 2]).read(10, 4) is None
    for of, name in ((sensitivity, "VERSION"), (sensitivity, "METHOD"), (sensitivity.provenance, "git_revision")):
        with monkeypatch.context() as patch:
            patch.setattr(of, name, (lambda: "another") if name == "git_revision" else "another")
            assert Known(IDENTITY, [0, 2, 5]).read(10, 4) is None


def test_a_plugin_that_was_changed_is_measured_again(monkeypatch):
    monkeypatch.setattr(sensitivity, "plugin_code", lambda mechanism: ["one"] if mechanism.startswith("local") else [])
    Known(IDENTITY, [0]).write({0: 1.0}, 10, 4)
    assert Known(IDENTITY, [0]).read(10, 4) == {0: 1.0}
    monkeypatch.setattr(sensitivity, "plugin_code", lambda mechanism: ["other"])
    assert Known(IDENTITY, [0]).read(10, 4) is None


@pytest.mark.parametrize(("steps", "blocks", "counts"), [(20, 8, True), (21, 4, False), (10, 9, False), (8, 1, True)])
def test_what_was_measured_in_less_than_half_of_the_work_does_not_count(steps, blocks, counts):
    Known(IDENTITY, [0, 2, 5]).write(FOUND, 10, 4)
    assert (Known(IDENTITY, [0, 2, 5]).read(steps, blocks) is not None) is counts


@pytest.mark.parametrize("text", ["", "[]", "{", '{"identity": 1}', "null"])
def test_an_unreadable_file_counts_as_missing(text):
    kept = Known(IDENTITY, [0, 2, 5])
    kept.write(FOUND, 10, 4)
    kept.path.write_text(text)
    assert kept.read(10, 4) is None


def test_a_cache_that_cannot_be_written_keeps_nothing(cache):
    cache.parent.mkdir()
    cache.write_text("a file")
    kept = Known(IDENTITY, [0])
    kept.write({0: 1.0}, 10, 4)
    assert kept.read(10, 4) is None and cache.read_text() == "a file"
