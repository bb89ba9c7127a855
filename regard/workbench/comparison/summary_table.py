"""The summary of a comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from regard.measurement import units
from regard.workbench.comparison.summary import with_rule
from regard.workbench.reports.labels import short
from regard.workbench.reports.scales import Formatter, is_number

COSTS = (
    ("inference", "inference_ms", units.milliseconds),
    ("train/s", "tokens_per_second", units.count),
    ("decode/s", "decode_tokens_per_second", units.count),
    ("state", "state_bytes", units.size),
    ("memory", "inference_memory_bytes", units.size),
    ("in training", "training_memory_bytes", units.size),
)
LONGEST_RULE = 26
FITS = ((104, len(COSTS)), (76, 3), (56, 1), (0, 0))
"""(columns, costs): a terminal with at least so many columns shows so many costs; the report has all of them."""


def terminal_table(
    summary: Mapping[str, Sequence[Mapping[str, Any]]],
    baselines: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    width: int = 80,
) -> Table:
    """One row per mechanism under the name of its task, in the order given, with the task's simple rule at its rank.

    Args:
        summary: for each task, one entry per mechanism, as the report receives it.
        baselines: for each task with a rule, the rule's name and score and whether higher is better.
        width: columns of the terminal; a narrow one shows fewer costs.

    Returns:
        The table. Mechanisms that cannot be told apart share a rank, a star marks the Pareto front, and a dash stands
        for what was not measured.
    """
    every = [entry for entries in summary.values() for entry in entries]
    costs = [cost for cost in COSTS if any(is_number(entry.get(cost[1])) for entry in every)]
    costs = costs[: next(number for columns, number in FITS if width >= columns)]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", min_width=1)
    table.add_column("", min_width=12, overflow="fold")  # fold, so that no name loses its options
    for heading in ("score", "rank", *(heading for heading, _, _ in costs)):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, entries in summary.items():
        table.add_row("", Text(task, style="bold"))
        for entry in with_rule(entries, (baselines or {}).get(task)):
            if "rule" in entry:
                table.add_row("", *_rule(entry))
                continue
            table.add_row(
                "★" if entry.get("on_front") else "",
                Text(entry["mechanism"]),
                Text(_score(entry)),
                _rank(entry),
                *(_value(entry, name, form) for _, name, form in costs),
            )
        table.add_section()
    return table


def figures_table(summary: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table | None:
    """Figures that tasks report in addition to scores: a row per mechanism, a column per figure; None without any."""
    told = {task: [e for e in entries if e.get("figures")] for task, entries in summary.items()}
    names = list(dict.fromkeys(name for entries in told.values() for e in entries for name in e["figures"]))
    if not names:
        return None
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", overflow="fold")
    for name in names:
        table.add_column(Text(name), justify="right")
    for task, entries in told.items():
        if entries:
            table.add_row(Text(task, style="bold"))
        for entry in entries:
            values = (entry["figures"].get(name) for name in names)
            shown = (units.number(value) if is_number(value) else "—" for value in values)
            table.add_row(Text(f"  {entry['mechanism']}"), *shown)
    return table


def _rule(rule: Mapping[str, Any]) -> tuple[Text, Text, Text]:
    name = Text(short(rule["rule"], LONGEST_RULE), style="italic")
    return name, Text(units.number(rule["mean"])), Text("rule", style="dim")


def _score(entry: Mapping[str, Any]) -> str:
    mean, error = entry.get("mean"), entry.get("standard_error")
    if not is_number(mean):
        return "—"
    return " ± ".join(units.with_error(mean, error)) if is_number(error) else units.number(mean)


def _rank(entry: Mapping[str, Any]) -> Text:
    if not is_number(entry.get("mean")):
        return Text("no score", style="yellow")
    rank = entry.get("rank")
    return Text("—", style="dim") if rank is None else Text(str(rank), style="green" if rank == 1 else "dim")


def _value(entry: Mapping[str, Any], name: str, form: Formatter) -> Text:
    value = entry.get(name)
    return Text(form(value)) if is_number(value) else Text("—", style="dim")
