"""Recommendations for a retrofitted language model, and figures that do not justify any."""

from __future__ import annotations

import pytest
from small_llama import SIZES, transformers

from regard.retrofit.hosts import open_host
from regard.retrofit.measures.language import state_lengths
from regard.retrofit.measures.verdict import recommend, state_at
from regard.retrofit.settings import RetrofitSettings


def probe(found):
    """Shares of both models in three texts; each a number, or three."""
    lists = (one if isinstance(one, list) else [one] * 3 for one in found)
    return dict(zip(("original", "retrofit"), lists, strict=True))


def results(
    change=0.01,
    error=0.001,
    token=(1.0, 1.0),
    prompt=(1.0, 1.0, 1.0),
    state=100,
    held=100,
    said=(0.0, 0.0),
    paired=(0.0, 0.0),
):
    """Results for an original whose state, and whose keys and values, take 100 bytes at every length."""
    both = ("original", "retrofit", "softmax")
    return {
        "perplexity": {"own": {"blocks": 9}, "other": {"change": change, "standard_error": error, "blocks": 9}},
        "needles": {"1024": probe(said), "2048": None},
        "pairs": {"1024": {"first": probe(paired)}, "2048": None},
        "state": {length: {"original": 100, "retrofit": state} for length in ("1024", "8192")},
        "prefill": {"1024": {name: {"median": time} for name, time in zip(both, prompt, strict=True)}},
        "decoding": {
            "1024": {
                name: {"median": time, "held": bytes}
                for name, time, bytes in zip(both, token, (100, held), strict=False)
            }
        },
        "generates_with_cache": True,
        "left_out": [],
    }


def test_states_are_compared_at_a_length_that_the_model_can_read():
    found = results(state=50, held=50)
    found["state"] = {length: found["state"]["1024"] for length in ("32", "512")}
    assert "the state at 512 tokens is 50%" in recommend(found)["text"]
    for positions, lengths in ((512, {512}), (3000, {2048, 3000}), (9000, {2048, 8192, 9000})):
        config = transformers.LlamaConfig(**{**SIZES, "max_position_embeddings": positions}, num_hidden_layers=1)
        host = open_host(transformers.LlamaForCausalLM(config))
        local = RetrofitSettings("local:window=4", length=64)
        assert set(state_lengths(host, local)) == lengths
        assert state_at({"state": state_lengths(host, local)}) == min(positions, 8192)
        landmark = RetrofitSettings("landmark", keep_layers=(), length=64)
        assert set(state_lengths(host, landmark)) == {positions, 2048, 8192, 32768}
        shared = [{"state": state_lengths(host, settings)} for settings in (landmark, local)]
        assert state_at(*shared) == max(length for length in lengths if length <= 8192)


@pytest.mark.parametrize(
    ("given", "take", "said"),
    [
        ({}, False, "neither state nor time is smaller"),
        ({"state": 50, "held": 50}, True, "the state at 8k tokens is 50%"),
        ({"state": 90, "held": 105}, True, "the state at 8k tokens is 90%"),
        ({"state": 50, "held": 100}, False, "holds all keys and values"),
        ({"prompt": (1.0, 0.5, 1.0)}, True, "a prompt of 1k tokens takes 50%"),
        ({"prompt": (1.0, 0.5, 0.5)}, False, "takes the original 50% of the time without a retrofit"),
        (
            {"token": (1.0, 250.0), "state": 50, "held": 50},
            True,
            "but a token after 1k tokens takes 250 times the time",
        ),
        ({"said": (0.1, 1.0)}, True, "of the needles in 1k tokens it finds 100% where the original finds 10%"),
        ({"said": (1.0, 0.1)}, False, "of the needles in 1k tokens it finds 10% where the original finds 100%"),
        ({"paired": (0.1, 1.0)}, True, "of the pairs in 1k tokens it finds 100% where the original finds 10%"),
        ({"paired": (1.0, 0.1)}, False, "of the pairs in 1k tokens it finds 10% where the original finds 100%"),
        ({"change": -0.05}, True, "for its perplexity alone, which is 5.0% lower"),
        ({"change": -0.05, "error": 0.04}, False, "neither state nor time is smaller"),
        ({"change": 0.2, "said": (0.1, 1.0)}, False, "though of the needles in 1k tokens"),
    ],
    ids=str,
)
def test_what_is_gained_and_lost_decides_and_is_said(given, take, said):
    found = recommend(results(**given))
    assert found["take"] is take and found["text"].startswith("Take" if take else "Keep")
    assert said in " ".join([found["text"], *found["notes"]])


def test_a_difference_of_less_than_two_standard_errors_is_not_told():
    found = results(said=([0.9, 0.9, 0.3], [0.1, 0.6, 0.5]))  # 0.3 lower, give or take 0.29
    assert recommend(found)["notes"] == recommend(results())["notes"]
    found["needles"]["1024"] = probe(([0.9, 0.9, 0.3], [0.6, 0.6, 0.0]))  # 0.3 lower in each text
    assert recommend(found)["notes"] == ["of the needles in 1k tokens it finds 40% where the original finds 70%."]


def test_needles_of_records_of_earlier_versions_count():
    found = results()
    del found["needles"], found["pairs"]
    found["recall"] = {"1024": {"depths": [0.1, 0.5, 0.9], **probe((1.0, 0.1))}, "2048": None}
    assert "of the needles in 1k tokens it finds 10%" in " ".join(recommend(found)["notes"])
