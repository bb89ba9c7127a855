"""Which mechanism to take, in two sentences, without ranking noise.

First quality decides: where a task can be solved, only mechanisms that solve it stay; where some surely beat the simple
rule of a task, only those with a better score than it; then those remain that cannot be told apart from the best score of the other tasks. Only among what
remains does cost decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from regard.measurement.statistics import Comparison, seeds_needed
from regard.workbench.budget import Budget

PREFERENCES = {
    "inference": ("inference_ms", False, "{:.3g} ms of inference"),
    "training": ("tokens_per_second", True, "{:,.0f} training tokens per second"),
    "decode": ("decode_tokens_per_second", True, "{:,.0f} decoded tokens per second"),
    "memory": ("peak_memory_bytes", False, "{:,.0f} bytes of peak training memory"),
    "state": ("state_bytes", False, "{:,.0f} bytes of state a sequence"),
}
"""What may decide among mechanisms of equal quality: column of the summary, whether higher is better, wording."""


@dataclass
class Recommendation:
    """`winner` is None when no mechanism has a score. `notes` say what could not be separated, and what would."""

    text: str
    reason: str
    winner: str | None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def recommend(
    summary: Mapping[str, Sequence[Mapping[str, Any]]],
    comparisons: Mapping[str, Comparison],
    metrics: Mapping[str, tuple[str, bool]],
    *,
    prefer: str = "inference",
    budget: str = "",
    at_length: int | None = None,
) -> Recommendation:
    """The recommendation for a comparison.

    Args:
        summary: of each task, one entry a mechanism.
        comparisons: the paired scores of each task.
        metrics: name of each task's metric and whether higher is better.
        prefer: one of `PREFERENCES`.
        budget: as the user gave it, to say what larger one would separate.
        at_length: length at which inference, decoding and state were measured.
    """
    remaining = _scored_everywhere(summary)
    if not remaining:
        return Recommendation("No mechanism can be recommended.", "None has a score on every task.", None)
    kept, notes, steps = remaining, [], []
    beating: list[str] = []
    for task, entries in summary.items():
        if all(e.get("solved") is None for e in entries):
            continue
        solving = [m for m in kept if _entry(summary, task, m)["solved"]]
        if solving:
            if len(solving) < len(kept):
                lost = [m for m in kept if m not in solving]
                steps.append(f"{task} is not solved by {_list(lost)}")
            kept = solving
        elif any(e.get("solved") for e in entries):
            notes.append(f"No remaining mechanism solves {task}.")
        else:
            notes.append(f"No mechanism solved {task} at this budget; a larger --budget may.")
    for task in summary:
        entries = [_entry(summary, task, m) for m in kept]
        better = [e["mechanism"] for e in entries if (e.get("over_baseline") or 0) > 0]
        if any(e.get("beside_baseline") == "ahead" for e in entries) and len(better) < len(kept):
            lost = [m for m in kept if m not in better]
            steps.append(f"on {task} no better than a rule without training: {_list(lost)}")
            kept = beating = better
    for task in summary:
        entries = [_entry(summary, task, m) for m in kept]
        if any(e.get("solved") for e in entries):
            continue
        name, higher = metrics[task]
        best = max(entries, key=lambda e: e["mean"] if higher else -e["mean"])["mechanism"]
        comparison = comparisons[task]
        tied: list[str] = []
        behind: list[str] = []
        for mechanism in kept:
            if mechanism != best:
                difference = comparison.difference(best, mechanism)
                (behind if difference.separable else tied).append(mechanism)
        if behind:
            score = _entry(summary, task, best)["mean"]
            steps.append(f"on {task} {best} reaches {score:.4g} {name}, ahead of {_list(behind)}")
        if tied:
            notes.append(_inseparable(task, best, tied, comparison, budget))
        kept = [m for m in kept if m not in behind]
    column, more, wording = PREFERENCES[prefer]
    winner = _cheapest(summary, kept, column, more)
    measured = _value(summary, winner, column)
    solved = [task for task in summary if _entry(summary, task, winner).get("solved")]
    text = f"Take {winner}"
    if len(kept) > 1 and math.isfinite(measured):
        text += (
            f": of {_list(kept)}, which this comparison cannot tell apart in quality, it is the cheapest in {prefer}."
        )
    elif kept == beating:
        text += ": it alone beats a rule without training."
    elif len(remaining) == 1:
        text += ": it is the only mechanism with a score on every task."
    else:
        text += ": no other mechanism matches its quality here."
    judged = all(comparison.degrees > 0 for comparison in comparisons.values())
    reason = "; ".join(steps) or (
        "every mechanism reached the same quality within the noise"
        if judged or len(remaining) == 1
        else "with a single seed no difference in quality counts, so cost alone decides"
    )
    reason = reason[0].upper() + reason[1:]
    own = [f"solves {_list(solved)}"] if solved else []
    if math.isfinite(measured):
        where = f" at {at_length} tokens" if at_length and prefer in ("inference", "decode", "state") else ""
        own.append(f"{'reaches' if more else 'needs'} {wording.format(measured)}{where}")
    if own:
        reason += f"; {winner} {' and '.join(own)}"
    return Recommendation(text, reason + ".", winner, notes)


def _entry(summary: Mapping[str, Sequence[Mapping[str, Any]]], task: str, mechanism: str) -> Mapping[str, Any]:
    return next(e for e in summary[task] if e["mechanism"] == mechanism)


def _scored_everywhere(summary: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    names = [e["mechanism"] for e in next(iter(summary.values()), ())]
    return [
        name
        for name in names
        if all(
            any(e["mechanism"] == name and e["mean"] is not None and math.isfinite(e["mean"]) for e in entries)
            for entries in summary.values()
        )
    ]


def _value(summary: Mapping[str, Sequence[Mapping[str, Any]]], mechanism: str, column: str) -> float:
    values = [e.get(column) for entries in summary.values() for e in entries if e["mechanism"] == mechanism]
    known = [float(v) for v in values if v is not None]
    return math.exp(sum(map(math.log, known)) / len(known)) if known and min(known) > 0 else math.nan


def _cheapest(summary: Mapping[str, Sequence[Mapping[str, Any]]], names: list[str], column: str, more: bool) -> str:
    def rank(name: str) -> float:
        value = _value(summary, name, column)
        return math.inf if not math.isfinite(value) else -value if more else value

    return min(names, key=rank)


def _inseparable(task: str, best: str, tied: list[str], comparison: Comparison, budget: str) -> str:
    """What the scores of a task leave open, and what would separate the most distant of those tied."""
    said = f"Cannot separate {best} and {_list(tied)} on {task} at this budget"
    far = max(tied, key=lambda other: abs(comparison.difference(best, other).mean))
    difference = comparison.difference(best, far)
    if not math.isfinite(difference.resolved):
        return said + ": with a single seed nothing can be separated; use --seeds 2 or more."
    size = f"difference {'up to ' if len(tied) > 1 else ''}{abs(difference.mean):.2g}"
    said += f" ({size}, smallest resolved {difference.resolved:.2g})"
    seeds = len(comparison.seeds)
    needed = seeds_needed(seeds, difference.resolved, difference.mean)
    if needed is None:
        return said + "; the difference is too small to matter or to measure."
    wanted = max(needed, seeds + 1)
    return (
        said + f"; --seeds {wanted}{_longer(budget, wanted / seeds)} would" + (f" for {far}." if len(tied) > 1 else ".")
    )


def _longer(budget: str, factor: float) -> str:
    if not budget:
        return ""
    parsed = Budget.parse(budget)
    return f" --budget {Budget(parsed.unit, parsed.amount * factor)}" if parsed.unit == "seconds" else ""


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
