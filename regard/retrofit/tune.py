"""The last training stage: the whole model learns the teacher's answers, or the right ones."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Unsupported, an_instance
from regard.core.precision import mixed
from regard.integrations.collecting import collect_losses
from regard.models.evaluating import evaluation_mode
from regard.retrofit.best import Best
from regard.retrofit.folder import Folder
from regard.retrofit.hosts import Batch, Host
from regard.retrofit.settings import RetrofitSettings
from regard.retrofit.stage import Stage, Watch, train_stage
from regard.retrofit.teaching import Taught, learning_layers, with_attention_of
from regard.retrofit.transfer import LOSS_WEIGHTS


def tune(
    host: Host,
    student: Any,
    numbers: Sequence[int],
    learned: Sequence[str],
    data: Any,
    settings: RetrofitSettings,
    stage: Stage,
    folder: Folder,
    watch: Watch,
    best: Best | None = None,
) -> list[list[float]]:
    """Train a student in place; see :func:`tune_losses` for its loss.

    Args:
        numbers: numbers of the layers with new attention.
        learned: names of the new parameters.
        best: keeps the student's best weights on held-out data, which it ends with.
    """
    unload = prepare(host, student, numbers, settings)
    was = student.training
    student.train()

    def step(number: int) -> list[float]:
        batch = host.batch(data, number, stage.seed, settings)
        return tune_losses(host, student, batch, settings.distil, stage.before + number, precision=settings.precision)

    try:
        adapters = [name for name, _ in student.named_parameters() if ".lora_" in name]
        return train_stage(stage, folder, student, {*learned, *adapters}, step, watch, best=best)
    finally:
        student.train(was)
        unload()


def prepare(host: Host, student: Any, numbers: Sequence[int], settings: RetrofitSettings) -> Any:
    """Set which weights require gradients; return a function that undoes it and merges low-rank updates."""
    if settings.train == "new":
        student.requires_grad_(False)
        for number in numbers:
            student.get_submodule(host.layers[number].path).requires_grad_(True)
    if settings.lora is None:
        return lambda: student.requires_grad_(True)
    peft = _peft()
    placed = [module for number in numbers if (module := host.placed(student, number)) is not None]
    targets = _targets(host, student, placed)
    transposed = not all(isinstance(student.get_submodule(name), nn.Linear) for name in targets)
    config = peft.LoraConfig(
        r=settings.lora, lora_alpha=2 * settings.lora, target_modules=targets, fan_in_fan_out=transposed
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses a name that transformers has deprecated
        torch.manual_seed(settings.seed)
        adapted = peft.get_peft_model(student, config)
    for module in placed:
        module.requires_grad_(True)

    def unload() -> None:
        adapted.merge_and_unload()
        student.requires_grad_(True)

    return unload


def check_train(host: Host, settings: RetrofitSettings) -> None:
    """Raise Unsupported for low-rank updates without peft, or of a model without layers that can have them."""
    if settings.lora is not None:
        _peft()
        _targets(host, host.model, [])


def _targets(host: Host, student: Any, placed: Sequence[nn.Module]) -> list[str]:
    """The names of the linear layers that get low-rank updates: all but the head and those in `placed`."""
    library = sys.modules.get("transformers.pytorch_utils")
    kinds = nn.Linear if library is None else (nn.Linear, library.Conv1D)
    inside = {id(part) for module in placed for part in module.modules()}
    head = student.get_output_embeddings() if hasattr(student, "get_output_embeddings") else None
    found = [
        name
        for name, part in student.named_modules()
        if isinstance(part, kinds) and part is not head and id(part) not in inside
    ]
    if not found:
        raise Unsupported(
            f"low-rank updates of {an_instance(host.model)}, which has no linear layers of PyTorch or transformers",
            supported="train='all' or 'new'",
            nearest="train='new'",
        )
    return found


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise Unsupported(
            "low-rank updates without peft", supported="train='all' or 'new'", nearest="pip install peft"
        ) from error
    return peft


@torch.no_grad()
def held_out_loss(host: Host, student: Any, batch: Batch, distil: float) -> float:
    """The loss of :func:`tune_losses` on held-out data, with the student in evaluation mode."""
    with evaluation_mode(student):
        losses = list[float]()
        for part in host.parts(batch):
            expected = host.answers(host.model, part) if distil > 0 else None
            losses.append(float(_loss(host, host.answers(student, part), part, expected, distil)))
    return math.fsum(losses) / len(losses)


def _loss(host: Host, found: Tensor, part: Batch, expected: Tensor | None, distil: float) -> Tensor:
    """`distil` times the distance from the teacher's answers, plus 1 - `distil` times that from the right ones."""
    loss = found.new_zeros(())
    if distil < 1:
        loss = loss + (1 - distil) * host.own_loss(found, part)
    if expected is not None:
        loss = loss + distil * host.distance(found, expected)
    return loss


def _taught(host: Host, student: Any, part: Batch, distil: float) -> tuple[Tensor | None, dict[str, Taught]]:
    """The teacher's answers, None where they have no weight, and what the student's layers, by path, learn from its
    attention."""
    learning = learning_layers(host, student)
    if not learning and not distil:
        return None, {}
    teacher = host.by_regard if learning else host.model
    expected, taught = with_attention_of(host, learning, lambda: host.answers(teacher, part))
    return expected if distil else None, {host.layers[number].path: its for number, its in taught.items()}


def tune_losses(
    host: Host, student: Any, batch: Batch, distil: float, progress: int = 0, *, precision: str = "float32"
) -> list[float]:
    """`distil` times the student's distance from the teacher's answers, plus 1 - `distil` times its distance from the
    right ones; in nats (or as a share of the squared hidden states). The mechanisms' auxiliary losses are trained on
    too, but not included in the result; those of layers that learn from the teacher's attention (sea) do so with any
    `distil`.

    Leaves the gradients in the student's parameters. Where answers are large, rows are processed one by one, so that
    only one row's answers are in memory.

    Args:
        progress: number of the training step, for mechanisms with a schedule.
        precision: that of the settings.
    """
    device = batch.inputs.device
    total = 0.0
    parts = host.parts(batch)
    for part in parts:
        with mixed(precision, device):
            expected, teachers = _taught(host, student, part, distil)
        with mixed(precision, device), collect_losses(student, teachers=teachers, progress=progress) as collected:
            found = host.answers(student, part)
        loss = _loss(host, found, part, expected, distil)
        ((loss + collected.total(LOSS_WEIGHTS).to(found)) / len(parts)).backward()
        total += loss.item() / len(parts)
    return [total]
