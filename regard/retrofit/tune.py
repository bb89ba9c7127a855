"""The last training stage: the whole model learns the teacher's next-token distributions, or the next tokens themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Unsupported
from regard.integrations.collecting import collect_losses
from regard.retrofit.corpus import Corpus
from regard.retrofit.folder import Folder
from regard.retrofit.hosts import Host
from regard.retrofit.settings import RetrofitSettings
from regard.retrofit.stage import Stage, Watch, train_stage
from regard.retrofit.transfer import LOSS_WEIGHTS

if TYPE_CHECKING:
    from jaxtyping import Int


def tune(
    host: Host,
    student: Any,
    numbers: Sequence[int],
    learned: Sequence[str],
    corpus: Corpus,
    settings: RetrofitSettings,
    stage: Stage,
    folder: Folder,
    watch: Watch,
) -> list[list[float]]:
    """Train a student in place; see :func:`tune_losses` for its loss.

    Args:
        numbers: of the layers whose attention is new.
        learned: names of parameters that are new.
    """
    unload = prepare(host, student, numbers, settings)
    was = student.training
    student.train()

    def step(number: int) -> list[float]:
        ids = corpus.blocks(number, stage.seed, settings.batch_size, settings.length)
        return tune_losses(host, student, ids, settings.distil)

    try:
        adapters = [name for name, _ in student.named_parameters() if ".lora_" in name]
        return train_stage(stage, folder, student, {*learned, *adapters}, step, watch)
    finally:
        student.train(was)
        unload()


def prepare(host: Host, student: Any, numbers: Sequence[int], settings: RetrofitSettings) -> Any:
    """Let the weights of a student want gradients that `train` names; what ends that and merges low-rank updates."""
    if settings.train == "new":
        student.requires_grad_(False)
        for number in numbers:
            student.get_submodule(host.layers[number].path).requires_grad_(True)
    if settings.lora is None:
        return lambda: student.requires_grad_(True)
    peft = _peft()
    placed = [student.get_submodule(host.layers[number].path).regard for number in numbers]
    inside = {id(part) for module in placed for part in module.modules()}
    head = student.get_output_embeddings()
    targets = [
        name
        for name, part in student.named_modules()
        if isinstance(part, nn.Linear) and part is not head and id(part) not in inside
    ]
    config = peft.LoraConfig(r=settings.lora, lora_alpha=2 * settings.lora, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        adapted = peft.get_peft_model(student, config)
    for module in placed:
        module.requires_grad_(True)

    def unload() -> None:
        adapted.merge_and_unload()
        student.requires_grad_(True)

    return unload


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise Unsupported(
            "low-rank updates without peft", supported="train='all' or 'new'", nearest="pip install peft"
        ) from error
    return peft


def tune_losses(host: Host, student: Any, ids: Int[Tensor, "b n"], distil: float) -> list[float]:
    """KL(teacher, student) of the next tokens times `distil`, plus their cross entropy times the rest, in nats a token; the losses
    that mechanisms have of their own are learned from too, and not told.

    The parameters of the student have its gradients afterwards. Rows are taken one by one, so that the logits of one alone
    are in memory.
    """
    total = 0.0
    for row in ids.split(1):
        with collect_losses(student) as collected:
            logits = student(row, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        loss = collected.total(LOSS_WEIGHTS).to(logits)
        own = loss.item()
        if distil < 1:
            loss = loss + (1 - distil) * F.nll_loss(logits, row[0, 1:])
        if distil > 0:
            with torch.no_grad():
                expected = host.model(row, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            loss = loss + distil * F.kl_div(logits, expected, reduction="sum", log_target=True) / len(expected)
        (loss / len(ids)).backward()
        total += (loss.item() - own) / len(ids)
    return [total]
