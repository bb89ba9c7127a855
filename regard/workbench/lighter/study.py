"""Compression recipes tried on one model: quality, size and time of each compared with the original, in a resumable
folder.

``results.json`` in the folder holds the finished results; an interrupted recipe resumes at the block it had reached.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard.compression import Compressed, Recipe, compress
from regard.compression.layers import find_layers
from regard.compression.resume import digest
from regard.contract import Unsupported
from regard.core.files import write_text_atomically
from regard.integrations.conv1d import conv1d_as_linear
from regard.measurement import provenance, units
from regard.measurement.budget import Budget
from regard.measurement.timing import calm_clock, rounds
from regard.models.weights import weights_bytes, weights_digest
from regard.workbench.lighter.subjects import Subject
from regard.workbench.side_effects import Effects, Probes

RESULTS, REPORT, WORK = "results.json", "report.html", "work"
SCORING, CALIBRATING = 0.35, 0.3
"""Shares of the budget for scoring and for calibration."""
FEWEST_ITEMS, MOST_ITEMS = 2, 256
FEWEST_CALIBRATION, MOST_CALIBRATION = 4, 32
TIMING_SECONDS = 6.0
"""Timing budget of each recipe."""

NOTICEABLE = 1.05
"""Ratio from which one is called faster than the other."""

OF_WHOLE_ITEMS = ("accuracy", "agreement")
"""Metrics that count right items."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """The effect of a recipe on the model.

    Attributes:
        recipe: the recipe as text; ``original`` for the model itself.
        quality: quality by the subject's metric.
        loss: relative loss of quality against the original; negative for a gain.
        bytes: size of the model.
        milliseconds, speedup: by action, its time, and the original's time (measured in turns with it) divided by that
            time.
        seconds: duration of the compression.
        kept: for each layer that was left unchanged, the reason.
        layers: number of quantized layers.
    """

    recipe: str
    quality: float
    loss: float
    bytes: int
    milliseconds: dict[str, float]
    speedup: dict[str, float]
    seconds: float
    kept: dict[str, str]
    layers: int


@dataclass(frozen=True)
class Study:
    """The results of all recipes tried on a model.

    Attributes:
        described, metric, higher_is_better: as in the subject.
        items, calibration: number of items for scoring and for calibration.
        original: the row of the uncompressed model.
        rows: the rows of the recipes, in the order requested.
        refused: for each recipe without a row, the reason.
        machine: the CPU that it was measured on.
        threads: number of torch threads.
        effects: side effects, with those of the original first; empty if they were not requested.
    """

    described: str
    metric: str
    higher_is_better: bool
    items: int
    calibration: int
    original: Row
    rows: list[Row]
    refused: dict[str, str]
    machine: str | None
    threads: int
    effects: dict[str, Effects] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The study as data for JSON."""
        effects = {name: found.as_dict() for name, found in self.effects.items()}
        return {**asdict(replace(self, effects={})), "side_effects": effects or None}


def study(
    subject: Subject,
    recipes: Sequence[Recipe],
    folder: Path,
    budget: Budget,
    *,
    probes: Probes | None = None,
    effects: int = 0,
    say: Say = lambda sentence: None,
    on_progress: Callable[[str, int, int], None] = lambda doing, done, count: None,
) -> Study:
    """Try compression recipes on a model.

    Args:
        folder: folder for the results; the same call resumes there.
        budget: a time. It determines how many items are scored and calibrated with; recipes for which no time is left
            are skipped.
        probes, effects: the probes for side effects, and the number of samples; 0 for none.
        say: called with sentences on what was decided.
        on_progress: called with the current work, the number of finished recipes, and their total.

    Raises:
        Unsupported: for a budget that is not a time, a folder with another study, or a model without linear layers if
            all recipes change their weights.
    """
    if budget.unit != "seconds":
        raise Unsupported(f"budget {budget}", supported="a time: 90s, 20m, 2h", nearest="20m")
    model = subject.load()
    if all(recipe.changes_weights for recipe in recipes):
        with conv1d_as_linear(model):
            find_layers(model)
    began = time.monotonic()
    state = _opened(folder / RESULTS, subject, model)
    spent = float(state["spent"])

    def used() -> float:
        return spent + time.monotonic() - began

    def keep() -> None:
        state["spent"] = used()
        text = json.dumps(state, indent=2, ensure_ascii=False) + "\n"
        write_text_atomically(folder / RESULTS, text)

    if "original" not in state:
        on_progress("the original", 0, len(recipes))
        state |= _planned(subject, model, recipes, budget, say)
        quality = subject.quality(model, state["items"])
        state["original"] = asdict(Row("original", quality, 0.0, weights_bytes(model), {}, {}, 0.0, {}, 0))
        keep()
    original = Row(**state["original"])
    answers: dict[str, list[Any]] = state.setdefault("effects", {})
    refused: dict[str, str] = {}  # not kept: another version may do what this one refuses

    def ask(name: str, asked: nn.Module) -> None:
        if probes is not None and len(answers.get(name, ())) < effects:
            on_progress(f"{name}: side effects", len(state["rows"]), len(recipes))
            reader = subject.reader(asked)
            answers[name] = [asdict(probes.ask(reader, number)) for number in range(effects)]
            keep()

    ask("original", model)
    for i, recipe in enumerate(recipes):
        answered = len(answers.get(recipe.name, ())) >= effects
        if recipe.name in state["rows"] and answered:
            continue
        if used() > budget.amount:
            say(f"the budget of {budget} is over: {recipe.name} is left out")
            continue
        on_progress(recipe.name, i, len(recipes))
        work = folder / WORK / hashlib.blake2b(recipe.name.encode(), digest_size=6).hexdigest()
        try:
            changed = compress(
                copy.deepcopy(model),
                recipe,
                calibration_data(subject, recipe, state["calibration"]),
                training=training_data(subject, recipe),
                run=subject.run,
                work=work if recipe.needs else None,
                on_layer=lambda name, done, count, i=i, recipe=recipe: on_progress(  # type: ignore[misc]
                    f"{recipe.name}: {name} ({done} of {count})", i, len(recipes)
                ),
            )
        except Unsupported as error:
            refused[recipe.name] = str(error)
        else:
            on_progress(f"{recipe.name}: scoring", i, len(recipes))
            state["rows"][recipe.name] = asdict(_measured(subject, model, original, changed, state["items"]))
            ask(recipe.name, changed.model)
        shutil.rmtree(work, ignore_errors=True)
        keep()
    late = {
        recipe.name: f"the budget of {budget} was over"
        for recipe in recipes
        if recipe.name not in state["rows"] and recipe.name not in refused
    }
    rows = [Row(**state["rows"][recipe.name]) for recipe in recipes if recipe.name in state["rows"]]
    return Study(
        subject.described,
        subject.metric,
        subject.higher_is_better,
        state["items"],
        state["calibration"],
        _timed_original(original, rows),
        rows,
        {**refused, **late},
        provenance.fingerprint()["cpu"],
        torch.get_num_threads(),
        {
            name: Effects.of(answers[name][:effects])
            for name in ("original", *(row.recipe for row in rows))
            if effects and len(answers.get(name, ())) >= effects
        },
    )


def calibration_data(subject: Subject, recipe: Recipe, count: int) -> list[Any] | None:
    """The batches for a recipe's calibration (`count` items in all) or search; None if it needs no data."""
    if "loss" in recipe.needs:
        return subject.choosing()
    return subject.calibration(count) if recipe.needs - {"training"} else None


def training_data(subject: Subject, recipe: Recipe) -> list[Any] | None:
    """The batches for a recipe's training; None if it does not train."""
    steps = [step.steps for _, step in recipe.steps if "training" in step.needs]
    return subject.training(max(steps)) if steps else None


def _planned(subject: Subject, model: nn.Module, recipes: Sequence[Recipe], budget: Budget, say: Say) -> dict[str, Any]:
    """Choose the number of items for scoring and for calibration."""
    few = min(FEWEST_ITEMS, subject.items)
    subject.quality(model, few)
    started = time.monotonic()
    subject.quality(model, few)
    each = max((time.monotonic() - started) / max(few, 1), 1e-6)
    calibrating = sum((4 if "second" in recipe.needs else 1) for recipe in recipes if recipe.needs)
    items = int(SCORING * budget.amount / (len(recipes) + 1) / each)
    calibration = int(CALIBRATING * budget.amount / max(calibrating, 1) / each)
    items = max(few, min(items, MOST_ITEMS, subject.items))
    calibration = max(FEWEST_CALIBRATION, min(calibration, MOST_CALIBRATION))
    say(f"scored on {items} held-out items, calibrated with {calibration}, at about {each:.2g} s an item")
    return {"items": items, "calibration": calibration}


def _measured(subject: Subject, model: nn.Module, original: Row, changed: Compressed, items: int) -> Row:
    quality = subject.quality(changed.model, items)
    milliseconds, speedup = {}, {}
    before, after = subject.timed(model), subject.timed(changed.model)
    for name in after:
        pair = {"before": before[name], "after": after[name]}
        found = rounds(pair, seconds=TIMING_SECONDS / len(after), most=40, clock=calm_clock())
        milliseconds[name] = 1e3 * _middle(found["after"])
        milliseconds[f"original {name}"] = 1e3 * _middle(found["before"])
        speedup[name] = _middle([a / b for a, b in zip(found["before"], found["after"], strict=True)])
    report = changed.report
    return Row(
        report.recipe,
        quality,
        loss_of(quality, original.quality, higher_is_better=subject.higher_is_better),
        report.bytes_after,
        milliseconds,
        speedup,
        report.seconds,
        report.kept,
        len(report.layers),
    )


def loss_of(quality: float, original: float, *, higher_is_better: bool) -> float:
    """Relative loss of quality against the original."""
    change = quality - original if not higher_is_better else original - quality
    return change / max(abs(original), 1e-12)


def _timed_original(original: Row, rows: Sequence[Row]) -> Row:
    """The original with the times that were measured in turns with the recipes."""
    names = [name for name in (rows[0].milliseconds if rows else ()) if name.startswith("original ")]
    times = {name.removeprefix("original "): _middle([row.milliseconds[name] for row in rows]) for name in names}
    return Row(**{**asdict(original), "milliseconds": times, "speedup": dict.fromkeys(times, 1.0)})


def recommend(found: Study, tolerance: float = 0.01) -> tuple[str | None, str]:
    """The recipe to use, or None for the original, and a sentence that says so.

    Among the recipes that lose no more than `tolerance`, it is the fastest, or the smallest if none is noticeably
    faster.
    """
    if not found.rows:
        return None, "Keep the original: no recipe was measured."
    good = [row for row in found.rows if row.loss <= tolerance]
    if not good:
        least = min(found.rows, key=lambda row: row.loss)
        return None, (
            f"Keep the original: every recipe loses more than {100 * tolerance:.2g} % of the {found.metric}; "
            f"{least.recipe} loses least ({least.loss:.1%})."
        )
    main = next(iter(good[0].speedup))
    best = max(good, key=lambda row: row.speedup[main])
    faster = best.speedup[main]
    if faster <= NOTICEABLE:
        best = min(good, key=lambda row: row.bytes)
        faster = best.speedup[main]
    ratio = found.original.bytes / best.bytes
    smaller = f"{ratio:.2g} times smaller" if ratio > NOTICEABLE else "no smaller"
    if faster > NOTICEABLE:
        link = "and" if ratio > NOTICEABLE else "but"
        speed = f"{smaller} {link} {faster:.2g} times faster in {main}"
    else:
        slower = f"{1 / faster:.2g} times slower" if faster < 1 / NOTICEABLE else "no faster"
        speed = f"{smaller}, but {slower} in {main} (no recipe that loses so little is faster)"
    return best.recipe, (
        f"Use {best.recipe}{'' if faster > NOTICEABLE else ' where size matters'}: {speed}, with "
        f"{quality_in_words(best.quality)} {found.metric} against {quality_in_words(found.original.quality)} "
        f"({_changed(best.loss)})."
    )


def caution(found: Study, tolerance: float = 0.01) -> str:
    """A sentence if the scores are too coarse for the tolerance; otherwise empty."""
    worth = 1 / (found.items * max(found.original.quality, 1 / found.items)) if found.items else 0.0
    if found.metric not in OF_WHOLE_ITEMS or worth <= tolerance:
        return ""
    return (
        f"{found.items} items are few: a single one is worth {worth:.1%} of the {found.metric}, more than the tolerance of "
        f"{100 * tolerance:.2g} %, so small differences may be chance. Use more data."
    )


def quality_in_words(quality: float) -> str:
    """The quality with at least four digits, enough to show a loss of a tenth of a percent."""
    return f"{quality:,.4g}" if abs(quality) < 1000 else units.number(quality)


def _changed(loss: float) -> str:
    if abs(loss) < 5e-4:
        return "unchanged"
    return f"{abs(loss):.1%} {'worse' if loss > 0 else 'better'}"


def _opened(file: Path, subject: Subject, model: nn.Module) -> dict[str, Any]:
    """The state of the study in a folder; raises Unsupported if another model or other data were studied there."""
    identity = {
        "subject": subject.described,
        "items": subject.items,
        "model": weights_digest(model),
        "data": digest(subject.looked_at()),
    }
    if not file.is_file():
        return {"identity": identity, "rows": {}, "spent": 0.0}
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        same = before["identity"] == identity
    except (ValueError, TypeError, KeyError):
        raise Unsupported(f"{file}, which cannot be read", supported="a file of `regard compress`") from None
    if not same:
        raise Unsupported(
            f"{file.parent}, which holds a study of another model or other data",
            supported="a new folder, or the same study again",
            nearest="another --output",
        )
    return before


def _middle(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
