"""Costs at any length, from a few measurements."""

import math

import numpy as np
import pytest

from regard.workbench.prediction import Curve, nonnegative_least_squares

LENGTHS = (32, 128, 512, 2048)


def quadratic(n):
    return 4.0 * n * n


def linear(n):
    return 4.0 * n


@pytest.mark.parametrize("growth", [quadratic, linear])
@pytest.mark.parametrize("parts", [(3.0, 0.0, 0.0), (1.0, 0.02, 0.0), (0.5, 0.01, 1e-4), (0.0, 0.0, 1e-5)])
def test_a_cost_of_the_model_s_form_is_recovered_at_every_length(growth, parts):
    def cost(n):
        return parts[0] + parts[1] * n + parts[2] * growth(n)

    curve = Curve({n: cost(n) for n in LENGTHS}, growth)
    for n in (8, 33, 100, 777, 1500, 16384):
        assert curve(n) == pytest.approx(cost(n), rel=1e-6)


def test_a_measured_length_is_predicted_as_it_was_measured():
    rng = np.random.default_rng(0)
    measured = {n: float((0.2 + 1e-3 * n + 1e-6 * n * n) * rng.uniform(0.7, 1.4)) for n in LENGTHS}
    curve = Curve(measured, quadratic)
    for n, value in measured.items():
        assert curve(n) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_noise_of_the_measurements_is_not_amplified_between_them(noise):
    rng = np.random.default_rng(1)

    def cost(n):
        return 0.3 + 2e-3 * n + 1e-6 * n * n

    errors = []
    for _ in range(50):
        measured = {n: cost(n) * math.exp(rng.normal(0, noise)) for n in LENGTHS}
        curve = Curve(measured, quadratic)
        errors += [abs(curve(n) / cost(n) - 1) for n in (64, 200, 1000)]
    assert np.median(errors) < 1.5 * noise


def test_beyond_the_measured_lengths_the_card_s_growth_goes_on():
    measured = {n: 0.1 + 1e-6 * n * n for n in LENGTHS}
    assert Curve(measured, quadratic)(1 << 16) / Curve(measured, quadratic)(1 << 15) == pytest.approx(4, rel=0.01)
    flat = {n: 0.1 + 1e-3 * n for n in LENGTHS}
    assert Curve(flat, quadratic)(1 << 16) / Curve(flat, quadratic)(1 << 15) == pytest.approx(2, rel=0.1)


def test_each_prediction_says_how_it_is_known():
    curve = Curve({n: float(n) for n in LENGTHS}, linear)
    assert [curve.basis(n) for n in (31, 32, 33, 2048, 2049)] == [
        "extrapolated",
        "measured",
        "interpolated",
        "measured",
        "extrapolated",
    ]


def test_costs_of_zero_stay_finite():
    curve = Curve(dict.fromkeys(LENGTHS, 0.0), lambda n: 0.0)
    assert 0 <= curve(100) < 1e-20


def test_least_squares_never_takes_a_negative_weight_and_finds_the_best_without():
    rng = np.random.default_rng(2)
    for _ in range(20):
        features, target = rng.normal(size=(6, 3)), rng.normal(size=6)
        found = nonnegative_least_squares(features, target)
        assert found.min() >= 0
        error = np.square(features @ found - target).sum()
        for _ in range(200):  # no other point is better
            other = np.maximum(0, found + rng.normal(size=3) * rng.choice([0.01, 0.1, 1.0]))
            assert np.square(features @ other - target).sum() >= error - 1e-9
