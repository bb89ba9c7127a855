"""Comparisons of scores: when two mechanisms are called different, and by how much."""

import math

import numpy as np
import pytest

from regard.measurement.statistics import Comparison, Scores, pareto_front, score_of_items, seeds_needed


def noisy(rng, quality, seeds, training_noise, item_noise, shared_items):
    """Scores of a mechanism: its quality plus noise of each training run, own item noise and item noise shared by all."""
    found = {}
    for seed in range(seeds):
        run = training_noise * rng.standard_normal()
        own = item_noise * rng.standard_normal(len(shared_items))
        weights = np.full(len(shared_items), 4.0)
        found[seed] = np.stack([weights * (quality + run + shared_items + own), weights], 1)
    return Scores(found)


def one_each(items):
    """Give each item the weight 1."""
    return np.stack([items, np.ones(len(items))], 1)


@pytest.mark.parametrize("with_rule", [False, True])
def test_equal_mechanisms_or_a_rule_as_good_as_one_are_rarely_separated(with_rule):
    """Under the null hypothesis, about one comparison in twenty finds a difference."""
    rng = np.random.default_rng(0)
    called = 0
    for _ in range(400):
        shared = 3 * rng.standard_normal(60)
        found = Comparison({name: noisy(rng, 1.0, 3, 0.05, 0.3, shared) for name in "abc"})
        rule = noisy(rng, 1.0, 1, 0.0, 0.3, shared).items[0]
        called += (found.against("a", rule) if with_rule else found.difference("a", "b")).separable
    assert called / 400 < 0.08


def test_a_real_difference_is_separated_and_signed():
    rng = np.random.default_rng(1)
    shared = 3 * rng.standard_normal(60)
    qualities = {"a": 1.0, "b": 0.5, "c": 0.5}
    scores = Comparison({name: noisy(rng, quality, 3, 0.02, 0.1, shared) for name, quality in qualities.items()})
    found = scores.difference("a", "b")
    assert found.separable
    assert found.mean == pytest.approx(0.5, abs=0.1)
    assert scores.difference("b", "a").mean == -found.mean


def test_item_noise_counts_even_when_training_noise_is_nil():
    items = np.random.default_rng(2).standard_normal(40)
    scores = {name: Scores(dict.fromkeys(range(3), one_each(sign * items))) for name, sign in (("a", 1), ("b", -1))}
    expected = np.std(2 * items, ddof=1) / math.sqrt(40)
    assert Comparison(scores).difference("a", "b").standard_error == pytest.approx(expected, rel=1e-9)


def test_a_single_seed_resolves_nothing():
    scores = {name: Scores({0: np.array([[value, 1.0], [value, 1.0]])}) for name, value in (("a", 1.0), ("b", 9.0))}
    found = Comparison(scores).difference("a", "b")
    assert not found.separable
    assert math.isinf(found.resolved)
    assert math.isnan(scores["a"].standard_error)


def test_scores_weigh_items_by_their_targets():
    assert Scores({0: np.array([[3.0, 1.0], [0.0, 3.0]])}).score(0) == 0.75


def test_items_of_weight_0_change_no_score_error_or_difference():
    """A score, its standard error, and the resolution of a difference are those without the items."""
    rng = np.random.default_rng()
    weights = np.array([1.0, 1, 1, 1, 1, 0, 0])
    scores, fewer = (
        {name: Scores({s: items[name, s][:count] for s in range(2)}) for name in "ab"}
        for items in [{(name, s): np.stack([weights * rng.random(7), weights], 1) for name in "ab" for s in range(2)}]
        for count in (7, 5)
    )
    assert score_of_items(scores["a"].items[0]) == pytest.approx(score_of_items(fewer["a"].items[0]))
    found, expected = (Comparison(each).difference("a", "b") for each in (scores, fewer))
    assert (found.mean, found.standard_error) == pytest.approx((expected.mean, expected.standard_error))


def test_the_standard_error_over_seeds_is_that_of_a_mean():
    """With the unbiased variance, the standard error of the mean of two scores is half their difference."""
    scores = np.random.default_rng().standard_normal(2)
    found = Scores({seed: np.array([[score, 1.0]]) for seed, score in enumerate(scores)})
    assert found.standard_error == pytest.approx(abs(scores[0] - scores[1]) / 2)


def test_pareto_front_keeps_what_nothing_beats():
    points = {
        "fast": (3.0, 1.0),
        "good": (1.0, 3.0),
        "beaten": (1.0, 1.0),
        "middle": (2.0, 2.0),
        "lost": (math.nan, 9.0),
    }
    assert pareto_front(points) == {"fast", "good", "middle"}


def test_seeds_needed_falls_with_the_square_of_the_difference():
    assert seeds_needed(2, 0.2, 0.1) == 8
    assert seeds_needed(2, 0.2, 0.001) is None
    assert seeds_needed(1, math.inf, 0.1) is None


def test_against_a_rule_item_noise_counts_with_one_seed_and_training_noise_with_more():
    rng = np.random.default_rng(3)
    rule, away = one_each(rng.standard_normal(50)), rng.standard_normal(50)
    shifted = rule + np.stack([away, np.zeros(50)], 1)
    found = Comparison({"a": Scores({0: shifted})}).against("a", rule)
    assert found.mean == pytest.approx(away.mean(), rel=1e-9)
    assert found.standard_error == pytest.approx(np.std(away, ddof=1) / math.sqrt(50), rel=1e-9)
    assert found.separable == (abs(away.mean()) > 1.96 * found.standard_error)
    steady = {seed: shifted + np.array([0.5 * seed, 0]) for seed in range(3)}
    restless = {seed: shifted + np.array([0.5 * (-1) ** seed, 0]) for seed in range(3)}
    several = Comparison({"a": Scores(steady), "b": Scores(restless)})
    assert several.against("a", rule).standard_error > 2 * found.standard_error


def test_against_a_rule_one_item_tells_nothing_and_a_few_more_right_do_from_six_on():
    one = np.array([[5.0, 1.0]])
    found = Comparison({"a": Scores({0: one})}).against("a", one - [[3.0, 0.0]])
    assert (found.mean, found.separable) == (3.0, False)
    for count, told in ((5, False), (6, True)):
        better = one_each(np.arange(1000) < count)
        found = Comparison({"a": Scores({0: better})}).against("a", one_each(np.zeros(1000)))
        assert found.separable == told
