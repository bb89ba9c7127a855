import numpy as np

from regard.measurement.statistics import Comparison, Scores
from regard.workbench.recommend import recommend


def case(scores, inference, solved=None, seeds=3, noise=0.001):
    """One task: mean scores, inference times, whether each mechanism solves it."""
    rng = np.random.default_rng(0)
    by_name = {
        name: Scores(
            {s: np.array([[mean + noise * rng.standard_normal(), 1.0] for _ in range(20)]) for s in range(seeds)}
        )
        for name, mean in scores.items()
    }
    summary = [
        {
            "mechanism": name,
            "mean": by_name[name].mean,
            "inference_ms": inference[name],
            "solved": None if solved is None else name in solved,
        }
        for name in scores
    ]
    return summary, Comparison(by_name)


def advise(**tasks):
    summaries, comparisons, metrics = {}, {}, {}
    for name, ((summary, comparison), metric) in tasks.items():
        summaries[name], comparisons[name], metrics[name] = summary, comparison, metric
    return recommend(summaries, comparisons, metrics, budget="8m", at_length=2048)


BITS, ACCURACY = ("bits per byte", False), ("accuracy", True)
TIMES = {"slow": 10.0, "fast": 1.0, "toy": 0.1}


def test_the_fastest_toy_cannot_win_without_solving_recall():
    recall = case({"slow": 0.99, "fast": 0.98, "toy": 0.2}, TIMES, solved={"slow", "fast"})
    text = case({"slow": 2.0, "fast": 2.0, "toy": 2.0}, TIMES)
    found = advise(recall=(recall, ACCURACY), text=(text, BITS))
    assert found.winner == "fast"
    assert "toy" in found.reason


def test_cost_does_not_buy_a_separable_loss_of_quality():
    found = advise(text=(case({"slow": 1.0, "fast": 2.0}, TIMES), BITS))
    assert found.winner == "slow"
    assert "ahead of fast" in found.reason


def test_the_cost_that_is_given_is_said_to_be_the_winners():
    """Also where another has the best score, and is the one that the sentence began with."""
    scores = {"slow": 1.0, "fast": 1.02, "toy": 9.0}
    found = advise(text=(case(scores, TIMES, noise=0.08), BITS))
    assert found.winner == "fast"
    assert "slow reaches" in found.reason and "; fast needs 1 ms" in found.reason


def test_what_cannot_be_separated_is_said_with_what_would():
    found = advise(text=(case({"slow": 1.0, "fast": 1.02}, TIMES, noise=0.08), BITS))
    assert found.winner == "fast"
    assert any("Cannot separate" in note and "--seeds" in note and "--budget" in note for note in found.notes)


def test_what_does_not_beat_the_rule_is_not_taken_where_others_do():
    summary, comparison = case({"slow": 1.0, "fast": 1.0, "toy": 1.0}, TIMES)
    for entry, standing, over in zip(summary, ("ahead", "level", "level"), (0.2, 0.1, 0.0), strict=True):
        entry |= {"beside_baseline": standing, "over_baseline": over}
    found = advise(text=((summary, comparison), BITS))
    assert found.winner == "fast"
    assert "no better than a rule without training: toy" in found.reason
    summary[1]["over_baseline"] = -0.1
    assert "Take slow: it alone beats a rule" in advise(text=((summary, comparison), BITS)).text
    for entry in summary:
        entry["beside_baseline"] = "level"
    assert advise(text=((summary, comparison), BITS)).winner == "toy"


def test_a_single_seed_ranks_nothing():
    found = advise(text=(case({"slow": 1.0, "fast": 9.0}, TIMES, seeds=1), BITS))
    assert any("single seed" in note for note in found.notes)
    assert "within the noise" not in found.reason
    assert "single seed" in found.reason
    assert "within the noise" in advise(text=(case({"slow": 1.0, "fast": 1.0}, TIMES), BITS)).reason


def test_nobody_solving_is_said_and_does_not_exclude():
    found = advise(recall=(case({"slow": 0.3, "fast": 0.3}, TIMES, solved=set()), ACCURACY))
    assert found.winner is not None
    assert any("No mechanism solved recall" in note for note in found.notes)


def test_mechanisms_without_a_score_are_left_out():
    summary, comparison = case({"slow": 1.0, "fast": 1.0}, TIMES)
    summary[1]["mean"] = None
    assert advise(text=((summary, comparison), BITS)).winner == "slow"
    summary[0]["mean"] = None
    assert advise(text=((summary, comparison), BITS)).winner is None
