"""The study of architecture search: its task, and a whole search as a cell."""

import math

import numpy as np
import pytest
import torch

from regard.contract import Unsupported
from regard.models.variants import read_variant
from regard.reproductions.framework.runs import run_cell
from regard.studies import get_study
from regard.studies.architecture_search import other_flops, scratch
from regard.studies.architecture_search.task import ASK, KEYS, SYMBOLS, RecallAndMajority
from regard.tasks import IGNORED, check_task
from regard.workbench.comparison.task_models import build
from regard.workbench.search.costs import NetworkBudget
from regard.workbench.search.settings import SearchSettings
from regard.workbench.search.space import Choices, Space

STUDY = get_study("architecture-search")


def test_questions_are_answered_by_the_noise_and_by_the_pairs():
    task = check_task(RecallAndMajority(length=64, pairs=4, questions=8, evaluation_items=16))
    batch = task.training_batch(0, 0, 16)
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        noise, pairs = tokens[: task.noise], tokens[task.noise : task.noise + 8]
        majority = 1 + int(np.argmax(np.bincount(noise, minlength=1 + SYMBOLS)[1:]))
        known = dict(zip(pairs[::2], pairs[1::2], strict=True))
        asked = [(token, answer) for token, answer in zip(tokens, targets, strict=True) if answer != IGNORED]
        assert len(asked) == 8
        assert sum(token == ASK for token, _ in asked) == 4
        assert all(answer == (majority if token == ASK else known[token]) for token, answer in asked)
        assert max(noise) <= SYMBOLS < min(pairs[::2]) <= SYMBOLS + KEYS
    with pytest.raises(Unsupported, match="length"):
        RecallAndMajority(length=20)


def test_a_cell_is_a_whole_search_and_is_shown_and_judged(monkeypatch):
    monkeypatch.setattr("regard.workbench.search.predictor.STEPS", 20)
    chosen = STUDY.choose()
    made = STUDY.make(chosen)
    settings = made.smoke_settings()
    measured = run_cell(made, settings["FLOPs"], 0)
    for name in ("found", "softmax alone", "cosformer alone", "reference"):
        assert measured[f"{name} loss"] > 0
    assert measured["found flops"] <= 0.6 * measured["reference flops"] * (1 + 1e-9)
    assert measured["reference first"] == measured["reference layers"] == 2
    assert measured["cosformer alone first"] == 0
    parts = STUDY.sections(chosen, {("FLOPs", 0): measured})
    assert [row["network"] for row in parts[0].rows] == ["found", "softmax alone", "cosformer alone", "reference"]
    assert parts[-1].rows[0]["ranker: tau"] == measured["ranker tau"]
    verdict = made.judge({("FLOPs", 0): measured, ("FLOPs", 1): measured})
    assert all(math.isfinite(finding.mean) for finding in verdict.findings if finding.seeds)


def test_searches_of_one_seed_share_what_their_budgets_do_not_change(monkeypatch):
    monkeypatch.setattr("regard.workbench.search.predictor.STEPS", 20)
    made = STUDY.make(STUDY.choose())
    setting = made.smoke_settings()["FLOPs"]
    smaller = {**setting, "budget": "50% flops"}
    scratch.cache_clear()
    alone = run_cell(made, smaller, 0)
    scratch.cache_clear()
    run_cell(made, setting, 0)
    beside = run_cell(made, smaller, 0)
    assert scratch.cache_info().hits == 1
    assert alone.keys() == beside.keys()
    assert all(beside[name] == value for name, value in alone.items() if not name.endswith(" ms"))


def test_other_flops_are_those_of_all_pairs_in_softmax():
    task = RecallAndMajority(length=64, pairs=4, questions=8, evaluation_items=2)
    softmax = read_variant("softmax")
    choices = Choices((softmax,), dims=(16,), depths=(2,), heads=(2,), feed_forward=(8,))
    space = Space(task, choices, SearchSettings(NetworkBudget("flops", 1.0)).models(task, [softmax]))
    model = build(space.config(space.uniform("softmax")), 0)
    with torch.no_grad():
        assert other_flops(model, task) == 2 * 4 * 64**2 * 16


def test_what_has_no_causal_pattern_cannot_enter_and_other_mechanisms_may():
    with pytest.raises(Unsupported, match="causal-self"):
        STUDY.choose(mechanisms="softmax,fnet")
    made = STUDY.make(STUDY.choose(mechanisms="softmax,gated_linear"))
    assert not any("cosFormer" in check.says for check in made.checks)
    assert any("without cosformer" in claim for claim in made.left_out)
    assert not any("without cosformer" in claim for claim in STUDY.make(STUDY.choose()).left_out)
