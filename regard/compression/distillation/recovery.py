"""The recipe step ``distil``: a changed model learns from the outputs of the original model, or of another one.

The loss of a batch is T^2 KL(softmax(teacher / T), softmax(student / T)) over its answers (:func:`response_loss`),
excluding padding; if outputs are real numbers rather than classes, the mean squared difference. ``features`` adds, over
pairs of layers at the same relative depth, the mean squared difference of hidden states divided by the mean square of
the teacher's.

The original model shares its tensors with the model: trained parameters are copied first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from regard.compression.descent import by_path, descend, mean_loss
from regard.compression.distillation.cached import AnswerCache
from regard.compression.distillation.losses import feature_loss, response_loss
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

    def loss_of(number: int) -> Tensor:
        batch = batches[number % len(batches)]
        if cache is None:
            return teaching_loss(model, teacher, step, batch, run)
        return _distance(model, _cached_lesson(cache, teacher, step.kind, batch, run), step, batch, run)

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
        done, seconds = descend(
            by_path(trained),
            [{"params": list(trained.values()), "factor": 1.0}],
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
    numbers = sum(parameter.numel() for parameter in trained.values())
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
    """What a teacher says about a batch: its answers, and the outputs of its layers, none for ``response``."""

    answers: Tensor
    hidden: list[Tensor]


def teaching_loss(model: nn.Module, teacher: nn.Module, step: Distil, batch: Any, run: Run) -> Tensor:
    """The training loss: the distance of a model's answers on a batch from the teacher's, which is in evaluation mode.

    Raises:
        Unsupported: for answers and hidden states that cannot be compared.
    """
    return _distance(model, _lesson(teacher, step.kind, batch, run), step, batch, run)


def _distance(model: nn.Module, lesson: Lesson, step: Distil, batch: Any, run: Run) -> Tensor:
    with _hidden(model, step.kind) as own:
        found = run(model, batch)
    loss = _answers_loss(found, lesson.answers, batch, step.temperature)
    for i, state in enumerate(own):
        goal = lesson.hidden[(i + 1) * len(lesson.hidden) // len(own) - 1]
        loss = loss + feature_loss(wide(state), wide(goal)) / (wide(goal).square().mean() * len(own))
    return loss


def _lesson(teacher: nn.Module, kind: str, batch: Any, run: Run) -> Lesson:
    with torch.no_grad(), evaluation_mode(teacher), _hidden(teacher, kind) as hidden:
        answers, _ = _answers(run(teacher, batch), batch)
    return Lesson(answers, hidden)


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
        found = {f"hidden.{i}": state for i, state in enumerate(lesson.hidden)}
        if len(given) == 1 and torch.equal(wide(_applied(head, given[0])), lesson.answers):
            return [found | {"head": given[0]}]
        return [found | {"answers": lesson.answers}]

    some = next(teacher.parameters())
    (told,) = cache.answers([(kind, batch)], compute, some.device)
    answers = told["answers"] if "answers" in told else wide(_applied(head, told["head"]))
    return Lesson(answers, [told[f"hidden.{i}"] for i in range(sum(name.startswith("hidden.") for name in told))])


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


@contextmanager
def _hidden(model: nn.Module, kind: str) -> Iterator[list[Tensor]]:
    """Collect the outputs of a model's layers while it runs; none for ``response``."""
    found: list[Tensor] = []
    if kind == "response":
        yield found
        return

    def note(module: nn.Module, given: Any, output: Any) -> None:
        output = getattr(output, "output", output)
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(note) for layer in _layers(model)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _layers(model: nn.Module) -> list[nn.Module]:
    """The largest sequence of modules of one class."""
    rows = [
        list(row)
        for row in model.modules()
        if isinstance(row, nn.ModuleList | nn.Sequential) and len({type(layer) for layer in row}) == 1
    ]
    if not rows:
        raise Unsupported(
            f"features of {an_instance(model)} without a row of layers",
            supported="kind=response",
            nearest="kind=response",
        )
    return max(rows, key=lambda row: sum(parameter.numel() for layer in row for parameter in layer.parameters()))


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
