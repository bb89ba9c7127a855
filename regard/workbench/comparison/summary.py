"""Summaries of a comparison from the rows of the store: one entry for each task and mechanism."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from regard.measurement.statistics import FEWEST_ITEMS, Comparison, Scores, items_array, pareto_front
from regard.tasks import Baseline
from regard.training.loop import History, Point
from regard.workbench.comparison.recommend import listed
from regard.workbench.reports.scales import is_number

CURVE_POINTS = 100


def by_tokens(history: History) -> list[tuple[int, Point]]:
    """The points of a training curve, each with the number of tokens seen so far; all steps count alike."""
    each = history.tokens / max(1, len(history.curve))
    return [(round(each * (i + 1)), point) for i, point in enumerate(history.curve)]


def thin(points: list[list[float]]) -> list[list[float]]:
    """Reduce to at most CURVE_POINTS points, each the mean over a stretch of steps."""
    size = max(1, math.ceil(len(points) / CURVE_POINTS))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [[part[-1][0], sum(loss for _, loss in part) / len(part)] for part in parts]


def comparison_of(rows: Sequence[Mapping[str, Any]]) -> Comparison:
    """Scores by mechanism and seed from the rows of one task; runs without a score are left out."""
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
    at_length: int,
    baseline: Baseline | None = None,
) -> list[dict[str, Any]]:
    """One entry per mechanism, best first.

    Args:
        rows: the rows of all seeds.
        comparison: the comparison of their scores.
        costs: costs by mechanism; empty for one whose costs were not measured.
        at_length: the length whose costs count.
        baseline: the task's simple rule.
    """
    higher = rows[0]["higher_is_better"]
    entries = []
    for name in costs:
        own = [row for row in rows if row["mechanism"] == name]
        scores = comparison.scores.get(name)
        complete = scores is not None and len(scores.items) == len(own)
        speeds = sorted(row["tokens_per_second"] for row in own if row["tokens_per_second"] is not None)
        peaks = [row["training_memory_bytes"] for row in own if row["training_memory_bytes"] is not None]
        solved = [row["solved"] for row in own if row["solved"] is not None]
        entries.append(
            {
                "mechanism": name,
                "mean": scores.mean if scores is not None and complete else None,
                "standard_error": scores.standard_error if scores is not None and complete else None,
                "seeds": len(own),
                "parameters": own[0]["parameters"],
                "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
                "at_length": at_length,
                "inference_ms": _at(costs[name].get("latency"), at_length),
                "decode_tokens_per_second": _at(costs[name].get("decode"), at_length),
                "training_memory_bytes": max(peaks) if peaks else None,
                "inference_memory_bytes": _at(costs[name].get("memory"), at_length),
                "state_bytes": _at(costs[name].get("state_bytes"), at_length),
                "solved": all(solved) if solved else None,
                "on_front": False,
                "rank": None,
                "separable_from_best": None,
                "beside_baseline": None,
                "over_baseline": None,
                "figures": _figures(own),
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
    entries.sort(key=lambda e: -sign * e["mean"] if e["mean"] is not None else math.inf)
    if comparison.degrees > 0:
        rank(entries, comparison)
    return entries


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Figures that the task reports in addition to the score, by name: means over the runs; None if a run lacks one."""
    found: dict[str, float | None] = {}
    for name in dict.fromkeys(name for row in rows for name in row.get("figures") or {}):
        values = [((row.get("figures") or {}).get(name) or [None])[0] for row in rows]
        known = [value for value in values if is_number(value)]
        found[name] = sum(known) / len(known) if len(known) == len(rows) else None
    return found


def rank(entries: list[dict[str, Any]], comparison: Comparison) -> None:
    """Rank the entries, best first: those that cannot be told apart from the first of a group share its rank."""
    first, place = None, 0
    for index, entry in enumerate(e for e in entries if e["mean"] is not None):
        if first is None or comparison.difference(first, entry["mechanism"]).separable:
            first, place = entry["mechanism"], index + 1
        entry["rank"] = place


def with_rule(entries: Sequence[Mapping[str, Any]], rule: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The entries of a task, best first, with its rule inserted in order: ``{"rule": name, "mean": score}``."""
    if rule is None:
        return list(entries)
    sign = 1 if rule["higher_is_better"] else -1
    ahead = [e for e in entries if is_number(e.get("mean")) and sign * e["mean"] >= sign * rule["score"]]
    return [*ahead, {"rule": rule["name"], "mean": rule["score"]}, *entries[len(ahead) :]]


def beside_baseline(task: str, entries: Sequence[Mapping[str, Any]], baseline: Baseline, winner: str | None) -> str:
    """Sentences on which mechanisms beat the rule of a task, and whether the recommended one does."""
    said = f"On {task} a rule without training, {baseline.name}, scores {baseline.score:.4g}."
    for standing, words in (("ahead", "Better"), ("level", "Not told apart from it"), ("behind", "Worse")):
        names = [entry["mechanism"] for entry in entries if entry["beside_baseline"] == standing]
        if names or standing == "ahead":
            said += f" {words}: {', '.join(names) or 'none'}."
        if winner in names and standing != "ahead":
            few = len(baseline.items) < FEWEST_ITEMS
            help_ = "that takes more held-out items" if few else "a larger --budget, or more held-out items, may help"
            said += f" So {winner} is not shown to beat it: {help_}."
    return said


def too_long(costs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences about lengths at which mechanisms ran out of memory."""
    names: dict[tuple[str, int], list[str]] = {}
    for cost in costs:
        for length in cost.get("too_long", ()):
            names.setdefault((cost["task"], length), []).append(cost["mechanism"])
    return [
        f"{task}: no costs of {listed(those)} at {length:,} tokens, which need more memory than was available."
        for (task, length), those in names.items()
    ]


def skipped_steps(task: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the training steps skipped because gradients overflowed; empty if there were none."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["mechanism"]] = counts.get(row["mechanism"], 0) + row.get("skipped", 0)
    told = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
    return f"Steps on {task} that were skipped, since gradients overflowed in float16: {told}." if told else ""


def rates_on_edge(trials: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mechanisms whose best rate on a task is the lowest or the highest that was tried, with that rate."""
    found = {}
    for name in dict.fromkeys(trial["mechanism"] for trial in trials):
        own = [trial for trial in trials if trial["mechanism"] == name]
        scored = [trial for trial in own if trial["loss"] is not None]
        if len(own) < 2 or not scored:
            continue
        best = min(scored, key=lambda trial: trial["loss"])["lr"]
        if best in (min(t["lr"] for t in own), max(t["lr"] for t in own)):
            found[name] = best
    return found


def beside_frames(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Scores of mechanisms in further frames, next to the first.

    Args:
        rows: rows of one task in the first frame.
        others: rows of some of the mechanisms in other frames.

    Returns:
        For each mechanism and further frame: score and standard error, ``first`` (the score in the first frame),
        whether the two can be told apart, whether each solves the task, and ``overtaken``: the mechanisms whose order
        with this one is sure in both frames, but reversed.
    """
    names = {row["mechanism"] for row in others}
    labelled = [{**row, "mechanism": (row["mechanism"], row["frame"])} for row in (*rows, *others)]
    comparison = comparison_of([row for row in labelled if row["mechanism"][0] in names])
    found = []
    for name, frame in dict.fromkeys((row["mechanism"], row["frame"]) for row in others):
        own = [row for row in others if (row["mechanism"], row["frame"]) == (name, frame)]
        first = [row for row in rows if row["mechanism"] == name]
        scores = {label: comparison.scores.get(label) for label in ((name, first[0]["frame"]), (name, frame))}  # type: ignore[call-overload]
        before, after = scores.values()
        if before is None or after is None:
            continue
        home = first[0]["frame"]
        difference = comparison.difference((name, home), (name, frame))  # type: ignore[arg-type]
        overtaken = []
        for other in dict.fromkeys(row["mechanism"] for row in others if row["frame"] == frame):
            if not all((other, where) in comparison.scores for where in (home, frame)):
                continue
            pairs = [comparison.difference((name, where), (other, where)) for where in (home, frame)]  # type: ignore[arg-type]
            if all(pair.separable for pair in pairs) and pairs[0].mean * pairs[1].mean < 0:
                overtaken.append(other)
        found.append(
            {
                "mechanism": name,
                "frame": frame,
                "mean": after.mean,
                "standard_error": after.standard_error,
                "first": before.mean,
                "separable": difference.separable,
                "overtaken": overtaken,
                "solved": all(row["solved"] for row in own) if own[0]["solved"] is not None else None,
                "first_solved": all(row["solved"] for row in first) if own[0]["solved"] is not None else None,
            }
        )
    return found


def frames_sentences(
    beside: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Mapping[str, tuple[str, bool]], first: str
) -> list[str]:
    """Sentences that separate the effects of frame and mechanism: one per further frame, and what follows from them."""
    said = []
    owed: dict[str, list[str]] = {}  # what is solved in the first frame, and the frames in which it is not
    for frame in dict.fromkeys(entry["frame"] for entries in beside.values() for entry in entries):
        told, turned = [], []
        for task, entries in beside.items():
            own = [entry for entry in entries if entry["frame"] == frame]
            changed = [e for e in own if e["separable"]]
            unsteady = [e for e in own if not e["separable"] and e["first_solved"] and not e["solved"]]
            same = [e["mechanism"] for e in own if e not in changed and e not in unsteady]
            words = [f"{e['mechanism']} {e['mean']:.3g} instead of {e['first']:.3g}" for e in changed]
            words += [
                f"{e['mechanism']} {e['mean']:.3g} instead of {e['first']:.3g}, not solved by every seed"
                for e in unsteady
            ]
            if same:
                words.append(f"{' and '.join(same)} the same within the noise")
            if words:
                told.append(f"on {task} ({metrics[task][0]}) {', '.join(words)}")
            for e in changed:
                if e["first_solved"] and not e["solved"]:
                    owed.setdefault(f"{e['mechanism']} solves {task}", []).append(frame)
            for i, one in enumerate(own):
                after = [e["mechanism"] for e in own[i + 1 :] if e["mechanism"] in one["overtaken"]]
                turned += [f"{one['mechanism']} and {name} change places on {task}" for name in after]
        if told:
            said.append(f"In the frame {frame} instead of {first}: {'; '.join(told)}.")
        if turned:
            said.append(f"The order depends on the frame: {'; '.join(turned)}.")
    if owed:
        solved = "; ".join(f"{what} (not in {' or '.join(frames)})" for what, frames in owed.items())
        said.append(f"Due to the parts of the frame {first}: {solved}.")
    return said
