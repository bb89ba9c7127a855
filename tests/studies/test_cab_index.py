"""CAB's index, ranks, correlations and efficiency lengths against its repository's output and hand calculations."""

import numpy as np
import pytest

from regard.contract import Pattern, Unsupported
from regard.studies.cab.efficiency import efficiency_length
from regard.studies.cab.index import AVERAGE, Metric, correlation, indices, ranks, standards
from regard.studies.cab.published import EFFICIENCY, LEADERBOARD, METRICS, STANDARDS, published_index, read_scores

NS, CS, NC, CC = Pattern

EXAMPLE = """3.4748 1.9735 4.0953 2.1985 34.61 6.35 31.66 23.18 0.675 3.42
4.0953 2.1985 34.61 6.35 31.66 -100
7.425 0.231 0.779 1.138167 0.77467 0.478 0.508 0.449 0.4855
4.0953 2.1985 34.61 6.35 31.66
"""
"""Softmax attention's scores: scripts/compositional_index/example.txt of Shark-NLP/CAB at 0e49696. -100 means none."""


@pytest.fixture
def example(tmp_path):
    path = tmp_path / "example.txt"
    path.write_text(EXAMPLE)
    return read_scores(path)


def test_the_index_of_the_repositorys_example_is_the_one_it_prints(example):
    found = published_index(example)
    printed = {pattern: dict(LEADERBOARD[pattern]["softmax"]) for pattern in Pattern}
    for pattern, tasks in printed.items():
        for task, value in tasks.items():
            assert found[pattern.value][task] == pytest.approx(value, abs=0.005), (pattern, task)
    for pattern, value in ((NS, -0.0247), (NC, 0.5968), (CC, 0.9569)):
        assert found[pattern.value][AVERAGE] == pytest.approx(value, abs=2e-4)


def test_scores_of_another_form_are_refused_with_what_is_accepted(tmp_path):
    path = tmp_path / "scores.txt"
    for text, told in (
        ("1 2 3\n", "with 3 numbers a line"),
        ("a b\n", "four lines of numbers"),
        ("", "with no numbers"),
    ):
        path.write_text(text)
        with pytest.raises(Unsupported, match=told):
            read_scores(path)
    with pytest.raises(Unsupported, match="No such file"):
        read_scores(tmp_path / "none.txt")


def test_the_index_over_the_models_themselves_is_standardised():
    rng = np.random.default_rng()
    metrics = [Metric("loss", "A", False), Metric("score", "A", True), Metric("other", "B", True)]
    models = {f"m{i}": {one.name: float(rng.normal(5, 3)) for one in metrics} for i in range(8)}
    found = indices(models, metrics)
    for task in ("A", "B", AVERAGE):
        assert np.mean([own[task] for own in found.values()]) == pytest.approx(0, abs=1e-12)
    assert np.std([own["B"] for own in found.values()], ddof=1) == pytest.approx(1)
    turned = {name: {**own, "loss": -own["loss"]} for name, own in models.items()}
    again = indices(turned, [Metric("loss", "A", True), *metrics[1:]])
    for name, own in found.items():
        assert again[name] == pytest.approx(own)
    known = standards(models, metrics)
    scaled = {name: {**own, "other": 1000 * own["other"] - 7} for name, own in models.items()}
    assert indices(scaled, metrics)["m0"] == pytest.approx(found["m0"])
    assert indices({"m0": models["m0"]}, metrics, known)["m0"] == pytest.approx(found["m0"])


def test_a_model_that_lacks_a_task_has_no_average_and_one_alone_is_at_zero():
    metrics = [Metric("a", "A", True), Metric("b", "B", False)]
    found = indices({"one": {"a": 1.0, "b": 2.0}, "two": {"a": 3.0}}, metrics)
    assert AVERAGE in found["one"]
    assert found["two"] == {"A": pytest.approx(0.5**0.5)}
    assert indices({"alone": {"a": 4.0}}, metrics)["alone"] == {"A": 0.0, AVERAGE: 0.0}


def test_a_metric_in_which_all_are_equal_is_left_out():
    metrics = [Metric("a", "A", True), Metric("none", "A", True), Metric("b", "B", True)]
    models = {"one": {"a": 1.0, "none": 0.0, "b": 2.0}, "two": {"a": 3.0, "none": 0.0, "b": 2.0}}
    found = indices(models, metrics)
    assert found["two"] == {"A": pytest.approx(0.5**0.5), "B": 0.0, AVERAGE: pytest.approx(0.5**1.5)}


def test_ranks_do_not_move_with_an_outlier():
    metrics = [Metric("ppl", "LM", False)]
    near = {"a": {"ppl": 3.0}, "b": {"ppl": 3.1}, "c": {"ppl": 3.1}, "d": {"ppl": 4.0}}
    far = {**near, "d": {"ppl": 186.0}}
    assert ranks(near, metrics) == ranks(far, metrics)
    assert [own["LM"] for own in ranks(far, metrics).values()] == [1.0, 2.5, 2.5, 4.0]
    assert abs(indices(far, metrics)["a"]["LM"] - indices(far, metrics)["b"]["LM"]) < 0.01


def test_correlation_is_over_the_models_that_both_have():
    first = {name: float(i) for i, name in enumerate("abcde")}
    assert correlation(first, {name: 3 - 2 * value for name, value in first.items() if name != "e"}) == (
        pytest.approx(-1),
        4,
    )
    assert correlation(first, {"a": 1.0, "b": 2.0}) == (None, 2)
    assert correlation(first, dict.fromkeys("abc", 1.0)) == (None, 3)


def test_efficiency_lengths_of_made_up_costs_are_the_analytic_root():
    n = np.array([128, 256, 512, 1024, 2048, 4096.0])
    a, b, c, d, e = 3e-6, 2e-3, 0.5, 9e-3, 1.7
    found = efficiency_length(n, a * n**2 + b * n + c, d * n + e, skip=1)
    root = ((d - b) + ((d - b) ** 2 + 4 * a * (e - c)) ** 0.5) / (2 * a)
    assert found.length == pytest.approx(root)
    assert (found.fit, found.softmax_fit) == (pytest.approx(1), pytest.approx(1))
    assert found.note == ""
    assert efficiency_length(n[:4], (a * n**2 + b * n + c)[:4], (d * n + e)[:4]).note == "beyond what was measured"
    assert efficiency_length(n, a * n**2 + b * n + c, 0 * n).length == 0
    assert efficiency_length(n, b * n - a * n**2, d * n).length == float("inf")


def test_a_cheaper_mechanism_has_no_longer_efficiency_length():
    rng = np.random.default_rng()
    n = np.array([256, 512, 1024, 2048, 4096, 8192.0])
    softmax = 1e-6 * n**2 + 1e-3 * n + 1 + rng.normal(0, 0.01, len(n))
    costs = [(1 + i) * 1e-3 * n + 0.3 * i for i in range(12)]
    found = [efficiency_length(n, softmax, cost).length for cost in costs]
    assert found == sorted(found)
    memory = [lengths[1] for lengths in EFFICIENCY.values()]
    assert memory == sorted(memory)


def test_the_costs_of_the_repository_give_the_lengths_of_its_readme():
    """The costs of softmax and ABC are from the repository's scripts/efficiency_length/cost.xlsx."""
    n = [256, 512, 1024, 2048, 4096, 8192]
    seconds = efficiency_length(
        n, [0.472, 0.628, 0.721, 0.981, 3.67, 18.437], [0.648, 0.59, 0.602, 0.91, 1.006, 1.509], skip=1
    )
    memory = efficiency_length(n, [81, 265, 952, 3604, 14020, 55300], [42, 80, 156, 308, 612, 1220])
    assert (round(seconds.length), round(memory.length)) == EFFICIENCY["abc"]
    assert memory.note == "below what was measured"


def test_the_published_tables_hang_together():
    averages = {"local": 0.978, "cosformer": 0.466, "long_short": 0.269, "nystrom": -0.440, "abc": -0.686}
    for name, value in averages.items():
        assert np.mean(list(LEADERBOARD[NS][name].values())) == pytest.approx(value, abs=0.002)
    for pattern in Pattern:
        assert [one.name for one in METRICS[pattern]] == list(STANDARDS[pattern])
        assert {task for own in LEADERBOARD[pattern].values() for task in own} == {one.task for one in METRICS[pattern]}
