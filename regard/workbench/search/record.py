"""The results of a search: its record, its verdict, the plan as a file, and commands for further use."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from regard.contract import written_options
from regard.core.files import write_text_atomically
from regard.measurement import provenance
from regard.measurement.statistics import Comparison, Scores, items_array
from regard.tasks import Task
from regard.workbench.plugins import plugin_words
from regard.workbench.search.costs import CostTable
from regard.workbench.search.predictor import Judged
from regard.workbench.search.settings import SearchSettings
from regard.workbench.search.space import DECODER, ENCODER, Genes, Space

if TYPE_CHECKING:
    from regard.workbench.search.run import Search

Row = dict[str, Any]

PLAN, REFERENCE = "plan.json", "reference"

_COLUMN = {"milliseconds": "ms", "flops": "flops", "parameters": "parameters"}
_SAID = {"ms": "time", "flops": "FLOPs", "parameters": "parameters"}


@dataclass(frozen=True)
class Found:
    """The finished steps of a search.

    Attributes:
        table: the cost table.
        limit: the highest cost that a network may have.
        tried: evaluated networks and their losses with the supernet's weights.
        judged: the quality of each predictor.
        methods: the result of each search method.
        entrants: the chosen networks; the winner is first and the reference last.
        left_out: sentences on the spaces without a network that keeps the budget.
    """

    table: CostTable
    limit: float
    tried: Mapping[Genes, float]
    judged: Mapping[str, Judged]
    methods: Sequence[Row]
    entrants: Sequence[Row]
    left_out: Sequence[str]


def record_of(search: Search, found: Found) -> Row:
    """Make the record of a search, and write its plan to a file."""
    task, space, settings, unit = search.task, search.space, search.settings, search.settings.budget.unit
    rows, plan = found.entrants, search.output / PLAN
    write_plan(space, tuple(rows[0]["genes"]), plan)
    comparison = _comparison(rows)
    compared = {} if comparison is None else _beside(comparison)
    unlearned = "" if comparison is None or REFERENCE not in compared else _unlearned(search, comparison)
    return {
        "task": task.name,
        "described": task.describe(),
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "budget": str(settings.budget),
        "unit": unit,
        "limit": found.limit,
        "space": space.size,
        "choices": search.of_space,
        "settings": {**asdict(settings), "budget": str(settings.budget)},
        "items": {"choose": search.choosing, "judge": search.items - search.choosing},
        "tried": [
            {
                "network": space.describe(genes),
                "loss": loss,
                "cost": found.table(genes),
                "mechanisms": _mixture(space, genes),
            }
            for genes, loss in found.tried.items()
        ],
        "judged": {kind: asdict(one) for kind, one in found.judged.items()},
        "methods": found.methods,
        "entrants": [{**row, "cost": row[_COLUMN[unit]]} for row in rows],
        "against": compared,
        "left_out": found.left_out,
        "verdict": _verdict(search, rows, compared) + unlearned,
        "plan": str(plan),
        "commands": _commands(search, rows[0]),
        "machine": provenance.fingerprint()["cpu"],
        "threads": torch.get_num_threads(),
    }


def _mixture(space: Space, genes: Genes) -> str:
    """The mechanism of all layers, or ``mixed`` if there are several."""
    names = [layer.mechanism for layers in space.network(genes).stacks.values() for layer in layers]
    kinds = dict.fromkeys(names)
    return next(iter(kinds)) if len(kinds) == 1 else "mixed"


def write_plan(space: Space, genes: Genes, path: Path) -> None:
    """Write the plan as a file that :func:`regard.models.variants.read_variant` can parse."""
    plan: Row = {"name": "found", **space.variant(genes).record()}
    for stack in ("layers", ENCODER, DECODER):
        if stack in plan:
            plan[stack] = [{"mechanism": name, "options": options} for name, options in plan[stack]]
    text = json.dumps(plan, indent=2) + "\n"
    write_text_atomically(path, text)


def _commands(search: Search, winner: Row) -> list[str]:
    settings, sizes = search.settings, search.space.sized(tuple(winner["genes"]))
    same = f"--dim {sizes.dim} --layers {sizes.layers} --heads {sizes.heads} --frame {settings.frame}"
    same += _given(search, precision="--precision", device="--device") + plugin_words(settings.plugins)
    trained = _given(search, batch_tokens="--batch-tokens", seed="--seed")
    compared = _given(search, seeds="--seeds", seed="--seed-offset")
    plan = shlex.quote(str(search.output / PLAN))
    plugged = getattr(search.task, "registered", None) is None and settings.plugins
    task = "" if plugged else f" {task_in_words(search.task)}"
    both = shlex.quote(f"{search.choices.names[0]},{search.output / PLAN}")
    return [
        f"regard train{task} --mechanism {plan} {same}{trained} "
        f'--learning-rate {settings.learning_rate} --budget "{max(20, settings.retrain_steps)} steps"',
        f"regard compare{task} --mechanisms {both} {same}{compared}",
    ]


def _given(search: Search, **options: str) -> str:
    """Options, by the settings that they are for, of the settings that differ from the defaults of all commands."""
    values = {name: getattr(search.settings, name) for name in options}
    given = {name: value for name, value in values.items() if value != getattr(SearchSettings, name)}
    return "".join(f" {options[name]} {shlex.quote(str(value))}" for name, value in given.items())


def task_in_words(task: Task) -> str:
    """Command-line arguments for the same data: files, the task with its options, held-out files, the tokenizer."""
    origin = dict(getattr(task, "origin", None) or {})
    files = {name: origin.pop(name, None) or [] for name in ("data", "validation")}
    data, held_out = ([paths] if isinstance(paths, str) else list(paths) for paths in files.values())
    tokenizer = origin.pop("tokenizer", None)
    described = written_options(getattr(task, "registered", None) or task.name, origin)
    words = [*map(shlex.quote, data), f"--task {shlex.quote(described)}"]
    words += [f"--validation {shlex.quote(path)}" for path in held_out]
    words += [f"--tokenizer {shlex.quote(str(tokenizer))}"] if tokenizer else []
    return " ".join(words)


def _verdict(search: Search, rows: Sequence[Row], compared: Mapping[str, Row]) -> str:
    winner, reference = rows[0], rows[-1]
    column, metric = _COLUMN[search.settings.budget.unit], search.task.metric
    share = winner[column] / reference[column]
    told = f"{winner['plan']} ({winner['width']}) has {share:.0%} of the {_SAID[column]} of the reference"
    beside = compared.get(REFERENCE)
    if beside is None:
        lost = [
            f"the {name} diverged in {count} of {len(row['runs'])}"
            for name, row in (("winner", winner), ("reference", reference))
            if (count := sum(run["diverged"] for run in row["runs"]))
        ]
        why = f": {' and '.join(lost)}" if lost else ""
        return f"{told}; there are no runs of both from scratch to compare{why}."
    own, others = (_mean([run["score"] for run in row["runs"] if not run["diverged"]]) for row in (winner, reference))
    scores = f"{own:.4g} {metric} against {others:.4g}"
    if beside["resolved"] is None:
        return f"{told}: {scores}, which one seed cannot tell apart."
    if abs(beside["mean"]) <= beside["resolved"]:
        return (
            f"{told} and is within the noise of it: {scores}; a difference of {beside['resolved']:.2g} could be told."
        )
    better = (beside["mean"] > 0) == search.task.higher_is_better
    return f"{told} and is {'better' if better else 'worse'} than it: {scores}."


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _comparison(rows: Sequence[Row]) -> Comparison | None:
    """Scores of the winner and the other entrants, by seeds and items; None if it or all of them lack runs."""
    scores = {}
    for row in rows:
        runs = {run["seed"]: items_array(run["items"]) for run in row["runs"] if not run["diverged"]}
        if runs:
            scores[row["name"]] = Scores(runs)
    return Comparison(scores) if rows[0]["name"] in scores and len(scores) > 1 else None


def _beside(comparison: Comparison) -> dict[str, Row]:
    """The winner's score minus each other entrant's, paired over seeds and items."""
    first, *others = comparison.scores
    found = {}
    for name in others:
        difference = comparison.difference(first, name)
        finite = math.isfinite(difference.resolved)
        found[name] = {
            "mean": difference.mean,
            "standard_error": difference.standard_error if finite else None,
            "resolved": difference.resolved if finite else None,
        }
    return found


def _unlearned(search: Search, comparison: Comparison) -> str:
    """A sentence if neither the winner nor the reference is shown to beat a rule without training, or chance; otherwise
    empty, also if the task has neither."""
    first, chance = next(iter(comparison.scores)), getattr(search.task, "chance", None)
    if search.rule is not None:
        told, score, items = f"a rule without training, {search.rule.name}", search.rule.score, search.rule.items
    elif chance is not None:
        weights = next(iter(comparison.scores[first].items.values()))[:, 1]
        told, score, items = "chance", chance, np.stack([chance * weights, weights], 1)
    else:
        return ""
    for name in (first, REFERENCE):
        over = comparison.against(name, items)
        if over.separable and (over.mean > 0) == search.task.higher_is_better:
            return ""
    return f" Neither is shown to be better than {told} ({score:.4g}): train longer, with --retrain."
