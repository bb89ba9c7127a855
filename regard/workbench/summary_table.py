"""The summary of a comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from regard.workbench import charts
from regard.workbench.charts import is_number


def terminal_table(summary: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """One row for each mechanism and task, in the order given.

    Args:
        summary: of each task, one entry a mechanism, as the report receives it.

    Returns:
        The table. A star marks the Pareto front; what was not measured is a dash.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("task", "mechanism", "score"):
        table.add_column(heading, justify="right" if heading == "score" else "left", no_wrap=True)
    table.add_column("standing", no_wrap=True)
    for heading in ("train tok/s", "inference", "decode tok/s", "peak memory", "state"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, entries in summary.items():
        for position, entry in enumerate(entries):
            last = position == len(entries) - 1
            table.add_row(
                Text(task if position == 0 else ""),
                Text(("★ " if entry.get("on_front") else "  ") + entry["mechanism"]),
                Text(_score(entry)),
                _standing(entry),
                _value(entry, "tokens_per_second", charts.format_count),
                _value(entry, "inference_ms", charts.format_milliseconds),
                _value(entry, "decode_tokens_per_second", charts.format_count),
                _value(entry, "peak_memory_bytes", charts.format_bytes),
                _value(entry, "state_bytes", charts.format_bytes),
                end_section=last,
            )
    return table


def _score(entry: Mapping[str, Any]) -> str:
    mean, error = entry.get("mean"), entry.get("standard_error")
    if not is_number(mean):
        return "—"
    return " ± ".join(charts.format_with_error(mean, error)) if is_number(error) else charts.format_number(mean)


def _standing(entry: Mapping[str, Any]) -> Text:
    if not is_number(entry.get("mean")):
        return Text("no score", style="yellow")
    separable = entry.get("separable_from_best")
    if separable is None:
        return Text("—", style="dim")
    return Text("behind", style="dim") if separable else Text("among the best", style="green")


def _value(entry: Mapping[str, Any], name: str, form: charts.Formatter) -> Text:
    value = entry.get(name)
    return Text(form(value)) if is_number(value) else Text("—", style="dim")
