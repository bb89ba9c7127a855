import pytest

from regard.measurement.timing import Timing, efficiency_length, interleaved


def test_actions_alternate_in_both_orders():
    calls = []
    interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, least=4, most=4)
    assert "".join(calls) == "ab" + "abbaabba"


def test_median_and_middle_half():
    timing = Timing.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.low, timing.median, timing.high) == (2.0, 3.0, 4.0)


def test_efficiency_length_of_a_line_against_a_parabola():
    """The larger root of a n^2 = d n + e, here 1,000, is interpolated between powers of two on log axes."""
    lengths = [128 << i for i in range(6)]
    softmax = {n: 1e-6 * n * n for n in lengths}
    linear = {n: 8e-4 * n + 0.2 for n in lengths}
    assert efficiency_length(linear, softmax) == pytest.approx(1000, rel=0.02)


def test_efficiency_length_at_the_ends():
    softmax = {100: 1.0, 200: 2.0}
    assert efficiency_length({100: 0.5, 200: 0.5}, softmax) == 100
    assert efficiency_length({100: 5.0, 200: 5.0}, softmax) is None
    assert efficiency_length({}, softmax) is None


def test_the_last_crossing_counts():
    softmax = dict.fromkeys((1, 2, 4, 8), 1.0)
    assert 2 < efficiency_length({1: 0.5, 2: 2.0, 4: 0.5, 8: 0.5}, softmax) < 4
