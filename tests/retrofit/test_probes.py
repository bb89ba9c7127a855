"""Probes of what a language model finds in its context, with models whose answers are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from regard.retrofit.hiding import ANSWER, CUE
from regard.retrofit.measures.probes import LINE, needles, pairs, with_errors

KINDS = 300


class Known:
    """A model of which the logits are given by a function of the tokens (n,), and which keeps what it reads."""

    def __init__(self, logits):
        self.logits, self.read = logits, []

    def __call__(self, ids, use_cache, logits_to_keep):
        self.read.append(ids[0])
        return SimpleNamespace(logits=self.logits(ids[0])[None, -logits_to_keep:].double())


def copied(ids, context):
    """One-hot logits of the token that followed, the last time that as many tokens were the same."""
    found, seen = torch.zeros(len(ids), KINDS + 1), {}
    for at in range(context - 1, len(ids)):
        before = tuple(ids[at - context + 1 : at + 1].tolist())
        if before in seen:
            found[at, ids[seen[before] + 1]] = 1.0
        seen[before] = at
    return found


def constant(ids):
    return torch.zeros(len(ids), KINDS + 1)


def drawn(ids):
    return torch.rand(len(ids), KINDS + 1)


def text(n=4000):
    """Tokens of which the last kind is the commonest."""
    ids = torch.randint(KINDS, (n,))
    return torch.where(torch.rand(n) < 0.1, KINDS, ids)


def test_a_model_that_copies_says_all_needles_and_one_that_does_not_says_none():
    models = {"original": Known(lambda ids: copied(ids, CUE)), "retrofit": Known(drawn)}
    found = needles(models, text(), 256, 6, 0)
    assert found["original"] == [1.0] * 6 and found["standard_error"]["original"] == 0
    assert found["mean"]["retrofit"] < 0.1


@pytest.mark.parametrize(("length", "count"), [(32, 1), (100, 1), (128, 2), (192, 3), (1000, 3)])
def test_a_needle_is_anywhere_in_its_part_of_a_text_and_again_at_the_end(length, count):
    model, size = Known(constant), CUE + ANSWER
    assert needles({"original": model}, text(), length, 40, 0)["needles"] == count
    filler, places = length - 2 * count * size, []
    for read in model.read:
        assert len(read) == length - 1  # the last token is only predicted
        windows = read.unfold(0, size - 1, 1)
        for at in range(count):
            needle = read[length - (count - at) * size :][: size - 1]
            first = (windows == needle).all(1).nonzero()[0].item() - at * size
            assert at * filler / count - 1 < first <= (at + 1) * filler / count
            places.append(first - at * filler / count)
    assert len({tuple(read.tolist()) for read in model.read}) == 40
    assert max(places) - min(places) > 0.7 * filler / count or filler < 20


def test_the_value_of_a_key_is_likeliest_in_a_model_that_copies_and_at_chance_in_others():
    models = {"original": Known(lambda ids: copied(ids, 1)), "retrofit": Known(drawn), "softmax": Known(constant)}
    found = pairs(models, text(), 256, 20, 0)
    assert found["pairs"] == 256 // LINE - 16
    assert set(found["first"]["original"]) == set(found["rank"]["original"]) == {1.0}
    assert set(found["first"]["softmax"]) == {0.0} and set(found["rank"]["softmax"]) == {0.5}
    mean, error = (found["rank"][what]["retrofit"] for what in ("mean", "standard_error"))
    assert abs(mean - 0.5) < 4 * error < 0.15
    assert found["first"]["mean"]["retrofit"] < 0.1


def test_values_that_are_not_in_the_text_do_not_count():
    def elsewhere(ids):
        found = copied(ids, 1)
        return torch.where(torch.isin(torch.arange(KINDS + 1), ids), found, 9.0)

    model = Known(elsewhere)
    assert pairs({"original": model}, text(), 256, 3, 0)["first"]["original"] == [1.0] * 3
    model.logits = lambda ids: -elsewhere(ids)
    assert pairs({"original": model}, text(), 256, 3, 0)["rank"]["original"] == [0.0] * 3


@pytest.mark.parametrize(("length", "count", "asked"), [(32, 8, 2), (100, 25, 8), (256, 69, 16), (900, 150, 16)])
def test_pairs_are_lines_with_keys_and_values_of_their_own_and_some_are_asked_from_everywhere(length, count, asked):
    ids, model = text(), Known(constant)
    assert pairs({"original": model}, ids, length, 30, 0)["pairs"] == count
    everywhere = set()
    for read in model.read:
        assert len(read) == length
        lines = read[length - LINE * (count + asked) :].view(-1, LINE)
        assert set(lines[:, 2].tolist()) == {KINDS}
        own = lines[:count, :2].flatten().tolist()
        assert len(set(own)) == 2 * count and KINDS not in own
        order = [lines[:count].tolist().index(line) for line in lines[count:].tolist()]
        assert order == sorted(set(order))
        everywhere |= set(order)
    assert len(everywhere) > 0.8 * count


def test_a_text_that_is_too_short_or_has_too_few_kinds_has_no_probes():
    models = {"original": Known(constant)}
    assert needles(models, text(100), 256, 2, 0) is None
    assert pairs(models, torch.arange(4000) % 5, 256, 2, 0) is None
    assert pairs(models, torch.arange(400) % 48, 2000, 2, 0) is None
    assert models["original"].read == []


def test_two_runs_with_other_texts_agree_within_their_standard_errors():
    def sometimes(ids):
        found = copied(ids, 1)
        return torch.where(torch.rand(len(ids), 1) < 0.6, found, torch.rand(len(ids), KINDS + 1) / 2 - 1)

    runs = [pairs({"original": Known(sometimes)}, text(), 128, 24, seed)["first"] for seed in (0, 1)]
    (one, other), errors = ([run[what]["original"] for run in runs] for what in ("mean", "standard_error"))
    assert runs[0] != runs[1] and abs(one - other) < 4 * math.hypot(*errors) < 0.25


def test_a_standard_error_is_that_of_the_mean_over_the_texts():
    shares = torch.rand(7, dtype=torch.float64)
    found = with_errors({"original": shares.tolist(), "retrofit": [0.5]})
    torch.testing.assert_close(found["mean"]["original"], float(shares.mean()))
    deviation = float((shares - shares.mean()).square().sum().div(6).sqrt())
    torch.testing.assert_close(found["standard_error"]["original"], deviation / math.sqrt(7))
    assert found["standard_error"]["retrofit"] is None
