"""Report sections of the study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from regard.reproductions.framework.judging import Measurements
from regard.reproductions.framework.protocol import Setting
from regard.studies.in_context_functions.cells import BEST, LONGER, NEAREST, NOTHING, SHIFTED
from regard.workbench.reports.sections import Curves, Row, Section

Cells = Mapping[tuple[str, int], Measurements]
DRAWN = (BEST, "elimination", "Gaussian elimination", NEAREST, NOTHING)
"""References drawn in the pictures with the models; the others are in the tables only."""
PRETRAINED = "SmolLM2-135M"


def sections(
    cells: Cells, functions: Sequence[str], mechanisms: Sequence[str], settings: Mapping[str, Setting]
) -> list[Section]:
    """Accuracies by function and learner, then generalisation beyond training, heads, and the pretrained model."""
    found = [_function(cells, function, mechanisms) for function in functions]
    return [
        one
        for one in [
            *found,
            _beyond(cells, functions, mechanisms),
            _variants(cells, settings),
            _heads(cells),
            *_pretrained(cells),
        ]
        if one.rows
    ]


def mean(cells: Cells, setting: str, name: str) -> float | None:
    """The mean of a measured number over seeds; None where it was not measured."""
    values = _values(cells, setting, name)
    return sum(values) / len(values) if values else None


def error(cells: Cells, setting: str, name: str) -> float | None:
    """The standard error of the mean over seeds; None for fewer than two."""
    values = _values(cells, setting, name)
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def diverged(cells: Cells, setting: str) -> str:
    """How many runs of a setting diverged, which means leave out; "" if none did."""
    runs = [measured for (own, _), measured in cells.items() if own == setting]
    lost = sum(measured.get("end") is None for measured in runs)
    return f"{lost} of {len(runs)} runs" if lost else ""


def _values(cells: Cells, setting: str, name: str) -> list[float]:
    found = [measured.get(name) for (own, _), measured in cells.items() if own == setting]
    return [float(value) for value in found if value is not None]


def curve(cells: Cells, setting: str, name: str) -> list[tuple[float, float | None]]:
    """The mean over seeds of a measured curve, with examples numbered from 1."""
    curves = [found[name] for (own, _), found in cells.items() if own == setting and name in found]
    told = []
    for at, values in enumerate(zip(*curves, strict=True)):
        known = [value for value in values if value is not None]
        if known:
            told.append((float(at + 1), sum(known) / len(known)))
    return told


def _row(cells: Cells, learner: str, setting: str, prefix: str = "") -> Row:
    return {
        "learner": learner,
        "early": mean(cells, setting, f"{prefix}early"),
        "end": mean(cells, setting, f"{prefix}end"),
        "end ±": error(cells, setting, f"{prefix}end"),
        "all examples": mean(cells, setting, f"{prefix}score"),
    }


def _function(cells: Cells, function: str, mechanisms: Sequence[str]) -> Section:
    """All learners of a function: the models, then the references."""
    reference = f"{function}: references"
    names = learners_of(cells, reference)
    models = [one for one in mechanisms if any(own == f"{function}: {one}" for own, _ in cells)]
    rows = [_row(cells, one, f"{function}: {one}") for one in models]
    rows += [_row(cells, one, reference, f"{one} ") for one in names]
    lost = {one: diverged(cells, f"{function}: {one}") for one in models}
    if any(lost.values()):
        rows = [{**row, "diverged": lost.get(row["learner"], "")} for row in rows]
    curves = {one: curve(cells, f"{function}: {one}", "curve") for one in models}
    curves |= {one: curve(cells, reference, f"{one} curve") for one in DRAWN if one in names}
    return Section(
        function,
        f"Accuracy on new functions, by how many examples came before. {NOTHING.capitalize()} is what a model gets that reads "
        "no example; the ± is the standard error over seeds.",
        [_drawn("Accuracy over the context", curves)] if curves else [],
        rows,
    )


def _beyond(cells: Cells, functions: Sequence[str], mechanisms: Sequence[str]) -> Section:
    rows, curves = [], {}
    for function in functions:
        for one in mechanisms:
            setting = f"{function}: {one}"
            if mean(cells, setting, "end") is None:
                continue
            rows.append(
                {
                    "function": function,
                    "mechanism": one,
                    "end": mean(cells, setting, "end"),
                    f"end of {LONGER} times the examples": mean(cells, setting, "longer end"),
                    f"end with {SHIFTED:.0%} of the bits +1": mean(cells, setting, "shifted end"),
                }
            )
            if function == functions[0]:
                curves[one] = curve(cells, setting, "longer curve")
    return Section(
        "Beyond training",
        "The same models on longer contexts than they were trained on, and on inputs drawn from other distributions.",
        [_drawn(f"{functions[0]}: twice as many examples as in training", curves)] if curves else [],
        rows,
    )


def _variants(cells: Cells, settings: Mapping[str, Setting]) -> Section:
    """The models that were trained in other ways."""
    rows = []
    for name, setting in settings.items():
        usual = not any(setting.get(option) for option in ("taught", "noise", "pool", "frozen"))
        if setting["kind"] != "trained" or usual or mean(cells, name, "end") is None:
            continue
        tried = {"new contexts": "", "functions of the pool": "pooled ", "taught": "taught ", "untaught": "untaught "}
        rows += [
            {"model": name, "tried on": words}
            | {k: v for k, v in _row(cells, "", name, prefix).items() if k != "learner"}
            for words, prefix in tried.items()
            if mean(cells, name, f"{prefix}end") is not None
        ]
    return Section(
        "Trained in other ways",
        "Labels flipped in training only; functions from a fixed pool, tried on new ones and on those of the pool; layers as they "
        "were drawn, so that only what reads tokens and labels is trained; teaching sequences in half of the contexts.",
        rows=rows,
    )


def _heads(cells: Cells) -> Section:
    rows = []
    for setting in dict.fromkeys(own for own, _ in cells):
        if mean(cells, setting, "nearest heads") is None:
            continue
        names = ("induction heads", "best induction score", "nearest heads", "best nearest score")
        rows.append({"model": setting} | {name: mean(cells, setting, name) for name in names})
    return Section(
        "Heads",
        "Induction: the share of an input's attention that goes to its own label in earlier copies of a repeated context; nearest: "
        "to the label of the most similar input before. A head counts from one half. Only where a mechanism has a table of weights to look at.",
        rows=rows,
    )


def _pretrained(cells: Cells) -> list[Section]:
    """A section for each function on which the pretrained model was measured, with the references."""
    found = []
    for setting in dict.fromkeys(own for (own, _), measured in cells.items() if f"reference {NOTHING} end" in measured):
        names = [name.removeprefix("reference ") for name in learners_of(cells, setting) if name]
        rows = [_row(cells, PRETRAINED, setting)]
        rows += [_row(cells, one, setting, f"reference {one} ") for one in names]
        curves = {PRETRAINED: curve(cells, setting, "curve")}
        curves |= {one: curve(cells, setting, f"reference {one} curve") for one in DRAWN if one in names}
        found.append(
            Section(
                setting,
                "Asked in words for the label of each input after the examples before it; the likelier of the two labels "
                "counts.",
                [_drawn("Accuracy over the context", curves)],
                rows,
            )
        )
    return found


def learners_of(cells: Cells, setting: str) -> list[str]:
    """Names of the learners with a curve in the cells of a setting; the model's own name is ""."""
    names = [name for (own, _), measured in cells.items() if own == setting for name in measured]
    return list(dict.fromkeys(name[: -len("curve")].strip() for name in names if name.endswith("curve")))


def _drawn(caption: str, curves: Mapping[str, Sequence[tuple[float, float | None]]]) -> Curves:
    return Curves(caption, "example", "accuracy", curves)
