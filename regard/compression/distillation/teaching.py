"""Training a student with its teacher, in any loop that adds the losses of a model's result.

::

    method = read_method("transkd:variant=gl")
    taught = Taught(student, teacher, method, task)
    regard.training.train(taught, task, config)
    save_pretrained(taught.student, folder)             # no more parameters than any other student
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.compression.distillation.cached import AnswerCache
from regard.compression.distillation.losses import positive, response_loss
from regard.compression.distillation.reading import OF_STATES, Seen, first_projection, layers_loss, reading
from regard.compression.distillation.transkd import Stages, TransKD, TransKDConfig, encoder_of, name_of, recorded
from regard.contract import Context, Result, Unsupported, at_least, check_options, closest, read_options
from regard.models.evaluating import evaluation_mode
from regard.tasks import Task
from regard.training.step import batch_context, run_model

LOSS = "teacher"
"""Name of the loss that :class:`Taught` adds."""
TASKS = "tasks that classify or segment images, such as images and segmentation, and text"
"""The tasks that support a teacher."""


@dataclass(frozen=True)
class ResponseConfig:
    """The student learns the teacher's answers; see :func:`regard.compression.distillation.losses.response_loss`.

    Attributes:
        temperature: divides the logits of both models.
        weight: weight of this loss relative to the task's.
    """

    temperature: float = 4.0
    weight: float = 1.0
    kind: ClassVar[str] = "response"

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0.0)
        positive("temperature", self.temperature)


@dataclass(frozen=True)
class LayersConfig(ResponseConfig):
    """The student learns the teacher's answers and what its layers compute, as `kind` says; see
    :mod:`regard.compression.distillation.reading`.

    Attributes:
        layers: weight of the loss on layers, which `weight` does not change.
    """

    layers: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("layers", self.layers)


@dataclass(frozen=True)
class FeaturesConfig(LayersConfig):
    """Hidden states too."""

    kind: ClassVar[str] = "features"


@dataclass(frozen=True)
class PatientConfig(LayersConfig):
    """Directions of hidden states too (PKD, arXiv 1908.09355)."""

    kind: ClassVar[str] = "patient"


@dataclass(frozen=True)
class AttentionConfig(LayersConfig):
    """Attention weights too (MobileBERT, arXiv 2004.02984)."""

    kind: ClassVar[str] = "attention"


@dataclass(frozen=True)
class RelationConfig(LayersConfig):
    """Attention weights and relations of values of the last layers too (MiniLM, arXiv 2002.10957)."""

    kind: ClassVar[str] = "relation"


@dataclass(frozen=True)
class TokenConfig:
    """The student's distillation token learns the teacher's classes, the class token the data's (DeiT, arXiv 2012.12877).

    This is the paper's hard distillation: CE(class token, label) + CE(distillation token, argmax teacher), without its
    factor of one half. After training, the logits are the mean of both heads'.

    Attributes:
        weight: weight of the second term relative to the task's loss.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0.0)


Method = ResponseConfig | TokenConfig | TransKDConfig
METHODS: Mapping[str, type[Method]] = {
    **{each.kind: each for each in (ResponseConfig, FeaturesConfig, PatientConfig, AttentionConfig, RelationConfig)},
    "token": TokenConfig,
    "transkd": TransKDConfig,
}


def read_method(text: str) -> Method:
    """Parse a method from its notation: ``transkd``, ``response:temperature=2,weight=0.5``.

    Raises:
        Unsupported: for an unknown name or option, with the nearest.
    """
    name, _, options = (part.strip() for part in text.partition(":"))
    if name not in METHODS:
        known = list(METHODS)
        raise Unsupported(f"distillation {name!r}", supported=", ".join(known), nearest=closest(name, known))
    given = read_options(options, name)
    check_options(METHODS[name], given, name)
    return METHODS[name](**given)


class Taught(nn.Module):
    """A student with its teacher and the modules trained along with it; in evaluation mode the student alone.

    Args:
        student, teacher: models of `task`. The teacher runs in evaluation mode and without gradients, and is not part
            of this module: it is not saved, counted or trained.
        method: how the student learns from the teacher.
        task: the task whose classes or next tokens both models predict.
        cache: keeps what the teacher says about each item; None to ask the teacher every time.

    Raises:
        Unsupported: for tasks other than image classification, image segmentation and text continuation, and for models
            and tasks that the method does not fit.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        method: Method,
        task: Task,
        *,
        cache: AnswerCache | None = None,
    ) -> None:
        super().__init__()
        of_images = task.features is not None and len(task.grid or ()) == 2
        if not ((task.objective in ("classification", "segmentation") and of_images) or task.objective == "next-token"):
            raise Unsupported(
                f"distillation on the task {task.name}",
                supported=TASKS,
                nearest="regard.compression.distillation, whose losses take any tensors",
            )
        if not (of_images or isinstance(method, ResponseConfig)):
            raise Unsupported(
                f"distillation of stages or by a token on the task {task.name}",
                supported="response, features, patient, attention, relation",
                nearest="response",
            )
        if isinstance(method, LayersConfig) and cache is not None:
            raise Unsupported(
                f"a cache of the teacher's layers for {method.kind}",
                supported="a cache with response, token and transkd",
                nearest="response",
            )
        self.student, self.method, self.classes = student, method, task.num_classes
        self.cache = cache
        self._teacher = (teacher,)  # in a tuple, so that it is not registered as a submodule
        some = next(student.parameters())
        self.beside: nn.Module | None = None
        if isinstance(method, TransKDConfig):
            own, told = (encoder_of(model).config for model in (student, teacher))
            self.beside = TransKD(own, told, method)  # type: ignore[arg-type]
        if isinstance(method, LayersConfig):
            self.beside = self._projection(method.kind, task)
        if self.beside is not None:
            self.beside.to(some.device, some.dtype)
        if isinstance(method, TokenConfig) and getattr(_backbone(student), "distillation_head", None) is None:
            raise Unsupported(
                f"distillation by a token in {name_of(student)}, which has none",
                supported="vision transformers with distillation_token=true",
                nearest='--model "deit_t:distillation_token=true"',
            )

    @property
    def teacher(self) -> nn.Module:
        """The teacher."""
        return self._teacher[0]

    @property
    def config(self) -> TaughtConfig:
        """The part of the config that a training loop reads."""
        return TaughtConfig({**getattr(self.student.config, "loss_weights", {}), LOSS: 1.0})

    def forward(self, inputs: Tensor, *, context: Context | None = None) -> Result:
        """The student's result, in training with the added loss ``teacher``."""
        if not self.training:
            return self.student(inputs, context=context)
        learn = {TransKDConfig: self._stages, TokenConfig: self._token}
        result, loss = learn.get(type(self.method), self._responses)(inputs, context)
        return Result(
            result.output, result.state, {**result.losses, LOSS: (loss, torch.ones_like(loss))}, result.extras
        )

    def _told(self, inputs: Tensor, context: Context | None) -> dict[str, Tensor]:
        """What the teacher says about each item: its logits, or its stages for TransKD."""
        of_stages = isinstance(self.beside, TransKD)

        def ask(inputs: Tensor) -> dict[str, Tensor]:
            with torch.no_grad(), evaluation_mode(self.teacher):
                if not of_stages:
                    return {"output": self.teacher(inputs, context=context).output}
                with recorded(encoder_of(self.teacher)) as stages:
                    self.teacher(inputs, context=context)
            return {f"{name}.{i}": x for name, found in vars(stages).items() for i, x in enumerate(found)}

        if self.cache is None:
            return ask(inputs)
        if context is not None and context.mask is not None:
            raise Unsupported("cached answers of a teacher about padded items", supported="items of one length")

        def compute(rows: list[int]) -> list[dict[str, Tensor]]:
            found = ask(inputs[rows])
            return [{name: x[i] for name, x in found.items()} for i in range(len(rows))]

        grid = None if context is None else context.grid
        rows = self.cache.answers([(not of_stages, grid, row) for row in inputs], compute, inputs.device)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _stages(self, inputs: Tensor, context: Context | None) -> tuple[Result, Tensor]:
        assert isinstance(self.beside, TransKD)
        found = self._told(inputs, context)
        stages = range(len(encoder_of(self.teacher).stages))
        told = Stages(**{name: [found[f"{name}.{i}"] for i in stages] for name in vars(Stages())})
        with recorded(encoder_of(self.student)) as own:
            result = self.student(inputs, context=context)
        return result, self.beside.loss(own, told)

    def _token(self, inputs: Tensor, context: Context | None) -> tuple[Result, Tensor]:
        assert isinstance(self.method, TokenConfig)
        classes = self._told(inputs, context)["output"].argmax(-1)
        student: Any = self.student
        result, logits = _backbone(student).forward_distilled(student.images(inputs, student.grid_of(context)))
        return result, self.method.weight * F.cross_entropy(logits, classes)

    def _responses(self, inputs: Tensor, context: Context | None) -> tuple[Result, Tensor]:
        assert isinstance(self.method, ResponseConfig)
        with reading(self.teacher, self.method.kind) as theirs:
            told = self._told(inputs, context)["output"]
        with reading(self.student, self.method.kind) as ours:
            result = self.student(inputs, context=context)
        own = result.output
        if self.classes is not None:  # a patch has the classes of several pixels
            own, told = (x.unflatten(-1, (-1, self.classes)) for x in (own, told))
        loss = self.method.weight * response_loss(own, told, self.method.temperature)
        if isinstance(self.method, LayersConfig):
            projection = self.beside.weight.mT if isinstance(self.beside, nn.Linear) else None
            loss = loss + self.method.layers * layers_loss(self.method.kind, ours, theirs, projection)
        return result, loss

    def _projection(self, kind: str, task: Task) -> nn.Linear | None:
        """A map from the student's hidden states to the teacher's; None if they have one width, or are not compared.

        Raises:
            Unsupported: for layers that cannot be compared, as a batch of the task shows.
        """
        batch = task.training_batch(0, 0, 2).to(next(self.student.parameters()).device)
        seen: list[Seen] = []
        for model in (self.student, self.teacher):
            with torch.no_grad(), evaluation_mode(model), reading(model, kind) as layers:
                run_model(model, batch, batch_context(batch))
            seen.append(layers)
        own, told = seen
        layers_loss(kind, own, told, first_projection(kind, own, told))
        if kind not in OF_STATES:
            return None
        width, wanted = (layers.hidden[-1].shape[-1] for layers in (own, told))
        return None if width == wanted else nn.Linear(width, wanted, bias=False)


def _backbone(model: nn.Module) -> Any:
    return getattr(model, "backbone", model)


@dataclass(frozen=True)
class TaughtConfig:
    """The loss weights of a :class:`Taught`."""

    loss_weights: Mapping[str, float]
