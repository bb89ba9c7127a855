"""The report of a comparison: one HTML file that needs nothing else, drawn from rows of the store.

This module arranges and draws; means, standard errors and the Pareto front come in ready made.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from regard.contract import Unsupported
from regard.workbench import charts
from regard.workbench.charts import Axis, ScatterPoint, Series, is_number

Payload = Mapping[str, Any]
REFERENCE = "softmax"
"""What efficiency lengths are counted against."""
LENGTH = Axis("length of the input, tokens →", charts.format_length, log=True, base=2)


@dataclass(frozen=True)
class Metric:
    """How the quality of a task is measured."""

    name: str
    higher_is_better: bool

    @property
    def axis(self) -> Axis:
        name = f"↑ better   {self.name}" + ("" if self.higher_is_better else " (small is up)")
        return Axis(name, charts.format_tick, rising=self.higher_is_better)


def write_report(
    path: str | Path,
    *,
    run: Payload,
    quality: Sequence[Payload],
    cost: Sequence[Payload],
    search: Sequence[Payload],
    summary: Mapping[str, Sequence[Payload]],
    machine: Payload,
    revision: str | None = None,
) -> Path:
    """Write the report of one run, replacing the file in one step.

    Args:
        path: the HTML file. Its folder is created when missing.
        run, quality, cost, search: payloads of the rows of those kinds.
        summary: of each task, one entry a mechanism.
        machine: :func:`regard.workbench.provenance.fingerprint` of where it was measured.
        revision: of the code that measured; None when it was not recorded.

    Returns:
        The path.

    Raises:
        Unsupported: the file cannot be written.
    """
    path = Path(path)
    page = render(
        run=run, quality=quality, cost=cost, search=search, summary=summary, machine=machine, revision=revision
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            file.write(page)
        try:
            Path(file.name).chmod(0o644)
            os.replace(file.name, path)
        except OSError:
            Path(file.name).unlink()
            raise
    except OSError as error:
        raise Unsupported(
            f"{path} as a report: it cannot be written ({error.strerror})",
            supported="a file in a folder that can be written",
            nearest="--output ./report.html",
        ) from error
    return path


def render(
    *,
    run: Payload,
    quality: Sequence[Payload],
    cost: Sequence[Payload],
    search: Sequence[Payload],
    summary: Mapping[str, Sequence[Payload]],
    machine: Payload,
    revision: str | None = None,
) -> str:
    """The page as text; arguments as in :func:`write_report`."""
    view = _View(run, quality, cost, search, summary)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _or_dash(charts.format_number),
        "count": _or_dash(charts.format_count),
        "bytes": _or_dash(charts.format_bytes),
        "milliseconds": _or_dash(charts.format_milliseconds),
        "duration": _or_dash(format_duration),
        "tick": _or_dash(charts.format_tick),
    }
    return environment.get_template("report.html.j2").render(
        view=view,
        run=run,
        recommendation={"text": "", "reason": "", "winner": None, "notes": [], **(run.get("recommendation") or {})},
        quality=quality,
        machine=machine,
        revision=revision,
        glyph=charts.glyph,
        reference=REFERENCE,
        colours=range(charts.COLOURS),
    )


def format_duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _or_dash(form: charts.Formatter) -> Any:
    return lambda value: form(value) if is_number(value) else "—"


class _View:
    """What the template asks for, task by task."""

    def __init__(
        self,
        run: Payload,
        quality: Sequence[Payload],
        cost: Sequence[Payload],
        search: Sequence[Payload],
        summary: Mapping[str, Sequence[Payload]],
    ) -> None:
        self.run, self.quality, self.cost, self.search, self.summary = run, quality, cost, search, summary
        rows = [*quality, *cost, *search, *(entry for entries in summary.values() for entry in entries)]
        self.mechanisms = list(dict.fromkeys([*run.get("mechanisms", ()), *(row["mechanism"] for row in rows)]))
        self.tasks = list(
            dict.fromkeys([*run.get("tasks", ()), *summary, *(row["task"] for row in [*quality, *cost, *search])])
        )
        recommendation = run.get("recommendation") or {}
        self.winner = recommendation.get("winner")

    def number(self, mechanism: str) -> int:
        """Decides the colour and the shape of a mechanism."""
        return self.mechanisms.index(mechanism)

    def metric(self, task: str) -> Metric:
        row = next((row for row in self.quality if row["task"] == task), None)
        return Metric("quality", True) if row is None else Metric(row["metric"], row["higher_is_better"])

    def ranked(self, task: str) -> list[Payload]:
        """The summary of a task, best first, mechanisms without a score last."""
        sign = -1 if self.metric(task).higher_is_better else 1
        entries = self.summary.get(task, ())
        return sorted(entries, key=lambda e: (0, sign * e["mean"]) if is_number(e["mean"]) else (1, 0.0))

    def standing(self, task: str, entry: Payload) -> str:
        """What can be said about a mechanism beside the best one of the task."""
        if not is_number(entry["mean"]):
            return "no score"
        if entry is self.ranked(task)[0]:
            return "best"
        separable = entry.get("separable_from_best")
        if separable is None:
            return "unknown"
        return "behind" if separable else "tied"

    def tied(self, task: str) -> list[str]:
        """The best mechanism of a task and those that cannot be told apart from it; empty when there are none."""
        ranked = self.ranked(task)
        found = [e["mechanism"] for e in ranked if self.standing(task, e) == "tied"]
        return [ranked[0]["mechanism"], *found] if found else []

    def diverged(self, task: str) -> list[str]:
        """Mechanisms with a seed that has no score."""
        rows = [row for row in self.quality if row["task"] == task and not is_number(row["score"])]
        return list(dict.fromkeys(row["mechanism"] for row in rows))

    def picture(self, task: str) -> Markup | None:
        """Quality against speed."""
        speed, axis = self._speed(task)
        metric = self.metric(task)
        points = [
            ScatterPoint(
                number=self.number(entry["mechanism"]),
                name=entry["mechanism"],
                x=speed(entry),
                y=entry["mean"],
                error=entry.get("standard_error") if is_number(entry.get("standard_error")) else None,
                seeds=self._seeds(task, entry["mechanism"]),
                front=bool(entry.get("on_front")),
                winner=entry["mechanism"] == self.winner,
                detail=f"{entry['mechanism']}: {metric.name} {charts.format_number(entry['mean'])}, "
                f"{axis.format(speed(entry))}",
            )
            for entry in self.summary.get(task, ())
            if is_number(entry["mean"]) and axis.usable(speed(entry))
        ]
        if not points:
            return None
        best = self.ranked(task)[0]
        description = (
            f"{len(points)} mechanisms; best {metric.name} {charts.format_number(best['mean'])} by {best['mechanism']}. "
            "The figures are in the table below."
        )
        return charts.scatter(
            self._id("picture", task), f"{task}: quality against speed", description, points, axis, metric.axis
        )

    def _speed(self, task: str) -> tuple[Any, Axis]:
        """Inference time where it was measured for every mechanism with a score, else the speed of training."""
        entries = [e for e in self.summary.get(task, ()) if is_number(e["mean"])]
        if entries and all(is_number(e.get("inference_ms")) and e["inference_ms"] > 0 for e in entries):
            axis = Axis("time of inference, faster →", charts.format_milliseconds, log=True, rising=False)
            return (lambda e: e["inference_ms"]), axis
        axis = Axis("tokens trained per second, faster →", charts.format_count, log=True)
        return (lambda e: e.get("tokens_per_second")), axis

    def _seeds(self, task: str, mechanism: str) -> list[float]:
        rows = [row for row in self.quality if (row["task"], row["mechanism"]) == (task, mechanism)]
        scores = [row["score"] for row in rows if is_number(row["score"])]
        return scores if len(scores) > 1 else []

    def costs(self, task: str) -> list[dict[str, Any]]:
        """Charts of what grows with the length, each with the sentence below it."""
        latency = Axis("milliseconds or seconds, ↓ better", charts.format_milliseconds, log=True)
        memory = Axis("bytes, ↓ better", charts.format_bytes, log=True, base=2)
        decode = Axis("tokens per second, ↑ better", charts.format_count, log=True)
        wanted = (
            ("Time", "latency", latency, "efficiency_length_time"),
            ("Memory", "memory", memory, "efficiency_length_memory"),
            ("Decoding speed", "decode", decode, None),
            ("State kept to decode the next token", "state_bytes", memory, None),
        )
        drawn = []
        for name, source, axis, crossing in wanted:
            series = [self._cost_series(row, source, crossing) for row in self.cost if row["task"] == task]
            chart = charts.lines(
                self._id(source, task),
                f"{task}: {name.lower()} against length",
                f"One line for each of {len(series)} mechanisms, both axes logarithmic.",
                series,
                LENGTH,
                axis,
            )
            if chart is not None:
                note = self._crossing_sentence(name, series) if crossing else ""
                drawn.append({"caption": name, "chart": chart, "note": note})
        return drawn

    def _cost_series(self, row: Payload, source: str, crossing: str | None) -> Series:
        measured = row.get(source) or ()
        return Series(
            number=self.number(row["mechanism"]),
            name=row["mechanism"],
            points=[(entry[0], entry[1]) for entry in measured],
            ranges={entry[0]: (entry[2], entry[3]) for entry in measured if len(entry) == 4},
            crossing=row.get(crossing) if crossing else None,
        )

    def _crossing_sentence(self, name: str, series: Sequence[Series]) -> str:
        found = sorted((s.crossing, s.name) for s in series if s.crossing is not None)
        if not found:
            return ""
        adjective = "Faster" if name == "Time" else "Smaller"
        return f"{adjective} than {REFERENCE} from: " + ", ".join(
            f"{mechanism} {charts.format_length(length)}" for length, mechanism in found
        )

    def curves(self, task: str) -> Markup | None:
        """Training loss against tokens, a line a seed."""
        rows = [row for row in self.quality if row["task"] == task and row.get("curve")]
        losses = [loss for row in rows for _, loss in row["curve"] if is_number(loss)]
        firsts = [next((loss for _, loss in row["curve"] if is_number(loss)), None) for row in rows]
        starts = [loss for loss in firsts if loss is not None]
        if not losses:
            return None
        log = min(losses) > 0
        # A run that blows up must not flatten all the others.
        axis = Axis("training loss, ↓ better", log=log, limit=max(starts) * 1.2 if log else None)
        named: set[str] = set()
        series = []
        for row in rows:
            series.append(
                Series(
                    number=self.number(row["mechanism"]),
                    name=row["mechanism"],
                    points=[(tokens, loss) for tokens, loss in row["curve"]],
                    label=row["mechanism"] not in named,
                )
            )
            named.add(row["mechanism"])
        return charts.lines(
            self._id("curves", task),
            f"{task}: training curves",
            f"Training loss against tokens of {len(rows)} runs.",
            series,
            Axis("tokens seen in training →", charts.format_count),
            axis,
            markers=False,
        )

    def searches(self, task: str) -> Markup | None:
        """Score against learning rate, the chosen one ringed."""
        cells: dict[tuple[str, Any], list[Payload]] = {}
        for row in self.search:
            if row["task"] == task:
                cells.setdefault((row["mechanism"], row["seed"]), []).append(row)
        named: set[str] = set()
        series = []
        for (mechanism, _), rows in cells.items():
            chosen = self.chosen_rate(task, mechanism)
            series.append(
                Series(
                    number=self.number(mechanism),
                    name=mechanism,
                    points=[
                        (row["lr"], None if row["diverged"] else row["score"])
                        for row in sorted(rows, key=lambda row: row["lr"])
                    ],
                    rings=() if chosen is None else (chosen,),
                    label=mechanism not in named,
                )
            )
            named.add(mechanism)
        metric = self.metric(task)
        return charts.lines(
            self._id("search", task),
            f"{task}: learning-rate search",
            f"{metric.name} of short runs at each learning rate of the grid.",
            series,
            Axis("learning rate →", charts.format_tick, log=True),
            metric.axis,
            missing="× diverged",
        )

    def chosen_rate(self, task: str, mechanism: str) -> float | None:
        rows = [row for row in self.quality if (row["task"], row["mechanism"]) == (task, mechanism)]
        return next((row["lr"] for row in rows if is_number(row.get("lr"))), None)

    def edges(self, task: str) -> list[tuple[str, float, str]]:
        """Mechanisms whose chosen rate is at an end of its grid: a better one may lie beyond."""
        found = []
        for mechanism in self.mechanisms:
            rates = {row["lr"] for row in self.search if (row["task"], row["mechanism"]) == (task, mechanism)}
            chosen = self.chosen_rate(task, mechanism)
            if len(rates) > 1 and chosen in (min(rates), max(rates)):
                found.append((mechanism, chosen, "lowest" if chosen == min(rates) else "highest"))
        return found

    def _id(self, chart: str, task: str) -> str:
        return f"{chart}-{self.tasks.index(task)}"
