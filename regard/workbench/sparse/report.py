"""The report page of a sparse attention study, and the rows of its tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regard.core.files import write_text_atomically
from regard.measurement import units
from regard.workbench import side_effects
from regard.workbench.reports import charts
from regard.workbench.reports.charts import Figure, ScatterPoint, Series
from regard.workbench.reports.pages import pages
from regard.workbench.reports.scales import Axis
from regard.workbench.sparse.analysis import Point, crossing_length, frontier, larger_and_sparse
from regard.workbench.sparse.study import Cell, Found, phases_of, recommend

MEASURED = (
    "Every method and the dense model answer the same samples, and greedily.",
    "A compression is safe if, at it and at all smaller ones, no task that the dense model can do shows a loss (z below 1.645, one-sided).",
    "The error of attention is that of a layer's output, relative to dense attention on the same queries, keys and values, on one prompt or its reply: the phase in which a method saves work.",
    "Sparsity is counted while the model runs; times are medians of replies given in turns.",
)


def safe_table(found: Found) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: for each method its safe compression at each length, and what the worst task keeps there."""
    safe, _ = recommend(found)
    lengths = found.lengths()
    headings = ["method", "saves in", *(f"safe at {units.tokens(n)}" for n in lengths)]
    rows = []
    for method in found.plan.methods:
        row = [method, " and ".join(phases_of(method))]
        for n in lengths:
            ratio = safe[method].get(str(n))
            if ratio is None:
                row.append("not judged")
                continue
            kept = found.relative(method, ratio, n) if ratio > 1 else {}
            worst = f", worst task {min(kept.values()):.0%}" if kept else ""
            speeds = [
                f"{s:.2g}x in {p}" for p in phases_of(method) if (s := found.faster(method, ratio, n, p)) and ratio > 1
            ]
            row.append(f"{ratio:g}x{worst}{', ' if speeds else ''}{', '.join(speeds)}")
        rows.append(row)
    return headings, rows


def effects_table(found: Found) -> tuple[list[str], list[list[str]]]:
    """Headings and rows for side effects: of dense attention, of each method, and of the text itself."""
    return ["method", *side_effects.HEADINGS], side_effects.rows("dense", found.effects)


def errors_table(found: Found) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: for each method and length, the relative error of a layer's attention at each compression."""
    ratios = sorted({ratio for _, ratio, _ in found.errors})
    rows = []
    for method in found.plan.methods:
        for n in found.lengths():
            here = [found.errors.get((method, ratio, n)) for ratio in ratios]
            if any(error is not None for error in here):
                rows.append([method, units.tokens(n), *("" if error is None else f"{error:.1%}" for error in here)])
    return ["method", "length", *(f"{ratio:g}x" for ratio in ratios)], rows


CELLS = [
    "method",
    "compression",
    "task",
    "length",
    "score",
    "samples",
    "prefill skipped",
    "decoding skipped",
    "cache kept",
    "prompt",
    "a token",
    "prompt's FLOPs",
    "a token reads",
]


def cell_row(cell: Cell) -> list[str]:
    """The cells of a row in the table of all measurements."""
    token = "" if cell.token_seconds is None else units.milliseconds(1e3 * cell.token_seconds)
    return [
        cell.method,
        f"{cell.ratio:g}x",
        cell.task,
        units.tokens(cell.length),
        f"{cell.score:.3f}",
        str(len(cell.scores)),
        f"{cell.prefill:.1%}",
        f"{cell.decode:.1%}",
        f"{cell.cache:.1%}",
        units.milliseconds(1e3 * cell.prefill_seconds),
        token,
        units.count(cell.flops),
        units.size(cell.token_bytes),
    ]


def write_page(found: Found, path: Path) -> Path:
    """Write the HTML page of a study as a single, self-contained file."""
    _, sentence = recommend(found)
    headings, rows = safe_table(found)
    cells = sorted(found.cells, key=lambda c: (c.length, c.task, c.method != "dense", c.method, c.ratio))
    return _write(
        path,
        title=f"{found.name} with sparse attention",
        facts=[
            f"{units.count(found.weights)} weights",
            f"{len(found.plan.methods)} methods",
            f"{max((len(c.scores) for c in found.cells), default=0)} samples per task",
            *(["stopped by its budget"] if found.over else []),
        ],
        sentence=f"{sentence} {side_effects.sentence('dense', found.effects)}".strip() if found.effects else sentence,
        measured=(*MEASURED, *(side_effects.MEASURED if found.effects else ())),
        figures=_figures(found),
        lede="1 is the dense model; the mean over the tasks that it can do, and the worst of them: a mean hides what fails.",
        tables=[
            ("Safe compressions", headings, rows),
            *([("Error of attention", *errors_table(found))] if found.errors else []),
            *([("Side effects", *effects_table(found))] if found.effects else []),
            ("All measurements", CELLS, [cell_row(c) for c in cells]),
        ],
        notes=[*filter(None, [found.beyond]), *(f"{where} is left out: {why}" for where, why in found.refused.items())],
    )


def _figures(found: Found) -> list[Figure]:
    figures = []
    for length in found.lengths():
        for caption, pick in (("mean", statistics.fmean), ("worst task", min)):
            series = []
            for number, method in enumerate(found.plan.methods):
                points: list[tuple[float, float | None]] = [(1.0, 1.0)]
                for ratio in found.plan.ratios:
                    kept = found.relative(method, ratio, length)
                    points.append((ratio, pick(kept.values()) if kept else None))
                if any(y is not None for _, y in points[1:]):
                    series.append(Series(number, method, points))
            title = f"{caption} at {units.tokens(length)} tokens"
            chart = charts.lines(
                f"{caption.replace(' ', '-')}-{length}",
                title,
                f"Score over that of the dense model by compression, {title}",
                series,
                Axis("compression →", lambda value: f"{value:g}x", log=True, base=2),
                Axis("↑ of the dense score", "{:.0%}".format),
            )
            if chart is not None and series:
                figures.append(Figure(title, chart))
    return figures


def isoflops_rows(by_length: Mapping[int, Sequence[Point]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: for each length and dense model, the best larger sparse one that costs no more."""
    rows = []
    for length, points in sorted(by_length.items()):
        for dense, rival in larger_and_sparse(points):
            row = [units.tokens(length), f"{dense.size:g}", f"{dense.score:.2f}", units.count(dense.cost)]
            if rival is None:
                row += ["none is that cheap", "", ""]
            else:
                row += [f"{rival.size:g} at {rival.ratio:g}x", f"{rival.score:.2f}", units.count(rival.cost)]
            rows.append(row)
    return ["length", "dense", "score", "cost", "larger and sparse", "score", "cost"], rows


def isoflops_sentence(by_length: Mapping[int, Sequence[Point]], what: str) -> str:
    """A sentence with the result of the comparison at equal cost."""
    crossing = crossing_length(by_length)
    lengths = ", ".join(units.tokens(n) for n in sorted(by_length))
    if crossing is None:
        return f"{what}: at none of {lengths} tokens does a larger sparse model clearly beat a dense one of its cost."
    return f"{what}: from {units.tokens(crossing)} tokens on a larger sparse model beats a dense one of its cost."


def write_isoflops(
    groups: Mapping[str, Mapping[int, Sequence[Point]]], path: Path, *, title: str, measured: Sequence[str]
) -> Path:
    """Write the page that compares models of several sizes.

    Args:
        groups: points by length, for each setting by name.
    """
    figures, tables = [], []
    for name, by_length in groups.items():
        for length, points in sorted(by_length.items()):
            front = frontier(points)
            sizes = sorted({p.size for p in points})
            dots = [
                ScatterPoint(
                    sizes.index(p.size),
                    f"{p.size:g}, {'dense' if p.ratio == 1 else f'{p.ratio:g}x'}",
                    p.cost,
                    p.score,
                    front=p in front,
                    detail=f"size {p.size:g}, compression {p.ratio:g}: {p.score:.3f} at {units.count(p.cost)}",
                    label=p in front,
                )
                for p in points
            ]
            heading = f"{name}, {units.tokens(length)} tokens"
            cost = Axis("cost of an answer →", units.count, log=True)
            identity = f"{name.replace(' ', '-')}-{length}"
            figures.append(
                Figure(heading, charts.scatter(identity, heading, heading, dots, cost, Axis("↑ score", units.tick)))
            )
        tables.append((f"At equal cost: {name}", *isoflops_rows(by_length)))
    sentence = " ".join(isoflops_sentence(by_length, name) for name, by_length in groups.items())
    return _write(
        path,
        title=title,
        facts=[],
        sentence=sentence,
        measured=measured,
        figures=figures,
        lede="Up is better, left is cheaper. The thick line joins what nothing beats at its cost.",
        tables=tables,
        notes=[],
    )


def _write(path: Path, **given: Any) -> Path:
    page = pages().get_template("sparse.html.j2").render(**given)
    write_text_atomically(path, page)
    return path
