"""Advice: the ranking respects needs, memory and results and gives reasons, and its code to paste runs."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from support import ALL, watched

from regard import Pattern, Unsupported, get_mechanism, list_mechanisms
from regard.measurement.store import Store
from regard.workbench.advice import needs
from regard.workbench.advice.advise import advise
from regard.workbench.advice.check import Errors, check, errors_of
from regard.workbench.advice.layer_work import MIXING, LayerSettings, LayerWork
from regard.workbench.advice.pasted import code_for
from regard.workbench.advice.probe import probe
from regard.workbench.advice.quality import read_quality
from regard.workbench.advice.samples import SURE, Sample
from regard.workbench.advice.settings import AdviseSettings
from regard.workbench.advice.text import advice_text, errors_table, short_text

pytestmark = pytest.mark.usefixtures("_own_cache")

SMALL = {"dim": 32, "heads": 2}


TIMES = {
    "softmax": lambda n: 1e-4 + 1e-6 * n + 1e-9 * n * n,
    "sigmoid": lambda n: 2e-4 + 1e-6 * n + 1e-9 * n * n,
    "linear": lambda n: 3e-4 + 1.1e-6 * n,
    "local": lambda n: 1.5e-4 + 1.05e-6 * n,
    "mamba2": lambda n: 5e-4 + 3e-6 * n,
}
NAMES = tuple(TIMES)


def fake(what, length, names):
    """Samples with quadratic and linear times that cross; memory is largest for mamba2."""
    factor = {"forward": 1, "training": 3, "decode": 0.1}[what]
    return {
        name: Sample(factor * TIMES[name](length), (4000 if name == "mamba2" else 1000) * length, 10 * length, "native")
        for name in names
    }


def ask(lengths=(4096,), measure=fake, mechanisms=NAMES, **options):
    return advise(measure=measure, mechanisms=mechanisms, lengths=lengths, **SMALL, **options)


def listening(asked):
    """A measure that records what it is asked for, as (what, length, name)."""

    def measure(what, length, names):
        asked.extend((what, length, name) for name in names)
        return fake(what, length, names)

    return measure


def order(advice):
    return [c.mechanism for c in advice.candidates]


def test_softmax_is_advised_at_short_lengths_and_something_linear_at_long_ones():
    short, long = ask(64), ask(8192)
    assert short.pick == "softmax" and short.text.startswith("Use softmax")
    assert long.pick == "local"
    assert order(long) == sorted(order(long), key=lambda name: TIMES[name](8192))


def test_the_order_follows_the_time_of_the_use():
    for use, factor in (("infer", 1), ("train", 3), ("serve", 0.1)):
        found = ask(8192, use=use)
        top = found.candidates[0]
        assert top.milliseconds == pytest.approx(factor * 1e3 * TIMES[top.mechanism](8192), rel=1e-6)


def test_with_several_lengths_the_geometric_mean_decides():
    found = ask((64, 8192))
    expected = {n: (TIMES[n](64) * TIMES[n](8192)) ** 0.5 for n in NAMES}
    assert found.candidates[0].milliseconds == pytest.approx(1e3 * expected[found.pick], rel=1e-6)
    assert {e.length for e in found.candidates[0].estimates} == {64, 8192}


def test_needs_rule_out_and_say_why():
    found = ask(needs="keep-all")
    assert order(found) == ["softmax", "sigmoid"]
    assert "fixed size" in found.rejected["linear"] and "card" in found.rejected["linear"]
    assert "15 of 1024" in found.rejected["local"] and "measured" in found.rejected["local"]
    assert any(change.startswith("Without the need 'keep-all': local") for change in found.changes)
    assert order(ask(needs=("exact",))) == ["softmax"]
    assert order(ask(needs=("constant-state", "order"))) == ["local", "linear", "mamba2"]


def test_a_memory_cap_rules_out_and_says_what_it_would_take():
    found = ask(memory=2000 * 4096)
    assert "mamba2" not in order(found) and "of memory, more than" in found.rejected["mamba2"]
    tight = ask(memory=100)
    assert tight.pick is None and tight.text.startswith("No mechanism qualifies")
    assert any("of memory: local" in change for change in tight.changes)
    # in serving, the state counts too
    assert "softmax" in order(ask(use="serve", memory=1011 * 4096))
    assert ask(use="serve", memory=1009 * 4096).pick is None


def test_the_length_from_which_another_wins_is_named():
    change = next(c for c in ask(64).changes if c.startswith("The length"))
    assert "softmax up to " in change and ", then local" in change
    crossing = int(change.split("softmax up to ")[1].split(",")[0])
    # softmax is preferred unless it is surely slower; lengths are tried on a grid of quarter octaves
    assert TIMES["softmax"](crossing * 2**0.25) > TIMES["local"](crossing * 2**0.25)
    assert TIMES["softmax"](crossing) <= 1.2 * TIMES["local"](crossing)
    assert any(c.startswith("Not the length: softmax") for c in ask(64, mechanisms=("softmax", "sigmoid")).changes)


def test_every_figure_says_whether_it_was_measured_and_how_well_it_is_known():
    found = ask((512, 700, 1 << 15))
    estimates = {(e.what, e.length): e for e in found.candidates[0].estimates}
    forward, training = ([estimates[what, n] for n in (512, 700, 1 << 15)] for what in ("forward", "training"))
    assert [e.basis for e in forward] == ["measured"] * 3
    assert [e.basis for e in training] == ["measured", "interpolated", "extrapolated"]
    widths = [math.log(e.high / e.milliseconds) for e in training]
    assert widths == sorted(widths) and widths[0] == pytest.approx(SURE) and widths[2] > 0.2
    assert all(e.low < e.milliseconds < e.high for e in estimates.values())


def test_what_decides_is_measured_at_the_length_and_use_asked_for(monkeypatch):
    """A card that promises linear growth does not mislead, even if short lengths confirm it."""
    monkeypatch.setitem(TIMES, "linear", lambda n: 1e-6 * n * max(1, n / 2048) ** 2)
    asked = []
    found = ask(6000, listening(asked), use="train")
    assert found.pick == "local"
    assert {("training", 6000, "linear"), ("training", 6000, "local")} <= set(asked)
    assert "not measured" not in found.text
    assert ("training", 6000, "mamba2") not in asked  # surely slower, by the shorter lengths
    assert not any(what != "training" and length == 6000 for what, length, _ in asked)


def test_a_pick_for_which_the_time_did_not_suffice_is_said_to_be_predicted(monkeypatch):
    monkeypatch.setitem(TIMES, "local", lambda n: 0.1 * n)
    found = ask(6000, mechanisms=("local",), seconds=3)
    assert "not measured at 6000 tokens for lack of time" in found.text


def test_only_what_qualifies_is_measured_at_the_length_asked_for():
    asked = []
    assert ask(6000, listening(asked), needs="exact").pick == "softmax"
    assert {name for _, length, name in asked if length == 6000} == {"softmax"}


@pytest.mark.parametrize(
    ("share", "spread", "pick"), [(0.96, 0.0, "softmax"), (0.94, 0.0, "linear"), (0.85, 0.1, "softmax")]
)
def test_softmax_stands_unless_another_is_clearly_faster_beyond_the_interval(share, spread, pick, monkeypatch):
    monkeypatch.setitem(TIMES, "linear", lambda n: share * TIMES["softmax"](n))

    def spreading(what, length, names):
        return {name: replace(sample, spread=spread) for name, sample in fake(what, length, names).items()}

    found = ask(64, spreading, ("linear", "softmax"))
    assert found.pick == pick
    assert ("clearly faster" in found.text) == (pick == "softmax")


def test_one_that_is_faster_in_doubt_does_not_hide_one_that_is_faster_beyond_it(monkeypatch):
    monkeypatch.setitem(TIMES, "linear", lambda n: 0.8 * TIMES["softmax"](n))
    monkeypatch.setitem(TIMES, "local", lambda n: 0.9 * TIMES["softmax"](n))

    def spreading(what, length, names):
        spread = {"linear": 0.2}
        return {n: replace(sample, spread=spread.get(n, 0.0)) for n, sample in fake(what, length, names).items()}

    assert ask(64, spreading, ("linear", "local", "softmax")).pick == "local"
    assert ask(64, spreading, ("linear", "softmax")).pick == "softmax"


@pytest.mark.parametrize("lengths", [64, (64, 4096), 1 << 15])
@pytest.mark.parametrize(
    "options", [{}, {"needs": "recall"}, {"memory": 1}, {"needs": ("recall", "weights"), "memory": 10**9}]
)
def test_the_answer_has_twenty_lines_and_the_rest_on_request(lengths, options):
    found = ask(lengths, **options)
    console = Console(width=120, record=True, file=io.StringIO())
    for part in short_text(found):
        console.print(part)
    lines = console.export_text().splitlines()
    assert len(lines) <= 20 and found.text[:60] in lines[0]
    assert any("--all" in line for line in lines)


def test_candidates_and_exclusions_are_honoured():
    assert order(ask(mechanisms=("linear_transformer", "local"))) == ["local", "linear"]
    found = ask(exclude=("local", "sdpa"))
    assert "local" not in order(found) and found.rejected["softmax"] == "excluded by you"


def test_a_mechanism_that_lacks_the_pattern_or_the_size_is_listed_with_the_reason():
    assert "relative to a query" in ask(pattern="causal-cross").rejected["local"]
    found = ask(64, head_dim=7)
    assert "cannot have this size" in found.rejected["mamba2"] and "mamba2" not in order(found) and found.pick
    with pytest.raises(Unsupported, match="mamba2: its layer"):
        ask(64, head_dim=7, mechanisms=("mamba2",))


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_what_mixes_no_tokens_is_not_advised(pattern):
    found = ask(pattern=pattern, mechanisms=(*NAMES, "activator", "large_kernel"), measure=everything_alike)
    assert "mixes no tokens" in found.rejected["activator"] and "activator" not in order(found)
    assert "large_kernel" in order(found)


def everything_alike(what, length, names):
    return {name: Sample(1e-3, 1000 * length, 10 * length, "native") for name in names}


def test_what_does_not_decode_is_not_advised_for_serving(monkeypatch):
    monkeypatch.setattr(LayerWork, "decodes", property(lambda work: work.card.name != "local"))
    assert "no state" in ask(use="serve").rejected["local"]


def results(folder, **tasks):
    """A comparison's output folder, with rows (mechanism, mean, solved, surely behind) for each task."""
    names = ("mechanism", "mean", "solved", "separable_from_best")
    entries = {task: [dict(zip(names, row, strict=True)) for row in rows] for task, rows in tasks.items()}
    summary = {task: [{**entry, "standard_error": 0.01} for entry in found] for task, found in entries.items()}
    with Store(folder / "results.db") as store:
        store.put("run", {"run": store.run}, {"summary": summary})
    return folder


def test_results_put_what_is_behind_out_and_what_is_unknown_last(tmp_path):
    scores = [("softmax", 1.5, None, False), ("linear", 1.6, None, False), ("local", 2.0, None, True)]
    found = ask(results=results(tmp_path, text=scores))
    assert order(found)[:2] == ["linear", "softmax"]
    assert "behind the best on text" in found.rejected["local"]
    quality = {c.mechanism: c.quality for c in found.candidates}
    assert quality["linear"] == "text 1.6 ± 0.01" and quality["mamba2"] == "not measured"
    assert any(change.startswith("Without your results: local") for change in found.changes)
    assert "not measured" not in found.text  # although mechanisms missing from the results may be faster
    assert "quality was not measured" not in " ".join(found.changes)


def test_results_of_recall_decide_the_need_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "RECALL", {"mamba2": {"without": 0.2}, "sigmoid": {"without": 1.0}})
    both = results(tmp_path, recall=[("softmax", 0.99, True, False), ("linear", 0.98, True, False)])
    found = ask(needs="recall", results=both)
    assert set(order(found)) == {"softmax", "linear", "sigmoid"} and order(found)[0] == "linear"
    assert not any("no recall results" in note for note in found.notes)
    one = results(tmp_path / "b", recall=[("softmax", 0.99, True, False), ("sigmoid", 0.2, False, False)])
    assert "did not solve" in ask(needs="recall", results=one / "results.db").rejected["sigmoid"]


def test_without_results_no_quality_is_claimed():
    found = ask()
    assert all(c.quality == "not measured" for c in found.candidates)
    assert any("quality was not measured" in change for change in found.changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use": "inference"}, "try infer"),
        ({"lengths": ()}, "lengths"),
        ({"lengths": 0}, "lengths from 1"),
        ({"lengths": 1 << 21}, "lengths from 1"),
        ({"memory": 0}, "positive number of bytes"),
        ({"seconds": 0}, "seconds=0"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"needs": "speed"}, "need 'speed'"),
        ({"what": ("forwards",)}, "try forward"),
        ({"use": "serve", "pattern": "noncausal-self"}, "try --use infer"),
        ({"mechanisms": ("softmxa",)}, "try softmax"),
        ({"mechanisms": ("low_rank_pooling",)}, "pool of an encoder"),
        ({"mechanisms": ("token_parameter",)}, "a linear layer"),
        ({"mechanisms": ("softmax",), "exclude": ("softmax",)}, "no candidate.*softmax excluded by you"),
        (
            {"mechanisms": ("local",), "pattern": "causal-cross"},
            "no candidate.*local lacks causal-cross: memory tokens",
        ),
        ({"mechanisms": ()}, "no candidate.*none was named"),
        ({"exclude": ("softmxa",)}, "try softmax"),
        ({"heads": 3}, "dim=32"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_anything_is_measured(options, message):
    def measure(*_):
        raise AssertionError("measured")

    with pytest.raises(Unsupported, match=message):
        advise(measure=measure, **{**SMALL, **options})


def test_results_that_are_no_finished_comparison_are_refused(tmp_path):
    Store(tmp_path / "results.db").close()
    with pytest.raises(Unsupported, match="no finished comparison"):
        read_quality(tmp_path)
    (tmp_path / "other.db").write_text("text")
    with pytest.raises(Unsupported, match="not a store"):
        read_quality(tmp_path / "other.db")


def test_advice_is_json_and_text():
    found = ask((64, 4096), needs="recall", memory=10**9)
    again = json.loads(json.dumps(found.as_dict()))
    assert again["pick"] == found.pick and again["settings"]["pattern"] == "causal-self"
    text = "\n".join(str(part) for part in advice_text(found))
    for word in (found.text, "What would change", "Do not qualify", "create_layer"):
        assert word in text
    assert list(advice_text(ask(memory=1)))


def mixing(pattern):
    return list_mechanisms(pattern=pattern, where=lambda card: card.kind in MIXING)


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("use", ["train", "infer", "serve"])
def test_what_is_to_be_pasted_runs(pattern, use):
    if use == "serve" and pattern is Pattern.NONCAUSAL_SELF:
        pytest.skip("not served")
    settings = LayerSettings(pattern, **SMALL) if use == "train" else LayerSettings(pattern, 32, 2, 8, 2, "float64")
    names = mixing(pattern)
    if use != "serve" and not ALL:
        names = names[use == "infer" :: 2]  # half of them train, half infer
    for name in names:
        if use == "serve" and not LayerWork(get_mechanism(name), settings).decodes:
            continue
        scope = {}
        exec(code_for(name, settings, use, 20), scope)
        assert scope["layer"].card is get_mechanism(name)
        found = scope["result"].output if use == "serve" else scope["y"]
        assert found.shape == (settings.batch, 1 if use == "serve" else scope["x"].shape[1], 32)
        assert found.dtype == getattr(torch, settings.dtype)
        modelled = pattern is Pattern.CAUSAL_SELF or get_mechanism(name).prepare is None
        assert ("model" in scope) == (modelled and pattern is not Pattern.NONCAUSAL_CROSS)


def test_the_pasted_layer_is_the_measured_one():
    for name in mixing(Pattern.CAUSAL_SELF):
        settings = LayerSettings(**SMALL)
        scope = {}
        exec(code_for(name, settings, "infer", 12), scope)
        measured = LayerWork(get_mechanism(name), settings)
        measured.action("forward", 12)
        assert str(measured.layer) == str(scope["layer"])
        shapes = [[p.shape for p in layer.parameters()] for layer in (measured.layer, scope["layer"])]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("use", "pattern"),
    [("infer", Pattern.NONCAUSAL_SELF), ("infer", Pattern.CAUSAL_CROSS), ("serve", Pattern.CAUSAL_SELF)],
)
def test_what_is_to_be_pasted_runs_beyond_the_default_of_a_greatest_length(use, pattern):
    limited = [name for name in mixing(pattern) if get_mechanism(name).length == "max"]
    assert limited
    for name in limited:
        settings, card = LayerSettings(pattern, **SMALL), get_mechanism(name)
        if use == "infer" or LayerWork(card, settings).decodes:
            exec(code_for(name, settings, use, (card.options().length or 0) + 6), {})


def test_the_check_finds_the_errors_of_predictions():
    settings = LayerSettings(**SMALL)
    known = probe(settings, {"forward": ["linear"]}, seconds=9, measure=fake)
    measured = {
        ("forward", "linear", n): Sample(TIMES["linear"](n) / factor, round(1000 * n / factor), round(10 * n / factor))
        for n, factor in ((96, 1.0), (320, 1.1), (768, 0.8))
    }
    time, memory = errors_of(known, measured)
    assert isinstance(time, Errors) and time.count == 3 and time.where == "linear at 768" and time.of == "seconds"
    assert time.median == pytest.approx(0.1, abs=0.01) and time.worst == pytest.approx(0.2, abs=0.01)
    assert memory.median == pytest.approx(0.1, abs=0.01)
    assert errors_table([time, memory]).row_count == 2
    assert time.inside == pytest.approx(1 / 3) and memory.inside is None


def test_the_check_measures_goes_on_and_forgets_when_asked(monkeypatch):
    import regard.workbench.advice.check as module

    settings = AdviseSettings(mechanisms=("linear", "mamba2"), **SMALL, what=("forward",), seconds=0.2)
    calls = watched(monkeypatch, module, "profile", lambda settings: settings)
    first = check(settings, lengths=(40, 80))
    assert len(first) == 2 and {e.count for e in first} == {4} and len(calls) == 4  # two passes
    assert first[1].median < 0.2  # memory does not depend on load
    assert len(check(settings, lengths=(40, 80))) == 2 and len(calls) == 4
    check(settings, lengths=(40, 80), fresh=True)
    assert len(calls) == 8


def test_a_disturbance_in_one_pass_of_the_check_is_no_error_of_a_prediction(monkeypatch):
    import regard.workbench.advice.check as module

    settings = AdviseSettings(mechanisms=("linear",), **SMALL, what=("forward",), seconds=0.2)

    def disturbed(settings, what, length, names, *, section, **_):
        hit = section == module.PASSES[length == 80]  # a different pass for each length
        return {name: Sample(TIMES["linear"](length) * (50 if hit else 1), 1000) for name in names}

    monkeypatch.setattr(module, "profiled", disturbed)
    monkeypatch.setattr(module, "probe", lambda layer, able, **_: probe(layer, able, seconds=9, measure=fake))
    time = check(settings, lengths=(40, 80))[0]
    assert time.of == "seconds" and time.worst < 0.01
