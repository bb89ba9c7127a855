"""The report page of a search, and the rows of its table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regard.core.files import write_text_atomically
from regard.measurement import units
from regard.measurement.statistics import pareto_front
from regard.workbench.reports import charts
from regard.workbench.reports.charts import Figure, ScatterPoint
from regard.workbench.reports.pages import pages
from regard.workbench.reports.scales import Axis, is_number

Record = Mapping[str, Any]
AXES = {
    "milliseconds": Axis("time of an item, faster →", units.milliseconds, log=True, rising=False),
    "flops": Axis("FLOPs of an item, fewer →", units.count, log=True, rising=False),
    "parameters": Axis("parameters, fewer →", units.count, log=True, rising=False),
}


def labels(record: Record) -> list[str]:
    """Column headings: ± is the standard error over seeds, and share the cost relative to the reference's."""
    return ["", record["metric"], "±", "loss", "parameters", "FLOPs", "time", "share", "plan"]


def cells(record: Record, row: Mapping[str, Any]) -> list[str]:
    """The cells of a table row."""
    done = [run for run in row["runs"] if not run["diverged"]]
    score, error = _mean_and_error([run["score"] for run in done])
    loss, _ = _mean_and_error([run["loss"] for run in done])
    reference, lost = record["entrants"][-1], len(row["runs"]) - len(done)
    return [
        f"{row['name']} (diverged in {lost} of {len(row['runs'])} runs)" if lost else row["name"],
        _number(score),
        _number(error),
        _number(loss),
        units.count(row["parameters"]),
        units.count(row["flops"]),
        units.milliseconds(row["ms"]),
        f"{row['cost'] / reference['cost']:.0%}",
        f"{row['plan']} ({row['width']})",
    ]


def write_page(record: Record, path: Path) -> Path:
    """Write the record of a search as a self-contained HTML page."""
    entrants = record["entrants"]
    judged = record["judged"]
    importance = sorted(judged["ranker"]["importance"].items(), key=lambda item: -item[1])
    page = (
        pages()
        .get_template("search.html.j2")
        .render(
            record=record,
            figures=_figures(record),
            labels=labels(record),
            rows=[cells(record, row) for row in entrants],
            judged=[
                (kind, _with_error(one["tau"], one["tau_error"]), _number(one["accuracy"]))
                for kind, one in judged.items()
            ],
            methods=[
                (one["method"], _number(one["score"]), _number(one["inherited"]), one["scored"], one["network"])
                for one in record["methods"]
            ],
            importance=[(name, f"{value:+.3f}") for name, value in importance],
        )
    )
    write_text_atomically(path, page)
    return path


def _figures(record: Record) -> list[Figure]:
    axis = AXES[record["unit"]]
    found = [("Networks tried, with the supernet's weights", _tried(record, axis))]
    if any(row["runs"] for row in record["entrants"]):
        found.append(("What was chosen, trained from scratch", _chosen(record, axis)))
    return [Figure(caption, chart) for caption, chart in found if chart is not None]


def _tried(record: Record, axis: Axis) -> Any:
    """Losses of the networks that the ranker learned from, against costs; those on the Pareto front are labelled."""
    shown = [one for one in record["tried"] if is_number(one["loss"]) and axis.usable(one["cost"])]
    if len(shown) < 2:
        return None
    kinds = list(dict.fromkeys([*record["choices"]["mechanisms"], "mixed"]))
    front = pareto_front({str(i): (-one["loss"], -one["cost"]) for i, one in enumerate(shown)})
    points = [
        ScatterPoint(
            kinds.index(one["mechanisms"]) if one["mechanisms"] in kinds else len(kinds) - 1,
            one["mechanisms"],
            one["cost"],
            one["loss"],
            front=str(i) in front,
            detail=f"{one['network']}: loss {units.number(one['loss'])}, {axis.format(one['cost'])}",
            label=str(i) in front,
        )
        for i, one in enumerate(shown)
    ]
    up = Axis("↑ loss (lower is better, so low is up)", units.tick, rising=False)
    return charts.scatter("tried", "Loss against cost", "Networks tried with the supernet's weights", points, axis, up)


def _chosen(record: Record, axis: Axis) -> Any:
    sign = 1.0 if record["higher_is_better"] else -1.0
    arrow = "" if record["higher_is_better"] else " (lower is better, so low is up)"
    rows = []
    for row in record["entrants"]:
        scores = [run["score"] for run in row["runs"] if is_number(run["score"])]
        if scores and axis.usable(row["cost"]):
            rows.append((row, scores, *_mean_and_error(scores)))
    if len(rows) < 2:
        return None
    front = pareto_front({row["name"]: (sign * mean, -row["cost"]) for row, _, mean, _ in rows})
    points = [
        ScatterPoint(
            i,
            row["name"],
            row["cost"],
            mean,
            error=error if is_number(error) else None,
            seeds=scores,
            front=row["name"] in front,
            winner=i == 0,
            detail=f"{row['plan']}: {units.number(mean)} {record['metric']}, {axis.format(row['cost'])}",
        )
        for i, (row, scores, mean, error) in enumerate(rows)
    ]
    up = Axis(f"↑ {record['metric']}{arrow}", units.tick, rising=record["higher_is_better"])
    return charts.scatter(
        "chosen", f"{record['metric']} against cost", "Networks trained from scratch", points, axis, up
    )


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error; nan if there are too few values."""
    if not values:
        return math.nan, math.nan
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _number(value: Any) -> str:
    return units.number(value) if is_number(value) else "—"


def _with_error(value: Any, error: Any) -> str:
    return " ± ".join(units.with_error(value, error)) if is_number(value) and is_number(error) else _number(value)
