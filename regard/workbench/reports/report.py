"""The report of a comparison: one HTML file that needs nothing else, drawn from rows of the store.

This module arranges and draws; means, standard errors and the Pareto front come in ready made.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

import regard
from regard.catalogue import list_mechanisms
from regard.contract import Unsupported
from regard.measurement import units
from regard.measurement.statistics import pareto_front
from regard.workbench.comparison.summary import with_rule
from regard.workbench.reports import charts, mask_pictures
from regard.workbench.reports.charts import ScatterPoint, Series
from regard.workbench.reports.markers import COLOURS, glyph, numbers
from regard.workbench.reports.scales import Axis, Formatter, is_number

Payload = Mapping[str, Any]
REFERENCE = "softmax"
"""The mechanism that efficiency lengths are counted against."""

SCHEMA = 2
"""Version of the JSON that a report holds and that ``regard compare --json`` prints (docs/schema/compare.json); it rises
when a name in it changes its meaning."""

COSTS = (
    (
        "inference",
        "inference_ms",
        Axis("time of inference, faster →", units.milliseconds, log=True, rising=False),
    ),
    ("training", "tokens_per_second", Axis("tokens trained per second, faster →", units.count, log=True)),
    (
        "decoding",
        "decode_tokens_per_second",
        Axis("tokens decoded per second, faster →", units.count, log=True),
    ),
    (
        "memory of inference",
        "inference_memory_bytes",
        Axis("peak memory of inference, less →", units.size, log=True, base=2, rising=False),
    ),
    (
        "memory of training",
        "training_memory_bytes",
        Axis("peak memory of training, less →", units.size, log=True, base=2, rising=False),
    ),
    ("state", "state_bytes", Axis("state of a sequence, less →", units.size, log=True, base=2, rising=False)),
)
"""Axes beside quality in charts: name, column of the summary, axis. The first that was measured is shown first."""

FIGURES = (
    ("Training, tokens/s", "tokens_per_second", units.count),
    ("Inference", "inference_ms", units.milliseconds),
    ("Decoding, tokens/s", "decode_tokens_per_second", units.count),
    ("Memory, training", "training_memory_bytes", units.size),
    ("Memory, inference", "inference_memory_bytes", units.size),
    ("State", "state_bytes", units.size),
)
"""Costs in the table: heading, column of the summary, and how it is written."""

MOST_NAMED = 14
"""Mechanisms whose names have room in a chart; of more, only what matters most is named."""


@dataclass(frozen=True)
class Metric:
    """How the quality of a task is measured."""

    name: str
    higher_is_better: bool

    @property
    def axis(self) -> Axis:
        """The axis of charts; better is always up."""
        name = f"↑ {self.name}" + ("" if self.higher_is_better else " (lower is better, so low is up)")
        return Axis(name, units.tick, rising=self.higher_is_better)


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
        machine: :func:`regard.measurement.provenance.fingerprint` of where it was measured.
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
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(page, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise Unsupported(
            f"{path} as a report: it cannot be written ({error.strerror})",
            supported="a file in a folder that can be written",
            nearest="--output ./report.html",
        ) from error
    return path


def pages(*folders: Path) -> Environment:
    """Templates of pages: those of reports, with their style, and those in other folders."""
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent / "templates"]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "score": _or_dash("{:.4g}".format),
        "count": _or_dash(units.count),
        "bytes": _or_dash(units.size),
        "milliseconds": _or_dash(units.milliseconds),
        "duration": _or_dash(units.duration),
        "tick": _or_dash(units.tick),
        "sortable": lambda value: value if is_number(value) else "",
    }
    environment.globals |= {"colours": range(COLOURS), "version": regard.__version__}
    return environment


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
    environment = pages()
    return environment.get_template("report.html.j2").render(
        view=view,
        run=run,
        recommendation={"text": "", "reason": "", "winner": None, "notes": [], **(run.get("recommendation") or {})},
        quality=quality,
        machine=machine,
        revision=revision,
        glyph=glyph,
        reference=REFERENCE,
    )


def _or_dash(form: Formatter) -> Any:
    return lambda value: form(value) if is_number(value) else "—"


class _View:
    """The values that the template asks for, task by task."""

    def __init__(
        self,
        run: Payload,
        quality: Sequence[Payload],
        cost: Sequence[Payload],
        search: Sequence[Payload],
        summary: Mapping[str, Sequence[Payload]],
    ) -> None:
        first = run.get("frame")
        self.run, self.cost, self.summary = run, cost, summary
        self.quality = [row for row in quality if row.get("frame") == first]
        self.search = [row for row in search if row.get("frame") == first]
        rows = [*quality, *cost, *search, *(entry for entries in summary.values() for entry in entries)]
        self.mechanisms = list(dict.fromkeys([*run.get("mechanisms", ()), *(row["mechanism"] for row in rows)]))
        self.tasks = list(
            dict.fromkeys([*run.get("tasks", ()), *summary, *(row["task"] for row in [*quality, *cost, *search])])
        )
        recommendation = run.get("recommendation") or {}
        self.winner = recommendation.get("winner")
        self.named = set(self.mechanisms)
        if len(self.mechanisms) > MOST_NAMED:
            self.named = {e["mechanism"] for task in self.tasks for e in summary.get(task, ()) if e.get("on_front")}
            self.named |= {REFERENCE, self.winner}
        self.numbers = numbers(self.mechanisms, list_mechanisms())
        self.any_tie = any(self.tied(task) for task in self.tasks)

    @property
    def kind(self) -> str:
        """What is compared: mechanisms in one frame, or models as they are."""
        return "model" if self.run.get("whole_models") else "mechanism"

    @property
    def columns(self) -> list[tuple[str, str, Any]]:
        """Of `FIGURES` those that some entry has: models of images neither decode nor keep a state."""
        entries = [entry for entries in self.summary.values() for entry in entries]
        return [
            (heading, column, _or_dash(written))
            for heading, column, written in FIGURES
            if any(is_number(entry.get(column)) for entry in entries)
        ]

    def counted(self) -> str:
        """The costs that count at a length, in words."""
        words = {
            "inference_ms": "inference",
            "decode_tokens_per_second": "decoding",
            "inference_memory_bytes": "its memory",
            "state_bytes": "the state",
        }
        *first, last = [words[column] for _, column, _ in self.columns if column in words] or ["costs"]
        return f"{', '.join(first)} and {last}" if first else last

    def number(self, mechanism: str) -> int:
        """Decides the colour and the shape of a mechanism."""
        return self.numbers[mechanism]

    def metric(self, task: str) -> Metric:
        row = next((row for row in self.quality if row["task"] == task), None)
        return Metric("quality", True) if row is None else Metric(row["metric"], row["higher_is_better"])

    def ranked(self, task: str) -> list[Payload]:
        """The summary of a task, best first, mechanisms without a score last."""
        sign = -1 if self.metric(task).higher_is_better else 1
        entries = self.summary.get(task, ())
        return sorted(entries, key=lambda e: (0, sign * e["mean"]) if is_number(e["mean"]) else (1, 0.0))

    def rule(self, task: str) -> Payload | None:
        """Name and score of the simple rule of a task."""
        found = (self.run.get("baselines") or {}).get(task)
        return found if found is not None and is_number(found["score"]) else None

    def ranked_with_rule(self, task: str) -> list[Mapping[str, Any]]:
        """As :meth:`ranked`, with the rule, which has no mechanism, in its place."""
        return with_rule(self.ranked(task), self.rule(task))

    def figures(self, task: str) -> dict[str, Any] | None:
        """What a task tells beside the score: the figures' names, and the entries that have some; None for nothing."""
        entries = [e for e in self.ranked(task) if e.get("figures")]
        names = list(dict.fromkeys(name for e in entries for name in e["figures"]))
        return {"names": names, "entries": entries} if names else None

    def standing(self, task: str, entry: Payload) -> str:
        """How a mechanism compares with the best one of the task."""
        if not is_number(entry["mean"]):
            return "no score"
        if entry is self.ranked(task)[0]:
            return "best"
        separable = entry.get("separable_from_best")
        if separable is None:
            return "unknown"
        return "behind" if separable else "tied"

    def parts(self) -> list[dict[str, Any]]:
        """The parts of layers beside their mechanisms, one entry for all that have the same: names and parts."""
        groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for by_name in (self.run.get("parts") or {}).values():
            for name, parts in by_name.items():
                if not parts:
                    continue  # a model with layers of its own
                members = groups.setdefault(tuple(parts.items()), [])
                members += [name] if name not in members else []
        return [{"names": names, "parts": dict(parts)} for parts, names in groups.items()]

    def differences(self) -> str:
        """The differences between the models of a comparison, beside what was chosen for them."""
        if self.kind == "model":
            return "the model, with layers of its own"
        groups = self.parts()
        names = dict.fromkeys(part for group in groups for part in group["parts"])
        differing = [part for part in names if len({group["parts"].get(part, "none") for group in groups}) > 1]
        if not groups:
            return "the mechanism and whatever its layer has of its own"
        if not differing:
            return "the mechanism alone"
        return f"the mechanism, and of the parts around it {', '.join(differing)}, as the table of parts shows"

    def beside(self) -> list[dict[str, Any]]:
        """Scores in further frames beside those in the first, for each task and mechanism that was trained in them."""
        return [
            {"task": task, **entry} for task, entries in (self.run.get("beside") or {}).items() for entry in entries
        ]

    def kept(self, task: str, what: str) -> list[dict[str, Any]]:
        """An entry of the rows, such as ``sample``, of each mechanism's best run that has it, best mechanism first."""
        return [{"mechanism": name, **row[what]} for name, row in self._with(task, what)]

    def masks(self, task: str) -> dict[str, Any] | None:
        """Images, masks and predictions of a task that segments, see :func:`regard.workbench.reports.mask_pictures.table`."""
        return mask_pictures.table((self.run.get("masks") or {}).get(task), self._with(task, "masks"))

    def _with(self, task: str, key: str) -> list[tuple[str, Payload]]:
        """The first row at its best rate that has something to show, of each mechanism that has one, best first."""
        found = []
        for entry in self.ranked(task):
            name, rate = entry["mechanism"], self.chosen_rate(task, entry["mechanism"])
            own = [r for r in self.quality if (r["task"], r["mechanism"], r["lr"]) == (task, name, rate)]
            found += [(name, row) for row in own if row.get(key)][:1]
        return found

    def lengths(self) -> str:
        """The lengths at which costs count, in words."""
        at = self.run.get("at_length") or {}
        if len(set(at.values())) == 1:
            return f"{next(iter(at.values())):,} tokens"
        return ", ".join(f"{length:,} tokens for {task}" for task, length in at.items())

    def score(self, entry: Payload) -> Markup:
        """The mean with its standard error."""
        if not is_number(entry["mean"]):
            return Markup("—")
        if not is_number(entry.get("standard_error")):
            return Markup(units.number(entry["mean"]))
        mean, error = units.with_error(entry["mean"], entry["standard_error"])
        return Markup("{} <small>± {}</small>").format(mean, error)

    def tied(self, task: str) -> list[str]:
        """Mechanisms that cannot be told apart from the best one of a task, whose rank they share."""
        return [e["mechanism"] for e in self.ranked(task) if self.standing(task, e) == "tied"]

    def told_apart(self, task: str) -> list[str]:
        """Sentences on what the scores of a task can and cannot say."""
        ranked = [entry for entry in self.ranked(task) if is_number(entry["mean"])]
        if not ranked:
            return ["no mechanism has a score."]
        best, others, tied = ranked[0]["mechanism"], ranked[1:], self.tied(task)
        if tied:
            said = [f"the best score, of {best}, cannot be told apart from {', '.join(tied)}."]
        elif not others:
            said = ["one mechanism with a score, nothing to compare."]
        elif any(self.standing(task, entry) == "unknown" for entry in others):
            said = [f"{best} has the best score; too few seeds to say whether by chance."]
        else:
            said = [f"{best} is ahead of every other."]
        smallest = (self.run.get("resolution") or {}).get(task)
        if is_number(smallest):
            said.append(f"Differences below {smallest:.2g} in {self.metric(task).name} are beyond this budget.")
        lost = [row["mechanism"] for row in self.quality if row["task"] == task and not is_number(row["score"])]
        if lost:
            said.append(f"Without a score in some seed: {', '.join(dict.fromkeys(lost))}.")
        return said

    def pictures(self, task: str) -> list[dict[str, Any]]:
        """Quality against each cost that was measured: the name of the cost, the chart, and who is missing from it."""
        found = []
        for name, column, axis in COSTS:
            entries = [e for e in self.summary.get(task, ()) if is_number(e["mean"]) and axis.usable(e.get(column))]
            if not entries:
                continue
            drawn = {e["mechanism"] for e in entries}
            lost = [e["mechanism"] for e in self.summary[task] if e["mechanism"] not in drawn]
            note = f"Without a score or this cost: {', '.join(lost)}" if lost else ""
            found.append({"name": name, "chart": self._picture(task, entries, column, axis), "note": note})
        return found

    def _picture(self, task: str, entries: Sequence[Payload], column: str, axis: Axis) -> Markup:
        metric = self.metric(task)
        signs = (1 if axis.rising else -1, 1 if metric.higher_is_better else -1)
        front = pareto_front({e["mechanism"]: (signs[0] * e[column], signs[1] * e["mean"]) for e in entries})
        points = [
            ScatterPoint(
                number=self.number(entry["mechanism"]),
                name=entry["mechanism"],
                x=entry[column],
                y=entry["mean"],
                error=entry.get("standard_error") if is_number(entry.get("standard_error")) else None,
                seeds=self._seeds(task, entry["mechanism"]),
                front=entry["mechanism"] in front,
                winner=entry["mechanism"] == self.winner,
                detail=f"{entry['mechanism']}: {metric.name} {units.number(entry['mean'])}, "
                f"{axis.format(entry[column])}",
                label=entry["mechanism"] in self.named,
            )
            for entry in entries
        ]
        best = self.ranked(task)[0]
        return charts.scatter(
            self._id(f"picture-{column}", task),
            f"{task}: quality against {axis.label}",
            f"{len(points)} mechanisms; best {metric.name} {units.number(best['mean'])} by {best['mechanism']}. "
            "The figures are in the table below.",
            points,
            axis,
            metric.axis,
            rule=None if (rule := self.rule(task)) is None else (rule["name"], rule["score"]),
        )

    def table(self) -> str:
        """The figures as CSV, a line for each task and mechanism."""
        columns = (
            "mean",
            "standard_error",
            "rank",
            "solved",
            "seeds",
            "parameters",
            "at_length",
            *(c for _, c, _ in COSTS),
        )
        written = io.StringIO()
        lines = csv.writer(written, lineterminator="\n")
        lines.writerow(("task", "mechanism", "metric", "frame", *columns))
        for task in self.tasks:
            for e in self.ranked(task):
                seeds = e["seeds"] if isinstance(e["seeds"], int) else len(e["seeds"])
                values = [seeds if column == "seeds" else e.get(column) for column in columns]
                lines.writerow((task, e["mechanism"], self.metric(task).name, self.run.get("frame", ""), *values))
        return written.getvalue()

    def data(self) -> str:
        """All that the report is made of but the scores and pictures of single items, as JSON."""
        large = ("items", "predicted", "completed")
        quality = [{key: value for key, value in row.items() if key not in large} for row in self.quality]
        rows = {"quality": quality, "cost": self.cost, "search": self.search, "summary": self.summary}
        text = json.dumps({"schema": SCHEMA, "run": self.run, **rows}, default=str)
        return json.dumps(json.loads(text, parse_constant=lambda _: None))  # JSON has no NaN

    def _seeds(self, task: str, mechanism: str) -> list[float]:
        rows = [row for row in self.quality if (row["task"], row["mechanism"]) == (task, mechanism)]
        scores = [row["score"] for row in rows if is_number(row["score"])]
        return scores if len(scores) > 1 else []

    @property
    def costed(self) -> list[str]:
        """Tasks whose backbone was measured; all of them when none was."""
        measured = {row["task"] for row in self.cost}
        return [task for task in self.tasks if task in measured] or self.tasks

    def costs(self, task: str) -> list[dict[str, Any]]:
        """Charts of what grows with the length, each with the sentence below it."""
        latency = Axis("less is better ↓", units.milliseconds, log=True)
        memory = Axis("less is better ↓", units.size, log=True, base=2)
        decode = Axis("tokens per second, more is better ↑", units.count, log=True)
        wanted: list[tuple[str, str, Axis, str | None]] = [
            ("Time", "latency", latency, "efficiency_length_time"),
            ("Memory", "memory", memory, "efficiency_length_memory"),
            ("Decoding speed", "decode", decode, None),
            ("State kept to decode the next token", "state_bytes", memory, None),
        ]
        cross = any(row["task"] == task and str(row.get("pattern", "")).endswith("cross") for row in self.cost)
        what = "memory" if cross else "input"
        length = Axis(f"length of the {what}, tokens →", units.tokens, log=True, base=2)
        if len(self.costed) > 1:
            wanted = wanted[:3]  # one row of the page a task; the table has the state
        drawn = []
        for name, source, axis, crossing in wanted:
            series = [self._cost_series(row, source, crossing) for row in self.cost if row["task"] == task]
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
            number=self.number(row["mechanism"]),
            name=row["mechanism"],
            points=[(entry[0], entry[1]) for entry in measured],
            ranges={entry[0]: (entry[2], entry[3]) for entry in measured if len(entry) == 4},
            crossing=row.get(crossing) if crossing else None,
            label=row["mechanism"] in self.named,
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
        for row in self.cost:
            if row["task"] == task and row.get("backends"):
                by_backend.setdefault(" and ".join(row["backends"]), []).append(row["mechanism"])
        if not by_backend:
            return ""
        return "Engines ran on " + "; ".join(f"{name}: {', '.join(who)}" for name, who in by_backend.items())

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
        axis = Axis("training loss ↓", log=log, limit=max(starts) * 1.2 if log else None)
        named: set[str] = set()
        series = []
        for row in rows:
            series.append(
                Series(
                    number=self.number(row["mechanism"]),
                    name=row["mechanism"],
                    points=[(tokens, loss) for tokens, loss in row["curve"]],
                    label=row["mechanism"] in self.named - named,
                )
            )
            named.add(row["mechanism"])
        return charts.lines(
            self._id("curves", task),
            f"{task}: training curves",
            f"Training loss against tokens of {len(rows)} runs.",
            series,
            Axis("tokens seen in training →", units.count),
            axis,
            markers=False,
        )

    def searches(self, task: str) -> Markup | None:
        """Score against learning rate, the chosen one ringed."""
        cells: dict[tuple[str, Any], list[Payload]] = {}
        for row in self.search:
            if row["task"] == task:
                cells.setdefault((row["mechanism"], row["seed"]), []).append(row)
        rates = tuple(sorted({row["lr"] for rows in cells.values() for row in rows}))
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
                    label=mechanism in self.named - named,
                )
            )
            named.add(mechanism)
        metric = self.metric(task)
        return charts.lines(
            self._id("search", task),
            f"{task}: learning-rate search",
            f"{metric.name} at each learning rate that was tried, in full runs of the first seed.",
            series,
            Axis("learning rate →", units.tick, log=True, ticks=rates),
            metric.axis,
            missing="× diverged",
        )

    def chosen_rate(self, task: str, mechanism: str) -> float | None:
        rows = [row for row in self.quality if (row["task"], row["mechanism"]) == (task, mechanism)]
        return next((row["lr"] for row in rows if is_number(row.get("lr"))), None)

    def edges(self, task: str) -> list[str]:
        """Mechanisms whose chosen rate is at an end of its grid: a better one may lie beyond."""
        found = []
        for mechanism in self.mechanisms:
            rates = {row["lr"] for row in self.search if (row["task"], row["mechanism"]) == (task, mechanism)}
            chosen = self.chosen_rate(task, mechanism)
            if chosen is not None and len(rates) > 1 and chosen in (min(rates), max(rates)):
                end = "lowest" if chosen == min(rates) else "highest"
                found.append(f"{mechanism} ({units.tick(chosen)}, the {end})")
        return found

    def _id(self, chart: str, task: str) -> str:
        return f"{chart}-{self.tasks.index(task)}"
