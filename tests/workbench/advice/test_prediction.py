"""Predictions of costs at any length from a few measurements."""

import math

import numpy as np
import pytest

from regard.workbench.advice.prediction import Curve, nonnegative_least_squares

LENGTHS = (32, 128, 512, 2048)


def quadratic(n):
    return 4.0 * n * n


def linear(n):
    return 4.0 * n


def nothing(n):
    return 0.0


def curve_of(cost, growth=quadratic):
    return Curve({n: cost(n) for n in LENGTHS}, growth)


@pytest.mark.parametrize("growth", [quadratic, linear, nothing])
@pytest.mark.parametrize(
    "parts", [(3.0, 0.0, 0.0), (1.0, 0.02, 0.0), (0.5, 0.01, 1e-4), (0.0, 0.0, 1e-5), (0.0, 0.0, 0.0)]
)
def test_a_cost_of_the_model_s_form_is_recovered_at_every_length(growth, parts):
    def cost(n):
        return parts[0] + parts[1] * n + parts[2] * growth(n)

    curve = curve_of(cost, growth)
    for n in (8, 33, 100, 777, 1500, 16384):
        assert curve(n) == pytest.approx(cost(n), rel=1e-6, abs=1e-20)


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_noise_stays_at_the_measured_lengths_and_is_not_amplified_between_them(noise):
    rng, errors = np.random.default_rng(1), []

    def cost(n):
        return 0.3 + 2e-3 * n + 1e-6 * n * n

    for _ in range(50):
        measured = {n: cost(n) * math.exp(rng.normal(0, noise)) for n in LENGTHS}
        curve = Curve(measured, quadratic)
        assert [curve(n) for n in LENGTHS] == pytest.approx(list(measured.values()), rel=1e-9)
        errors += [abs(curve(n) / cost(n) - 1) for n in (64, 200, 1000)]
    assert np.median(errors) < 1.5 * noise


def test_each_prediction_says_how_it_is_known():
    curve = curve_of(float, linear)
    assert [curve.basis(n) for n in (32, 2048)] == ["measured"] * 2
    assert [curve.basis(n) for n in (31, 33, 2049)] == ["extrapolated", "interpolated", "extrapolated"]


def test_least_squares_never_takes_a_negative_weight_and_finds_the_best_without():
    rng = np.random.default_rng(2)
    for _ in range(20):
        features, target = rng.normal(size=(6, 3)), rng.normal(size=6)
        found = nonnegative_least_squares(features, target)
        assert found.min() >= 0
        error = np.square(features @ found - target).sum()
        for _ in range(200):  # no random other point is better
            other = np.maximum(0, found + rng.normal(size=3) * rng.choice([0.01, 0.1, 1.0]))
            assert np.square(features @ other - target).sum() >= error - 1e-9
