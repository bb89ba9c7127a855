"""Steps of a recipe that concern the whole model: distilling it, fewer tokens in it, a program made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from regard.compression.distillation.losses import positive
from regard.compression.sparse.catalogue import METHODS as SPARSE
from regard.compression.tokens.reducers import METHODS as REDUCERS
from regard.contract import Unsupported, at_least, one_of
from regard.measurement.budget import Budget

KINDS = ("response", "features")
FORMATS = ("onnx", "torch")
KEEP = 0.7
"""The usual share of tokens that stay."""

IMAGES = tuple(name for name in REDUCERS if "random" not in name)
TEXTS = ("power_bert", "ltp")
CACHES = tuple(name for name, kind in SPARSE.items() if hasattr(kind, "capacity"))
METHODS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(IMAGES, ("keep", "remove")),
    "power_bert": ("keep",),
    "ltp": ("threshold",),
    **dict.fromkeys(CACHES, ("keep", "capacity")),
}
"""Methods for fewer tokens, with the options that say how many."""


@dataclass(frozen=True)
class Distil:
    """The model learns the answers of the one that was given, or of another; see
    :mod:`regard.compression.distillation.recovery`.

    First in a recipe it makes a student of some of the layers, at even distances; of all where there is another teacher and no
    `layers`. Elsewhere it wins back what the step before it lost: zeros stay zeros, and of a model whose weights are rounded it trains what is in floating point.

    Attributes:
        layers: how many the student has; half of them, or with a teacher all, when None. Of a step that comes first.
        teacher: the folder of another model, of the same library, tokens, classes and inputs; the model that was given when None.
        kind: ``response``: the answers alone; ``features``: hidden states behind the layers too.
        temperature: by which logits of both are divided, above 0.
        steps: of training, a batch each; 1 or more.
        learning_rate: at the start, above 0.
        budget: a time after which it ends, where the steps take longer: ``90s``, ``5m``.
    """

    layers: int | None = None
    teacher: str | None = None
    kind: str = "response"
    temperature: float = 1.0
    steps: int = 200
    learning_rate: float = 1e-4
    budget: str | None = None
    stage: ClassVar = "distil"
    needs: ClassVar = ("training",)

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS)
        positive("temperature", self.temperature)
        at_least("steps", self.steps, 1)
        check_rate(self.learning_rate)
        if self.layers is not None:
            at_least("layers", self.layers, 1)
        if self.teacher is not None and (not isinstance(self.teacher, str) or not self.teacher):
            raise Unsupported(f"teacher={self.teacher!r} of distil", supported="a folder", nearest="teacher=big/")
        self.seconds  # noqa: B018  refuses what is no time

    @property
    def seconds(self) -> float | None:
        """The budget."""
        if self.budget is None:
            return None
        read = Budget.parse(str(self.budget))
        if read.unit != "seconds":
            raise Unsupported(f"budget={self.budget} of distil", supported="a time: 90s, 5m", nearest="budget=5m")
        return read.amount


@dataclass(frozen=True)
class FewerTokens:
    """Tokens go on their way through the model, or out of its cache; see :mod:`regard.compression.tokens.applied`.

    Attributes:
        method: one of :data:`METHODS`; when None the first that the model takes: ``tome``, ``power_bert`` or ``snapkv``.
        keep: the share of tokens that stay: of images at a quarter, half and three quarters of the blocks each; of texts in the
            last layer, at the length of the data; of caches for prompts of half that length. :data:`KEEP` when nothing is said.
        remove: of images, patches that go at each block; a number, or a list of them.
        capacity: of caches, tokens of a prompt that each layer keeps.
        threshold: of ``ltp``, the mean attention below which tokens go in the last layer; in those before it rises evenly to that.
    """

    method: str | None = None
    keep: float | None = None
    remove: int | Sequence[int] | None = None
    capacity: int | None = None
    threshold: float | None = None
    stage: ClassVar = "tokens"

    def __post_init__(self) -> None:
        if self.method is not None:
            one_of("method", self.method, METHODS)
        given = [name for name in ("keep", "remove", "capacity", "threshold") if getattr(self, name) is not None]
        if len(given) > 1:
            raise Unsupported(f"{' and '.join(given)} of tokens", supported="one of them")
        taken = METHODS[self.named or "tome"] if self.named or given != ["keep"] else ("keep",)
        for name in given:
            if name not in taken:
                raise Unsupported(
                    f"{name} of {self.named}", supported=" or ".join(taken), nearest=f"tokens:method={self.named}"
                )
        if self.named == "ltp" and self.threshold is None:
            raise Unsupported(
                "ltp without a threshold",
                supported="threshold=, the mean attention below which tokens go",
                nearest="tokens:method=ltp,threshold=0.01",
            )
        if self.keep is not None and not (isinstance(self.keep, float) and 0 < self.keep < 1):
            raise Unsupported(f"keep={self.keep!r}", supported="0 < keep < 1", nearest=f"keep={KEEP}")
        if self.capacity is not None:
            at_least("capacity", self.capacity, 2)
        if self.threshold is not None:
            at_least("threshold", self.threshold, 0.0)

    @property
    def named(self) -> str | None:
        """The method, where the options tell it."""
        if self.method is not None:
            return self.method
        options = {"remove": "tome", "capacity": "snapkv", "threshold": "ltp"}
        return next((name for option, name in options.items() if getattr(self, option) is not None), None)

    @property
    def needs(self) -> tuple[str, ...]:
        """Data, where a share is one of their length, or answers of single tokens have to be noticed."""
        return () if self.named in IMAGES or self.capacity is not None else ("data",)


@dataclass(frozen=True)
class Export:
    """A program of the model beside its weights; see :mod:`regard.compression.programs`.

    Attributes:
        format: ``onnx``, or ``torch`` for a program of ``torch.export``.
    """

    format: str = "onnx"
    stage: ClassVar = "export"
    needs: ClassVar = ("data",)

    def __post_init__(self) -> None:
        one_of("format", self.format, FORMATS)


def check_rate(value: object) -> None:
    """Raise Unsupported unless it is a learning rate between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise Unsupported(f"learning_rate={value}", supported="0 < learning_rate < 1", nearest="learning_rate=0.0001")


def check_program(method: str | None) -> None:
    """Raise Unsupported where a model with this method for fewer tokens has no program."""
    if method in CACHES:
        raise Unsupported(
            f"export after {method}, since a program reads whole sequences and keeps no cache",
            supported="export without tokens, or with a method for images",
            nearest="the recipe without tokens",
        )
    if method == "ltp":
        raise Unsupported(
            "export after ltp, whose numbers of tokens are those of each input",
            supported="power_bert, whose numbers are fixed",
            nearest="tokens:method=power_bert",
        )
