from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from regard.models import LanguageModel, LanguageModelConfig
from regard.models.vision import create_backbone
from regard.training import make_optimizer, parameter_groups
from regard.training.optimizer import scheduled_rate


def decayed_names(model, **options):
    groups = parameter_groups(model, 0.1, **options)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(names.values())
    return {names[id(p)] for group in groups if group["weight_decay"] == 0.1 for p in group["params"]}


def language_model(**options) -> LanguageModel:
    return LanguageModel(LanguageModelConfig(5, dim=8, num_heads=2, num_layers=1, **options))


def test_only_matrices_decay_unless_more_is_asked_for():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 3))
    assert decayed_names(model) == {"1.weight", "3.weight"}
    assert decayed_names(model, decay_embeddings=True) == {"0.weight", "1.weight", "3.weight"}
    assert decayed_names(model, decay_norms=True) == {"1.weight", "2.weight", "3.weight"}


def test_marked_and_frozen_parameters_do_not_decay():
    model = nn.Linear(4, 4, bias=False)
    model.weight._no_weight_decay = True
    assert decayed_names(model) == set()
    model.weight.requires_grad_(False)
    assert parameter_groups(model, 0.1) == []


def test_positions_and_class_tokens_of_an_image_backbone_do_not_decay():
    backbone = create_backbone("vit_nano", num_layers=1, num_classes=3)
    decayed = decayed_names(nn.ModuleDict({"whole": backbone}))
    assert not {"whole.positions", "whole.class_tokens"} & decayed
    assert "whole.head.weight" in decayed


def test_what_decays_in_a_model():
    model = language_model(positions="learned", max_length=4)
    decayed = decayed_names(model)
    assert not any("embedding" in name or name.startswith("positions") or "norm" in name for name in decayed)
    assert {"blocks.0.mixer.query.weight", "blocks.0.feed_forward.up.weight"} <= decayed
    norms = {f"{name}.weight" for name in ("blocks.0.mixer_norm", "blocks.0.feed_forward_norm", "norm")}
    assert decayed_names(model, decay_norms=True) == decayed | norms


@pytest.mark.parametrize("decay_norms", [False, True])
def test_decay_shrinks_what_decays_alone(decay_norms):
    model = language_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.5, decay_norms=decay_norms)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed = decayed_names(model, decay_norms=decay_norms)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (0.95 if name in decayed else 1.0))


def test_the_rate_rises_to_its_peak_and_falls_to_a_tenth():
    rates = [scheduled_rate(s, 100, peak=2.0, warmup=0.1, schedule="cosine") for s in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and max(rates) == pytest.approx(2.0)
    assert rates[99] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:])), "the last step alone has the final rate"
    assert rates[10] == pytest.approx(2.0) and rates[54] + rates[55] == pytest.approx(2.0 + 0.2), "half a period"
    constant = [scheduled_rate(s, 100, peak=2.0, warmup=0.1, schedule="constant") for s in range(100)]
    assert constant[:10] == rates[:10] and set(constant[10:]) == {2.0}
    assert scheduled_rate(0, 1, peak=2.0, warmup=0.0, schedule="cosine") == 2.0
