"""The needs that a mechanism meets, by cards and measurements rather than opinions."""

import json
from pathlib import Path

import pytest

from regard import Pattern, Unsupported, get_mechanism, list_mechanisms
from regard.contract import Kind
from regard.workbench.advice import needs
from regard.workbench.advice.layer_work import MIXING
from regard.workbench.advice.needs import NEEDS, find, looks_up, parse_needs, reach

CAUSAL = Pattern.CAUSAL_SELF


def mixing(pattern):
    return list_mechanisms(pattern=pattern, where=lambda card: card.kind in MIXING)


@pytest.mark.parametrize("pattern", Pattern)
def test_only_softmax_is_softmax(pattern):
    """The length is beyond those where others attend to everything, as BigBird does up to 703 tokens."""
    names = [n for n in mixing(pattern) if find("exact", n, pattern, 720).holds]
    assert names == ["softmax"]


def test_a_window_as_wide_as_the_sequence_is_exact_and_a_narrower_one_is_not():
    assert [find("exact", "local", CAUSAL, n).holds for n in (15, 16)] == [True, False]


@pytest.mark.parametrize(
    ("name", "pattern", "seen"),
    [
        ("local", CAUSAL, get_mechanism("local").options().window),
        ("softmax", CAUSAL, 120),
        ("softmax", Pattern.NONCAUSAL_CROSS, 120),
        ("mamba", CAUSAL, 120),
        ("landmark", CAUSAL, 120),  # its inserted tokens do not count
    ],
)
def test_reach_is_the_width_of_a_window_or_all(name, pattern, seen):
    assert reach(name, pattern, 120) == (seen, 120)


@pytest.mark.parametrize("pattern", Pattern)
def test_keeping_all_needs_reach_and_a_state_that_grows(pattern):
    for name in mixing(pattern):
        finding = find("keep-all", name, pattern, 200)
        seen, total = reach(name, pattern, 200)
        kept = seen == total and not get_mechanism(name).recurrent
        assert finding.holds == (kept and looks_up(name, pattern)), name
        assert finding.reason and finding.source in ("card", "measured")


def test_recall_is_what_a_comparison_finds_with_the_same_short_convolution(monkeypatch):
    """The table comes from a comparison; cases without a trained model are judged like the need keep-all."""
    table = {"gated_linear": {"without": 0.25, "with": 1.0}, "softmax": {"without": 0.98}, "local": {"with": 1.0}}
    monkeypatch.setattr(needs, "RECALL", table)
    for convolution, able in ((None, False), (0, False), (4, True)):
        finding = find("recall", "gated_linear", CAUSAL, 100, convolution=convolution)
        assert finding.holds == able and finding.source == "measured"
        assert "without" in finding.reason if not able else "fixed size" in finding.reason
    assert "1.00 with a short convolution" in find("recall", "gated_linear", CAUSAL, 100).reason
    assert find("recall", "softmax", CAUSAL, 100).holds
    assert "sees 15 of 100" in find("recall", "local", CAUSAL, 100, convolution=4).reason
    for name, pattern, convolution in (
        ("sigmoid", CAUSAL, None),
        ("gated_linear", Pattern.CAUSAL_CROSS, 4),
        ("softmax", CAUSAL, 4),
    ):
        assert find("recall", name, pattern, 100, None, convolution) == find("keep-all", name, pattern, 100)


def test_the_table_of_recall_has_each_mechanism_as_its_layer_is():
    assert set(needs.RECALL) <= set(mixing(CAUSAL))
    for name, found in needs.RECALL.items():
        assert all(0 <= x <= 1 for x in found.values())
        assert ("with" if needs.convolved(get_mechanism(name)) else "without") in found, name


def test_who_solved_recall_in_the_published_comparison_is_called_able():
    ranking = json.loads((Path(__file__).parents[3] / "docs" / "data" / "ranking.json").read_text())
    solved = {e["mechanism"] for e in ranking["entries"] if e["task"] == "recall" and e["solved"]}
    assert ranking["frame"] == "convolution"
    assert solved and all(find("recall", name, CAUSAL, 48, convolution=4).holds for name in solved)


def test_looking_up_needs_weights_that_both_tokens_decide():
    for pattern in Pattern:
        assert looks_up("softmax", pattern)
        assert not looks_up("positional_attention", pattern)  # positions decide
        assert not looks_up("synthesizer", pattern)  # positions and the query decide
    assert all(looks_up(n, CAUSAL) for n in ("linear", "gated_linear", "delta_rule", "mamba2", "reformer", "combiner"))
    assert not looks_up("fnet", Pattern.NONCAUSAL_SELF)


def test_results_of_a_recall_task_decide_where_there_are_some():
    solved = {"linear": True, "softmax": False}
    assert find("recall", "linear", CAUSAL, 100, solved).holds
    assert not find("recall", "softmax", CAUSAL, 100, solved).holds
    assert find("recall", "linear", CAUSAL, 100, solved).source == "results"
    assert find("recall", "sigmoid", CAUSAL, 100, solved).source == "measured"


def test_order_is_told_by_rotary_positions_windows_and_gates_and_not_by_a_learned_query():
    assert all(needs.tells_order(n, CAUSAL) for n in ("softmax", "linear", "gated_linear", "mamba2", "large_kernel"))
    assert not needs.tells_order("aaren", CAUSAL)
    assert not needs.tells_order("softmax", Pattern.NONCAUSAL_CROSS)
    assert needs.tells_order("gated_linear", Pattern.NONCAUSAL_CROSS)


@pytest.mark.parametrize(
    ("need", "able", "unable"),
    [
        ("constant-state", ("mamba", CAUSAL), ("softmax", CAUSAL)),
        ("weights", ("softmax", CAUSAL), ("linear", CAUSAL)),
        ("bias", ("softmax", CAUSAL), ("linear", CAUSAL)),
        ("any-length", ("large_kernel", CAUSAL), ("large_kernel", Pattern.NONCAUSAL_SELF)),
    ],
)
def test_the_rest_is_read_off_the_card(need, able, unable):
    assert find(need, *able, 8).holds and not find(need, *unable, 8).holds


def test_mechanisms_that_are_no_function_of_queries_keys_and_values_are_not_compared():
    for name in mixing(CAUSAL):
        if get_mechanism(name).kind is not Kind.ATTENTION:
            assert needs.difference_from_softmax(name, CAUSAL, 30) is None


def test_needs_are_parsed_and_unknown_ones_refused_with_the_nearest_or_all():
    assert parse_needs("recall, order,recall,") == ("recall", "order")
    assert parse_needs(()) == ()
    with pytest.raises(Unsupported, match="try recall"):
        parse_needs("recal")
    with pytest.raises(Unsupported, match="nonsense") as caught:
        parse_needs("exact,nonsense")
    assert caught.value.supported == ", ".join(NEEDS) and not caught.value.nearest
