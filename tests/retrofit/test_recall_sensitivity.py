"""Layers to keep, chosen by what a model finds in its context."""

from __future__ import annotations

import pytest
import torch
from small_llama import WORK, llama, tokens
from torch.nn import functional as F

import regard
from regard.contract import Unsupported
from regard.retrofit import hiding, sensitivity
from regard.retrofit.folder import Folder
from regard.retrofit.hosts import open_host
from regard.retrofit.sensitivity import Known, choose, measure_sensitivity
from regard.retrofit.settings import RetrofitSettings

MECHANISM = "local:window=4"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    monkeypatch.setattr(sensitivity, "user_cache", lambda: tmp_path / "cache")


def test_half_of_the_layers_is_given_up_in_turn_by_how_unlikely_hidden_tokens_become(tmp_path):
    host = open_host(llama(5).double())
    settings = host.begun(RetrofitSettings(MECHANISM, "recall:1", **WORK))
    read = host.read(tokens(), None, settings)
    new, _ = host.copy_with(range(5), MECHANISM, 0)
    modules = {number: new.get_submodule(layer.path) for number, layer in enumerate(host.layers)}
    folder, nothing = Folder(tmp_path, {}), lambda _: None
    with folder.alone():
        found = measure_sensitivity(host, modules, read, 2, settings, folder, nothing, 0.0)
    texts = hiding.hiding(read.held_out, WORK["length"], 2, 0)

    @torch.no_grad()
    def nats(model):
        told = []
        for text, hidden in texts:
            losses = F.cross_entropy(model(text).logits[0, :-1], text[0, 1:], reduction="none")[-hidden.numel() :]
            told.append(losses.view(hidden.shape)[:, hiding.CUE :].mean())
        return torch.stack(told).mean()

    def lost(*numbers):
        new, _ = host.copy_with(numbers, MECHANISM, 0)
        return float(nats(new) - nats(host.model))

    alone = {number: lost(number) for number in modules}
    *weak, fourth, fifth = sorted(alone, key=lambda number: alone[number])
    least = alone[weak[-1]]
    again = {number: lost(*weak, number) for number in (fourth, fifth)}
    second, first = sorted(again, key=lambda number: again[number])
    expected = {number: alone[number] for number in weak}
    expected[second] = max(again[second], least)
    expected[first] = max(lost(*modules), expected[second])
    assert found == pytest.approx(expected, abs=1e-9) and len(set(alone.values())) == 5
    assert choose(found, 1) == (first,) and choose(found, 2) == tuple(sorted((first, second)))


def test_the_layer_without_which_the_least_is_found_is_kept(tmp_path):
    made = regard.retrofit(
        llama(3, loud=(1,)),
        MECHANISM,
        keep_layers="recall:1",
        data=tokens(),
        budget="54 steps",
        **WORK,
        output=tmp_path / "made",
    )
    sensitivity = made.record["sensitivity"]
    assert made.record["kept"] == [max(range(3), key=lambda number: sensitivity[str(number)])]
    assert made.record["settings"]["keep_layers"] == "recall:1"


def test_each_way_to_measure_is_kept_apart():
    host = open_host(llama(2))
    identities = [host.begun(RetrofitSettings(MECHANISM, keep, **WORK)).identity() for keep in ("auto:1", "recall:1")]
    paths = [Known({"model": "0123", "data": "4567", **its}, [0, 1]).path for its in identities]
    assert paths[0] != paths[1]


def test_blocks_too_short_to_hide_something_are_refused():
    host = open_host(llama(2))
    settings = RetrofitSettings(MECHANISM, "recall:1", **{**WORK, "length": hiding.LEAST_TEXT - 1})
    with pytest.raises(Unsupported, match=f"too short to hide something in.*length={hiding.LEAST_TEXT}"):
        host.begun(settings)
    assert hiding.hiding(tokens(), hiding.LEAST_TEXT - 1, 1, 0) is None
    assert hiding.hiding(tokens(), hiding.LEAST_TEXT, 1, 0) is not None


def test_a_model_that_predicts_no_next_token_has_no_recall():
    pytest.importorskip("timm")
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3)
    with pytest.raises(Unsupported, match=r"'recall:0.5'.*predicts no next tokens.*'auto:0.5'"):
        open_host(model).begun(RetrofitSettings("linear", "recall:0.5"))


def test_a_measurement_that_was_stopped_goes_on_where_it_was(tmp_path):
    host = open_host(llama(5))
    settings = host.begun(RetrofitSettings(MECHANISM, "recall:1", **WORK))
    read = host.read(tokens(), None, settings)
    new, _ = host.copy_with(range(5), MECHANISM, 0)
    modules = {number: new.get_submodule(layer.path) for number, layer in enumerate(host.layers)}

    def measure(folder, watch):
        with folder.alone():
            return measure_sensitivity(host, modules, read, 1, settings, folder, watch, 0.0)

    def stop(progress):
        if progress.done == 6:
            raise KeyboardInterrupt

    whole, folder, reports = measure(Folder(tmp_path / "whole", {}), lambda _: None), Folder(tmp_path / "parts", {}), []
    with pytest.raises(KeyboardInterrupt):
        measure(folder, stop)
    assert measure(folder, reports.append) == whole
    assert [(report.done, report.total) for report in reports] == [(7, 8), (8, 8)]
