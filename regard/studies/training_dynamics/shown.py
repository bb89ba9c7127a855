"""Report sections of the study."""

from __future__ import annotations

import itertools
from typing import Any

from regard.studies.framework.protocol import Cells, Chosen
from regard.studies.training_dynamics.cells import FORMS, OPTIMISERS
from regard.studies.training_dynamics.text import CONTROL, on_text_of
from regard.workbench.reports.sections import Curves, Heat, Section

Curve = list[tuple[float, float | None]]


def sections(chosen: Chosen, cells: Cells) -> list[Section]:
    """A run, the sweep, SGD against its limit, text and exactness; only those that have cells."""
    parts = (_run(cells), _sweep(cells), _following(cells), _text(chosen, cells), _exactness(cells))
    return [part for part in parts if part is not None]


def _run(cells: Cells) -> Section | None:
    if not any(setting == "run" for setting, _ in cells):
        return None
    course = {name: _by_step(means(cells, "run", name)) for name in ("common", "entropy", "change")}
    chances, attention = means(cells, "run", "chances"), means(cells, "run", "distinct")
    words = ("first common", "last common", "last entropy", "in order", "snapped", "last loss", "conservation")
    row: dict[str, Any] = {word: mean(cells, "run", word) for word in words}
    row |= {
        word: mean(cells, "biases", word) for word in ("common tokens fall", "distinct tokens rise", "growth as f²")
    }
    return Section(
        "One run: scan, then snap",
        "z are the layer's scores, c the attention that they give, y its decoder, f the attention scaled to length 1. Attention "
        "c is over infinitely long contexts, so that their noise hides nothing. First the mass moves from common tokens to "
        "distinct ones, the likelier of them more; then it stops: snapped is the step from which z moves less than a tenth of its "
        "fastest. Conservation is the largest change of the sums that gradient descent keeps. The last columns are shares of signs "
        "in the limit, and the correlation of growth with f².",
        (
            Curves("Attention on common tokens", "step", "share", {"common tokens": course["common"]}),
            Curves("How fast z moves", "step", "|change of z|", {"z": [p for p in course["change"] if p[0] > 0]}),
            Curves(
                "Distinct tokens at the end",
                "chance of the token",
                "attention",
                {"attention": list(zip(chances, attention, strict=True)), "at first": [(p, p) for p in chances]},
            ),
        ),
        [row],
    )


def _sweep(cells: Cells) -> Section | None:
    names = list(dict.fromkeys(setting for setting, _ in cells if " last, rate " in setting))
    if not names:
        return None
    rows, curves, values = [], {}, []
    for name in names:
        ratios, entropies = means(cells, name, "ratios"), means(cells, name, "entropies")
        moments = means(cells, name, "moments")
        curves[name] = list(zip(ratios, entropies, strict=True))
        values.append(entropies)
        rows.append(
            {
                "facts": name,
                **{f"entropy at {ratio:g}": entropy for ratio, entropy in curves[name]},
                **{f"frozen at {ratio:g}": moment for ratio, moment in zip(ratios, moments, strict=True)},
            }
        )
    falling = [row["facts"] for row in rows if any(b < a for a, b in _pairs(curves[row["facts"]]))]
    says = (
        "Entropy of c at the end, in nats, and the step from which z moves less than a tenth of its fastest (frozen), by the rate of "
        "y over that of z. A row is named by how many last tokens there are and by the rate of z. "
        + (
            f"It does not rise at every step of the ratio for: {'; '.join(falling)}."
            if falling
            else "It rises throughout."
        )
    )
    columns = [f"{ratio:g}" for ratio in means(cells, names[0], "ratios")]
    pictures = [Heat("Entropy by ratio", names, columns, values)]
    if len(names) <= 8:
        pictures = [Curves("Entropy by ratio", "rate of y over rate of z", "nats", curves, log_x=True)]  # type: ignore[list-item]
    return Section("Do larger ratios freeze earlier, and attend to more?", says, pictures, rows)


def _pairs(curve: Curve) -> list[tuple[float, float]]:
    known = [value for _, value in curve if value is not None]
    return list(itertools.pairwise(known))


def _following(cells: Cells) -> Section | None:
    if not any(setting == "following" for setting, _ in cells):
        return None
    sizes, errors = means(cells, "following", "batches"), means(cells, "following", "errors")
    course = {
        f"batch {size:g}": _by_step(means(cells, "following", f"course {which}"))
        for which, size in (("smallest", sizes[0]), ("largest", sizes[-1]))
    }
    power = mean(cells, "following", "power")
    says = (
        "How far z is from the solution of the equation of infinitely long contexts, over how far that one has gone. "
        + ("" if power is None else f"The error falls as the batch to the power {power:.2f}; ")
        + "what is left at large batches is due to the finite contexts and the step size."
    )
    rows = [{"batch": int(size), "error": error} for size, error in zip(sizes, errors, strict=True)]
    errors_by_size: Curve = list(zip(sizes, errors, strict=True))
    pictures = (
        Curves(
            "Error by batch size",
            "sequences of a step",
            "error",
            {"SGD": errors_by_size},
            log_x=True,
            log_y=True,
            rising=False,
        ),
        Curves("Error over the run", "step", "error", course, rising=False),
    )
    return Section("Finite gradient descent beside the limit", says, pictures, rows)


def _text(chosen: Chosen, cells: Cells) -> Section | None:
    there = {setting for setting, _ in cells}
    names = [name for name in dict.fromkeys((CONTROL, *chosen.mechanisms)) if on_text_of(name) in there]
    if not names:
        return None

    def over(name: str, what: str) -> Curve:
        moments, values = (means(cells, on_text_of(name), one) for one in ("moments", what))
        return [(at, value) for at, value in zip(moments, values, strict=True) if at > 0]

    words = ("last entropy", "last frequent over others", "snapped", "first loss", "last loss")
    rows: list[dict[str, Any]] = [
        {"mechanism": name, **{word: mean(cells, on_text_of(name), word) for word in words}} for name in names
    ]
    signs = [
        f"{row['mechanism']} {'less' if ratio < 1 else 'more'} ({ratio:.3g})"
        for row in rows
        if (ratio := row["last frequent over others"]) is not None
    ]
    sign = f" At the end frequent tokens are looked at, relative to others, by {'; '.join(signs)}." if signs else ""
    says = (
        "One layer of one head of each mechanism. Lift is the share of the weights over what equal weights would give; the ten most "
        "frequent tokens stand for common ones, and the others are the next thirty. The paper's sign is less." + sign
    )
    lifts = {f"{name}, {which}": over(name, which) for name in names for which in ("frequent", "others")}
    return Section(
        "Real text",
        says,
        (
            Curves(
                "Entropy of the head, of 1", "step", "entropy", {one: over(one, "entropy") for one in names}, log_x=True
            ),
            Curves("Lift", "step", "lift", lifts, log_x=True),
            Curves(
                "How fast the weights change",
                "step",
                "share per step",
                {one: over(one, "change") for one in names},
                log_x=True,
            ),
        ),
        rows,
    )


def _exactness(cells: Cells) -> Section | None:
    rows = [
        {
            "what": name,
            "gradient's error": mean(cells, "exactness", f"gradient: {name}"),
            "change of the conserved sums": mean(cells, "exactness", f"conserved: {name}"),
        }
        for name in FORMS
    ] + [
        {
            "what": name,
            "gradient's error": None,
            "change of the conserved sums": mean(cells, "exactness", f"changed by: {name}"),
        }
        for name in OPTIMISERS
    ]
    if all(row["change of the conserved sums"] is None for row in rows):
        return None
    says = (
        "Gradients beside automatic differentiation, and the largest change of what gradient descent conserves: sum over keys of z, "
        "or the sum of the keys of a factored z. Adam and weight decay do not conserve it; what SGD changes is rounding."
    )
    courses = {
        name: [(step, value or None) for step, value in _by_step(course)]
        for name in OPTIMISERS
        if (course := means(cells, "exactness", f"course: {name}"))
    }
    pictures = (
        (Curves("Change of the conserved sums", "step", "largest change", courses, log_y=True),) if courses else ()
    )
    return Section("Exactness, and the conservation law", says, pictures, rows)


def _by_step(values: list[Any]) -> Curve:
    return [(float(step), value) for step, value in enumerate(values)]


def mean(cells: Cells, setting: str, name: str) -> float | None:
    """Mean of a measured number over the seeds."""
    values = [found[name] for (own, _), found in cells.items() if own == setting and found.get(name) is not None]
    return sum(values) / len(values) if values else None


def means(cells: Cells, setting: str, name: str) -> list[Any]:
    """Elementwise means of lists over the seeds that have them; those of earlier versions may not."""
    lists = [found[name] for (own, _), found in cells.items() if own == setting and name in found]
    return [None if None in column else sum(column) / len(column) for column in zip(*lists, strict=True)]
