"""A vision transformer compared with the original: agreement, accuracy, and speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regard.integrations.encoders import UNASKED
from regard.measurement import units
from regard.measurement.timing import interleaved
from regard.retrofit.hosts import Batch, VisionHost
from regard.retrofit.measures.shared import (
    CLOSE,
    MODELS,
    ORIGINAL,
    RETROFIT,
    Closeness,
    Loss,
    Models,
    Row,
    beside,
    judgement,
    kept,
    longer,
    mean_and_error,
    operations,
    source_notes,
    times,
    times_as_long,
)
from regard.retrofit.pace import Plan
from regard.retrofit.pictures import Pictures, Some
from regard.retrofit.settings import RetrofitSettings

LARGER = (1, 2, 4)
"""Factors of height and width of the images whose operations are counted."""
AT_ONCE = 4
"""Ratio between the sizes of consecutive timed batches."""
SAME, POINTS = 0.95, 0.01
"""The least share of images on which a retrofit must agree to be recommended, and, where classes are known, the largest
loss of accuracy."""


def parts(
    host: VisionHost, student: Any, pictures: Pictures, settings: RetrofitSettings, plan: Plan
) -> dict[str, Callable[[], Any]]:
    """The measurements by name; see :class:`regard.retrofit.measures.Measures`."""
    models, most = {ORIGINAL: host.model, RETROFIT: student}, plan.windows * settings.rows
    found: dict[str, Callable[[], Any]] = {
        f"quality on {source}": partial(quality, models, host, images.spread(most), settings.rows)
        for source, images in pictures.sources.items()
    }
    batch = host.batch(pictures, 0, settings.seed, settings)
    for count in at_once(settings.rows):
        found[f"time of {count}"] = partial(time_of, models, batch.split(count)[0])
    return found


def at_once(rows: int) -> list[int]:
    """Sizes of the timed batches: from one image up to a training step's."""
    found = [rows]
    while found[-1] > 1:
        found.append(max(found[-1] // AT_ONCE, 1))
    return found[::-1]


def results(
    host: VisionHost, student: Any, pictures: Pictures, settings: RetrofitSettings, found: Mapping[str, Any]
) -> dict[str, Any]:
    """All figures of the record, from the results of the parts."""
    sides = [(factor, host.tokens(factor)) for factor in LARGER]
    counts, both = at_once(settings.rows), {ORIGINAL: host.model, RETROFIT: student}
    return {
        "quality": {source: found[f"quality on {source}"] for source in pictures.sources},
        "time": found[f"time of {counts[-1]}"],
        "time_by_batch": {str(count): found[f"time of {count}"] for count in counts},
        "tokens": host.reads(settings),
        "operations": {m: operations(host, model, host.reads(settings)) for m, model in both.items()},
        "operations_by_size": {
            f"{factor * host.view.height} x {factor * host.view.width}": {
                "tokens": tokens,
                **{m: operations(host, model, tokens) for m, model in both.items()},
            }
            for factor, tokens in sides
        },
    }


@torch.no_grad()
def quality(models: Models, host: VisionHost, images: Some, rows: int) -> dict[str, Any]:
    """How often both models predict the same class, and how often each is right if classes are known; for a model
    without classes, how much of its features' variance is kept; and how much of the hidden states' variance after each
    layer."""
    closeness, said = Closeness(), {name: list[Tensor]() for name in MODELS}
    layers = [Closeness() for _ in host.layers]
    for chosen in torch.arange(len(images)).split(rows):
        batch: Batch = host.of_images(images.at(chosen))
        answers, hidden = {}, {}
        for name, model in models.items():
            with host.watched(model) as hidden[name]:
                answers[name] = host.answers(model, batch)
        closeness.add(answers[RETROFIT], answers[ORIGINAL])
        for number, layer in enumerate(layers):
            layer.add(*(hidden[name][number].flatten(0, -2) for name in (RETROFIT, ORIGINAL)))
        for name, its in answers.items():
            said[name].append(its.argmax(-1))
    found: dict[str, Any] = {"images": len(images), "by_layer": [layer.share()[0] for layer in layers]}
    if not host.distributes:
        found["kept"], found["kept_error"] = closeness.share()
        return found
    first, second = (torch.cat(said[name]) for name in MODELS)
    found["agreement"], found["standard_error"] = mean_and_error((first == second).double())
    known = images.labels != UNASKED
    if bool(known.any()):
        right = {name: (torch.cat(said[name]) == images.labels)[known].double() for name in MODELS}
        found["accuracy"] = {name: float(its.mean()) for name, its in right.items()}
        lost, error = mean_and_error(right[RETROFIT] - right[ORIGINAL])
        found["accuracy"] |= {"change": lost, "standard_error": error}
    return found


@torch.no_grad()
def time_of(models: Models, batch: Batch) -> dict[str, Any]:
    """Seconds for a batch of images."""
    found = interleaved({name: partial(model, batch.inputs) for name, model in models.items()}, seconds=10.0, least=3)
    return {"images": len(batch.inputs), **{name: asdict(timing) for name, timing in found.items()}}


def rows(results: Mapping[str, Any]) -> list[Row]:
    """Table rows of the figures: a label, the original's value, the retrofit's value."""
    found: list[Row] = []
    for source, its in results["quality"].items():
        if "kept" in its:
            share = kept(its["kept"], its["kept_error"])
            found.append((f"variance of features that is kept, {source}", "all", share))
            continue
        same = kept(its["agreement"], its["standard_error"])
        found.append((f"images of the same class as by the original, {source}", "all", same))
        if "accuracy" in its:
            found.append(beside(f"accuracy on {source}", its["accuracy"], "{:.1%}".format))
    its, count = results["time"], results["time"]["images"]
    found.append(times(f"time of {count} images at once", its))
    found.append(beside("images a second", its, lambda timing: units.number(count / timing["median"])))
    words = f"operations of attention over the {results['tokens']} tokens of an image, by definition"
    found.append(beside(words, results["operations"], units.count))
    return found


def loss(results: Mapping[str, Any]) -> Loss:
    """The loss of accuracy; if classes are not known, the share of images with another predicted class; for a model
    without classes, the share of its features' variance that is lost."""
    judged = list(results["quality"].values())[-1]
    if "kept" in judged:
        words = f"{kept(judged['kept'], judged['kept_error'])} of the variance of features is kept"
        return 1 - judged["kept"], judged["kept_error"], words
    if "accuracy" in judged:
        its = judged["accuracy"]
        words = f"accuracy is {its[RETROFIT]:.1%} where the original has {its[ORIGINAL]:.1%}"
        return -its["change"], its["standard_error"], words
    words = f"{kept(judged['agreement'], judged['standard_error'])} of images have the original's class"
    return 1 - judged["agreement"], judged["standard_error"], words


def recommend(results: Mapping[str, Any]) -> dict[str, Any]:
    """The recommendation and notes on its limits: ``take`` (bool), ``text``, ``notes``."""
    source, judged = list(results["quality"].items())[-1]
    lost, _, words = loss(results)
    most = 1 - CLOSE if "kept" in judged else POINTS if "accuracy" in judged else 1 - SAME
    close, cost = lost <= most, f"{words} on {source}"
    faster, slower = (longer(results["time"], *pair) for pair in ((ORIGINAL, RETROFIT), (RETROFIT, ORIGINAL)))
    gain = None if faster is None else f"images take {1 / faster:.0%} of the time"
    delay = None if slower is None else f"images take {times_as_long(slower)}"
    notes = source_notes(results["quality"], min(its["images"] for its in results["quality"].values()), "images")
    return {**judgement(close, cost, gain, delay), "notes": notes}
