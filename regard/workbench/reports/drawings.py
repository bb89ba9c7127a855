"""The charts in a comparison's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from regard.measurement import units
from regard.measurement.statistics import pareto_front
from regard.workbench.reports import charts
from regard.workbench.reports.charts import ScatterPoint, Series
from regard.workbench.reports.scales import Axis, is_number
from regard.workbench.reports.view import COSTS, REFERENCE, Payload, View


class Drawings:
    """The charts that the template needs, task by task, from a view's data."""

    def __init__(self, view: View) -> None:
        self.view = view

    def pictures(self, task: str) -> list[dict[str, Any]]:
        """Quality against each measured cost: the cost's name, the chart, and a note on mechanisms missing from it."""
        found = []
        for name, column, axis in COSTS:
            entries = [
                e for e in self.view.summary.get(task, ()) if is_number(e["mean"]) and axis.usable(e.get(column))
            ]
            if not entries:
                continue
            drawn = {e["mechanism"] for e in entries}
            lost = [e["mechanism"] for e in self.view.summary[task] if e["mechanism"] not in drawn]
            note = f"Without a score or this cost: {', '.join(lost)}" if lost else ""
            found.append({"name": name, "chart": self._picture(task, entries, column, axis), "note": note})
        return found

    def _picture(self, task: str, entries: Sequence[Payload], column: str, axis: Axis) -> Markup:
        metric = self.view.metric(task)
        signs = (1 if axis.rising else -1, 1 if metric.higher_is_better else -1)
        front = pareto_front({e["mechanism"]: (signs[0] * e[column], signs[1] * e["mean"]) for e in entries})
        points = [
            ScatterPoint(
                number=self.view.number(entry["mechanism"]),
                name=entry["mechanism"],
                x=entry[column],
                y=entry["mean"],
                error=entry.get("standard_error") if is_number(entry.get("standard_error")) else None,
                seeds=self._seeds(task, entry["mechanism"]),
                front=entry["mechanism"] in front,
                winner=entry["mechanism"] == self.view.winner,
                detail=f"{entry['mechanism']}: {metric.name} {units.number(entry['mean'])}, "
                f"{axis.format(entry[column])}",
                label=entry["mechanism"] in self.view.named,
            )
            for entry in entries
        ]
        best = self.view.ranked(task)[0]
        return charts.scatter(
            self._id(f"picture-{column}", task),
            f"{task}: quality against {axis.label}",
            f"{len(points)} mechanisms; best {metric.name} {units.number(best['mean'])} by {best['mechanism']}. "
            "The figures are in the table below.",
            points,
            axis,
            metric.axis,
            rule=None if (rule := self.view.rule(task)) is None else (rule["name"], rule["score"]),
        )

    def _seeds(self, task: str, mechanism: str) -> list[float]:
        rows = [row for row in self.view.quality if (row["task"], row["mechanism"]) == (task, mechanism)]
        scores = [row["score"] for row in rows if is_number(row["score"])]
        return scores if len(scores) > 1 else []

    def costs(self, task: str) -> list[dict[str, Any]]:
        """Charts of costs that grow with the length, each with a sentence below it."""
        latency = Axis("less is better ↓", units.milliseconds, log=True)
        memory = Axis("less is better ↓", units.size, log=True, base=2)
        decode = Axis("tokens per second, more is better ↑", units.count, log=True)
        wanted: list[tuple[str, str, Axis, str | None]] = [
            ("Time", "latency", latency, "efficiency_length_time"),
            ("Memory", "memory", memory, "efficiency_length_memory"),
            ("Decoding speed", "decode", decode, None),
            ("State kept to decode the next token", "state_bytes", memory, None),
        ]
        cross = any(row["task"] == task and str(row.get("pattern", "")).endswith("cross") for row in self.view.cost)
        what = "memory" if cross else "input"
        length = Axis(f"length of the {what}, tokens →", units.tokens, log=True, base=2)
        if len(self.view.costed) > 1:
            wanted = wanted[:3]  # one row of the page per task; the table has the state
        drawn = []
        for name, source, axis, crossing in wanted:
            series = [self._cost_series(row, source, crossing) for row in self.view.cost if row["task"] == task]
            chart = charts.lines(
                self._id(source, task),
                f"{task}: {name.lower()} against length",
                f"One line for each of {len(series)} mechanisms, both axes logarithmic.",
                series,
                length,
                axis,
            )
            if chart is not None:
                note = self._crossing_sentence(name, series) if crossing else ""
                if source == "latency":
                    note = ". ".join(filter(None, (note, self._backend_sentence(task))))
                drawn.append({"caption": name, "chart": chart, "note": note})
        return drawn

    def _cost_series(self, row: Payload, source: str, crossing: str | None) -> Series:
        measured = row.get(source) or ()
        return Series(
            number=self.view.number(row["mechanism"]),
            name=row["mechanism"],
            points=[(entry[0], entry[1]) for entry in measured],
            ranges={entry[0]: (entry[2], entry[3]) for entry in measured if len(entry) == 4},
            crossing=row.get(crossing) if crossing else None,
            label=row["mechanism"] in self.view.named,
        )

    def _crossing_sentence(self, name: str, series: Sequence[Series]) -> str:
        by_length: dict[float, list[str]] = {}
        for s in sorted((s for s in series if s.crossing is not None), key=lambda s: s.crossing or 0):
            by_length.setdefault(s.crossing or 0, []).append(s.name)
        if not by_length:
            return ""
        adjective = "Faster" if name == "Time" else "Smaller"
        return f"{adjective} than {REFERENCE} from " + "; ".join(
            f"{units.tokens(length)}: {', '.join(names)}" for length, names in by_length.items()
        )

    def _backend_sentence(self, task: str) -> str:
        by_backend: dict[str, list[str]] = {}
        for row in self.view.cost:
            if row["task"] == task and row.get("backends"):
                by_backend.setdefault(" and ".join(row["backends"]), []).append(row["mechanism"])
        if not by_backend:
            return ""
        return "Engines ran on " + "; ".join(f"{name}: {', '.join(who)}" for name, who in by_backend.items())

    def curves(self, task: str) -> Markup | None:
        """Training loss against tokens, one line per seed."""
        rows = [row for row in self.view.quality if row["task"] == task and row.get("curve")]
        losses = [loss for row in rows for _, loss in row["curve"] if is_number(loss)]
        firsts = [next((loss for _, loss in row["curve"] if is_number(loss)), None) for row in rows]
        starts = [loss for loss in firsts if loss is not None]
        if not losses:
            return None
        log = min(losses) > 0
        # a run that blows up must not flatten all the others
        axis = Axis("training loss ↓", log=log, limit=max(starts) * 1.2 if log else math.inf)
        lines = [(row["mechanism"], [(tokens, loss) for tokens, loss in row["curve"]]) for row in rows]
        return charts.lines(
            self._id("curves", task),
            f"{task}: training curves",
            f"Training loss against tokens of {len(rows)} runs.",
            self._lines(lines),
            Axis("tokens seen in training →", units.count),
            axis,
            markers=False,
        )

    def searches(self, task: str) -> Markup | None:
        """Score against learning rate, with the chosen rate ringed."""
        cells: dict[tuple[str, Any], list[Payload]] = {}
        for row in self.view.search:
            if row["task"] == task:
                cells.setdefault((row["mechanism"], row["seed"]), []).append(row)
        rates = tuple(sorted({row["lr"] for rows in cells.values() for row in rows}))
        lines = []
        for (mechanism, _), rows in cells.items():
            by_rate = sorted(rows, key=lambda row: row["lr"])
            lines.append((mechanism, [(row["lr"], None if row["diverged"] else row["score"]) for row in by_rate]))
        chosen = {mechanism: self.view.chosen_rate(task, mechanism) for mechanism, _ in cells}
        metric = self.view.metric(task)
        return charts.lines(
            self._id("search", task),
            f"{task}: learning-rate search",
            f"{metric.name} at each learning rate that was tried, in full runs of the first seed.",
            self._lines(lines, rings={name: (rate,) for name, rate in chosen.items() if rate is not None}),
            Axis("learning rate →", units.tick, log=True, ticks=rates),
            metric.axis,
            missing="× diverged",
        )

    def _lines(
        self,
        lines: Sequence[tuple[str, list[tuple[float, float | None]]]],
        *,
        rings: Mapping[str, tuple[float, ...]] | None = None,
    ) -> list[Series]:
        """Lines of mechanisms, each with its rings; only the first line of a mechanism is labelled."""
        rings, first = rings or {}, set()
        series = []
        for name, points in lines:
            label = name in self.view.named and name not in first
            first.add(name)
            series.append(Series(self.view.number(name), name, points, rings=rings.get(name, ()), label=label))
        return series

    def _id(self, chart: str, task: str) -> str:
        return f"{chart}-{self.view.tasks.index(task)}"
