"""The report page of a compression study, and the rows of its table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from regard.core.files import write_text_atomically
from regard.measurement import units
from regard.measurement.statistics import pareto_front
from regard.workbench import side_effects
from regard.workbench.lighter.study import Row, Study, caution, quality_in_words, recommend
from regard.workbench.reports import charts
from regard.workbench.reports.charts import Figure, ScatterPoint
from regard.workbench.reports.markers import glyph
from regard.workbench.reports.pages import pages
from regard.workbench.reports.scales import Axis, is_number


def labels(study: Study) -> list[str]:
    """Column headings of the table."""
    return [
        "recipe",
        study.metric,
        "lost",
        "size, smaller",
        *(f"{name}, faster" for name in study.original.milliseconds),
    ]


def cells(study: Study, row: Row) -> list[str]:
    """The cells of a table row."""
    timed = [
        f"{units.milliseconds(_paced(study, row, name))}, {row.speedup[name]:.2f}x"
        for name in study.original.milliseconds
    ]
    size = f"{units.size(row.bytes)}, {study.original.bytes / row.bytes:.2f}x"
    lost = "" if row is study.original else "0.00%" if abs(row.loss) < 5e-5 else f"{row.loss:+.2%}"
    return [row.recipe, quality_in_words(row.quality), lost, size, *timed]


def _paced(study: Study, row: Row, name: str) -> float:
    """Milliseconds of a recipe, corrected for drift in the machine's speed between recipes: the original's time divided
    by the median ratio within turns."""
    return study.original.milliseconds[name] / row.speedup[name]


def effects_table(study: Study) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of side effects: for the original, for each recipe, and for the text itself."""
    return ["recipe", *side_effects.HEADINGS], side_effects.rows("original", study.effects)


def write_page(study: Study, path: Path, *, command: Callable[[str], str], tolerance: float) -> Path:
    """Write the HTML page of a study as a single, self-contained file.

    Args:
        command: returns the command that makes the model of a recipe.
        tolerance: as in :func:`regard.workbench.lighter.study.recommend`.
    """
    best, sentence = recommend(study, tolerance)
    everything = [study.original, *study.rows]
    page = (
        pages()
        .get_template("lighter.html.j2")
        .render(
            study=study,
            sentence=sentence,
            caution=caution(study, tolerance),
            command=None if best is None else command(best),
            figures=_figures(study, best),
            labels=labels(study),
            rows=[[glyph(i) + row.recipe, *cells(study, row)[1:]] for i, row in enumerate(everything)],
            best=[i for i, row in enumerate(everything) if row.recipe == best],
            kept={name: why for row in study.rows for name, why in row.kept.items()},
            effects=effects_table(study) if study.effects else None,
            effects_sentence=side_effects.sentence("original", study.effects) if study.effects else "",
            effects_measured=side_effects.MEASURED,
        )
    )
    write_text_atomically(path, page)
    return path


def _figures(study: Study, best: str | None) -> list[Figure]:
    everything = [study.original, *study.rows]
    arrow = "" if study.higher_is_better else " (lower is better, so low is up)"
    quality = Axis(f"↑ {study.metric}{arrow}", units.tick, rising=study.higher_is_better)
    costs: list[tuple[str, str, Axis, list[float]]] = [
        (
            "size",
            "size",
            Axis("size of the weights, smaller →", units.size, log=True, base=2, rising=False),
            [float(row.bytes) for row in everything],
        )
    ]
    for name in study.original.milliseconds:
        axis = Axis(f"time of {name}, faster →", units.milliseconds, log=True, rising=False)
        costs.append((name.replace(" ", "-"), name, axis, [_paced(study, row, name) for row in everything]))
    found = []
    for identity, caption, axis, values in costs:
        sign = 1.0 if study.higher_is_better else -1.0
        shown = [i for i, row in enumerate(everything) if is_number(row.quality) and axis.usable(values[i])]
        if len(shown) < 2:
            continue
        front = pareto_front({str(i): (sign * everything[i].quality, -values[i]) for i in shown})
        points = [
            ScatterPoint(
                i,
                everything[i].recipe,
                values[i],
                everything[i].quality,
                front=str(i) in front,
                winner=everything[i].recipe == best,
                detail=f"{everything[i].recipe}: {quality_in_words(everything[i].quality)} {study.metric}, {axis.format(values[i])}",
            )
            for i in shown
        ]
        title = f"{study.metric} against {caption}"
        found.append(Figure(caption, charts.scatter(identity, title, title, points, axis, quality)))
    return found
