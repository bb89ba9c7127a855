"""The catalogue: which forms run a mechanism, and packages that add their own."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import pickle
import sys

import pytest

import regard
from regard import catalogue
from regard.backends import engine_names


@pytest.mark.parametrize("name", regard.list_mechanisms())
def test_the_backend_of_every_mechanism_is_told(name):
    assert regard.get_mechanism(name).engine in ("", *engine_names())
    assert regard.which_backend(name, device="meta").name == "torch"
    assert regard.which_backend(name, device="cpu").reason


@pytest.mark.parametrize("name", regard.list_mechanisms())
def test_a_pickled_or_copied_card_is_the_card(name):
    card = regard.get_mechanism(name)
    assert pickle.loads(pickle.dumps(card)) is card
    assert copy.deepcopy(card) is card


def test_a_card_outside_the_catalogue_is_copied_as_an_object():
    card = dataclasses.replace(regard.get_mechanism("linear"), name="another")
    assert pickle.loads(pickle.dumps(card)).name == "another"


def test_engines_and_aliases_have_backends_too():
    assert regard.which_backend("gla") == regard.which_backend("gated_recurrence")
    assert regard.which_backend("softmax", backend="torch").reason == "requested"


@pytest.mark.parametrize(
    ("word", "choices", "nearest"),
    [
        ("softmxa", ("linear", "softmax"), "softmax"),
        ("gated", ("gated_linear", "gated_softmax", "linear"), "gated_linear"),
        ("state", ("exact", "constant-state"), "constant-state"),
        ("share_all", ("exits", "share_groups"), "share_groups"),
        ("LINEAR", ("windowed_linear", "linear"), "linear"),
        ("SEQPE", ("rotary", "SeqPE"), "SeqPE"),
        ("missing.txt", ("good.txt", "other.csv"), ""),
        ("nonsense", ("constant-state", "any-length", "exact"), ""),
        ("", ("exact",), ""),
    ],
)
def test_only_what_is_spelled_alike_or_shares_its_words_is_near(word, choices, nearest):
    assert regard.contract.closest(word, choices) == nearest


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"name": "gated_linaer"}, "try gated_linear"),
        ({"name": "softmax", "backend": "torhc"}, "try torch"),
        ({"name": "large_kernel", "backend": "native"}, "supported: torch"),
        ({"name": "softmax", "device": "gpu"}, "device 'gpu'"),
    ],
)
def test_a_backend_of_nothing_is_refused(asked, words):
    with pytest.raises(regard.Unsupported, match=words):
        regard.which_backend(**asked)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make the entry point of an installed package whose module has the given source."""

    def make(source):
        (tmp_path / "someones_attention.py").write_text(source, encoding="utf-8")
        point = importlib.metadata.EntryPoint("someones", "someones_attention:MECHANISM", catalogue.ENTRY_POINTS)
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
        catalogue._installed.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    yield make
    monkeypatch.undo()
    sys.modules.pop("someones_attention", None)
    catalogue._installed.cache_clear()


CARD = "from dataclasses import replace\nfrom regard.mechanisms import softmax\n"


def test_a_package_adds_its_mechanism(package):
    package(CARD + "MECHANISM = replace(softmax.MECHANISM, name='someones', aliases=())\n")
    assert "someones" in regard.list_mechanisms()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (CARD + "MECHANISM = softmax.MECHANISM\n", "a second mechanism called"),
        ("raise RuntimeError('no licence')\n", "RuntimeError: no licence"),
        ("MECHANISM = 3\n", "of type int"),
    ],
)
def test_a_package_that_cannot_be_used_is_named(package, source, words):
    package(source)
    with pytest.raises(regard.Unsupported, match=words):
        regard.list_mechanisms()
