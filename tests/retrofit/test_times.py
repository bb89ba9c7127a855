"""Token times in the report of a retrofit: models decode as they will for users, and are unchanged afterwards."""

import pytest
import torch
from small_llama import llama

import regard
from regard.retrofit.measures import language
from regard.retrofit.measures.shared import ORIGINAL, RETROFIT, SOFTMAX

pytest.importorskip("transformers")


def test_all_but_the_original_decode_fused_and_only_while_they_are_timed(monkeypatch):
    models = {ORIGINAL: llama(), RETROFIT: llama(), SOFTMAX: llama()}
    for name in (RETROFIT, SOFTMAX):
        regard.swap(models[name], "gated_linear" if name == RETROFIT else "softmax")

    def fused(model):
        return "forward" in vars(model.model.layers[0])

    seen, step = set(), language._GoingOn.step
    monkeypatch.setattr(
        language._GoingOn, "step", lambda one, n: (seen.add((one.model, fused(one.model))), step(one, n))
    )
    found = language.decoding(models, torch.arange(2, 40), 32)
    assert dict(seen) == {models[ORIGINAL]: False, models[RETROFIT]: True, models[SOFTMAX]: True}
    assert not any(map(fused, models.values()))
    assert {name: each["from"] for name, each in found.items()} == dict.fromkeys(models, "cache")
