"""Data for the template of a comparison's report, except charts: ranks, texts and tables, task by task."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from regard.catalogue import list_mechanisms
from regard.measurement import units
from regard.workbench.comparison.summary import with_rule
from regard.workbench.reports import mask_pictures
from regard.workbench.reports.markers import numbers
from regard.workbench.reports.pages import or_dash
from regard.workbench.reports.scales import Axis, is_number

Payload = Mapping[str, Any]
REFERENCE = "softmax"
"""The mechanism against which efficiency lengths are measured."""

SCHEMA = 2
"""Version of the JSON that a report contains and that ``regard compare --json`` prints (docs/schema/compare.json);
increased when a name in it changes its meaning."""

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
"""Cost axes of the charts of quality: name, column of the summary, axis. The first measured one is shown first."""

FIGURES = (
    ("Training, tokens/s", "tokens_per_second", units.count),
    ("Inference", "inference_ms", units.milliseconds),
    ("Decoding, tokens/s", "decode_tokens_per_second", units.count),
    ("Memory, training", "training_memory_bytes", units.size),
    ("Memory, inference", "inference_memory_bytes", units.size),
    ("State", "state_bytes", units.size),
)
"""Costs in the table: heading, column of the summary, and formatter."""

MOST_NAMED = 14
"""Most mechanisms whose names fit in a chart; beyond that, only the most important ones are named."""


@dataclass(frozen=True)
class Measured:
    """The data of a report.

    Attributes:
        run, quality, cost, search: payloads of the rows of these kinds.
        summary: for each task, one entry per mechanism.
        machine: :func:`regard.measurement.provenance.fingerprint` of the machine that measured.
        revision: revision of the code that measured; None if it was not recorded.
    """

    run: Payload
    quality: Sequence[Payload]
    cost: Sequence[Payload]
    search: Sequence[Payload]
    summary: Mapping[str, Sequence[Payload]]
    machine: Payload
    revision: str | None = None


@dataclass(frozen=True)
class Metric:
    """The quality metric of a task."""

    name: str
    higher_is_better: bool

    @property
    def axis(self) -> Axis:
        """The chart axis of the metric; better is always up."""
        name = f"↑ {self.name}" + ("" if self.higher_is_better else " (lower is better, so low is up)")
        return Axis(name, units.tick, rising=self.higher_is_better)


class View:
    """The values that the template needs, task by task."""

    def __init__(self, measured: Measured) -> None:
        run, summary = measured.run, measured.summary
        quality, cost, search = measured.quality, measured.cost, measured.search
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
        """What is compared: ``mechanism`` (in a shared frame) or ``model`` (whole models)."""
        return "model" if self.run.get("whole_models") else "mechanism"

    @property
    def columns(self) -> list[tuple[str, str, Any]]:
        """The `FIGURES` for which some mechanism has a value: image models neither decode nor keep a state."""
        entries = [entry for entries in self.summary.values() for entry in entries]
        return [
            (heading, column, or_dash(written))
            for heading, column, written in FIGURES
            if any(is_number(entry.get(column)) for entry in entries)
        ]

    def counted(self) -> str:
        """The costs that depend on the length, in words."""
        words = {
            "inference_ms": "inference",
            "decode_tokens_per_second": "decoding",
            "inference_memory_bytes": "its memory",
            "state_bytes": "the state",
        }
        *first, last = [words[column] for _, column, _ in self.columns if column in words] or ["costs"]
        return f"{', '.join(first)} and {last}" if first else last

    def number(self, mechanism: str) -> int:
        """The number that determines a mechanism's colour and shape."""
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
        """The name and score of a task's simple rule."""
        found = (self.run.get("baselines") or {}).get(task)
        return found if found is not None and is_number(found["score"]) else None

    def ranked_with_rule(self, task: str) -> list[Mapping[str, Any]]:
        """The result of :meth:`ranked`, with the rule, which has no mechanism, inserted in order."""
        return with_rule(self.ranked(task), self.rule(task))

    def figures(self, task: str) -> dict[str, Any] | None:
        """Figures that a task reports in addition to scores: names, and entries that have them; None without any."""
        entries = [e for e in self.ranked(task) if e.get("figures")]
        names = list(dict.fromkeys(name for e in entries for name in e["figures"]))
        return {"names": names, "entries": entries} if names else None

    def standing(self, task: str, entry: Payload) -> str:
        """The standing of a mechanism relative to the best one on the task."""
        if not is_number(entry["mean"]):
            return "no score"
        if entry is self.ranked(task)[0]:
            return "best"
        separable = entry.get("separable_from_best")
        if separable is None:
            return "unknown"
        return "behind" if separable else "tied"

    def parts(self) -> list[dict[str, Any]]:
        """The parts of layers other than the mechanism: one entry, with names and parts, per group with equal parts."""
        groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for by_name in (self.run.get("parts") or {}).values():
            for name, parts in by_name.items():
                if not parts:
                    continue  # a model with layers of its own
                members = groups.setdefault(tuple(parts.items()), [])
                members += [name] if name not in members else []
        return [{"names": names, "parts": dict(parts)} for parts, names in groups.items()]

    def differences(self) -> str:
        """What differs between the models of a comparison, apart from what was tuned for each."""
        if self.kind == "model":
            return "the model, with layers of its own"
        groups = self.parts()
        names = dict.fromkeys(part for group in groups for part in group["parts"])
        differing = [part for part in names if len({group["parts"].get(part, "none") for group in groups}) > 1]
        if not groups:
            return "the mechanism and whatever its layer has of its own"
        if not differing:
            return "the mechanism alone"
        return f"the mechanism and, of the parts around it, {', '.join(differing)}, as the table of parts shows"

    def beside(self) -> list[dict[str, Any]]:
        """Scores in further frames next to those in the first, for each task and mechanism trained in them."""
        return [
            {"task": task, **entry} for task, entries in (self.run.get("beside") or {}).items() for entry in entries
        ]

    def kept(self, task: str, what: str) -> list[dict[str, Any]]:
        """A field of the rows, such as ``sample``, from each mechanism's best run that has it; best mechanism first."""
        return [{"mechanism": name, **row[what]} for name, row in self._with(task, what)]

    def masks(self, task: str) -> dict[str, Any] | None:
        """Images, masks and predictions for a segmentation task; see :mod:`regard.workbench.reports.mask_pictures`."""
        return mask_pictures.table((self.run.get("masks") or {}).get(task), self._with(task, "masks"))

    def _with(self, task: str, key: str) -> list[tuple[str, Payload]]:
        """For each mechanism, best first, the first row at its best rate that has a value for `key`."""
        found = []
        for entry in self.ranked(task):
            name, rate = entry["mechanism"], self.chosen_rate(task, entry["mechanism"])
            own = [r for r in self.quality if (r["task"], r["mechanism"], r["lr"]) == (task, name, rate)]
            found += [(name, row) for row in own if row.get(key)][:1]
        return found

    def lengths(self) -> str:
        """The lengths at which costs are compared, in words."""
        at = self.run.get("at_length") or {}
        if len(set(at.values())) == 1:
            return f"{next(iter(at.values())):,} tokens"
        return ", ".join(f"{length:,} tokens for {task}" for task, length in at.items())

    def score(self, entry: Payload) -> Markup:
        """The mean with its standard error, as HTML."""
        if not is_number(entry["mean"]):
            return Markup("—")
        if not is_number(entry.get("standard_error")):
            return Markup(units.number(entry["mean"]))
        mean, error = units.with_error(entry["mean"], entry["standard_error"])
        return Markup("{} <small>± {}</small>").format(mean, error)

    def sentence(self, text: str) -> str:
        """Capitalise the first letter of a text, unless it starts with the name of a mechanism."""
        return text if text.startswith(tuple(self.mechanisms)) else text[:1].upper() + text[1:]

    def tied(self, task: str) -> list[str]:
        """Mechanisms that cannot be told apart from the best one on a task, whose rank they share."""
        return [e["mechanism"] for e in self.ranked(task) if self.standing(task, e) == "tied"]

    def told_apart(self, task: str) -> list[str]:
        """Sentences on what the scores for a task can and cannot tell."""
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
        if is_number(smallest) and smallest > 0:
            said.append(f"Differences below {smallest:.2g} in {self.metric(task).name} are beyond this budget.")
        lost = [row["mechanism"] for row in self.quality if row["task"] == task and not is_number(row["score"])]
        if lost:
            said.append(f"Without a score in some seed: {', '.join(dict.fromkeys(lost))}.")
        return said

    def table(self) -> str:
        """The figures as CSV, one line per task and mechanism."""
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
        """The data of the report as JSON, without the scores and pictures of single items."""
        large = ("items", "predicted", "completed")
        quality = [{key: value for key, value in row.items() if key not in large} for row in self.quality]
        rows = {"quality": quality, "cost": self.cost, "search": self.search, "summary": self.summary}
        text = json.dumps({"schema": SCHEMA, "run": self.run, **rows}, default=str)
        return json.dumps(json.loads(text, parse_constant=lambda _: None))  # JSON has no NaN

    @property
    def costed(self) -> list[str]:
        """Tasks whose models were measured; all tasks if none was."""
        measured = {row["task"] for row in self.cost}
        return [task for task in self.tasks if task in measured] or self.tasks

    def chosen_rate(self, task: str, mechanism: str) -> float | None:
        rows = [row for row in self.quality if (row["task"], row["mechanism"]) == (task, mechanism)]
        return next((row["lr"] for row in rows if is_number(row.get("lr"))), None)

    def edges(self, task: str) -> list[str]:
        """Mechanisms whose chosen rate is the lowest or highest tried, so that a better one may be beyond it."""
        found = []
        for mechanism in self.mechanisms:
            rates = {row["lr"] for row in self.search if (row["task"], row["mechanism"]) == (task, mechanism)}
            chosen = self.chosen_rate(task, mechanism)
            if chosen is not None and len(rates) > 1 and chosen in (min(rates), max(rates)):
                end = "lowest" if chosen == min(rates) else "highest"
                found.append(f"{mechanism} ({units.tick(chosen)}, the {end})")
        return found
