"""The recipe step ``distil``: a changed model learns from the outputs of the original model, or of another one.

The loss of a batch is T^2 KL(softmax(teacher / T), softmax(student / T)) over its answers (:func:`response_loss`),
excluding padding; if outputs are real numbers rather than classes, the mean squared difference. All kinds but ``response``
add a loss on the layers, see :mod:`regard.compression.distillation.reading`.

The original model shares its tensors with the model: trained parameters are copied first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from regard.compression.descent import by_path, descend, mean_loss
from regard.compression.distillation.cached import AnswerCache
from regard.compression.distillation.losses import feature_loss, response_loss
from regard.compression.distillation.reading import Seen, first_projection, layers_loss, reading
from regard.compression.layers import Run, language_head
from regard.compression.pruning.anatomy import Undo
from regard.contract import Unsupported, an_instance
from regard.core.precision import wide
from regard.measurement import units
from regard.models.evaluating import evaluation_mode
from regard.tasks.protocol import Batch

if TYPE_CHECKING:
    from regard.compression.steps import Distil

KEPT = "distilled.safetensors"
PROJECTION = "projection of hidden states"


def same_weights(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def win_back(
    model: nn.Module,
    teacher: nn.Module,
    step: Distil,
    batches: Sequence[Any],
    run: Run,
    *,
    keep: Callable[[str, nn.Module], bool],
    name: str = "the original",
    zeros: Collection[str] = (),
    folder: Path | None = None,
    on_step: Callable[[int], None] = lambda done: None,
) -> tuple[Undo, str]:
    """Train a model in place; return a function that undoes it, and a sentence that says what was done.

    Args:
        teacher: the model to learn from; neither model uses dropout.
        batches: one a step, in turn.
        keep: returns whether a module stays as it is.
        name: name of the teacher.
        zeros: names of layers whose zero weights stay 0.
        folder: where the state is saved, to resume the same call from.
        on_step: called with the number of steps done.

    Raises:
        Unsupported: for a model without trainable parameters, outputs that cannot be compared, and a loss that is not
            finite.
    """
    cache = None if step.cache is None else AnswerCache(step.cache, teacher)
    trained, undo = _own_parameters(model, keep)
    masks = [
        (weight, weight.detach() != 0) for weight in (_weight(model, name) for name in zeros) if weight is not None
    ]
    if not trained:
        undo()
        raise Unsupported(
            "distil of a model that has nothing in floating point", supported="distil before it is rounded"
        )

    beside: dict[str, nn.Parameter] = {}

    def loss_of(number: int) -> Tensor:
        batch = batches[number % len(batches)]
        told = (
            _lesson(teacher, step.kind, batch, run)
            if cache is None
            else _cached_lesson(cache, teacher, step.kind, batch, run)
        )
        return _distance(model, told, step, batch, run, beside)

    def mask() -> None:
        for weight, stays in masks:
            weight.data.mul_(stays)

    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        before = mean_loss(loss_of, len(batches))
        learned = trained | beside
        done, seconds = descend(
            by_path(learned),
            [{"params": list(learned.values()), "factor": 1.0}],
            loss_of,
            what="distil",
            steps=step.steps,
            learning_rate=step.learning_rate,
            seconds=step.seconds,
            file=None if folder is None else folder / KEPT,
            after=mask,
            on_step=on_step,
        )
        after = mean_loss(loss_of, len(batches))
    except BaseException:
        undo()
        raise
    finally:
        for parameter, needed in required.items():
            parameter.requires_grad_(needed)
    numbers = sum(parameter.numel() for parameter in learned.values())
    said = (
        f"distilled from {name} in {done} steps on {len(batches)} batches, {units.duration(seconds)}, {numbers:,} numbers "
        f"trained: {step.kind} loss {units.number(before)} before, {units.number(after)} after"
    )
    if cache is not None:
        said += f"; {cache.read:,} answers of the teacher read from {cache.path.parent}, {cache.written:,} added to it"
    if after <= before:
        return undo, said
    undo()
    return (lambda: None), f"{said}, so the weights stay as they were before this step"


class Lesson(NamedTuple):
    """What a teacher says about a batch: its answers, and what its layers computed, nothing for ``response``."""

    answers: Tensor
    layers: Seen


def teaching_loss(model: nn.Module, teacher: nn.Module, step: Distil, batch: Any, run: Run) -> Tensor:
    """The training loss: the distance of a model's answers on a batch, and of its layers, from the teacher's. Both are in
    evaluation mode.

    Raises:
        Unsupported: for answers and layers that cannot be compared, or not be read.
    """
    return _distance(model, _lesson(teacher, step.kind, batch, run), step, batch, run, {})


def _distance(
    model: nn.Module, lesson: Lesson, step: Distil, batch: Any, run: Run, beside: dict[str, nn.Parameter]
) -> Tensor:
    """The loss; a first batch on which hidden states have another width than the teacher's adds their projection to what
    is trained `beside` the model."""
    with reading(model, step.kind) as own:
        found = run(model, batch)
    loss = _answers_loss(found, lesson.answers, batch, step.temperature)
    if not beside and (first := first_projection(step.kind, own, lesson.layers)) is not None:
        beside[PROJECTION] = nn.Parameter(first)
    return loss + step.weight * layers_loss(step.kind, own, lesson.layers, beside.get(PROJECTION))


def _lesson(teacher: nn.Module, kind: str, batch: Any, run: Run) -> Lesson:
    with torch.no_grad(), evaluation_mode(teacher), reading(teacher, kind) as layers:
        answers, _ = _answers(run(teacher, batch), batch)
    return Lesson(answers, layers)


def _cached_lesson(cache: AnswerCache, teacher: nn.Module, kind: str, batch: Any, run: Run) -> Lesson:
    """A lesson from a cache, where the logits of a large vocabulary are kept as the inputs of the head if it makes them."""
    head = language_head(teacher)

    def compute(_: list[int]) -> list[dict[str, Tensor]]:
        given: list[Tensor] = []
        hook = None if head is None else head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
        try:
            lesson = _lesson(teacher, kind, batch, run)
        finally:
            if hook is not None:
                hook.remove()
        found = {f"hidden.{i}": state for i, state in enumerate(lesson.layers.hidden)}
        if len(given) == 1 and torch.equal(wide(_applied(head, given[0])), lesson.answers):
            return [found | {"head": given[0]}]
        return [found | {"answers": lesson.answers}]

    some = next(teacher.parameters())
    (told,) = cache.answers([(kind, batch)], compute, some.device)
    answers = told["answers"] if "answers" in told else wide(_applied(head, told["head"]))
    states = [told[f"hidden.{i}"] for i in range(sum(name.startswith("hidden.") for name in told))]
    return Lesson(answers, Seen(hidden=states))


@torch.no_grad()
def _applied(head: nn.Module, inputs: Tensor) -> Tensor:
    found: Tensor = head(inputs)
    return found


def _own_parameters(model: nn.Module, keep: Callable[[str, nn.Module], bool]) -> tuple[dict[str, nn.Parameter], Undo]:
    """Replace the trainable parameters of a model by copies, returned by name; shared parameters stay shared."""
    kept = [name for name, module in model.named_modules() if name and keep(name, module)]
    inside = {id(parameter) for name in kept for parameter in model.get_submodule(name).parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    changed: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in list(model.modules()):
        for key, old in list(module._parameters.items()):
            if old is None or id(old) in inside or not old.is_floating_point():
                continue
            if id(old) not in made:
                made[id(old)] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            setattr(module, key, made[id(old)])
            changed.append((module, key, old))

    def undo() -> None:
        for module, key, old in changed:
            setattr(module, key, old)

    return {names[key]: parameter for key, parameter in made.items()}, undo


def _weight(model: nn.Module, name: str) -> nn.Parameter | None:
    weight = model.get_submodule(name)._parameters.get("weight")
    return weight if isinstance(weight, nn.Parameter) else None


def _answers_loss(found: Any, told: Tensor, batch: Any, temperature: float) -> Tensor:
    own, classes = _answers(found, batch)
    if own.shape != told.shape:
        raise Unsupported(
            f"distil of outputs {tuple(own.shape)} from {tuple(told.shape)}", supported="outputs of the same shape"
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else getattr(batch, "valid", None)
    if mask is not None and own.ndim >= 3 and own.shape[:2] == mask.shape:
        own, told = own[mask.bool()], told[mask.bool()]
    return response_loss(own, told, temperature) if classes else feature_loss(own, told)


def _answers(found: Any, batch: Any) -> tuple[Tensor, bool]:
    """The outputs, and whether they are logits of classes, on the last axis."""
    states = getattr(found, "last_hidden_state", None)
    if isinstance(states, Tensor):
        return wide(states), False
    output = next((x for x in (getattr(found, name, None) for name in ("output", "logits")) if x is not None), found)
    if not isinstance(output, Tensor):
        raise Unsupported(f"distil of a model that returns {an_instance(found)}", supported="logits or hidden states")
    output = wide(output)
    if isinstance(batch, Batch):
        if batch.targets.is_floating_point():
            return output, False
        if batch.targets.ndim == output.ndim:  # classes of several pixels at each position
            return output.unflatten(-1, (batch.targets.shape[-1], -1)), True
    return output, output.shape[-1] > 1
