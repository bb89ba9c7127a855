"""Distillation of a student whose layers learn a teacher's attention weights, as in SEA (arXiv 2310.01777).

::

    report = begin_as(student, teacher)                    # parameters that only the student has are left as they are
    optimizer = torch.optim.AdamW(distillation_groups(student, report.new, learning_rate=1e-4))
    loss = distillation_loss(student, teacher, ids)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Context, Result, Unsupported, an_instance
from regard.core.precision import wide_dtype
from regard.core.ragged import gathering
from regard.integrations.observing import Observed, is_transformers_model, observe, swapped_paths
from regard.layers.attention import AttentionLayer
from regard.models import LanguageModel
from regard.models.evaluating import evaluation_mode
from regard.models.language_model import IGNORED, next_tokens
from regard.models.stack import StackConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class DistillationWeights:
    """Weights of the terms of :func:`distillation_loss`; the defaults are those of the paper's language models.

    Attributes:
        task: weight of the cross entropy of the next tokens.
        hidden: weight of the mean squared difference of the hidden states, averaged over layers.
        logits: weight of KL(teacher, student) of the next tokens.
        layers: weight of the layers' own loss ``distillation``, averaged over layers.
    """

    task: float = 0.1
    hidden: float = 5.0
    logits: float = 0.2
    layers: float = 1.0


@dataclass(frozen=True)
class BeginReport:
    """The result of :func:`begin_as`: names of the copied parameters, and of those that only the student has."""

    copied: tuple[str, ...]
    new: tuple[str, ...]


def begin_as(student: nn.Module, teacher: nn.Module) -> BeginReport:
    """Copy the teacher's parameters to the student's parameters of the same names.

    Raises:
        Unsupported: if the student lacks a parameter, or has it in another shape.
    """
    known = dict(student.named_parameters())
    given = dict(teacher.named_parameters())
    for name, parameter in given.items():
        if name not in known or known[name].shape != parameter.shape:
            found = "none" if name not in known else str(tuple(known[name].shape))
            raise Unsupported(
                f"a teacher with {name} of shape {tuple(parameter.shape)}, where the student has {found}",
                supported="a student of the same sizes, whose layers may have parameters in addition to the teacher's",
            )
    with torch.no_grad():
        for name, parameter in given.items():
            known[name].copy_(parameter)
    return BeginReport(tuple(given), tuple(name for name in known if name not in given))


def distillation_groups(
    student: nn.Module, new: Sequence[str], *, learning_rate: float, factor: float = 10.0, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: the `new` parameters have `factor` times the learning rate.

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
    student: Any,
    teacher: Any,
    ids: Int[Tensor, "b n"],
    targets: Int[Tensor, "b n"] | None = None,
    *,
    context: Context | None = None,
    weights: DistillationWeights | None = None,
) -> Float[Tensor, ""]:
    """Compute a student's loss on tokens, with the teacher's attention weights, head outputs, hidden states and logits.

    Both are language models of regard, or both are transformers models with logits: then the student is a model changed
    by :func:`regard.swap`, and the teacher uses the attention ``regard:softmax``, which returns its weights::

        teacher = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="regard:softmax")

    Args:
        student: a model with as many layers as the teacher, of the same widths; layers that accept the teacher's
            weights and outputs, as ``context.teacher``, learn from them.
        teacher: a model whose layers all return their attention weights; it runs without gradients and dropout.
        targets: the token to predict at each position, -100 for none; the sequence's next valid token when None.
            Required for a transformers model that does not generate.
        context: the context of the models' calls.

    Raises:
        Unsupported: for models of another kind, for a teacher without weights in every layer or with another number of
            layers, and for models with a non-default `stack`.
    """
    observed: Callable[..., Observed]
    if all(map(is_transformers_model, (student, teacher))):
        observed = _observe_transformers
        if targets is None and not student.can_generate():
            raise Unsupported(
                f"distillation of {an_instance(student)}, which predicts no next token, without targets",
                supported="targets=..., -100 where none is predicted",
            )
    else:
        observed = _observe
        _check(student, teacher)
    parts = DistillationWeights() if weights is None else weights
    context = Context() if context is None else context
    if targets is None:
        targets = next_tokens(ids, context.mask)
    with torch.no_grad(), evaluation_mode(teacher):
        told = observed(teacher, ids, context.replace(want=context.want | {"weights"}), student=student)
    own = observed(student, ids, context, teachers=told.teachers)

    valid = own.valid
    hidden = [
        (a[valid] - b[valid]).square().mean() for a, b in zip(own.hidden, told.hidden, strict=True) if valid.any()
    ]
    counted = targets != IGNORED
    logits, expected = (x.logits[counted].to(wide_dtype(x.logits)).log_softmax(-1) for x in (own, told))
    count = counted.sum().clamp(min=1)
    loss = parts.task * F.nll_loss(logits, targets[counted], reduction="sum") / count
    loss = loss + parts.logits * (expected.exp() * (expected - logits)).sum() / count
    loss = loss + parts.hidden * sum(hidden, start=loss.new_zeros(())) / max(len(hidden), 1)
    if "distillation" in own.losses:
        total, layers = own.losses["distillation"]
        loss = loss + parts.layers * total / layers.clamp(min=1)
    return loss


def _check(*models: Any) -> None:
    for model in models:
        if not isinstance(model, LanguageModel):
            raise Unsupported(
                f"distillation between layers of {an_instance(model)}, whose layers neither return attention weights nor learn from "
                "a teacher's",
                supported="two of regard.models.LanguageModel, or two models of transformers",
                nearest="torch.nn.functional.kl_div of its logits and the teacher's",
            )
        if model.config.stack != StackConfig():
            raise Unsupported(
                f"distillation between models with {model.config.stack}", supported="the default stack of both"
            )


def _observe(
    model: LanguageModel,
    ids: Tensor,
    context: Context,
    *,
    student: LanguageModel | None = None,
    teachers: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> Observed:
    """Call a language model and record it; for a teacher (`student` given), check that all layers return weights."""
    with _recorded(model, teachers) as recording:
        result: Result = model(ids, context=context)
    maps = result.extras.get("weights", [])
    if student is not None and not len(maps) == len(model.blocks) == len(student.blocks):
        raise Unsupported(
            f"a teacher with attention weights in {len(maps)} of {len(model.blocks)} layers for a student of "
            f"{len(student.blocks)}",
            supported="weights in every layer, and as many layers",
        )
    given: dict[int, Mapping[str, Tensor]] = {}
    if student is not None:
        given = {
            i: {"weights": m, "output": o.unflatten(-1, (m.shape[1], -1)).transpose(1, 2)}
            for i, (m, o) in enumerate(zip(maps, recording.outputs, strict=True))
        }
    layout = gathering(context.mask, ids.shape[0], ids.shape[1], ids.device)
    dense = layout.gather(torch.ones_like(ids), axis=1).bool()  # valid tokens of the right-padded layout
    return Observed(result.output, recording.hidden, dense, given, result.losses)


def _observe_transformers(
    model: Any,
    ids: Tensor,
    context: Context,
    *,
    student: Any = None,
    teachers: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Observed:
    """Call a transformers model and record it, like :func:`_observe`."""
    found = observe(model, ids, context.replace(want=frozenset()), teachers=teachers, want=context.want)
    if student is None:
        return found
    learning = swapped_paths(student)
    if not learning:
        raise Unsupported(
            f"distillation of {an_instance(student)} that has its own attention",
            supported="a student that regard.swap has changed",
            nearest='regard.swap(student, "sea")',
        )
    if missing := [path for path in learning if path not in found.teachers]:
        raise Unsupported(
            f"a teacher that gives no attention weights at {', '.join(missing)}",
            supported="modules of the same paths, which attend by softmax through regard",
            nearest='teacher.set_attn_implementation("regard:softmax")',
        )
    return found


@dataclass
class _Recording:
    """For each layer, the head outputs before the output projection, and the hidden states after the block."""

    outputs: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)


@contextmanager
def _recorded(model: LanguageModel, teachers: Mapping[int, Mapping[str, Tensor]] | None = None) -> Iterator[_Recording]:
    """Record the model's layers during calls, passing each layer its teacher."""
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
