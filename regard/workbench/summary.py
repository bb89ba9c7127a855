"""From rows of the store to what a comparison says: one entry for each task and mechanism."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from regard.measurement.statistics import Comparison, Scores, items_array, pareto_front
from regard.tasks import Baseline
from regard.training.loop import History, Point
from regard.workbench.charts import is_number
from regard.workbench.settings import CompareSettings

CURVE_POINTS = 100


def by_tokens(history: History) -> list[tuple[int, Point]]:
    each = history.tokens / max(1, len(history.curve))
    return [(round(each * (i + 1)), point) for i, point in enumerate(history.curve)]


def thin(points: list[list[float]]) -> list[list[float]]:
    """At most CURVE_POINTS points, each the mean of a stretch of steps."""
    size = max(1, math.ceil(len(points) / CURVE_POINTS))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [[part[-1][0], sum(loss for _, loss in part) / len(part)] for part in parts]


def comparison_of(rows: Sequence[Mapping[str, Any]]) -> Comparison:
    items: dict[str, dict[int, Any]] = {}
    for row in rows:
        if row["score"] is not None:
            items.setdefault(row["mechanism"], {})[row["seed"]] = items_array(row["items"])
    return Comparison({name: Scores(by_seed) for name, by_seed in items.items()})


def _at(rows: Sequence[Sequence[float]] | None, length: int) -> float | None:
    return next((row[1] for row in rows or () if row[0] == length), None)


def summarise(
    rows: Sequence[Mapping[str, Any]],
    comparison: Comparison,
    costs: Mapping[str, Mapping[str, Any]],
    settings: CompareSettings,
    baseline: Baseline | None = None,
) -> list[dict[str, Any]]:
    """One entry a mechanism, best first."""
    higher = rows[0]["higher_is_better"]
    entries = []
    for name in settings.mechanisms:
        own = [row for row in rows if row["mechanism"] == name]
        scores = comparison.scores.get(name)
        complete = scores is not None and len(scores.items) == len(own)
        speeds = sorted(row["tokens_per_second"] for row in own if row["tokens_per_second"] is not None)
        peaks = [row["peak_memory_bytes"] for row in own if row["peak_memory_bytes"] is not None]
        solved = [row["solved"] for row in own if row["solved"] is not None]
        entries.append(
            {
                "mechanism": name,
                "mean": scores.mean if scores is not None and complete else None,
                "standard_error": scores.standard_error if scores is not None and complete else None,
                "seeds": len(own),
                "parameters": own[0]["parameters"],
                "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
                "inference_ms": _at(costs[name].get("latency"), settings.at_length),
                "decode_tokens_per_second": _at(costs[name].get("decode"), settings.at_length),
                "peak_memory_bytes": max(peaks) if peaks else None,
                "state_bytes": _at(costs[name].get("state_bytes"), settings.at_length),
                "solved": all(solved) if solved else None,
                "on_front": False,
                "separable_from_best": None,
                "beside_baseline": None,
                "over_baseline": None,
            }
        )
    scored = [e for e in entries if e["mean"] is not None and math.isfinite(e["mean"])]
    sign = 1 if higher else -1
    points = {e["mechanism"]: (-e["inference_ms"], sign * e["mean"]) for e in scored if e["inference_ms"] is not None}
    front = pareto_front(points)
    best = max(scored, key=lambda e: sign * e["mean"])["mechanism"] if scored else None
    for entry in entries:
        entry["on_front"] = entry["mechanism"] in front
        if best is not None and entry in scored and comparison.degrees > 0:
            difference = comparison.difference(best, entry["mechanism"])
            entry["separable_from_best"] = entry["mechanism"] != best and difference.separable
        if baseline is not None and entry in scored:
            difference = comparison.against(entry["mechanism"], baseline.items)
            entry["over_baseline"] = over = sign * difference.mean
            entry["beside_baseline"] = "level" if not difference.separable else "ahead" if over > 0 else "behind"
    return sorted(entries, key=lambda e: -sign * e["mean"] if e["mean"] is not None else math.inf)


def with_rule(entries: Sequence[Mapping[str, Any]], rule: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Entries of a task, best first, with its rule in its place: ``{"rule": name, "mean": score}``, after its equals."""
    if rule is None:
        return list(entries)
    sign = 1 if rule["higher_is_better"] else -1
    ahead = [e for e in entries if is_number(e.get("mean")) and sign * e["mean"] >= sign * rule["score"]]
    return [*ahead, {"rule": rule["name"], "mean": rule["score"]}, *entries[len(ahead) :]]


def beside_baseline(task: str, entries: Sequence[Mapping[str, Any]], baseline: Baseline, winner: str | None) -> str:
    """Which mechanisms are better than the rule of a task and which are not, the recommended one above all."""
    said = f"On {task} a rule without training, {baseline.name}, scores {baseline.score:.4g}."
    for standing, words in (("ahead", "Better"), ("level", "Not told apart from it"), ("behind", "Worse")):
        names = [entry["mechanism"] for entry in entries if entry["beside_baseline"] == standing]
        if names or standing == "ahead":
            said += f" {words}: {', '.join(names) or 'none'}."
        if winner in names and standing != "ahead":
            said += f" So {winner} is not shown to beat it: a larger --budget may help."
    return said


def skipped_steps(task: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """How many steps of the runs of a task were skipped, since their gradients overflowed; empty for none."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["mechanism"]] = counts.get(row["mechanism"], 0) + row.get("skipped", 0)
    told = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
    return f"Steps on {task} that were skipped, since gradients overflowed in float16: {told}." if told else ""


def rates_on_edge(searches: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> list[str]:
    """Mechanisms (and tasks) whose best rate is the first or last of the grid."""
    found = []
    for task, name in dict.fromkeys((t["task"], t["mechanism"]) for t in searches):
        own = [t for t in searches if (t["task"], t["mechanism"]) == (task, name) and t["loss"] is not None]
        if own and min(own, key=lambda t: t["loss"])["lr"] in (min(rates), max(rates)):
            found.append(f"{name} on {task}")
    return found
