"""Recipe steps that remove parts of a model; :mod:`regard.compression.recipes` has the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from regard.compression.pruning.weights import FREE, read_pattern
from regard.compression.steps import check_rate
from regard.contract import Unsupported, at_least, one_of

FOCUSES = ("accuracy", "size", "speed")
SCORES = ("activation", "magnitude")
LAYERS = ("likeness", "even")


@dataclass(frozen=True)
class Masking:
    """A step that sets weights to 0; see :mod:`regard.compression.pruning.weights`.

    Attributes:
        ratio: the share of the weights to remove, for the free pattern.
        pattern: ``free``, or ``N:M`` such as ``2:4``: N of every M consecutive weights are kept.
    """

    ratio: float = 0.5
    pattern: str = FREE
    stage: ClassVar = "mask"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        if read_pattern(self.pattern) is not None and self.ratio != 0.5:
            raise Unsupported(
                f"ratio={self.ratio} together with pattern={self.pattern}, which already sets the share",
                supported="one of them",
            )


@dataclass(frozen=True)
class Magnitude(Masking):
    """Remove the smallest weights of a layer."""


@dataclass(frozen=True)
class Wanda(Masking):
    """Remove small weights in columns with small inputs."""

    needs: ClassVar = ("squares",)


@dataclass(frozen=True)
class SparseGpt(Masking):
    """Remove weights for which the remaining ones can compensate.

    Attributes:
        damping: damping of the second moments, above 0.
    """

    damping: float = 0.01
    needs: ClassVar = ("second",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)


@dataclass(frozen=True)
class Structured:
    """Remove heads, neurons and layers for good; see :mod:`regard.compression.pruning.scores`.

    Attributes:
        heads, neurons: the share of them to remove, in each layer.
        layers: number of layers to remove.
        by: ``activation``: by what a part contributes on the calibration data; ``magnitude``: by the size of its
            weights, without data.
        layers_by: ``likeness``: remove layers whose output is most similar to their input on the calibration data;
            ``even``: remove evenly spaced layers, without data, for models that were trained with
            :mod:`regard.compression.pruning.layer_drop`.
    """

    heads: float = 0.0
    neurons: float = 0.0
    layers: int = 0
    by: str = "activation"
    layers_by: str = "likeness"
    stage: ClassVar = "structure"

    def __post_init__(self) -> None:
        one_of("by", self.by, SCORES)
        one_of("layers_by", self.layers_by, LAYERS)
        for name in ("heads", "neurons"):
            check_share(name, getattr(self, name))
        if not isinstance(self.layers, int) or isinstance(self.layers, bool) or self.layers < 0:
            raise Unsupported(f"layers={self.layers!r}", supported="a number of layers, 0 or more")

    @property
    def needs(self) -> tuple[str, ...]:
        """Data, if they decide what is removed."""
        parts = bool(self.heads or self.neurons) and self.by == "activation"
        return ("data",) if parts or (self.layers and self.layers_by == "likeness") else ()


@dataclass(frozen=True)
class GateLearning:
    """Learn which heads, neurons and branches go, with the model's own loss; see :mod:`regard.compression.pruning.gates`.

    The model's weights are not trained. Use items that the model is not tested on.

    Attributes:
        share: the share of the branches' parameters to keep, above 0 and below 1.
        steps: training steps, a batch each; 1 or more. With few, the share is missed.
        learning_rate: Adam's rate for the gates, above 0.
        hidden: whether the residual stream becomes narrower too.
    """

    share: float = 0.5
    steps: int = 200
    learning_rate: float = 0.1
    hidden: bool = False
    stage: ClassVar = "structure"
    needs: ClassVar = ("training",)

    def __post_init__(self) -> None:
        check_share("share", self.share)
        if not self.share:
            raise Unsupported("share=0, which keeps nothing", supported="0 < share < 1", nearest="share=0.5")
        at_least("steps", self.steps, 1)
        check_rate(self.learning_rate)


@dataclass(frozen=True)
class AxFormer:
    """Remove what hurts a fine-tuned model, found by trial; see :mod:`regard.compression.pruning.axformer`.

    Attributes:
        focus: ``accuracy``: only changes that lower the loss; ``size`` and ``speed``: also changes that raise it by at
            most `slack`.
        slack: relative to the lowest loss so far; 0.02 when None, and 0 with ``accuracy``.
        groups: number of groups into which the neurons of a layer are divided for the finer search.
        hard: keys that a query of hard attention reads; 0 tries no hard attention.
        factor: the finer search within a branch is skipped if the loss without the branch is at least this many times
            the best.
        fraction: more than this share of the items must be unharmed; None for no such rule; the default is 0.5 for
            ``accuracy``.
        ties: whether changes that leave the loss as it is are made too.
    """

    focus: str = "accuracy"
    slack: float | None = None
    groups: int = 12
    hard: int = 30
    factor: float = 1.1
    fraction: float | None = None
    ties: bool = False
    stage: ClassVar = "structure"
    needs: ClassVar = ("loss",)

    def __post_init__(self) -> None:
        one_of("focus", self.focus, FOCUSES)
        exact = self.focus == "accuracy"
        if self.slack is None:
            object.__setattr__(self, "slack", 0.0 if exact else 0.02)
        at_least("slack", self.slack, 0.0)  # type: ignore[arg-type]
        if exact and self.slack:
            raise Unsupported(f"slack={self.slack} with focus=accuracy", supported="focus=size or focus=speed")
        at_least("groups", self.groups, 1)
        at_least("hard", self.hard, 0)
        at_least("factor", self.factor, 1.0)
        if self.fraction is None and exact:
            object.__setattr__(self, "fraction", 0.5)
        if self.fraction is not None:
            check_share("fraction", self.fraction)


def check_share(name: str, value: Any) -> None:
    """Raise Unsupported unless the value is a number from 0 to below 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise Unsupported(f"{name}={value!r}", supported=f"0 <= {name} < 1", nearest=f"{name}=0.5")


def check_damping(value: Any) -> None:
    """Raise Unsupported unless the value is a number above 0, at most 1."""
    if not isinstance(value, int | float) or not 0 < value <= 1:
        raise Unsupported(f"damping={value!r}", supported="0 < damping <= 1", nearest="damping=0.01")
