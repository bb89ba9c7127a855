"""Recipe steps that concern the whole model: distilling it, dropping tokens in it, exporting a program of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from regard.compression.distillation.losses import positive
from regard.compression.distillation.reading import KINDS, OF_ATTENTION
from regard.compression.sparse.catalogue import METHODS as SPARSE
from regard.compression.sparse.catalogue import make
from regard.compression.sparse.method import Method
from regard.compression.tokens.reducers import METHODS as REDUCERS
from regard.contract import Unsupported, at_least, one_of
from regard.measurement.budget import Budget

FORMATS = ("onnx", "torch")
KEEP = 0.7
"""The usual share of tokens to keep."""

IMAGES = tuple(name for name in REDUCERS if "random" not in name)
TEXTS = ("power_bert", "ltp")
CACHES = tuple(name for name, kind in SPARSE.items() if "decode" in kind.phases)
METHODS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(IMAGES, ("keep", "remove")),
    "power_bert": ("keep",),
    "ltp": ("threshold",),
    **dict.fromkeys(CACHES, ("keep", "capacity")),
    "quest": ("keep", "budget", "page", "share"),
    "int8": ("block", "window"),
}
"""Methods for dropping tokens, and for reading or storing the cache of all of them, with their options."""
OWN = ("budget", "page", "share", "block", "window")
"""Options that are those of the method in :mod:`regard.compression.sparse`; several may be given together."""


@dataclass(frozen=True)
class Distil:
    """Train the model on the answers of the original model, or of another teacher; see
    :mod:`regard.compression.distillation.recovery`.

    As the first step of a recipe, it makes a student of evenly spaced layers; of all layers if there is another teacher
    and no `layers`. Elsewhere it recovers what the step before it lost: zeros stay zeros, and in a model with rounded
    weights it trains whatever is in floating point.

    Attributes:
        layers: layers of the student, for a first step; when None half of them, or all with another teacher.
        teacher: the folder of another model with the same library, tokens, classes and inputs; the original model when
            None.
        kind: ``response``: the answers alone; the others compare layers too, see
            :mod:`regard.compression.distillation.reading`: ``features`` hidden states, ``patient`` their directions,
            ``attention`` attention weights, ``relation`` attention weights and values of the last layer.
        weight: weight of the loss on layers next to that on answers, above 0.
        temperature: divides the logits of both models, above 0.
        steps: training steps, a batch each; 1 or more.
        learning_rate: the initial rate, above 0.
        budget: a time limit, for when the steps take longer: ``90s``, ``5m``.
        cache: a folder for the teacher's answers, so that each batch is shown to the teacher once, in this run and later
            ones; see :mod:`regard.compression.distillation.cached`. Not for ``attention`` and ``relation``.
    """

    layers: int | None = None
    teacher: str | None = None
    kind: str = "response"
    weight: float = 1.0
    temperature: float = 1.0
    steps: int = 200
    learning_rate: float = 1e-4
    budget: str | None = None
    cache: str | None = None
    stage: ClassVar = "distil"
    needs: ClassVar = ("training",)

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS)
        positive("weight", self.weight)
        positive("temperature", self.temperature)
        if self.kind == "response" and self.weight != 1:
            raise Unsupported(
                f"weight={self.weight} of distil, which compares answers alone",
                supported="weight of a kind that compares layers",
                nearest=f"kind=features,weight={self.weight}",
            )
        at_least("steps", self.steps, 1)
        check_rate(self.learning_rate)
        if self.layers is not None:
            at_least("layers", self.layers, 1)
        for name, example in (("teacher", "big/"), ("cache", "answers/")):
            place = getattr(self, name)
            if place is not None and (not isinstance(place, str) or not place):
                raise Unsupported(f"{name}={place!r} of distil", supported="a folder", nearest=f"{name}={example}")
        if self.cache is not None and self.kind in OF_ATTENTION:
            raise Unsupported(
                f"cache={self.cache} of distil:kind={self.kind}, which would hold a number for each pair of tokens",
                supported="a cache for kind=response, features and patient",
                nearest=f"kind={self.kind} without a cache",
            )
        self.seconds  # noqa: B018  refuses what is no time

    @property
    def seconds(self) -> float | None:
        """The budget in seconds."""
        if self.budget is None:
            return None
        read = Budget.parse(str(self.budget))
        if read.unit != "seconds":
            raise Unsupported(f"budget={self.budget} of distil", supported="a time: 90s, 5m", nearest="budget=5m")
        return read.amount


@dataclass(frozen=True)
class FewerTokens:
    """Drop tokens on their way through the model or from its cache, or read or store the cache in a cheaper way; see
    :mod:`regard.compression.tokens.applied`.

    Attributes:
        method: one of :data:`METHODS`; when None the first that the model supports: ``tome``, ``power_bert`` or
            ``snapkv``.
        keep: the share of tokens to keep: for images at each of a quarter, half and three quarters of the blocks; for
            texts in the last layer, at the length of the data; for caches of prompts of half that length, with
            ``quest`` the share of them that a new token reads. :data:`KEEP` when nothing is given.
        remove: for images, patches to drop at each block; a number, or a list of them.
        capacity: for caches, tokens of a prompt that each layer keeps.
        threshold: for ``ltp``, the mean attention below which the last layer drops tokens; earlier layers rise evenly
            to it.
        budget, page, share: of :class:`regard.compression.sparse.paging.Quest`.
        block, window: of :class:`regard.compression.sparse.rounding.RoundedKeys`, ``int8``.
    """

    method: str | None = None
    keep: float | None = None
    remove: int | Sequence[int] | None = None
    capacity: int | None = None
    threshold: float | None = None
    budget: int | None = None
    page: int | None = None
    share: bool | None = None
    block: int | None = None
    window: int | None = None
    stage: ClassVar = "tokens"

    def __post_init__(self) -> None:
        if self.method is not None:
            one_of("method", self.method, METHODS)
        given = self._given
        if len(given) > 1 and not set(given) <= set(OWN):
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
        self.sparse  # noqa: B018  refuses values that the method does not have

    @property
    def _given(self) -> list[str]:
        """The options that were given, without the method."""
        return [f.name for f in fields(self) if f.name != "method" and getattr(self, f.name) is not None]

    @property
    def named(self) -> str | None:
        """The method, if the options determine it."""
        if self.method is not None:
            return self.method
        own = [option for option in self._given if option != "keep"]
        return next((name for name, taken in METHODS.items() if own and own[0] in taken), None)

    @property
    def sparse(self) -> Method | None:
        """The method for the cache, if its options are given; None for others and if they follow from a number of tokens."""
        own = {option: getattr(self, option) for option in self._given if option in OWN}
        return make(SPARSE[self.named], own) if self.named == "int8" or (self.named and own) else None

    @property
    def needs(self) -> tuple[str, ...]:
        """Data, if a share is relative to their length, or if answers for single tokens must be detected."""
        known = self.named in IMAGES or self.capacity is not None or self.sparse is not None
        return () if known else ("data",)


@dataclass(frozen=True)
class Export:
    """An exported program of the model, saved next to its weights; see :mod:`regard.compression.programs`.

    Attributes:
        format: ``onnx``, or ``torch`` for a program of ``torch.export``.
    """

    format: str = "onnx"
    stage: ClassVar = "export"
    needs: ClassVar = ("data",)

    def __post_init__(self) -> None:
        one_of("format", self.format, FORMATS)


def check_rate(value: object) -> None:
    """Raise Unsupported unless the value is a learning rate between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise Unsupported(f"learning_rate={value}", supported="0 < learning_rate < 1", nearest="learning_rate=0.0001")


def check_program(method: str | None) -> None:
    """Raise Unsupported if a model with this method for dropping tokens cannot be exported."""
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
