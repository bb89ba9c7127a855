"""The study of wide attention: what changes with the division into heads, and what does not."""

import pytest
from command_line import answer, run

from regard.reproductions import wide_attention as study
from regard.tasks import create_task


def test_the_table_has_means_over_seeds_and_nothing_where_nothing_was_measured():
    deep, wide = (f"documents: linear {study.shape(*ratio)}" for ratio in (study.DEEP, study.WIDE))
    cells = {
        (deep, 0): {"score": 0.6, "parameters": 30.0},
        (deep, 1): {"score": 0.8, "parameters": 30.0},
        (wide, 0): {"score": None, "parameters": 10.0},
        ("time: linear", 0): {"speedup": {"median": 3.0, "low": 2.0, "high": 4.0}},
    }
    row = next(r for r in study.table(cells) if (r["task"], r["attention"]) == ("documents", "linear"))
    scores = {"6x2": pytest.approx(0.7), "3x4": None, "2x6": None, "1x12": None}
    assert row == {"task": "documents", "attention": "linear", **scores, "smaller": 3.0, "faster": 3.0}


def test_expressions_are_judged_by_what_the_first_token_tells():
    name, score = study.RULES["listops"]
    rule = create_task("listops", length=128).baseline
    assert rule.name == name and rule.score == pytest.approx(score, abs=0.03)
    need = next(check for check in study.REPRODUCTION.needs if name in check.says)
    deep = f"listops: softmax {study.shape(*study.DEEP)}"
    assert need.judge([{deep: {"score": 0.226}}, {deep: {"score": 0.227}}]).outcome == "did not hold"


def test_the_command_lists_studies_and_shows_what_is_done(capsys, tmp_path):
    assert {"token-reduction", "wide-attention"} <= {one["name"] for one in answer(capsys, "study")["studies"]}
    code, shown, _ = run(capsys, "study wide-attention --table --output", tmp_path)
    assert code == 0 and "sparse_strided" in shown
    code, _, said = run(capsys, "study wide-atention --output", tmp_path)
    assert code == 2 and "try wide-attention" in said
    assert not list(tmp_path.iterdir())
