"""Cells of the study: a model that is trained, the reference learners, and a pretrained language model."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Unsupported
from regard.models import Encoder, EncoderConfig
from regard.models.evaluating import evaluation_mode
from regard.models.variants import read_variant
from regard.reproductions.framework.pretrained import SMOLLM2, open_model
from regard.reproductions.framework.protocol import Setting
from regard.reproductions.framework.training import fit
from regard.studies.in_context_functions.heads import head_figures, shows_weights
from regard.studies.in_context_functions.prompts import ask
from regard.tasks.in_context_functions import InContextFunctionsTask, as_batch, learners
from regard.tasks.in_context_functions.functions import Contexts, FunctionClass
from regard.tasks.protocol import EVALUATION, counter_generator

TASK_OPTIONS = tuple(inspect.signature(InContextFunctionsTask).parameters)
LONGER = 2
"""Length of the longer test contexts, in multiples of the training length."""
SHIFTED = 0.7
"""Probability that a bit is +1 in the test contexts with shifted inputs."""
NOTHING = "always -1"
NEAREST = "nearest neighbour"
BEST = "best guess"


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measurements of a setting. Accuracies are over all held-out contexts; lists have one for each example."""
    if setting["kind"] == "trained":
        return trained(setting, seed)
    if setting["kind"] == "references":
        return references(setting, seed)
    return asked(setting, seed)


def task_of(setting: Setting, seed: int, **other: Any) -> InContextFunctionsTask:
    """The task of a setting, with held-out contexts of the seed."""
    options = {name: setting[name] for name in TASK_OPTIONS if setting.get(name) is not None}
    return InContextFunctionsTask(**(options | {"evaluation_items": setting["items"], "seed": seed} | other))


def build_model(setting: Setting, features: int) -> Encoder:
    """A causal model with the setting's mechanism and one output number for each token.

    A mechanism with a maximum length gets that of the longest test contexts.
    """
    longest = LONGER * setting["length"]
    plan = []
    for name, options in read_variant(setting["mechanism"]).plan(setting["layers"]):
        (card,) = read_variant(name).cards
        own = {"length": longest} if "length" in inspect.signature(card.config).parameters else {}
        own |= {"axes": 1} if card.module is not None and "axes" in inspect.signature(card.module).parameters else {}
        plan.append((name, own | dict(options)))
    sizes = {name: setting[name] for name in ("dim", "num_heads")}
    config = EncoderConfig(1, None, features, plan=plan, pool="none", causal=True, max_length=longest, **sizes)
    return Encoder(config)


def trained(setting: Setting, seed: int) -> dict[str, Any]:
    """Train a model on the setting's functions and measure its accuracy on new functions, on longer contexts and on
    shifted inputs, and, where the setting has them, on the pool of training functions and with and without teaching
    sequences."""
    task = task_of(setting, seed)
    model = build_model(setting, task.dimensions)
    if setting.get("frozen"):
        model.blocks.requires_grad_(False)
    diverged = not fit(model, task, setting, seed)
    found: dict[str, Any] = {"parameters": float(sum(p.numel() for p in model.parameters()))}

    def tried(name: str, other: InContextFunctionsTask, contexts: Contexts | None = None) -> None:
        shown = other.held_out if contexts is None else contexts
        curve = [math.nan] * other.points if diverged else accuracy(says(model, shown), shown)
        found.update(told(curve, shown.first, name))

    tried("", task)
    longer = {"length": LONGER * task.length} | ({"start": task.start} if task.start else {})
    tried("longer ", task_of(setting, seed, **longer))
    if task.ones != SHIFTED:
        tried("shifted ", task_of(setting, seed, ones=SHIFTED))
    if task.pooled is not None:
        tried("pooled ", task, task.draw(counter_generator(seed, 2, EVALUATION), setting["items"], task.pooled))
    if 0 < task.taught < 1:
        tried("taught ", task_of(setting, seed, taught=1.0))
        tried("untaught ", task_of(setting, seed, taught=0.0))
    if shows_weights(setting["mechanism"]) and not diverged:
        found |= head_figures(model, task, seed)
    return found


def references(setting: Setting, seed: int) -> dict[str, Any]:
    """Accuracies of the learners that need no training, on the contexts on which models of this seed are scored."""
    task = task_of(setting, seed)
    x, y = (torch.from_numpy(each).float() for each in (task.held_out.x, task.held_out.y))
    found: dict[str, Any] = {}
    for name, learner in reference_learners(task).items():
        # in parts, since some learners need memory for each pair of examples times units or functions
        numbers = torch.cat([learner(*part) for part in zip(x.split(32), y.split(32), strict=True)])
        found.update(told(accuracy(numbers, task.held_out), task.held_out.first, f"{name} "))
    return found


def reference_learners(task: InContextFunctionsTask) -> dict[str, learners.Learner]:
    """Learners by name, with the exact learner and the best guess where they exist."""
    found: dict[str, learners.Learner] = {
        NOTHING: learners.null,
        NEAREST: learners.neighbours(1),
        "3 nearest neighbours": learners.neighbours(3),
        "averaging": learners.averaging,
        "gradient descent": learners.gradient_descent(),
    }
    exact = exact_learner(task.kind)
    if exact is not None:
        found[exact[0]] = exact[1]
    with contextlib.suppress(Unsupported):  # too many functions to weigh, or functions of several clauses
        found[BEST] = learners.best_guess(task.kind, task.dimensions, literals=task.literals, taught=task.taught)
    return found


def exact_learner(kind: FunctionClass) -> tuple[str, learners.Learner] | None:
    """The learner that is right as soon as the examples determine the function; None where no fast one is known."""
    monotone = not kind.signed
    if kind.rule == "nearest":
        return "nearest cosine", learners.nearest_cosine
    if kind.clauses > 1 or kind.rule == "threshold":
        return None
    if kind.rule == "odd":
        return "Gaussian elimination", learners.gaussian
    return "elimination", learners.elimination(monotone=monotone, disjunction=kind.rule == "any")


def asked(setting: Setting, seed: int) -> dict[str, Any]:
    """Accuracies of SmolLM2-135M, prompted with text, and of the reference learners on the same contexts."""
    task, host = task_of(setting, seed), open_model(SMOLLM2)
    found = {f"reference {name}": value for name, value in references(setting, seed).items()}
    answers = ask(host.model, host.tokenizer, task.held_out.x, task.held_out.y)
    return {**found, **told(accuracy(answers, task.held_out), task.held_out.first)}


@torch.no_grad()
def says(model: nn.Module, contexts: Contexts) -> Tensor:
    """A model's output for each example, (b, m)."""
    inputs = as_batch(contexts.x, contexts.y).inputs
    with evaluation_mode(model):
        return torch.cat([model(part).output[:, ::2, 0] for part in inputs.split(64)])


def accuracy(numbers: Tensor, contexts: Contexts) -> list[float]:
    """Share of contexts in which the sign is right, by example; nan before the first example that counts."""
    right = (numbers.sign() == torch.from_numpy(contexts.y)).double().mean(0)
    right[: contexts.first] = math.nan
    return right.tolist()


def told(curve: Sequence[float], first: int, name: str = "") -> Mapping[str, Any]:
    """A curve with its means over the examples that count (``score``), their second quarter (``early``) and their last
    quarter (``end``)."""
    counted = torch.tensor(curve[first:], dtype=torch.float64)
    quarter = max(1, len(counted) // 4)
    return {
        f"{name}curve": list(curve),
        f"{name}score": float(counted.mean()),
        f"{name}early": float(counted[quarter : 2 * quarter].mean()) if len(counted) > quarter else math.nan,
        f"{name}end": float(counted[-quarter:].mean()),
    }
