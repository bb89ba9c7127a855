"""Properties of every study: a checked choice, cells that are computed once, and a page."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import pytest
from command_line import answer, run

from regard import Unsupported
from regard.catalogue import unregister
from regard.cli.console import console
from regard.cli.study import _rows
from regard.contract import Paper
from regard.reproductions import Check, Reproduction
from regard.reproductions.framework.judging import largest, measured
from regard.studies import Chosen, Curves, Heat, Points, Section, Study, get_study, list_studies
from regard.studies.framework import catalogue
from regard.studies.framework.report import render_study
from regard.workbench.reports.section_pages import cell, draw
from regard.workbench.reports.sections import section

WIDE_ATTENTION = get_study("wide-attention")


@pytest.fixture
def example(monkeypatch):
    """Mechanisms and seeds of the cells that the example study has run."""
    ran = []

    def run_cell(setting, seed):
        ran.append((setting["mechanism"], seed))
        return {"score": 0.5 + 0.01 * seed, "curve": [0.1, float("nan"), setting["size"]]}

    def make(chosen: Chosen) -> Reproduction:
        size = {"tiny": 1, "small": 2}[chosen.preset]
        return Reproduction(
            name="example",
            mechanisms=("softmax",),
            claim="everything scores above 0.4",
            instead="numbers that are made up",
            settings={name: {"mechanism": name, "size": size} for name in chosen.mechanisms},
            run_cell=run_cell,
            checks=(Check("softmax scores above 0.4", measured("softmax", "score"), above=0.4),),
            source=Paper("An example", "0000.00000", 2020, 1),
            seconds=0.01,
            more_seconds={"linear": 0.03},
            seeds=2,
        )

    def sections(chosen, cells):
        curves = {name: list(enumerate(found["curve"])) for (name, seed), found in cells.items() if seed == 0}
        rows = [{"mechanism": name, "seed": seed, "score": found["score"]} for (name, seed), found in cells.items()]
        return [Section("Scores", "higher is better", [Curves("by place", "place", "score", curves)], rows)]

    study = Study(
        name="an-example",
        question="What is a study?",
        make=make,
        sections=sections,
        mechanisms=("softmax", "linear"),
        refuses=lambda name: "it hears nothing" if name == "fnet" else None,
    )
    monkeypatch.setattr(catalogue, "_found", lambda: {study.name: study})
    return ran


def test_a_study_runs_what_is_missing_and_tells_everything(capsys, example, tmp_path):
    found = answer(capsys, "study an-example --output", tmp_path)
    assert example == [("softmax", 0), ("linear", 0), ("softmax", 1), ("linear", 1)]
    assert (found["study"], found["preset"], found["outcome"]) == ("an-example", "tiny", "held")
    (shown,) = found["sections"]
    assert shown["rows"][0] == {"mechanism": "softmax", "seed": 0, "score": 0.5}
    assert shown["pictures"][0]["curves"]["linear"] == [[0, 0.1], [1, None], [2, 1]]
    page = (tmp_path / "an-example.html").read_text()
    assert "What is a study?" in page and "<svg" in page and "softmax scores above 0.4" in page
    example.clear()
    more = answer(capsys, "study an_example --mechanisms linear,local:window=4 --output", tmp_path)
    assert example == [("local:window=4", 0), ("local:window=4", 1)] and more["done"] == 4
    example.clear()
    assert answer(capsys, "study an-example --preset small --seeds 1 --output", tmp_path)["done"] == 2
    assert len(example) == 2, "rows of another preset do not count"


def test_the_list_tells_what_a_preset_takes(capsys, example):
    (told,) = answer(capsys, "study")["studies"]
    assert told["seconds"] == {name: pytest.approx(2 * (0.01 + 0.03)) for name in ("tiny", "small")}
    code, shown, _ = run(capsys, "study")
    assert code == 0 and "tiny: 0.08 s" in shown and not example


def test_a_budget_leaves_cells_for_later_and_showing_runs_nothing(capsys, example, tmp_path):
    assert answer(capsys, "study an-example --budget 0.001s --output", tmp_path)["done"] == 0
    assert answer(capsys, "study an-example --table --output", tmp_path / "none")["done"] == 0
    assert not example and not (tmp_path / "none").exists()
    assert answer(capsys, "study an-example --budget 1h --output", tmp_path)["done"] == 4


def test_the_line_before_a_cell_counts_what_is_left(capsys, example, monkeypatch, tmp_path):
    later = SimpleNamespace(monotonic=itertools.count(0, 60).__next__)  # a minute passes between two looks at the clock
    monkeypatch.setattr("regard.cli.progress.time", later)
    _, _, said = run(capsys, "study an-example --seeds 1 --output", tmp_path)
    assert "2 cells, about" in said and "1 cell, about" in said


def test_a_plugin_enters_by_its_flag_alone_beside_the_study_s_own(capsys, example, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n\nclass Sums(torch.nn.Module):\n    def forward(self, x):\n        return x.cumsum(1)\n"
    )
    try:
        told = answer(capsys, f"study an-example --seeds 1 --plugin {file}:Sums --output", tmp_path)
    finally:
        unregister("Sums")
    assert told["entered"] == ["softmax", "linear", "Sums"] and ("Sums", 0) in example


def test_a_plugin_that_is_no_mechanism_is_refused(capsys, example, tmp_path):
    file = tmp_path / "task.py"
    file.write_text("TASK = object()\n")
    code, _, said = run(capsys, f"study an-example --plugin {file} --output", tmp_path / "out")
    assert code == 2 and "a plugin without a mechanism" in " ".join(said.split())
    assert not example and not (tmp_path / "out").exists()


def test_the_list_tells_which_files_a_study_takes(capsys):
    told = {one["name"]: one["files"] for one in answer(capsys, "study")["studies"]}
    assert "text file" in told["training-dynamics"] and told["softmax-regression"] == ""
    _, shown, _ = run(capsys, "study")
    assert "cascades (.txt)" in " ".join(shown.split())


def test_a_mechanism_that_a_preset_has_no_heads_for_is_left_out_and_told():
    chosen = WIDE_ATTENTION.choose("tiny", "softmax,differential,linear", (), ())
    made = WIDE_ATTENTION.make(chosen)
    assert not any("differential" in setting for setting in made.settings)
    assert any("differential, which cannot share out its heads" in why for why in made.left_out)
    assert any("linear" in setting for setting in made.settings)


def test_options_of_runs_are_refused_where_nothing_runs(capsys, tmp_path):
    for command in (
        "study wide-attention --table --shard 1/2",
        "study wide-attention --table --budget 5m",
        "reproduce delta_rule --table --timings",
        "reproduce delta_rule --table --pilot 2",
        "reproduce delta_rule --pilot 2 --seeds 2",
    ):
        code, _, error = run(capsys, f"{command} --output", tmp_path / "none")
        assert code == 2 and "beside --" in error
    assert not (tmp_path / "none").exists()


def test_the_largest_of_numbers_of_which_one_is_none_is_none():
    assert largest([0.1, 0.3]) == 0.3
    for values in ([0.1, math.nan], [math.nan, 0.1], [0.1, math.nan, 0.3]):
        assert math.isnan(largest(values))


def test_no_figure_of_a_table_loses_digits_in_a_narrow_terminal():
    rows = [{f"a heading of some length {i}": 1234.5 + i if i else 1.234e-15 for i in range(12)}]
    with console.capture() as shown:
        console.print(_rows(rows), width=60)
    assert "…" not in shown.get()


def test_figures_are_read_without_powers_of_ten_where_they_are_counts():
    values = (43170.0, -1580.4, 0.123456, 999.96, 12, 2e12, True, None)
    told = ["43,170", "-1,580", "0.1235", "1000", "12", "2e+12", "yes", "—"]
    assert [cell(value) for value in values] == told


def test_an_axis_that_is_upside_down_says_so():
    curve = {"softmax": [(1, 2.0), (2, 1.0)]}
    assert "loss (less is up)" in str(draw(Curves("c", "x", "loss", curve, rising=False), "i"))
    assert "less is up" not in str(draw(Curves("c", "x", "accuracy", curve), "i"))


def test_names_beside_lines_are_whole():
    name = "softmax, of the context"
    assert f">{name}</text>" in str(draw(Curves("c", "x", "y", {name: [(1, 2.0), (2, 1.0)]}), "i"))


@pytest.mark.parametrize(("above", "open_"), [(0.4, False), (0.6, True)])
def test_beside_the_verdict_stands_what_did_not_hold(capsys, example, monkeypatch, tmp_path, above, open_):
    made = get_study("an-example")
    check = Check("softmax scores high", measured("softmax", "score"), above=above)
    changed = dataclasses.replace(made, make=lambda chosen: dataclasses.replace(made.make(chosen), checks=(check,)))
    monkeypatch.setattr(catalogue, "_found", lambda: {changed.name: changed})
    answer(capsys, "study an-example --output", tmp_path)
    verdict = (
        (tmp_path / "an-example.html").read_text().partition('class="answer"')[2].partition("How it was measured")[0]
    )
    assert ("0 of 1 expectations held" in verdict) == ("softmax scores high" in verdict) == open_


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("study an-exmple", "an-example"),
        ("study an-example --preset tny", "tiny"),
        ("study an-example --mechanisms fnet", "it hears nothing"),
        ("study an-example --mechanisms nothing", "mechanism 'nothing'"),
        ("study an-example text.txt", "no files"),
        ("study an-example --budget 5M tokens", "a time"),
    ],
)
def test_bad_words_are_told_and_nothing_is_run(capsys, example, tmp_path, line, said):
    line = line.replace("5M tokens", "'5M tokens'")
    code, _, message = run(capsys, line, "--output", tmp_path / "out")
    assert code == 2 and said in " ".join(message.split())
    assert not example and not (tmp_path / "out").exists()


def test_all_that_can_enter_leaves_out_what_is_refused(example):
    chosen = get_study("an-example").choose(mechanisms="all")
    assert "fnet" not in chosen.mechanisms and "softmax" in chosen.mechanisms
    with pytest.raises(Unsupported, match="not about them"):
        get_study("an-example").__class__("bare", "?", lambda _: None, lambda *_: []).choose(mechanisms="softmax")


def test_sections_survive_json_and_are_drawn():
    parts = [
        Curves("c", "x", "y", {"softmax": [(1, 2.0), (2, None)]}, log_x=True),
        Points("p", "x", "y", {"a": (1.0, 2.0), "b": (2.0, 3.0)}, rising=False),
        Heat("h", ["r<1>", "r2"], ["a", "b"], [[0.0, 1.0], [None, 3.0]], note="n"),
    ]
    once = Section("T", "says", parts, [{"a": 1, "b": None}])
    plain = json.loads(json.dumps(once.plain()))
    assert json.loads(json.dumps(section(plain).plain())) == plain
    for at, picture in enumerate(parts):
        assert str(draw(picture, f"i{at}")).startswith("<svg")
    assert str(draw(parts[2], "i")).count("<rect") == 3 and "r&lt;1&gt;, b: 1" in str(draw(parts[2], "i"))
    assert draw(Heat("h", ["r"], ["c"], [[None]]), "i") is None


def test_every_study_has_a_page_before_anything_is_run(tmp_path):
    from regard.studies import opened

    for name in list_studies():
        study = get_study(name)
        assert study.question.endswith("?")
        for preset in study.presets:
            record = opened(study, study.choose(preset), None)
            assert record["done"] == 0 < record["planned"] and record["outcome"] == "not run"
            assert study.question in render_study(record) or "&" in study.question
            json.dumps(record)
