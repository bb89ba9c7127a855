"""The framework of the reproductions: cells, shards, resumption, verdicts. No experiment is run here."""

import dataclasses
import itertools
import json
import math
from collections import Counter

import pytest
import torch
from elsewhere import Elsewhere

from regard import Unsupported, list_mechanisms
from regard.measurement.sharding import shard
from regard.measurement.statistics import t_quantile
from regard.measurement.store import Store
from regard.reproductions import Check, Outcome, collect, get_reproduction, list_reproductions, pilot, plan, run
from regard.reproductions.framework import catalogue, runs
from regard.reproductions.framework.judging import judge, measured, minus, over
from regard.reproductions.framework.protocol import Cell, Reproduction
from regard.reproductions.framework.runs import key
from regard.reproductions.framework.telling import cost_of_deciding
from regard.reproductions.framework.training import digit_levels, digit_pixels, said_twice
from regard.tasks.protocol import IGNORED


@pytest.fixture
def example(monkeypatch):
    """The calls of a reproduction with three settings, as (setting name, seed)."""
    calls = []

    def run_cell(setting, seed):
        calls.append((setting["name"], seed))
        return {"score": setting["score"] + 0.01 * seed + 0.001 * float(torch.rand(())), "loss": math.nan}

    made = Reproduction(
        name="example",
        mechanisms=("softmax",),
        claim="better",
        instead="smaller",
        settings={name: {"name": name, "score": score} for name, score in (("good", 0.9), ("bad", 0.5), ("time", 1.0))},
        run_cell=run_cell,
        checks=(Check("good above bad", minus("good", "bad"), above=0.1),),
        timings=frozenset({"time"}),
    )
    monkeypatch.setattr(catalogue, "_load", lambda name: made)
    monkeypatch.setattr(catalogue, "list_reproductions", lambda: ("example",))
    return calls


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "results.db") as opened:
        yield opened


def published(store):
    """The record of the example with two seeds, as read from a file."""
    return json.loads(json.dumps(collect(["example"], store, 2)))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_partition_the_cells(count):
    cells = plan(list_reproductions())
    shards = [shard(cells, f"{i + 1}/{count}") for i in range(count)]
    assert sorted(itertools.chain(*shards), key=str) == sorted(cells, key=str)
    assert len(set(cells)) == len(cells)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(Unsupported, match="shard"):
        shard([], text)


def test_timings_and_the_rest_are_all_cells(example):
    both = plan(["example"], 2, timings=True) + plan(["example"], 2, timings=False)
    assert sorted(both, key=str) == sorted(plan(["example"], 2), key=str)
    assert {cell.setting for cell in plan(["example"], 2, timings=True)} == {"time"}


def test_an_interrupted_run_keeps_all_but_the_cell_in_flight_and_a_second_makes_only_what_is_missing(example, store):
    cells = plan(["example"], 2)

    def stop(cell, left, seconds):
        if left == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cells, store, on_cell=stop)
    assert len(example) == len(store.rows("reproduction")) == len(cells) - 2
    run(cells, store)
    assert sorted(example) == sorted((cell.setting, cell.seed) for cell in cells)
    assert run(cells, store) == {}


def test_rows_of_another_protocol_or_of_other_options_do_not_count(example, store):
    run(plan(["example"], 2), store)
    made = get_reproduction("example")
    for name, value, missing in (
        ("protocol", 2, 6),
        ("protocol", 1, 0),
        ("settings", {**made.settings, "bad": {"name": "bad", "score": 0.6}}, 2),
    ):
        object.__setattr__(made, name, value)
        (record,) = collect(["example"], store, 2)
        assert len(record["missing"]) == missing and record["done"] == 6 - missing
    assert record["missing"] == ["bad 0", "bad 1"]


def test_published_cells_are_not_run_again(example, store, tmp_path):
    cells = plan(["example"], 2)
    run(cells, store)
    records = published(store)
    cell = records[0]["cells"][0]
    cell["machine"] = "another"
    records[0]["cells"].append(gone := {**cell, "setting": "gone"})
    with Store(tmp_path / "there.db") as there:
        assert runs.restore([{**records[0], "protocol": 0}, {"name": "no more", "protocol": 1}], there) == 0
        assert runs.restore(records, there) == len(cells)
        assert runs.restore(records, there) == 0
        assert run(cells, there) == {}
        records[0]["cells"].remove(gone)
        assert collect(["example"], there, 2) == records


def test_published_cells_with_other_options_are_not_restored(example, store, tmp_path):
    run(plan(["example"], 2), store)
    records = published(store)
    records[0]["settings"]["bad"]["score"] = 0.4
    with Store(tmp_path / "there.db") as there:
        assert runs.restore(records, there) == 4
        assert published(there)[0]["missing"] == ["bad 0", "bad 1"]


def test_a_cell_is_a_function_of_setting_and_seed_and_leaves_the_random_state(example):
    reproduction = get_reproduction("example")
    setting = reproduction.settings["good"]
    first = runs.run_cell(reproduction, setting, 5)
    torch.rand(3)
    before = torch.get_rng_state()
    assert runs.run_cell(reproduction, setting, 5) == first != runs.run_cell(reproduction, setting, 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert first["loss"] is None


def test_the_remaining_time_follows_the_pace(example, store):
    said = []
    run(plan(["example"], 2), store, on_cell=lambda cell, left, seconds: said.append((left, seconds)))
    assert [left for left, _ in said] == [6, 5, 4, 3, 2, 1]
    assert said[0][1] == 6 * 30
    assert all(seconds < 30 for _, seconds in said[1:])


def test_collected_results_have_findings_and_extra_seeds(example, store):
    run(plan(["example"], 4), store)
    (found,) = collect(["example"], store, 3)
    assert found["outcome"] == "held" and found["findings"][0]["seeds"] == 4
    assert found["findings"][0]["mean"] == pytest.approx(0.4, abs=2e-3)
    assert (found["done"], found["planned"], found["missing"]) == (9, 9, [])


def scores(*pairs):
    """Cells of the settings a and b, from a pair of scores for each seed."""
    return {(name, seed): {"score": x} for seed, pair in enumerate(pairs) for name, x in zip("ab", pair, strict=True)}


ABOVE = Check("a above b by 0.1", minus("a", "b"), above=0.1)
BELOW = Check("a - b below 0.1", minus("a", "b"), below=0.1)
SURE = scores((0.9, 0.5), (0.91, 0.5), (0.9, 0.52))


@pytest.mark.parametrize(
    ("cells", "above", "below"),
    [
        (SURE, Outcome.HELD, Outcome.DID_NOT_HOLD),
        (scores((0.5, 0.5), (0.51, 0.5), (0.5, 0.52)), Outcome.DID_NOT_HOLD, Outcome.HELD),
        (scores((0.9, 0.5), (0.6, 0.5), (0.5, 0.5)), Outcome.UNDECIDED, Outcome.UNDECIDED),
        (scores((0.9, 0.5)), Outcome.UNDECIDED, Outcome.UNDECIDED),
        (scores((math.nan, 0.5), (0.9, 0.5), (0.9, 0.5)), Outcome.UNDECIDED, Outcome.UNDECIDED),
        ({}, Outcome.NOT_RUN, Outcome.NOT_RUN),
    ],
)
def test_a_verdict_from_mean_and_standard_error(cells, above, below):
    assert judge([ABOVE], cells).outcome is above
    assert judge([BELOW], cells).outcome is below


def test_the_interval_is_students():
    (finding,) = judge([ABOVE], scores((1.0, 0.0), (1.1, 0.0), (1.2, 0.0))).findings
    error = 0.1 / math.sqrt(3)
    assert finding.mean == pytest.approx(1.1)
    assert finding.standard_error == pytest.approx(error)
    assert (finding.low, finding.high) == pytest.approx((1.1 - 4.303 * error, 1.1 + 4.303 * error))


def test_a_claim_holds_only_as_a_whole():
    unsure = Check("a above 0.9", measured("a", "score"), above=0.9)
    assert judge([ABOVE, unsure], SURE).outcome is Outcome.UNDECIDED
    assert judge([ABOVE, unsure, BELOW], SURE).outcome is Outcome.DID_NOT_HOLD


@pytest.mark.parametrize("claimed", [ABOVE, BELOW])
def test_a_claim_is_undecided_where_the_experiment_cannot_tell(claimed):
    learns, fails = (Check("b above", measured("b", "score"), above=bound) for bound in (0.4, 0.6))
    assert judge([claimed], SURE, [learns]).outcome is judge([claimed], SURE).outcome
    verdict = judge([claimed], SURE, [learns, fails])
    assert verdict.outcome is Outcome.UNDECIDED
    assert [need.outcome for need in verdict.needs] == [Outcome.HELD, Outcome.DID_NOT_HOLD]
    assert judge([claimed], {}, [learns]).outcome is Outcome.NOT_RUN


def test_seeds_to_decide_are_the_fewest_whose_interval_leaves_out_the_bound():
    (finding,) = judge([ABOVE], scores((0.9, 0.5), (0.6, 0.5), (0.5, 0.5))).findings
    spread, distance = finding.standard_error * math.sqrt(3), abs(finding.mean - 0.1)
    enough = finding.seeds_to_decide
    assert t_quantile(enough - 1) * spread / math.sqrt(enough) < distance
    assert t_quantile(enough - 2) * spread / math.sqrt(enough - 1) >= distance
    assert judge([ABOVE], scores((0.9, 0.5), (0.9, 0.5))).findings[0].seeds_to_decide is None
    hopeless = scores((0.9, 0.5), (0.3, 0.5), (0.6001, 0.5))
    assert judge([ABOVE], hopeless).findings[0].seeds_to_decide is None


def test_the_cost_of_deciding_counts_the_cells_that_are_compared(example, store):
    """The setting `time` is not part of the difference, so no more of its cells are needed."""
    for seed, score in enumerate((0.9, 0.6, 0.5)):
        for setting, value, seconds in (("good", score, 100.0), ("bad", 0.3, 50.0), ("time", 1.0, 1000.0)):
            cell = key(Cell(get_reproduction("example"), setting, seed))
            store.put("reproduction", cell, {"measured": {"score": value}, "seconds": seconds})
    (record,) = collect(["example"], store)
    (finding,) = record["findings"]
    assert record["outcome"] == Outcome.UNDECIDED
    assert record["hours_to_decide"] == pytest.approx((finding["seeds_to_decide"] - 3) * 150 / 3600)
    assert f"{finding['seeds_to_decide']} seeds" in cost_of_deciding(record)


def test_what_would_decide_depends_on_whether_a_need_failed_or_is_open(example, store):
    made = get_reproduction("example")

    def decide(need: float, *rows: tuple[float, float]) -> str:
        asked = dataclasses.replace(made, needs=(Check("good learns", measured("good", "score"), above=need),))
        with Store(store.path.parent / f"{need}-{len(rows)}.db") as own:
            for seed, row in enumerate(rows):
                for setting, value in zip(("good", "bad"), row, strict=True):
                    own.put(
                        "reproduction", key(Cell(asked, setting, seed)), {"measured": {"score": value}, "seconds": 36.0}
                    )
            (record,) = collect([asked], own)
        assert record["outcome"] == Outcome.UNDECIDED
        return cost_of_deciding(record)

    rows = [(0.9, 0.5), (0.88, 0.5), (0.91, 0.5)]
    assert decide(0.95, *rows).startswith("an experiment in which this holds: good learns")
    assert decide(0.88, *rows).partition(",")[0].removesuffix(" seeds").isdigit()
    assert decide(0.1, rows[0]) == "2 seeds at least"


def test_a_pilot_is_never_judged(example, store):
    run(plan(["example"], pilot=3), store)
    assert example == [(name, 1000 + seed) for seed in range(3) for name in ("good", "bad")]
    (record,) = collect(["example"], store)
    (finding,) = pilot("example", store)["findings"]
    assert record["outcome"] == Outcome.NOT_RUN
    assert (finding["says"], finding["seeds"]) == ("good above bad", 3)
    assert finding["mean"] == pytest.approx(0.4)
    assert [f["seeds"] for f in pilot("example", None)["findings"]] == [0]


def test_a_setting_may_have_more_seeds_than_the_others():
    made = dataclasses.replace(get_reproduction("delta_rule"), seeds=2, more_seeds={"delta_rule": 4, "additive": 3})
    counts = Counter(cell.setting for cell in made.cells())
    assert counts == {"delta_rule": 4, "additive": 3, "gated_linear": 2, "softmax": 2}
    assert set(Counter(cell.setting for cell in made.cells(5)).values()) == {5}


def test_a_timing_is_judged_by_its_spread():
    def timed(*spreads):
        names = ("low", "median", "high")
        return {("t", i): {"ratio": dict(zip(names, spread, strict=True))} for i, spread in enumerate(spreads)}

    faster = Check("faster", measured("t", "ratio"), above=1.0)
    assert judge([faster], timed((1.2, 1.3, 1.5), (1.1, 1.3, 1.4))).outcome is Outcome.HELD
    assert judge([faster], timed((1.2, 1.3, 1.5), (0.9, 1.3, 1.4))).outcome is Outcome.UNDECIDED
    assert judge([faster], timed((0.7, 0.8, 0.9), (0.7, 0.8, 0.95))).outcome is Outcome.DID_NOT_HOLD


def test_ratios_and_values_of_none_are_undecided():
    cells = scores(*[(None, 1.0)] * 3)
    assert judge([Check("", over("a", "b", "score"), above=0.0)], cells).outcome is Outcome.UNDECIDED
    assert judge([Check("", measured("a", "score"), above=0.0)], cells).outcome is Outcome.UNDECIDED


def test_every_mechanism_has_a_reproduction():
    reproduced = {mechanism for name in list_reproductions() for mechanism in get_reproduction(name).mechanisms}
    assert set(list_mechanisms()) <= reproduced


def test_a_reproduction_is_found_by_its_mechanism_and_its_aliases():
    assert get_reproduction("deltanet").name == "delta_rule"
    with pytest.raises(Unsupported, match="delta_rule"):
        get_reproduction("delta_rul")


def test_pixels_read_as_text_are_the_pixels_of_the_images():
    images, task = digit_pixels(40), digit_levels(40)
    read, drawn = task.training_batch(3, 1, 5), images.training_batch(3, 1, 5)
    assert torch.equal(task.levels[read.targets], drawn.inputs[..., 0])
    assert torch.equal(read.inputs[:, 1:], read.targets[:, :-1])
    start = task.vocab_size - 1
    assert read.inputs[:, 0].unique().tolist() == [start] and int(read.targets.max()) < start


def test_text_said_twice_asks_for_the_second_half_alone():
    batch = said_twice(20, 4).training_batch(0, 0, 3)
    assert torch.equal(batch.inputs[:, :10], batch.inputs[:, 10:])
    assert (batch.targets[:, :9] == IGNORED).all()
    assert torch.equal(batch.targets[:, 9:], batch.inputs.roll(-1, 1)[:, 9:])


def test_a_measurement_may_not_be_called_as_a_fact_of_cells(example, store):
    made = get_reproduction("example")
    object.__setattr__(made, "run_cell", lambda setting, seed: {"seconds": 1.0})
    with pytest.raises(ValueError, match="seconds"):
        run(plan(["example"], 1), store)


def test_cells_made_elsewhere_are_judged_as_those_made_here(example, store, tmp_path):
    cells, told, sweep = plan(["example"], 2), [], Elsewhere()
    with Store(tmp_path / "here.db") as here:
        run(cells, here)
        (expected,) = collect(["example"], here, 2)
    done = run(cells, store, sweep=sweep, on_cell=lambda cell, left, seconds: told.append((cell, left)))
    (found,) = collect(["example"], store, 2)
    untimed = [{**record, "cells": [c | {"seconds": 0} for c in record["cells"]]} for record in (expected, found)]
    assert untimed[0] == untimed[1] and set(done) == set(cells)
    assert len(sweep.cells) == 4 and not any(setting == "time" for _, setting, _ in sweep.cells)
    assert [left for _, left in told] == [3, 2, 1, 0, 2, 1]  # timings are run here, last
    assert run(cells, store, sweep=sweep) == {} and len(sweep.cells) == 4
    with pytest.raises(Unsupported, match="budget of time"):
        run(cells, store, sweep=sweep, within=1.0)
