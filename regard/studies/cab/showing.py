"""Report sections: leaderboards, scores, efficiency lengths, agreement of patterns, the benefit of attention."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regard.contract import Pattern
from regard.reproductions.framework.judging import Measurements
from regard.studies.cab import published
from regard.studies.cab.backbones import NOTHING
from regard.studies.cab.cells import (
    LEADERBOARD,
    MOST_ADDED,
    SOFTMAX,
    benches_of,
    card_of,
    complete_seeds,
    cost_setting,
    diverged,
    efficiency,
    entered,
    is_standard,
    pattern_indices,
    patterns_of,
    scores,
    task_setting,
)
from regard.studies.cab.index import AVERAGE, ScoresOf, correlation, over_seeds, ranks
from regard.studies.cab.own_data import score_files
from regard.studies.framework.protocol import Cells, Chosen
from regard.workbench.reports.sections import Curves, Heat, Row, Section

NS, CS, NC, CC = Pattern
WORDS = {
    "LM": "language modelling",
    "MLM": "masked words",
    "LSTF": "forecasts",
    "PCC": "completed point clouds",
    "SR": "larger pictures",
    "Sum": "summaries",
    "FastSpeech": "speech, all frames at once",
    "Transformer-TTS": "speech, four frames at a time",
    "PPL": "perplexity",
    "R-1": "ROUGE, as R-2 and R-L",
    "CD-l1": "Chamfer distance, as CD-l2",
    "PSNR": "signal to noise",
    "SSIM": "structural similarity",
    "MCD": "distance of mel cepstra",
    "MSD": "distance of mel spectra",
}
"""Meanings of the short names of tasks and metrics."""


def sections(chosen: Chosen, cells: Cells) -> list[Section]:
    """All sections of the report; sections without measurements are left out."""
    means, seeds = _means(cells), _by_seed(cells)
    failed = {pattern: _failed(chosen, seeds, pattern) for pattern in Pattern}
    found = {
        pattern: over_seeds(
            [pattern_indices(one, chosen, pattern) for one in complete_seeds(seeds, chosen, pattern)], failed[pattern]
        )
        for pattern in Pattern
    }
    parts = [
        _leaderboard(chosen, seeds, found, failed),
        _metrics(chosen, means),
        _learned(chosen, means),
        _costs(chosen, cells),
        _agreement(found),
        _benefit(chosen, means, seeds),
        _lengths(chosen, means),
        _beside(chosen, found),
        _given(chosen),
    ]
    return [part for part in parts if part.rows or part.pictures]


def _means(cells: Cells) -> dict[str, dict[str, Any]]:
    """Means over seeds of numbers, and elementwise of lists, by setting; None where a run diverged."""
    gathered: dict[str, dict[str, list[Any]]] = {}
    for (setting, _), measured in cells.items():
        for name, value in measured.items():
            gathered.setdefault(setting, {}).setdefault(name, []).append(value)
    return {
        setting: {name: _mean(values) for name, values in measured.items()} for setting, measured in gathered.items()
    }


def _mean(values: Sequence[Any]) -> Any:
    if any(value is None for value in values):
        return None
    if any(isinstance(value, list) for value in values):
        return [_mean(column) for column in zip(*values, strict=False)]
    known = [float(value) for value in values if isinstance(value, int | float)]
    return float(np.mean(known)) if known else None


def _by_seed(cells: Cells) -> dict[int, dict[str, Measurements]]:
    found: dict[int, dict[str, Measurements]] = {}
    for (setting, seed), measured in cells.items():
        found.setdefault(seed, {})[setting] = measured
    return found


def _failed(
    chosen: Chosen, seeds: Mapping[int, Mapping[str, Measurements]], pattern: Pattern
) -> dict[str, dict[str, int]]:
    """How many runs of each mechanism diverged in a pattern, by task."""
    counts = {
        name: Counter(t for one in seeds.values() for t in diverged(one, chosen, pattern, name))
        for name in entered(chosen)
    }
    return {name: dict(count) for name, count in counts.items() if count}


def _leaderboard(
    chosen: Chosen,
    seeds: Mapping[int, Mapping[str, Measurements]],
    found: Mapping[Pattern, ScoresOf],
    failed: Mapping[Pattern, Mapping[str, Mapping[str, int]]],
) -> Section:
    tasks = [task for task in ("TTS", "Sum", "SR", "MLM", "LM", "PCC", "LSTF") if _has(chosen, task)]
    metrics = [metric for bench in benches_of(chosen) for metric in bench.listed]
    rows: list[Row] = []
    for pattern in Pattern:
        own, lost = found[pattern], failed[pattern]
        complete = complete_seeds(seeds, chosen, pattern)
        places = over_seeds([ranks(scores(one, chosen, pattern), metrics) for one in complete], lost)
        each = [pattern_indices(one, chosen, pattern) for one in complete]
        named = [name for name in entered(chosen) if name in own or name in lost]
        base = own.get(SOFTMAX, {}).get(AVERAGE)
        for name in sorted(named, key=lambda name: own.get(name, {}).get(AVERAGE, -math.inf), reverse=True):
            average = own.get(name, {}).get(AVERAGE)
            values = [one[name][AVERAGE] for one in each if AVERAGE in one.get(name, {})]
            row: dict[str, Any] = {
                "pattern": pattern.value,
                "mechanism": name,
                "index": average,
                "±": None if average is None else standard_error(values),
                "to softmax": None if average is None or base is None else average - base,
                "rank": places.get(name, {}).get(AVERAGE),
                **{task: own.get(name, {}).get(task) for task in tasks},
            }
            if any(failed.values()):
                row["diverged"] = ", ".join(f"{task} in {n} of {len(seeds)}" for task, n in lost.get(name, {}).items())
            rows.append(row)
    says = (
        "The index is the mean of a task's standardised metrics, averaged over tasks: 0 is the mean of those that entered, "
        "1 a deviation better. It is the mean over seeds, of which ± is the standard error; rank is the mean rank, which a "
        "single failure does not distort."
    )
    if any(failed.values()):
        says += " Where a run diverged there is no score of the task, and no index."
    return Section("Leaderboards", says, [], rows)


def _has(chosen: Chosen, task: str) -> bool:
    return any(bench.task == task for bench in benches_of(chosen))


def _metrics(chosen: Chosen, means: Mapping[str, Mapping[str, Any]]) -> Section:
    rows: list[Row] = []
    for bench in benches_of(chosen):
        base = means.get(task_setting(bench, SOFTMAX, bench.patterns[0]), {}).get("parameters")
        for pattern in bench.patterns:
            for mechanism in (*entered(chosen), NOTHING):
                measured = means.get(task_setting(bench, mechanism, pattern))
                if measured is None or (mechanism != NOTHING and pattern not in patterns_of(mechanism)):
                    continue
                size = measured.get("parameters")
                added = None if not base or size is None else size / base - 1
                for name, higher in bench.metrics.items():
                    rows.append(
                        {
                            "task": bench.name,
                            "pattern": pattern.value,
                            "mechanism": mechanism,
                            "metric": name,
                            "better": "more" if higher else "less",
                            "value": measured.get(name),
                            "parameters": size,
                            "within the rule": None if added is None else added <= MOST_ADDED,
                        }
                    )
    named = {str(row[heading]).split()[0] for row in rows for heading in ("task", "metric")}
    says = (
        f"Means over seeds. By the benchmark's rule a mechanism adds at most {MOST_ADDED:.0%} to the backbone's parameters. "
        f"{NOTHING} has zeros in the place of attention. "
        + "; ".join(f"{short}: {words}" for short, words in WORDS.items() if short in named)
        + "."
    )
    return Section("Scores", says, [], rows)


def _learned(chosen: Chosen, means: Mapping[str, Mapping[str, Any]]) -> Section:
    rows: list[Row] = []
    for bench in benches_of(chosen):
        measured = means.get(task_setting(bench, SOFTMAX, bench.patterns[0]), {})
        score, rule = measured.get("score"), measured.get("rule")
        if score is not None and rule is not None:
            higher = bench.metrics[next(iter(bench.metrics))]
            beats = score > rule if higher else score < rule
            better = "more" if higher else "less"
            rows.append({"task": bench.name, "better": better, "softmax": score, "rule": rule, "beats the rule": beats})
    says = (
        "The task's own score beside that of a rule without training. Where softmax attention does not beat the rule, the "
        "backbone has learned little in these steps, and the places of the mechanisms say little."
    )
    return Section("Do the backbones learn?", says, [], rows)


def _costs(chosen: Chosen, cells: Cells) -> Section:
    rows: list[Row] = []
    curves: dict[str, dict[str, list[tuple[float, float | None]]]] = {"times": {}, "bytes": {}}
    for mechanism in entered(chosen):
        cell = next((m for (setting, _), m in sorted(cells.items()) if setting == cost_setting(mechanism)), None)
        if cell is None:
            continue
        told = efficiency(cell)
        row: dict[str, Any] = {"mechanism": mechanism}
        labels = {"times": "time", "bytes": "memory", "fused": "memory, fused"}
        for kind, label in labels.items():
            row[label] = None if math.isinf(told[kind].length) else round(told[kind].length)
        row |= {f"R² {labels[kind]}": told[kind].fit for kind in ("times", "bytes")}
        row["notes"] = "; ".join(f"{labels[kind]}: {one.note}" for kind, one in told.items() if one.note)
        rows.append(row)
        for kind, drawn in curves.items():
            drawn.setdefault(SOFTMAX, list(zip(cell["lengths"], cell[f"{SOFTMAX} {kind}"], strict=True)))
            drawn[mechanism] = list(zip(cell["lengths"], cell[kind], strict=True))
    rows.sort(key=lambda row: math.inf if row["memory"] is None else row["memory"])
    says = (
        "Tokens from which a layer is cheaper than softmax attention: where a parabola through softmax's costs meets a line "
        "through the mechanism's. Memory is compared with softmax attention that holds its weights, as the paper's does, and "
        "with the fused one that runs here, which holds none and mostly grows with the length alone (no length then). "
        "Figures and curves are those of the first seed; the claims are judged over all."
    )
    pictures = []
    if rows:
        pictures = [
            Curves("Seconds of a call", "tokens", "seconds", curves["times"], log_x=True, log_y=True, rising=False),
            Curves("Bytes of a call", "tokens", "bytes", curves["bytes"], log_x=True, log_y=True, rising=False),
        ]
    return Section("Efficiency lengths", says, pictures, rows)


def _agreement(found: Mapping[Pattern, ScoresOf]) -> Section:
    patterns = {
        pattern.value: {name: own[AVERAGE] for name, own in found[pattern].items() if AVERAGE in own}
        for pattern in Pattern
    }
    tasks = {
        f"{task} {pattern.value}": {name: own[task] for name, own in found[pattern].items() if task in own}
        for pattern in Pattern
        for task in LEADERBOARD[pattern]
    }
    pictures = [
        picture
        for picture in (
            _correlations("Between patterns, of the average index", patterns),
            _correlations("Between tasks", tasks),
        )
        if picture is not None
    ]
    says = "Pearson's correlation of the indices, over the mechanisms that both have; three or more are needed."
    rows = [
        {"first": one, "second": other, "correlation": value, "mechanisms": count}
        for one, other, value, count in _pairs(patterns)
        if value is not None
    ]
    return Section("Do patterns agree about mechanisms?", says, pictures, rows)


def _pairs(by: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str, float | None, int]]:
    names = list(by)
    return [(one, other, *correlation(by[one], by[other])) for i, one in enumerate(names) for other in names[i + 1 :]]


def _correlations(caption: str, by: Mapping[str, Mapping[str, float]]) -> Heat | None:
    kept = {name: values for name, values in by.items() if len(values) > 2}
    values = [[correlation(one, other)[0] for other in kept.values()] for one in kept.values()]
    known = [value for i, row in enumerate(values) for j, value in enumerate(row) if i != j and value is not None]
    return Heat(caption, list(kept), list(kept), values) if known else None


def _benefit(
    chosen: Chosen, means: Mapping[str, Mapping[str, Any]], seeds: Mapping[int, Mapping[str, Measurements]]
) -> Section:
    rows: list[Row] = []
    for bench in benches_of(chosen):
        full, without = (task_setting(bench, name, NS) for name in (SOFTMAX, NOTHING))
        if not {full, without} <= means.keys():
            continue
        both = [measured for measured in seeds.values() if {full, without} <= measured.keys()]
        for name, higher in bench.metrics.items():
            pairs = [(measured[full].get(name), measured[without].get(name)) for measured in both]
            gains = [
                (one - other) * (1 if higher else -1) for one, other in pairs if one is not None and other is not None
            ]
            gain, error = float(np.mean(gains)) if gains else None, standard_error(gains)
            told = gain is not None and error is not None and abs(gain) > 2 * error
            rows.append(
                {
                    "task": bench.name,
                    "metric": name,
                    SOFTMAX: means[full].get(name),
                    NOTHING: means[without].get(name),
                    "better by": gain,
                    "±": error,
                    "attention helps": gain > 0 if told and gain is not None else None,
                }
            )
    says = (
        f"The same backbone with zeros ({NOTHING}) in the place of what attention within a sequence gives. ± is the standard "
        "error over seeds; whether attention helps is stated where the difference is more than two of them."
    )
    return Section("Was attention needed?", says, [], rows)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for fewer than two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _lengths(chosen: Chosen, means: Mapping[str, Mapping[str, Any]]) -> Section:
    curves: dict[str, list[tuple[float, float | None]]] = {}
    for bench in benches_of(chosen):
        for mechanism in entered(chosen):
            measured = means.get(task_setting(bench, mechanism, CS), {})
            if measured.get("perplexities") and CS in patterns_of(mechanism):
                curves[mechanism] = list(zip(measured["lengths"], measured["perplexities"], strict=True))
    if not curves:
        return Section("Shorter and longer text")
    trained = next(iter(curves.values()))[-2][0]
    picture = Curves(
        "Perplexity of the same text in pieces",
        "tokens of a piece",
        "perplexity",
        curves,
        note=f"All were trained on {trained:.0f} tokens.",
        log_x=True,
        log_y=True,
        rising=False,
    )
    says = f"Language models trained on {trained:.0f} tokens read the same held-out text in pieces of other lengths."
    return Section("Shorter and longer text", says, [picture])


def _beside(chosen: Chosen, found: Mapping[Pattern, ScoresOf]) -> Section:
    rows: list[Row] = []
    for pattern in (p for p in Pattern if is_standard(chosen, p)):
        for name, tasks in published.LEADERBOARD[pattern].items():
            whole = len(tasks) == len(LEADERBOARD[pattern])
            here = next((own for own in found[pattern] if card_of(own).name == name), None)
            rows.append(
                {
                    "pattern": pattern.value,
                    "mechanism": name,
                    "published": float(np.mean(list(tasks.values()))) if whole else None,
                    "here": None if here is None else found[pattern][here].get(AVERAGE),
                }
            )
    says = "The paper's average index beside the one in this table: the data and the competitors differ, so only ranks can be compared."
    return Section("Beside the published leaderboards", says, [], rows)


def _given(chosen: Chosen) -> Section:
    rows: list[Row] = []
    for path in score_files(chosen.data):
        told = published.published_index(published.read_scores(path))
        for pattern in Pattern:
            rows.extend(
                {"file": path, "pattern": pattern.value, "task": task, "index": value}
                for task, value in told[pattern.value].items()
            )
    says = "Your scores on the benchmark's own data, by its published constants."
    return Section("Your scores by the published constants", says, [], rows)
