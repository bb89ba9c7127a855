"""The study of wide attention: what changes with the division into heads, and what does not."""

import json
from pathlib import Path

import pytest
from command_line import answer, run

from regard.contract import Unsupported
from regard.reproductions import wide_attention as study
from regard.studies import Chosen, get_study
from regard.studies import wide_attention as asked
from regard.tasks import create_task

SMALL = study.SIZES["small"]
PUBLISHED = Path(__file__).parents[2] / "docs/data/reproductions.json"


def test_the_table_has_means_over_seeds_and_nothing_where_nothing_was_measured():
    deep, wide = (study.trained("documents", "linear", one) for one in (SMALL.deep, SMALL.wide))
    cells = {
        (deep, 0): {"score": 0.6, "parameters": 30.0},
        (deep, 1): {"score": 0.8, "parameters": 30.0},
        (wide, 0): {"score": None, "parameters": 10.0},
        ("time: linear", 0): {"speedup": {"median": 3.0, "low": 2.0, "high": 4.0}},
    }
    row = next(r for r in study.table(cells) if (r["task"], r["attention"]) == ("documents", "linear"))
    scores = {"6x2": pytest.approx(0.7), "3x4": None, "2x6": None, "1x12": None}
    assert row == {"task": "documents", "attention": "linear", **scores, "smaller": 3.0, "faster": 3.0}


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_expressions_are_judged_by_what_the_first_token_tells(preset):
    size = study.SIZES[preset]
    name, options = study.TASKS["listops"]
    rule = create_task(name, **options | size.task_options.get("listops", {})).baseline
    assert rule.name == study.RULES["listops"] and rule.score == pytest.approx(size.rules["listops"], abs=0.03)
    need = next(check for check in study.make(preset).needs if rule.name in check.says)
    deep = study.trained("listops", "softmax", size.deep)
    barely = [{deep: {"score": size.rules["listops"] - 0.024 + 0.001 * i}} for i in range(2)]
    assert need.judge(barely).outcome == "did not hold"


def test_the_published_cells_are_those_of_the_preset_small():
    """Cells count by their options, which hold as little as when they were published."""
    told = next(one for one in json.loads(PUBLISHED.read_text())["reproductions"] if one["name"] == "wide_attention")
    assert told["protocol"] == study.REPRODUCTION.protocol and told["settings"] == study.REPRODUCTION.settings
    more = study.make("small", (*study.TYPES, "sigmoid"))
    assert told["settings"].items() <= {name: dict(one) for name, one in more.settings.items()}.items()


@pytest.mark.parametrize("preset", study.SIZES)
def test_a_division_keeps_all_heads_and_a_setting_is_of_one_preset(preset):
    size = study.SIZES[preset]
    assert len({layers * heads for layers, heads in size.divisions}) == 1
    assert size.deep[0] == max(size.divisions)[0] and size.wide[0] == 1
    others = [one for name in study.SIZES if name != preset for one in study.make(name).settings.values()]
    assert not any(one in others for one in study.make(preset).settings.values())


def test_a_type_of_attention_is_the_study_s_own_unless_its_options_are_given():
    assert study.form("local", 64) == ("local", {"form": "block", "block": 16})
    assert study.form("local:window=8", 64) == ("local", {"window": 8})
    assert study.form("linformer", 64) == ("linformer", {"length": 64, "projected": 32})
    assert study.form("sigmoid", 64) == ("sigmoid", {})


def test_any_attention_enters_beside_softmax_and_the_claims_are_about_what_entered():
    one = get_study("wide-attention")
    chosen = one.choose("tiny", "local:window=8,sigmoid")
    made = one.make(chosen)
    assert asked.entered(chosen) == ("softmax", "local:window=8", "sigmoid")
    cells = {
        (name, seed): {"speedup": 2.0} if name in made.timings else {"score": 0.9, "parameters": 100.0}
        for name in made.settings
        for seed in (0, 1)
    }
    cells = {
        at: {"speedup": {"median": 2.0, "low": 1.9, "high": 2.1}} if "speedup" in m else m for at, m in cells.items()
    }
    for seed in (0, 1):
        cells["listops: sigmoid 1x4", seed] = {"score": 0.6, "parameters": 10.0}
    found = {finding.says: finding.mean for finding in made.judge(cells).findings}
    assert found["ListOps: the wide model within 2 points of the deep one"] == pytest.approx(-0.1)
    assert found["half the size"] == pytest.approx((1 + 1 + 10) / 3)
    first, second = one.sections(chosen, cells)
    row = next(row for row in first.rows if row["attention"] == "sigmoid")
    assert (row["gained on listops"], row["smaller"], row["faster"]) == (pytest.approx(-0.3), 10.0, 2.0)
    assert [row["attention"] for row in second.rows] == list(asked.entered(chosen))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mamba2", "with heads"),
        ("lolcats", "noncausal-self"),
        ("landmark", "inserts tokens"),
        ("gated_linear+softmax", "hybrid"),
    ],
)
def test_what_has_no_heads_to_share_out_is_refused(name, why):
    with pytest.raises(Unsupported, match=why):
        get_study("wide-attention").choose("tiny", name)


def test_a_cell_of_a_user_s_choice_trains_what_it_names():
    shrunk, name = {"steps": 1, "batch_size": 2, "items": 4}, "local:window=8"
    made = study.make("tiny", ("softmax", name))
    size = study.SIZES["tiny"]
    deep, wide = (
        study.run_cell(made.settings[study.trained("listops", name, one)] | shrunk, 0)["parameters"]
        for one in (size.deep, size.wide)
    )
    layer = 3 * 32 * 64  # the gated feed-forward network, without biases and norms
    assert deep - wide == pytest.approx(3 * layer, rel=0.02)


def test_tasks_without_data_are_left_out_and_told(monkeypatch):
    monkeypatch.setattr(asked, "find_spec", lambda _: None)
    chosen = Chosen("small", ("softmax", "linear"))
    made = asked.make(chosen)
    assert {one["task"] for one in made.settings.values()} == {"listops"}
    assert sum("its data need" in one for one in made.left_out) == 3
    assert made.checks and asked.sections(chosen, {})[0].rows


def test_the_table_of_token_reduction_shows_accuracy_under_distractors_where_it_is_measured():
    cells = {("nothing", 0): {"score": 0.9, "distracted": 0.8}, ("dynamic 0.5", 0): {"score": 0.7, "distracted": 0.6}}
    rows = get_study("token-reduction").sections(Chosen("small"), cells)[0].rows
    shown = {(row["method"], row["share at a stage"]): row["with six blobs"] for row in rows}
    assert (shown["all tokens", 1.0], shown["DynamicViT", 0.5], shown["ToMe", 0.5]) == (0.8, 0.6, None)


def test_the_command_lists_studies_and_shows_what_is_done(capsys, tmp_path):
    told = {one["name"]: one for one in answer(capsys, "study")["studies"]}
    assert {"token-reduction", "wide-attention"} <= told.keys()
    assert told["wide-attention"]["presets"] == ["tiny", "small", "paper"] and told["wide-attention"]["mechanisms"]
    code, shown, _ = run(capsys, "study wide-attention --preset small --table --output", tmp_path)
    assert code == 0 and "sparse_strided" in shown
    code, _, said = run(capsys, "study wide-atention --output", tmp_path)
    assert code == 2 and "try wide-attention" in said
    assert not list(tmp_path.iterdir())
