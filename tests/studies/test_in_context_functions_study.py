"""The study of in-context functions: heads, prompts, eligible mechanisms, and a whole run from the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import answer, run
from support import close, load, refused

from regard import catalogue
from regard.studies import get_study, opened
from regard.studies import in_context_functions as study
from regard.studies.framework.report import render_study
from regard.studies.in_context_functions import showing
from regard.studies.in_context_functions.cells import BEST, NEAREST, NOTHING, build_model, run_cell, says, task_of
from regard.studies.in_context_functions.heads import head_figures, induction_scores, nearest_scores
from regard.studies.in_context_functions.prompts import INSTRUCTION, Prompt, ask
from regard.tasks.in_context_functions.functions import Contexts

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples" / "mechanisms"
STUDY = get_study("in-context-functions")
SMALLEST = {"steps": 2, "batch_size": 2, "items": 6, "layers": 1, "dim": 16, "num_heads": 2, "length": 24}
SMALLEST |= {"learning_rate": 1e-3, "dimensions": 5}


def uniform(tokens):
    """Weights that are equal for all visible tokens."""
    weights = torch.ones(1, 1, tokens, tokens, dtype=torch.float64).tril()
    return weights / weights.sum(-1, keepdim=True)


def test_a_head_that_copies_from_the_nearest_label_scores_one_and_a_uniform_one_a_share():
    x = torch.randn(3, 12, 5, dtype=torch.float64)
    unit = x / x.norm(dim=-1, keepdim=True)
    similar = (unit @ unit.mT).masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(-1), -2)
    weights = torch.zeros(3, 2, 24, 24, dtype=torch.float64)
    weights[..., 0] = 1
    for row in range(3):
        for point in range(1, 12):
            weights[row, 1, 2 * point] = torch.eye(24, dtype=torch.float64)[2 * similar[row, point].argmax() + 1]
    close(nearest_scores(weights, x, 6), torch.tensor([0.0, 1.0], dtype=torch.float64))
    share = torch.tensor([1 / (2 * point + 1) for point in range(6, 12)], dtype=torch.float64).mean()
    close(nearest_scores(uniform(24).expand(3, 1, -1, -1), x, 6), share[None])
    close(nearest_scores(uniform(24).expand(3, 1, -1, -1), x, 6, neighbours=2), 2 * share[None])


def test_a_head_that_copies_from_earlier_copies_scores_one_and_a_uniform_one_a_share():
    weights = torch.zeros(2, 1, 24, 24, dtype=torch.float64)  # three copies of four examples
    for copy in (1, 2):
        for place in range(0, 8, 2):
            for earlier in range(copy):
                weights[:, :, 8 * copy + place, 8 * earlier + place + 1] = 1 / copy
    close(induction_scores(weights, 3), torch.ones(1, dtype=torch.float64))
    shares = [copy / (8 * copy + place + 1) for copy in (1, 2) for place in range(0, 8, 2)]
    close(induction_scores(uniform(24), 3), torch.tensor([sum(shares) / 8], dtype=torch.float64))
    refused("of whole examples", induction_scores, uniform(24), 5)


def test_scores_of_heads_are_shares_of_any_weights():
    weights, x = torch.randn(2, 3, 24, 24, dtype=torch.float64).tril(), torch.randn(2, 12, 5, dtype=torch.float64)
    scales = 10 * torch.rand(2, 3, 24, 1, dtype=torch.float64)
    for score in (lambda given: induction_scores(given, 3), lambda given: nearest_scores(given, x, 6)):
        found = score(weights)
        assert ((found > 0) & (found <= 1)).all()
        close(score(weights.relu() * scales), found)
        close(score(-weights.abs()), torch.zeros(3, dtype=torch.float64))


def test_scores_of_heads_equal_those_of_the_public_code():
    recorded = load("in_context_functions_official")
    weights = recorded["heads_weights"].double()
    found = torch.cat([induction_scores(layer, 4) for layer in weights])
    close(found * 2 / 4, recorded["heads_induction"], 1e-6)  # the public code averages over pairs of copies
    found = torch.cat([nearest_scores(layer, recorded["heads_x"].double(), 5) for layer in weights])
    close(found, recorded["heads_nearest"], 1e-6)


@pytest.mark.parametrize("mechanism", ["softmax", "gated_linear", "mamba2", "cosformer"])
def test_what_a_model_says_does_not_depend_on_the_label_or_on_what_follows(mechanism):
    setting = SMALLEST | {"function": "conjunction"}
    task = task_of(setting, 0)
    model = build_model(setting | {"mechanism": mechanism}, task.dimensions).double()
    model.embedding.register_forward_pre_hook(lambda _, given: (given[0].double(),))
    shown, at = task.held_out, 7
    x, y = shown.x.copy(), shown.y.copy()
    x[:, at + 1 :], y[:, at:] = -x[:, at + 1 :], -y[:, at:]
    before, after = says(model, shown), says(model, Contexts(x, y, shown.taught))
    close(after[:, : at + 1], before[:, : at + 1])
    assert (after[:, at + 1 :] != before[:, at + 1 :]).all()


def test_only_mechanisms_that_can_read_the_context_enter():
    for name, told in (
        ("fnet", "causal-self"),
        ("low_rank_pooling", "as many tokens"),
        ("landmark", "inserts tokens"),
    ):
        refused(told, STUDY.choose, "tiny", f"softmax,{name}")
    chosen = STUDY.choose("small", "gated_linear,local:window=8")
    assert study.entered(chosen) == ("softmax", "gated_linear", "local:window=8"), "the control enters in any case"
    assert STUDY.choose("tiny", "retention").mechanisms == (study.RETENTION,), "one name for one model"
    everyone = STUDY.choose("tiny", "all").mechanisms
    assert len(everyone) > 35
    for name in everyone:  # all of them can be built
        build_model(SMALLEST | {"mechanism": name}, 5)


class Words:
    """A tokenizer with one token for each character, so that digits are single tokens after a space."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ([999] if add_special_tokens else []) + [ord(letter) for letter in text]}


def test_a_prompt_shows_all_examples_and_asks_before_each_label():
    x, y = np.array([[1, -1], [-1, -1], [1, 1]]), np.array([1, -1, 1])
    ids, asked = Prompt(Words()).read(x, y)
    text = "".join(map(chr, ids[1:]))
    assert text == INSTRUCTION + "\nInput: 1 0\nLabel: 1\nInput: 0 0\nLabel: 0\nInput: 1 1\nLabel: 1"
    assert [chr(ids[at + 1]) for at in asked] == ["1", "0", "1"]
    assert all("".join(map(chr, ids[at - 6 : at + 1])) == "Label: " for at in asked)

    def model(given):
        """A model that expects the next token to repeat the one nine places before."""
        logits = torch.zeros(*given.shape, 1000)
        logits[0, torch.arange(9, given.shape[1]), given[0, :-9]] = 3.0
        return SimpleNamespace(logits=logits)

    told = ask(model, Words(), x[None], y[None])
    before = [chr(ids[at - 9]) for at in asked]
    assert told[0].tolist() == [{"1": 3.0, "0": -3.0}.get(letter, 0.0) for letter in before]

    def merged(text, add_special_tokens=True):
        return {"input_ids": [3, 4] if text == " 0" else [5, 6]}

    refused("one token for a digit", Prompt, merged)


def test_a_cell_measures_what_its_setting_trains():
    found = run_cell(
        SMALLEST | {"kind": "trained", "mechanism": "softmax", "function": "teach_conjunction", "taught": 0.5}, 1
    )
    assert len(found["curve"]) == 12 and len(found["longer curve"]) == 24
    assert {"taught end", "untaught end", "shifted end", "best induction score", "nearest heads"} <= set(found)
    pooled = run_cell(SMALLEST | {"kind": "trained", "mechanism": "linear", "function": "parity", "pool": 4}, 1)
    assert "pooled end" in pooled and "best induction score" not in pooled
    neighbours = run_cell(SMALLEST | {"kind": "references", "function": "nearest_neighbours"}, 1)
    assert neighbours["nearest cosine score"] == 1.0
    assert np.isnan(neighbours["nearest cosine curve"]).tolist() == [True] * 6 + [False] * 6
    assert f"{BEST} end" not in neighbours


def test_frozen_layers_stay_as_they_were_drawn(monkeypatch):
    kept = {}

    def fit(model, task, setting, seed):
        kept.update({name: p.requires_grad for name, p in model.named_parameters()})
        return True

    monkeypatch.setattr("regard.studies.in_context_functions.cells.fit", fit)
    run_cell(SMALLEST | {"kind": "trained", "mechanism": "softmax", "function": "conjunction", "frozen": True}, 0)
    assert {name for name, trains in kept.items() if trains} == {
        name for name in kept if not name.startswith("blocks.")
    }


def test_heads_of_the_model_are_looked_at_on_examples():
    setting = SMALLEST | {"function": "conjunction", "mechanism": "softmax"}
    figures = head_figures(build_model(setting, 5), task_of(setting, 0), 0)
    assert 0 < figures["best induction score"] < 0.5 and 0 < figures["best nearest score"] < 0.5
    assert figures["induction heads"] == figures["nearest heads"] == 0


def test_every_check_reads_cells_that_the_preset_has():
    for preset in STUDY.presets:
        made = STUDY.make(STUDY.choose(preset))
        measured = {name: 0.5 for part in ("end", "early") for name in (part, f"taught {part}", f"untaught {part}")}
        measured |= {f"{one} end": 0.5 for one in (BEST, NEAREST, NOTHING, "elimination", "Gaussian elimination")}
        verdict = made.judge({(name, seed): measured for name in made.settings for seed in range(2)})
        assert all(one.seeds == 2 for one in (*verdict.findings, *verdict.needs))


def test_runs_that_diverged_are_told():
    good = {"early": 0.6, "end": 0.8, "score": 0.7, "curve": [0.5, 0.9]}
    lost = dict.fromkeys(good) | {"curve": [None, None]}
    cells = {("conjunction: softmax", 0): good, ("conjunction: softmax", 1): lost, ("conjunction: local", 0): lost}
    rows = showing._function(cells, "conjunction", ["softmax", "local", "linear"]).rows
    assert [(row["learner"], row["end"], row["diverged"]) for row in rows] == [
        ("softmax", 0.8, "1 of 2 runs"),
        ("local", None, "1 of 1 runs"),
    ]
    alone = showing._function({("conjunction: softmax", 0): good}, "conjunction", ["softmax"]).rows
    assert "diverged" not in alone[0]


def test_what_the_paper_says_of_models_without_attention_is_asked_of_those_alone():
    def about(mechanisms):
        made = STUDY.make(STUDY.choose("tiny", mechanisms))
        return [c for c in made.checks if "fixed size" in c.says], [one for one in made.left_out if "fixed size" in one]

    assert about("sigmoid")[0] == [] and len(about("sigmoid")[1]) == 1
    (check,), left_out = about("sigmoid,linear")
    assert not left_out
    scores = {"softmax": 0.9, "linear": 0.8, "sigmoid": 0.95}
    seed = {f"conjunction: {name}": {"end": value} for name, value in scores.items()}
    assert check.value(seed) == pytest.approx(-0.1), "sigmoid attention, which is better, does not count"


def test_a_plugin_enters_from_the_command_line_and_null_is_told_with_every_function(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(study.SIZES, "tiny", SMALLEST | {"length": 16})
    shutil.copy(EXAMPLES / "rectified.py", tmp_path)
    line = f"study in-context-functions --seeds 1 --mechanisms rectified --plugin {tmp_path}/rectified.py --output"
    try:
        told = answer(capsys, line, tmp_path / "runs")
        chosen = STUDY.choose("tiny", "rectified")
        names = [part["title"] for part in told["sections"]]
        assert names == ["conjunction", "taught conjunction", "parity", "Beyond training", "Heads"]
        for part in told["sections"][:3]:
            learners = {row["learner"] for row in part["rows"]}
            assert {NOTHING, NEAREST, "softmax"} <= learners
            assert len(part["pictures"][0]["curves"][NOTHING]) == 8
        assert "rectified" in {row["learner"] for row in told["sections"][0]["rows"]}
        page = (tmp_path / "runs" / "in-context-functions.html").read_text()
        assert page.count("<svg") == 4 and NOTHING in page and "rectified" in page
        assert "<svg" not in render_study(opened(STUDY, chosen, None))
    finally:
        catalogue.unregister("rectified")
    code, _, said = run(capsys, "study in-context-functions --preset tinny --output", tmp_path / "none")
    assert code == 2 and "try tiny" in said and not (tmp_path / "none").exists()
