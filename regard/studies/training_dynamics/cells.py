"""Measurements of the study's cells."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad

from regard.reproductions.framework.protocol import Setting
from regard.studies.training_dynamics.facts import Facts
from regard.studies.training_dynamics.layer import Model
from regard.studies.training_dynamics.runs import Descent, Watched, descend, flow, in_order, watch, watch_each
from regard.studies.training_dynamics.text import on_text
from regard.workbench.trained.attention_monitor import snapped

FORMS: dict[str, dict[str, Any]] = {
    "as in the paper": {},
    "not normalised": {"normalise": False},
    "residual": {"residual": True},
    "last token as a key": {"last_as_key": True},
    "factored, rank 4": {"rank": 4},
    "factored, not normalised, residual": {"rank": 4, "normalise": False, "residual": True},
}
OPTIMISERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.0},
    "SGD, momentum": {},
    "Adam": {"method": "adam", "rate": 0.1},
    "SGD, weight decay": {"weight_decay": 1e-3},
}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measurements of a setting, by its kind of cell."""
    return CELLS[setting["cell"]](setting, seed)


def exactness(setting: Setting, seed: int) -> dict[str, Any]:
    """Errors of the gradients against automatic differentiation, by form of the model, and how much each way of
    training changes the conserved sums, at most and step by step."""
    found: dict[str, Any] = {}
    generator, draws = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    facts = Facts.make(3, 2, common_of_last=2)
    for name, options in FORMS.items():
        model = Model(**options)
        weights, contexts = model.start(facts.size, "uniform", generator), facts.draw(16, 40, draws)

        def value(weights: dict[str, Tensor], model: Model = model, contexts: Any = contexts) -> Tensor:
            return model.value(weights, contexts)

        expected, (_, own) = grad(value)(weights), model.gradients(weights, contexts)
        found[f"gradient: {name}"] = max(
            float((own[key] - expected[key]).abs().max() / expected[key].abs().max()) for key in expected
        )
        how = Descent(steps=setting["steps"], ratio=2.0)
        found[f"conserved: {name}"] = max(watch(model, facts, descend(model, facts, weights, how, draws)).conservation)
    for name, options in OPTIMISERS.items():
        model = Model()
        start, how = model.start(facts.size, "uniform", generator), Descent(**{"steps": setting["steps"], **options})
        course = watch(model, facts, descend(model, facts, start, how, draws)).conservation
        found |= {f"changed by: {name}": max(course), f"course: {name}": course}
    return found


def figure(setting: Setting, seed: int) -> dict[str, Any]:
    """A fully monitored run from zeros on few facts; the final attention is that of the first fact."""
    facts, model = Facts.make(setting["num_last"], setting["num_next"]), Model()
    how = Descent(steps=setting["steps"], rate=setting["rate"], ratio=setting["ratio"])
    found = watch(model, facts, descend(model, facts, model.start(facts.size), how, np.random.default_rng(seed)))
    own = facts.distinct & (facts.probabilities[0] > 0)
    order = facts.probabilities[0][own].argsort()
    return {
        "losses": found.losses,
        "common": found.common,
        "entropy": found.entropy,
        "change": found.change,
        "distinct": found.attention[0][own][order].tolist(),
        "chances": facts.probabilities[0][own][order].tolist(),
        "first common": found.common[0],
        "last common": found.common[-1],
        "last entropy": found.entropy[-1],
        "last loss": found.losses[-1],
        "in order": in_order(found.attention, facts),
        "still": _still(found),
        "snapped": _or_nan(snapped(found.change)),
        "conservation": max(found.conservation),
    }


def _still(found: Watched) -> float:
    """The mean change per step in the last tenth of a run, over the largest of the run."""
    last = found.change[-max(1, len(found.change) // 10) :]
    return sum(last) / len(last) / max(found.change)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def biases(setting: Setting, seed: int) -> dict[str, Any]:
    """The paper's two biases in the limit of infinitely long contexts, from zeros and thus without randomness: shares
    of (moment, fact, token) with the expected sign, and the correlation between the growth of distinct tokens and
    f^2."""
    names = ("num_last", "num_next", "rate", "ratio", "steps", "parts")
    return dict(_biases(*(setting[name] for name in names)))


@functools.cache
def _biases(num_last: int, num_next: int, rate: float, ratio: float, steps: int, parts: int) -> dict[str, float]:
    facts, model = Facts.make(num_last, num_next), Model()
    falling, rising, alike = [], [], []
    run = flow(model, facts, model.start(facts.size), rate, ratio, steps, parts)
    for weights in run:
        _, gradients = model.gradients(weights, facts.limit())
        attention = model.attention(weights, facts.limit())
        share = (attention / attention.norm(dim=1, keepdim=True)).square()
        for fact, last in enumerate(facts.last):
            growth, own = gradients["z"][last], facts.distinct & (facts.probabilities[fact] > 0)
            if not bool(growth.any()):
                continue  # at the start from zeros
            falling.append(float((growth[facts.common] < 0).double().mean()))
            rising.append(float((growth[own] > 0).double().mean()))
            alike.append(float(torch.corrcoef(torch.stack([growth[own], share[fact][own]]))[0, 1]))
    return {
        "common tokens fall": sum(falling) / len(falling),
        "distinct tokens rise": sum(rising) / len(rising),
        "growth as f²": sum(alike) / len(alike),
    }


def following(setting: Setting, seed: int) -> dict[str, Any]:
    """How far gradient descent on finite contexts is from the limit's equation, by batch size: |z - z'| over the
    distance that z' has moved, at the end, and during the run for the smallest and the largest batch."""
    facts, model = Facts.make(setting["num_last"], setting["num_next"]), Model()
    start = model.start(facts.size, "uniform", torch.Generator().manual_seed(seed))
    rates = {"rate": setting["rate"], "ratio": setting["ratio"]}
    expected = [
        w["z"].clone() for w in flow(model, facts, start, steps=setting["steps"], parts=setting["parts"], **rates)
    ]
    found: dict[str, Any] = {"batches": [float(size) for size in setting["batches"]], "errors": []}
    way = float((expected[-1] - start["z"]).norm())
    for size in setting["batches"]:
        how = Descent(steps=setting["steps"], batch=size, length=setting["length"], momentum=0.0, **rates)
        run = descend(model, facts, start, how, np.random.default_rng(seed))
        course = [float((w["z"] - z).norm()) / way for (w, _), z in zip(run, expected, strict=True)]
        found["errors"].append(course[-1])
        if size in (setting["batches"][0], setting["batches"][-1]):
            found[f"course {'smallest' if size == setting['batches'][0] else 'largest'}"] = course
    sizes, errors = (np.log(np.array(found[name])) for name in ("batches", "errors"))
    return {
        **found,
        "smallest": found["errors"][0],
        "largest": found["errors"][-1],
        "power": float(np.polyfit(sizes, errors, 1)[0]) if len(setting["batches"]) > 1 else math.nan,
    }


def sweep(setting: Setting, seed: int) -> dict[str, Any]:
    """Final attention entropy and the step of freezing, by the ratio of learning rates, from uniform weights."""
    facts, model = Facts.make(setting["num_last"], setting["num_next"]), Model()
    start = model.start(facts.size, "uniform", torch.Generator().manual_seed(seed))
    how = Descent(steps=setting["steps"], rate=setting["rate"], ratio=setting["ratios"])
    found = watch_each(model, facts, descend(model, facts, start, how, np.random.default_rng(seed)))
    entropies = [one.entropy[-1] for one in found]
    moments = [_or_nan(snapped(one.change)) for one in found]
    return {
        "ratios": [float(ratio) for ratio in setting["ratios"]],
        "entropies": entropies,
        "moments": moments,
        "common": [one.common[-1] for one in found],
        "rise": entropies[-1] - entropies[0],
        "earlier": moments[0] - moments[-1],
    }


CELLS = {
    "exactness": exactness,
    "figure": figure,
    "biases": biases,
    "following": following,
    "sweep": sweep,
    "text": on_text,
}
