"""Distillation of a model whose layers learn the attention weights of a teacher, as SEA does (arXiv 2310.01777).

::

    report = begin_as(student, teacher)                    # the student's new parameters are left as they are
    optimizer = torch.optim.AdamW(distillation_groups(student, report.new, learning_rate=1e-4))
    loss = distillation_loss(student, teacher, ids)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Context, Result, Unsupported
from regard.core.precision import wide_dtype
from regard.core.ragged import gathering
from regard.layers.attention import AttentionLayer
from regard.models import LanguageModel
from regard.models.blocks import evaluation_mode
from regard.models.language_model import IGNORED, next_tokens
from regard.models.stack import StackConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class DistillationWeights:
    """Weights of the parts of :func:`distillation_loss`; those of the paper's language models.

    Attributes:
        task: of the cross entropy of the next tokens.
        hidden: of the mean squared difference of the hidden states, averaged over layers.
        logits: of KL(teacher, student) of the next tokens.
        layers: of the layers' own loss ``distillation``, averaged over layers.
    """

    task: float = 0.1
    hidden: float = 5.0
    logits: float = 0.2
    layers: float = 1.0


@dataclass(frozen=True)
class BeginReport:
    """The changes made by :func:`begin_as`: names of the parameters that were copied, and of the new ones."""

    copied: tuple[str, ...]
    new: tuple[str, ...]


def begin_as(student: nn.Module, teacher: nn.Module) -> BeginReport:
    """Copy the teacher's parameters to the student's of the same names.

    Raises:
        Unsupported: when the student lacks one of them, or has it in another shape.
    """
    known = dict(student.named_parameters())
    given = dict(teacher.named_parameters())
    for name, parameter in given.items():
        if name not in known or known[name].shape != parameter.shape:
            found = "none" if name not in known else str(tuple(known[name].shape))
            raise Unsupported(
                f"a teacher with {name} of shape {tuple(parameter.shape)}, of which the student has {found}",
                supported="a student of the same sizes, whose layers have parameters beside the teacher's",
            )
    with torch.no_grad():
        for name, parameter in given.items():
            known[name].copy_(parameter)
    return BeginReport(tuple(given), tuple(name for name in known if name not in given))


def distillation_groups(
    student: nn.Module, new: Sequence[str], *, learning_rate: float, factor: float = 10.0, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer: the `new` parameters learn `factor` times as fast as the others.

    Parameters of fewer than two axes, and those marked ``_no_weight_decay``, have no weight decay.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        decays = parameter.ndim >= 2 and not getattr(parameter, "_no_weight_decay", False)
        groups.setdefault((name in set(new), decays), []).append(parameter)
    return [
        {"params": found, "lr": learning_rate * (factor if is_new else 1.0), "weight_decay": weight_decay * decays}
        for (is_new, decays), found in groups.items()
    ]


def distillation_loss(
    student: LanguageModel,
    teacher: LanguageModel,
    ids: Int[Tensor, "b n"],
    targets: Int[Tensor, "b n"] | None = None,
    *,
    context: Context | None = None,
    weights: DistillationWeights | None = None,
) -> Float[Tensor, ""]:
    """The loss of a student on tokens, with the teacher's attention weights, head outputs, hidden states and logits.

    Args:
        student: as many layers as the teacher, of the same widths; those that can take the teacher's weights
            and outputs, as ``context.teacher``, learn from them.
        teacher: its layers must give their attention weights; it runs without gradients and dropout.
        targets: token to predict at each place, -100 for none; the next valid token of the sequence when None.
        context: as of a call of the models.

    Raises:
        Unsupported: for models of another kind, for a teacher without weights in every layer, or of another number of
            layers, and for models whose layers are not simply one after the other (`stack`).
    """
    for model in (student, teacher):
        if not isinstance(model, LanguageModel):
            raise Unsupported(
                f"distillation between layers of a {type(model).__name__}, whose layers neither give their weights nor learn "
                "from others",
                supported="regard.models.LanguageModel",
                nearest="torch.nn.functional.kl_div of its logits and the teacher's",
            )
        if model.config.stack != StackConfig():
            raise Unsupported(
                f"distillation between models with {model.config.stack}", supported="the default stack of both"
            )
    parts = DistillationWeights() if weights is None else weights
    context = Context() if context is None else context
    if targets is None:
        targets = next_tokens(ids, context.mask)
    with torch.no_grad(), evaluation_mode(teacher), _recorded(teacher) as known:
        told = teacher(ids, context=context.replace(want=context.want | {"weights"}))
    maps = told.extras.get("weights", [])
    if not len(maps) == len(teacher.blocks) == len(student.blocks):
        raise Unsupported(
            f"a teacher with attention weights in {len(maps)} of {len(teacher.blocks)} layers for a student of "
            f"{len(student.blocks)}",
            supported="weights in every layer, and as many layers",
        )
    given = [
        {"weights": m, "output": o.unflatten(-1, (m.shape[1], -1)).transpose(1, 2)}
        for m, o in zip(maps, known.outputs, strict=True)
    ]
    with _recorded(student, given) as own:
        result: Result = student(ids, context=context)

    layout = gathering(context.mask, ids.shape[0], ids.shape[1], ids.device)
    dense = layout.gather(torch.ones_like(ids), axis=1).bool()  # valid places of the right-padded layout
    hidden = [
        (a[dense] - b[dense]).square().mean() for a, b in zip(own.hidden, known.hidden, strict=True) if dense.any()
    ]
    counted = targets != IGNORED
    logits, expected = (x.output[counted].to(wide_dtype(x.output)).log_softmax(-1) for x in (result, told))
    count = counted.sum().clamp(min=1)
    loss = parts.task * F.nll_loss(logits, targets[counted], reduction="sum") / count
    loss = loss + parts.logits * (expected.exp() * (expected - logits)).sum() / count
    loss = loss + parts.hidden * sum(hidden, start=loss.new_zeros(())) / max(len(hidden), 1)
    if "distillation" in result.losses:
        total, layers = result.losses["distillation"]
        loss = loss + parts.layers * total / layers.clamp(min=1)
    return loss


@dataclass
class _Recording:
    """The head outputs of each layer before their projection, and its hidden state after the block."""

    outputs: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)


@contextmanager
def _recorded(model: LanguageModel, teachers: Sequence[Mapping[str, Tensor]] | None = None) -> Iterator[_Recording]:
    """Record the model's layers while it runs, each with its own teacher."""
    recording = _Recording()
    hooks = []
    for i, block in enumerate(model.blocks):
        mixer = block.mixer
        if isinstance(mixer, AttentionLayer):
            hooks.append(mixer.output.register_forward_pre_hook(lambda _, given: recording.outputs.append(given[0])))
            if teachers is not None and "teacher" in mixer.card.honours:

                def teach(_: nn.Module, args: Any, kwargs: Any, i: int = i) -> tuple[Any, Any]:
                    return args, kwargs | {"context": kwargs["context"].replace(teacher=teachers[i])}

                hooks.append(mixer.register_forward_pre_hook(teach, with_kwargs=True))
        hooks.append(block.register_forward_hook(lambda _, __, result: recording.hidden.append(result.output)))
    try:
        yield recording
    finally:
        for hook in hooks:
            hook.remove()


__all__ = ["BeginReport", "DistillationWeights", "begin_as", "distillation_groups", "distillation_loss"]
