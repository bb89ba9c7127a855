from __future__ import annotations

import pytest

from regard import Unsupported
from regard.measurement import units


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (units.number, 0.012345, "0.0123"),
        (units.number, 1234.5, "1,234"),
        (units.number, 1.84, "1.84"),
        (units.tick, 2.5e-4, "2.5e-4"),
        (units.tick, 1e-15, "1e-15"),
        (units.tick, 7.5e6, "7.5e6"),
        (units.tick, -0.025, "-0.025"),
        (units.count, 999_999, "1M"),
        (units.count, 12_345, "12.3k"),
        (units.tokens, 16384, "16k"),
        (units.tokens, 1000, "1,000"),
        (units.size, 3 * 2**20, "3 MiB"),
        (units.size, 2**30 - 1, "1 GiB"),
        (units.size, 12, "12 B"),
        (units.size, 1536, "1.5 KiB"),
        (units.milliseconds, 0.0456, "45.6 µs"),
        (units.milliseconds, 12.3, "12.3 ms"),
        (units.milliseconds, 1500, "1.5 s"),
        (units.duration, 59.7, "1 min 00 s"),
        (units.duration, 3725, "1 h 02 min"),
        (units.clock, 3599, "59:59"),
        (units.clock, 5000, "1:23:20"),
    ],
)
def test_numbers_read_as_a_person_writes_them(form, value, text):
    assert form(value) == text


@pytest.mark.parametrize(
    ("number", "what", "text"),
    [(1, "image", "1 image"), (0, "class", "0 classes"), (1, "series", "1 series"), (1200, "series", "1,200 series")],
)
def test_things_are_counted_in_words(number, what, text):
    assert units.counted(number, what) == text


def test_value_and_error_share_their_digits():
    assert units.with_error(0.98765, 0.0123) == ("0.988", "0.012")
    assert units.with_error(123.4, 17.0) == ("123", "17")
    assert units.told(0.98765, 0.0123) == "0.988 ± 0.012"


def test_the_mean_of_one_item_is_told_without_an_error():
    assert units.told(0.5, float("nan")) == units.number(0.5)


@pytest.mark.parametrize(
    ("text", "count"), [("512MiB", 512 << 20), ("2 GB", 2 * 10**9), ("300000", 300000), ("1.5kib", 1536), ("8B", 8)]
)
def test_sizes_are_read(text, count):
    assert units.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "MiB", "-3MB", "0", "3 parsecs", "1e9", "2GB/s"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(Unsupported, match="try 512MiB"):
        units.parse_size(text)
