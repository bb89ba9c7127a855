"""Advice, and the errors of its predictions, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from regard.measurement import units
from regard.workbench.advice.answer import Advice, Candidate, Estimate
from regard.workbench.advice.check import Errors

MARKS = {"measured": "", "interpolated": "~", "extrapolated": "≈"}
SHOWN, CHANGES = 5, 3
"""Mechanisms and changes shown in the short form."""


def short_text(advice: Advice) -> Iterator[Any]:
    """The answer in at most twenty lines on a wide terminal: top mechanisms, what would change it, a line to paste."""
    yield Text(advice.text, style="bold")
    if advice.candidates:
        yield ""
        yield _first(advice)
        yield Text(
            "± uncertainty of the time; ~ interpolated, ≈ extrapolated; memory in addition to weights and input",
            "dim",
        )
    more, out = max(0, len(advice.candidates) - SHOWN), len(advice.rejected)
    told = [f"{more} more qualify"] * (more > 0) + [f"{out} do not qualify"] * (out > 0)
    yield Text(f"{', '.join(told)}; --all shows everything." if told else "--all shows everything.", "dim")
    yield ""
    changes = Table(box=None, pad_edge=False, header_style="")
    changes.add_column("What would change the answer:", no_wrap=True, overflow="ellipsis")
    for change in advice.changes[:CHANGES]:
        changes.add_row(Text(f"- {change}"))
    yield changes
    if advice.candidates:
        yield ""
        yield Text(next(line for line in advice.candidates[0].code.splitlines() if line.startswith("layer =")))


def _first(advice: Advice) -> Table:
    """The first candidates, with the deciding time, its interval and the memory at each length."""
    settings = advice.settings
    headings = [settings.deciding]
    for length in settings.lengths:
        headings += [f"at {length}", "memory"]
    rows = []
    for candidate in advice.candidates[:SHOWN]:
        cells = [candidate.mechanism]
        for length in settings.lengths:
            estimate = _estimate(candidate, settings.deciding, length)
            time, memory = _cells(estimate)
            cells += [time if estimate is None else f"{time} ± {estimate.high / estimate.milliseconds - 1:.0%}", memory]
        rows.append(cells)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, heading in enumerate(headings):  # the reason is cut off if the terminal is narrow
        width = max(len(row[i]) for row in [headings, *rows])
        table.add_column(heading, justify="right" if i else "left", no_wrap=True, min_width=width)
    table.add_column("", no_wrap=True)
    for candidate, cells in zip(advice.candidates, rows, strict=False):
        table.add_row(*cells, Text(candidate.reason.split(";")[0], "dim"))
    return table


def advice_text(advice: Advice) -> Iterator[Any]:
    """The full text: the answer, a table per length, the reasons, what would change the answer, and code to paste."""
    yield Text(advice.text, style="bold")
    yield ""
    for length in advice.settings.lengths:
        if advice.candidates:
            yield _table(advice, length)
            yield ""
    if advice.candidates:
        yield Text(
            "time of one layer, and memory in addition to weights and input; ~ interpolated, ≈ extrapolated",
            style="dim",
        )
        yield ""
    for candidate in advice.candidates:
        quality = "" if candidate.quality == "not measured" else f" Quality: {candidate.quality}."
        yield Text(f"{candidate.place}. {candidate.mechanism}: {candidate.reason}.{quality}")
    if advice.rejected:
        yield ""
        yield Text("Do not qualify:")
        for name, reason in advice.rejected.items():
            yield Text(f"- {name}: {reason}", style="dim")
    yield ""
    yield Text("What would change the answer:")
    for change in advice.changes:
        yield Text(f"- {change}")
    yield ""
    for note in advice.notes:
        yield Text(note, style="dim")
    if advice.candidates:
        yield ""
        yield Text(advice.candidates[0].code)


def _table(advice: Advice, length: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", title=f"at {length} tokens", title_justify="left")
    table.add_column("mechanism", no_wrap=True)
    for what in advice.settings.what:
        table.add_column(what, justify="right", no_wrap=True)
        table.add_column("memory", justify="right", no_wrap=True)
    for candidate in advice.candidates:
        cells = []
        for what in advice.settings.what:
            cells += _cells(_estimate(candidate, what, length))
        table.add_row(candidate.mechanism, *cells)
    return table


def _estimate(candidate: Candidate, what: str, length: int) -> Estimate | None:
    return next((e for e in candidate.estimates if (e.what, e.length) == (what, length)), None)


def _cells(estimate: Estimate | None) -> list[str]:
    if estimate is None:
        return ["", ""]
    return [MARKS[estimate.basis] + units.milliseconds(estimate.milliseconds), units.size(estimate.memory_bytes)]


def errors_table(errors: Sequence[Errors]) -> Table:
    """Median and worst relative error of each kind of prediction."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("", "", "predictions", "median error", "worst error", "in interval", "worst at"):
        table.add_column(heading, justify="left" if heading in ("", "worst at") else "right")
    names = {"seconds": "time", "memory": "memory"}
    for e in errors:
        inside = "" if e.inside is None else f"{e.inside:.0%}"
        table.add_row(e.what, names[e.of], str(e.count), f"{e.median:.1%}", f"{e.worst:.1%}", inside, e.where)
    return table
