"""Report sections of the study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regard.studies.framework.protocol import Cells, Chosen
from regard.studies.softmax_regression.cells import VARIANTS
from regard.workbench.reports.sections import Curves, Section

LEARNER = "learner "
OTHERS = ("one step", "descent 2", "descent 5", "descent 20", "newton", "uniform")


def sections(chosen: Chosen, cells: Cells) -> list[Section]:
    """Learners and their sensitivities first, then bounds, extremes, solvers and derivatives; only those that have
    cells."""
    parts = (_learning, _sensitivities, _bounds, _extreme, _solvers, _derivatives)
    return [part for part in (one(cells) for one in parts) if part.rows or part.pictures]


def _learning(cells: Cells) -> Section:
    names = _learners(cells)
    rows = [
        {
            "learner": name,
            **{word: mean(cells, LEARNER + name, word) for word in ("loss", "one step", "uniform")},
            "loss over the step's": _over(mean(cells, LEARNER + name, "loss"), mean(cells, LEARNER + name, "one step")),
            "difference": mean(cells, LEARNER + name, "difference"),
            "untrained difference": mean(cells, LEARNER + name, "untrained difference"),
        }
        for name in names
    ]
    pictures = [
        _over_training(cells, *one)
        for one in (
            ("Loss of the layers", "|answer - target|² / 2", "losses", False),
            ("Difference from one step of gradient descent", "|answer - step's answer|", "differences", False),
        )
    ]
    others = {word: mean(cells, LEARNER + "softmax", word) for word in (*OTHERS, "one step, rate untuned")}
    known = "; ".join(f"{word}: {value:.3g}" for word, value in others.items() if value is not None)
    says = (
        "One layer of each mechanism reads keys with their targets, and answers for new keys. Losses of others on the same "
        f"tasks, all rates tuned unless it says otherwise: {known}. Newton is the minimum of the contexts' cross-entropy, uniform "
        "the answer 1/n. Of the context: asked for the keys whose targets stand in the context."
    )
    return Section("Layers that learn beside one step of gradient descent", says, pictures if names else (), rows)


def _sensitivities(cells: Cells) -> Section:
    names = _learners(cells)
    rows = []
    for name in names:
        cosines, slopes = (means(cells, LEARNER + name, which) for which in ("cosines", "slopes"))
        rows.append(
            {
                "learner": name,
                "cosine": cosines[-1],
                "untrained cosine": cosines[0],
                "norm of the difference": slopes[-1],
                "untrained norm": slopes[0],
            }
        )
    pictures = [
        _over_training(cells, *one)
        for one in (
            ("Cosine of the sensitivities to the query", "cosine", "cosines", True),
            ("Difference of the sensitivities to the query", "norm", "slopes", False),
        )
    ]
    says = (
        "A sensitivity is the gradient, with respect to a query, of the answer to it: how the answer would follow if the query moved. "
        "That of each layer beside that of one step of gradient descent at its best rate: the cosine between them, and the norm of their "
        "difference; means over tasks."
    )
    return Section("Sensitivities to the query beside one step's", says, pictures if names else (), rows)


def _learners(cells: Cells) -> list[str]:
    return list(dict.fromkeys(setting.removeprefix(LEARNER) for setting, _ in cells if setting.startswith(LEARNER)))


def _over_training(cells: Cells, caption: str, axis: str, which: str, rising: bool) -> Curves:
    """A picture of all learners over their training."""
    curves = {}
    for name in _learners(cells):
        moments, values = (means(cells, LEARNER + name, one) for one in ("moments", which))
        curves[name] = [(at, value) for at, value in zip(moments, values, strict=True) if at > 0]
    return Curves(caption, "training step", axis, curves, log_x=True, rising=rising)


def _bounds(cells: Cells) -> Section:
    settings = sorted({setting for setting, _ in cells if setting.startswith("bounds ")})
    rows: list[dict[str, Any]] = []
    tight: dict[str, list[tuple[float, float | None]]] = {}
    loose: dict[str, list[tuple[float, float | None]]] = {}
    for setting in settings:
        radius = setting.removeprefix("bounds ")
        for which in ("weight", "data"):
            rows.append(
                {
                    "shift": which,
                    "norms up to": radius,
                    "largest over tight": mean(cells, setting, f"{which}: largest"),
                    "draws within 5 %": mean(cells, setting, f"{which}: within 5 %"),
                    "draws above half": mean(cells, setting, f"{which}: above half"),
                    "log10 of largest over loose": mean(cells, setting, f"{which}: loose log10"),
                }
            )
            for curves, name in ((tight, "ratios"), (loose, "loose log10s")):
                values = means(cells, setting, f"{which}: {name}")
                curves[f"{which}, {radius}"] = [(i / max(1, len(values) - 1), v) for i, v in enumerate(values)]
    says = (
        "How far the target moves over what the bounds allow, in sorted draws. The paper's bound cannot fail in practice: it "
        "allows powers of ten more than anything does, so it tells little that it holds; the tight one does tell something."
    )
    pictures = (
        Curves("Over the tight bound", "share of draws", "ratio", tight),
        Curves("Over the paper's bound", "share of draws", "log10 of the ratio", loose),
    )
    return Section("Both bounds on both shifts", says, pictures if settings else (), rows)


def _extreme(cells: Cells) -> Section:
    distances = [0.01, 0.1, 0.3, 1.0, 3.0, 10.0]
    curves = {
        which: list(zip(distances, means(cells, "extreme", f"{which}s"), strict=False)) for which in ("weight", "data")
    }
    if not any(curves.values()):
        return Section("The tight bound at its extreme")
    rows = [
        {"size of the shift": at, **{which: curves[which][i][1] for which in curves}} for i, at in enumerate(distances)
    ]
    says = "Two keys are opposite and share the prediction in halves: small shifts along them reach the bound."
    picture = Curves("Over the tight bound, at its extreme", "size of the shift", "ratio", curves, log_x=True)
    return Section("The tight bound at its extreme", says, (picture,), rows)


def _solvers(cells: Cells) -> Section:
    curves = {
        name: [
            (float(i), max(v, 1e-17) if v is not None else None) for i, v in enumerate(means(cells, "solvers", name))
        ]
        for name in ("newton", "descent")
    }
    if not any(curves.values()):
        return Section("Solvers")
    words = ("order", "newton gradient", "largest rise", "regularised: lowest eigenvalue", "plain: indefinite")
    says = (
        "Regularised problems from 0. Order 2 is quadratic convergence of Newton's method; the largest rise is that of a step of "
        "gradient descent at 1 over a bound of |H|; indefinite is the share of problems whose Hessian has a negative eigenvalue without the "
        "regulariser."
    )
    picture = Curves("Loss above the least", "step", "loss", curves, log_y=True, rising=False)
    return Section("Solvers", says, (picture,), [{word: mean(cells, "solvers", word) for word in words}])


def _derivatives(cells: Cells) -> Section:
    rows = [
        {"variant": name, "largest relative error": mean(cells, "derivatives", name)}
        for name in (*VARIANTS, "identity")
        if mean(cells, "derivatives", name) is not None
    ]
    written = mean(cells, "construction", "error")
    if written is not None:
        rows.append({"variant": "linear attention as one step", "largest relative error": written})
    says = (
        "Closed forms beside automatic differentiation, the identity of both shifts, and the construction, in float64."
    )
    return Section("Exactness", says, (), rows)


def mean(cells: Cells, setting: str, name: str) -> float | None:
    """Mean of a measured number over the seeds."""
    values = [found[name] for (own, _), found in cells.items() if own == setting and found.get(name) is not None]
    return sum(values) / len(values) if values else None


def means(cells: Cells, setting: str, name: str) -> list[Any]:
    """Elementwise means of lists over the seeds."""
    lists: Sequence[Sequence[float | None]] = [found[name] for (own, _), found in cells.items() if own == setting]
    columns = zip(*lists, strict=True)
    return [None if None in column else sum(column) / len(column) for column in columns]


def _over(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other
