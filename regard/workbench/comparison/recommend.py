"""Recommendation of one mechanism in two sentences, without ranking noise.

First quality decides. If some mechanisms solve a task, only those stay; if some surely beat the simple rule of a task,
only those stay; then only those stay that cannot be told apart from the best score on the other tasks. Among the
mechanisms that remain, cost decides, and only where costs differ by more than timings vary between runs. If neither
decides, the mechanism that depends least on the frame is taken, then the plainest, then the one with the best mean
score in the ranking that regard publishes, so that two runs that leave the order open agree, then the one with the best
mean in this run.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regard.measurement.budget import Budget
from regard.measurement.statistics import Comparison, seeds_needed

PREFERENCES = {
    "inference": ("inference_ms", False, "{:.3g} ms of inference"),
    "training": ("tokens_per_second", True, "{:,.0f} training tokens per second"),
    "decode": ("decode_tokens_per_second", True, "{:,.0f} decoded tokens per second"),
    "training-memory": ("training_memory_bytes", False, "{:,.0f} bytes of peak memory in training"),
    "inference-memory": ("inference_memory_bytes", False, "{:,.0f} bytes of peak memory in inference"),
    "state": ("state_bytes", False, "{:,.0f} bytes of state a sequence"),
}
"""Tie-breakers among mechanisms of equal quality: column of the summary, whether higher is better, and wording."""

ALIKE = 1.1
"""Costs within this factor of the lowest are equal: timings of the same work differ by some percent between runs."""

OF_TRAINING = ("training", "training-memory")
"""Preferences that are measured in the training runs, so at the task's own length."""


@dataclass
class Recommendation:
    """A recommendation, with its reasons.

    `winner` is None if no mechanism has a score. `notes` say what could not be separated, and what would separate it.
    `alike` are the mechanisms, including the winner, between which neither quality nor cost decides.
    """

    text: str
    reason: str
    winner: str | None
    notes: list[str] = field(default_factory=list)
    alike: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The recommendation as plain data."""
        return asdict(self)


def recommend(
    summary: Mapping[str, Sequence[Mapping[str, Any]]],
    comparisons: Mapping[str, Comparison],
    metrics: Mapping[str, tuple[str, bool]],
    *,
    prefer: str = "inference",
    budget: str = "",
    seeds: int = 1,
    at_length: Mapping[str, int] | None = None,
    frame: str = "",
    edges: Mapping[tuple[str, str], float] | None = None,
    beside: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    named: Sequence[str] = (),
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> Recommendation:
    """Make the recommendation for a comparison.

    A mechanism is eliminated only on sure evidence: it does not solve a task that others solve, it is not shown to beat
    a rule that others surely beat, or it is surely behind the best of those left. So among those that stay none is
    surely better, and the cheapest is taken. Ties in cost are broken in this order: the mechanism that, in the further
    frames that all of them were trained in, loses the fewest of the tasks that it solves in the first frame; softmax;
    the one with the best mean on most of the unsolved tasks, likely but not surely better, by the published ranking if
    it has them all and by this comparison otherwise; the first that was named.

    Args:
        summary: for each task, one entry per mechanism.
        comparisons: the paired scores for each task.
        metrics: for each task, its metric and whether higher is better.
        prefer: one of `PREFERENCES`.
        budget: the budget as the user gave it, to say what a larger one would separate.
        seeds: the number of seeds that the user asked for, though time may not have sufficed for more than one.
        at_length: for each task, the length at which inference, decoding and state were measured.
        frame: the frame in which the mechanisms were compared.
        edges: the best learning rate by task and mechanism, where it is at an end of the rates that were tried.
        beside: scores in further frames, as returned by :func:`regard.workbench.comparison.summary.beside_frames`.
        named: the mechanisms in the order in which they were given; the order of the summary when empty.
        published: mean scores by task and mechanism in the same frame, see :func:`published_means`.
    """
    scored = _scored_everywhere(summary)
    if not scored:
        return Recommendation("No mechanism can be recommended.", "None has a score on every task.", None)
    kept, steps, notes = _without_unsolved(summary, scored)
    kept, unproven = _without_unproven(summary, kept)
    steps += unproven
    kept, lost = _without_beaten(summary, comparisons, metrics, kept)
    steps += lost
    column, more, wording = PREFERENCES[prefer]
    alike = _cheapest(summary, [name for name in named or scored if name in kept], column, more)
    winner, why = _settled(summary, metrics, alike, beside or {}, published or {})
    measured = _value(summary, winner, column)
    notes += _ties(summary, comparisons, metrics, kept, budget, seeds)
    notes += _overtaken(summary, comparisons, metrics, [name for name in scored if name not in kept], winner)
    where = "" if prefer in OF_TRAINING else _at_lengths(at_length)
    costs = math.isfinite(measured)
    cost = prefer + where if costs else ""
    solved = _solved(summary, winner)
    rest = [task for task in summary if task not in solved]
    quality = _equal_quality(kept, solved, rest, comparisons)
    text = f"Take {winner}: " + _headline(scored, kept, alike, quality, cost, why, len(summary), proven=not unproven)
    standings = {task: _entry(summary, task, winner).get("beside_baseline") for task in rest}
    few = [task for task in rest if standings[task] == "level" and comparisons[task].few_items]
    if few:
        text += (
            f" On {listed(few)} so few items are held out that nothing can be shown to beat a rule without training."
        )
    for standing, words in (("level", "is not clearly beaten"), ("behind", "is better")):
        if tasks := [task for task in rest if standings[task] == standing and task not in few]:
            text += f" But on {listed(tasks)} a rule without training {words}: it may have learned nothing there."
    at_edge = {task: rate for (task, name), rate in (edges or {}).items() if name == winner}
    if at_edge:
        ends = " and ".join(f"{rate:g} on {task}" for task, rate in at_edge.items())
        text += f" Its best learning rate is at the end of those tried ({ends}), so it may do better than shown."
    others = sorted({f"{name} on {task}" for task, name in (edges or {}) if name != winner})
    if others:
        notes.append(
            f"The best learning rate is at the end of those tried for {listed(others)}: they may do better too."
        )
    own = [f"solves {listed(solved)}"] if solved else []
    if costs:
        own.append(f"{'reaches' if more else 'needs'} {wording.format(measured)}{where}")
    steps = steps or [_no_steps(scored, solved, rest, comparisons)]
    reason = "; ".join([*steps, f"{winner} {' and '.join(own)}"] if own else steps)
    if frame:
        reason += f". All were compared with the frame {frame}"
    return Recommendation(text, reason[0].upper() + reason[1:] + ".", winner, notes, alike)


def _headline(
    scored: Sequence[str],
    kept: Sequence[str],
    alike: Sequence[str],
    quality: str,
    cost: str,
    why: str,
    tasks: int,
    *,
    proven: bool,
) -> str:
    """Why the winner won, in half a sentence, for every case."""
    if len(scored) == 1:
        return "it is the only mechanism with a score on every task."
    if len(kept) == 1:
        behind = "clearly behind it" + ("" if proven else " or not shown to beat a rule without training")
        return f"each of the others is {behind}{' on some task' if tasks > 1 else ''}."
    if not cost:
        return f"{quality}, and no cost was measured to decide; {why}."
    if len(alike) == 1:
        return f"{quality}, and it is the cheapest in {cost}."
    whose = "their costs" if len(alike) == len(kept) else f"the costs of {listed(alike)}, the cheapest,"
    return f"{quality}, and {whose} in {cost} are about the same; {why}."


def _equal_quality(
    kept: Sequence[str], solved: Sequence[str], rest: Sequence[str], comparisons: Mapping[str, Comparison]
) -> str:
    """Why quality does not decide among the mechanisms left, which all solve the same tasks and none of the `rest`."""
    if not rest:
        return f"{listed(kept)} solve {listed(solved)}"
    where = f" on {listed(rest)}" if solved else ""
    if _single_seed(rest, comparisons):
        unsure = f"with a single seed no difference in quality{where} counts"
        return f"{listed(kept)} solve {listed(solved)}, {unsure}" if solved else unsure
    if solved:
        return f"{listed(kept)} solve {listed(solved)}, none is clearly behind the best{where}"
    return f"of {listed(kept)}, none is clearly behind the best"


def _no_steps(
    scored: Sequence[str], solved: Sequence[str], rest: Sequence[str], comparisons: Mapping[str, Comparison]
) -> str:
    """Why no mechanism was eliminated."""
    if len(scored) == 1:
        return "there was nothing to choose between"
    said = f"every mechanism solves {listed(solved)}, where scores no longer decide" if solved else ""
    if rest and _single_seed(rest, comparisons):
        unsure = "two seeds or more would tell differences from chance"
        return f"{said}; {unsure}" if said else unsure
    if rest:
        same = "the same quality within the noise"
        return f"{said}; on {listed(rest)} all reached {same}" if said else f"every mechanism reached {same}"
    return said


def _single_seed(tasks: Sequence[str], comparisons: Mapping[str, Comparison]) -> bool:
    return any(comparisons[task].degrees < 1 for task in tasks)


def _at_lengths(at_length: Mapping[str, int] | None) -> str:
    if not at_length:
        return ""
    if len(set(at_length.values())) == 1:
        return f" at {next(iter(at_length.values()))} tokens"
    return " at " + listed([f"{length} tokens ({task})" for task, length in at_length.items()]) + " on average"


def _solved(summary: Mapping[str, Sequence[Mapping[str, Any]]], mechanism: str) -> list[str]:
    return [task for task in summary if _entry(summary, task, mechanism).get("solved")]


def _without_unsolved(
    summary: Mapping[str, Sequence[Mapping[str, Any]]], kept: list[str]
) -> tuple[list[str], list[str], list[str]]:
    """Keep the mechanisms that solve what others solve; return them, why others were eliminated, and notes."""
    steps, notes = [], []
    for task, entries in summary.items():
        if all(e.get("solved") is None for e in entries):
            continue
        solving = [m for m in kept if _entry(summary, task, m)["solved"]]
        if solving:
            lost = [m for m in kept if m not in solving]
            steps += [f"{task} is not solved by {listed(lost)}"] if lost else []
            kept = solving
        elif any(e.get("solved") for e in entries):
            notes.append(f"No remaining mechanism solves {task}.")
        else:
            notes.append(f"No mechanism solved {task} at this budget; a larger --budget may.")
    return kept, steps, notes


def _without_unproven(
    summary: Mapping[str, Sequence[Mapping[str, Any]]], kept: list[str]
) -> tuple[list[str], list[str]]:
    """Keep the mechanisms that surely beat a task's rule if any do; return them and why others were eliminated."""
    steps = []
    for task in summary:
        ahead = [m for m in kept if _entry(summary, task, m).get("beside_baseline") == "ahead"]
        lost = [m for m in kept if m not in ahead]
        if ahead and lost:
            steps.append(f"on {task} not shown to beat a rule without training: {listed(lost)}")
            kept = ahead
    return kept, steps


def _without_beaten(
    summary: Mapping[str, Sequence[Mapping[str, Any]]],
    comparisons: Mapping[str, Comparison],
    metrics: Mapping[str, tuple[str, bool]],
    kept: list[str],
) -> tuple[list[str], list[str]]:
    """The mechanisms that are not surely behind the best left, task by task, and why others were eliminated."""
    steps = []
    for task in summary:
        best = _best(summary, metrics, task, kept)
        if best is None:
            continue
        behind = [m for m in kept if m != best and comparisons[task].difference(best, m).separable]
        if behind:
            score = _entry(summary, task, best)["mean"]
            steps.append(f"on {task} {best} reaches {score:.4g} {metrics[task][0]}, ahead of {listed(behind)}")
        kept = [m for m in kept if m not in behind]
    return kept, steps


def _ties(
    summary: Mapping[str, Sequence[Mapping[str, Any]]],
    comparisons: Mapping[str, Comparison],
    metrics: Mapping[str, tuple[str, bool]],
    kept: list[str],
    budget: str,
    asked: int,
) -> list[str]:
    """Sentences on what the scores leave open among the mechanisms left, and what would settle it."""
    if len(kept) < 2:
        return []
    found = []
    for task in summary:
        best = _best(summary, metrics, task, kept)
        if best is not None:
            found.append(_inseparable(task, best, [m for m in kept if m != best], comparisons[task], budget, asked))
    return found


def _overtaken(
    summary: Mapping[str, Sequence[Mapping[str, Any]]],
    comparisons: Mapping[str, Comparison],
    metrics: Mapping[str, tuple[str, bool]],
    left: Sequence[str],
    winner: str,
) -> list[str]:
    """Sentences on the tasks where mechanisms eliminated for another reason are surely ahead of the winner."""
    found = []
    for task in summary:
        if _best(summary, metrics, task, [winner]) is None:
            continue
        ahead = [
            name
            for name in left
            if _best(summary, metrics, task, [winner, name]) == name
            and comparisons[task].difference(name, winner).separable
        ]
        if ahead:
            found.append(f"On {task} {winner} is clearly behind {listed(ahead)}, eliminated for the reasons above.")
    return found


def _best(
    summary: Mapping[str, Sequence[Mapping[str, Any]]],
    metrics: Mapping[str, tuple[str, bool]],
    task: str,
    kept: Sequence[str],
) -> str | None:
    """The one of `kept` with the best score; None if the task is solved, so that scores no longer decide."""
    entries = [_entry(summary, task, m) for m in kept]
    if any(e.get("solved") for e in entries):
        return None
    sign = 1 if metrics[task][1] else -1
    return max(entries, key=lambda e: sign * e["mean"])["mechanism"]


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


def _cheapest(
    summary: Mapping[str, Sequence[Mapping[str, Any]]], names: list[str], column: str, more: bool
) -> list[str]:
    """The cheapest mechanism and those of about the same cost, in the order of `names`; all if no cost is known."""
    costs = {name: _value(summary, name, column) for name in names}
    known = {name: 1 / cost if more else cost for name, cost in costs.items() if math.isfinite(cost)}
    if not known:
        return names
    return [name for name in names if known.get(name, math.inf) <= ALIKE * min(known.values())]


def _settled(
    summary: Mapping[str, Sequence[Mapping[str, Any]]],
    metrics: Mapping[str, tuple[str, bool]],
    alike: list[str],
    beside: Mapping[str, Sequence[Mapping[str, Any]]],
    published: Mapping[str, Mapping[str, float]],
) -> tuple[str, str]:
    """The mechanism to take among equals, and why."""
    least, why = _least_bound(alike, beside)
    if len(least) == 1:
        return least[0], why
    if "softmax" in least:
        return "softmax", why or "softmax is the simplest of them"
    open_tasks = [task for task in summary if _best(summary, metrics, task, least) is not None]
    own = {task: {name: _entry(summary, task, name)["mean"] for name in least} for task in open_tasks}
    elsewhere = {task: published[task] for task in open_tasks if least and published.get(task, {}).keys() >= set(least)}
    before = f"{why}, and " if why else ""
    for means, where in ((elsewhere, " in the ranking that regard publishes"), (own, "")):
        leads = {task: _leader(means[task], metrics[task][1], least) for task in means}
        ahead = Counter(name for name in leads.values() if name is not None)
        leading = [name for name in least if ahead[name] == max(ahead.values(), default=0)]
        if len(leading) == 1:
            tasks = listed([task for task, name in leads.items() if name == leading[0]])
            return leading[0], f"{before}{leading[0]} has the best mean on {tasks}{where}, though not by a clear margin"
    return least[0], why or "it was named first"


def _leader(means: Mapping[str, float], higher_is_better: bool, names: Sequence[str]) -> str | None:
    """The mechanism with the best mean; None if several share it."""
    values = {name: means[name] for name in names}
    best = (max if higher_is_better else min)(values.values())
    leading = [name for name, value in values.items() if value == best]
    return leading[0] if len(leading) == 1 else None


PUBLISHED = Path(__file__).with_name("published.json")


def published_means(frame: str) -> dict[str, dict[str, float]]:
    """Mean scores by task and mechanism in the documentation's ranking; empty for frames that it does not have."""
    found = json.loads(PUBLISHED.read_text(encoding="utf-8")) if PUBLISHED.is_file() else {}
    return dict(found.get("means", {})) if found.get("frame") == frame else {}


def _least_bound(alike: list[str], beside: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[str], str]:
    """The mechanisms that lose the fewest tasks in the further frames that all were trained in, and why they lead.

    All of them, without a reason, if there is no such frame.
    """
    lost: dict[str, dict[str, bool]] = {}
    for task, entries in beside.items():
        for frame in dict.fromkeys(entry["frame"] for entry in entries):
            of = {e["mechanism"]: e["first_solved"] and not e["solved"] for e in entries if e["frame"] == frame}
            if of.keys() >= set(alike):
                lost[f"{task} in the frame {frame}"] = of
    count = {name: sum(bool(of[name]) for of in lost.values()) for name in alike}
    fewest = min(count.values(), default=0)
    kept = [name for name in alike if count[name] == fewest]
    others = [name for name in alike if name not in kept]
    if not others:
        return alike, ""
    where = [w for w, of in lost.items() if any(of[n] for n in others) and not any(of[n] for n in kept)]
    if not where:
        return kept, f"it solves more of the tasks in the further frames than {listed(others)}"
    return kept, f"unlike {listed(others)} it also solves {listed(where)}"


def _inseparable(task: str, best: str, tied: list[str], comparison: Comparison, budget: str, asked: int) -> str:
    """A sentence on what the scores of a task leave open, and what would separate the most distant of those tied."""
    said = f"Cannot separate {best} from {listed(tied)} on {task} at this budget"
    far = max(tied, key=lambda other: abs(comparison.difference(best, other).mean))
    difference = comparison.difference(best, far)
    if not math.isfinite(difference.resolved):
        if asked == 1:
            more = "use --seeds 2 or more"
        elif _longer(budget, 1):
            more = "a larger --budget has time for more"
        else:
            more = "not all of the others have a score"
        return f"{said}: with a single seed nothing can be separated; {more}."
    if not difference.mean and not difference.resolved:
        return f"On {task} all of {listed([best, *tied])} score exactly the same."
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


def listed(names: Sequence[str]) -> str:
    """Join names in a sentence: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
