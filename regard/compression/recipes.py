"""Recipes: the steps that compress a model, one after another, in the notation that users write.

    int8                            one step
    gptq:bits=4,group=32            with options
    smoothquant:alpha=0.7 + w8a8    several steps, in the order in which they are done
    wanda:ratio=0.4 + int8          weights set to 0, then the others rounded
    axformer:focus=size             heads, neurons and layers removed for good
    gates:share=0.6,hidden=true     heads, neurons, layers and dimensions removed that gates have learned to close
    structured:layers=2 + distil    layers removed, then quality recovered from the answers of the original model
    int8 + tokens:method=int8       the weights and the cache in 8 bits
    int8 + tokens:keep=0.5 + export tokens dropped on their way through it, and an ONNX program next to the saved model
    my_recipe.yaml                  a file: a list of steps, each a name as above or {name: {option: value}}; JSON too

Several recipes are separated by commas; ``option=value`` after a comma belongs to the step before it. Each step has a
*stage*, and stages come in a fixed order: removing parts of the model, setting weights to 0 (both in
:mod:`regard.compression.pruning`), moving difficulty between inputs and weights, rounding, dropping tokens, exporting.
There is at most one step per stage. ``distil`` comes first, where it makes a student, or directly after a step whose
losses it recovers. ``awq`` and ``smoothquant`` need a rounding step: ``awq`` alone is ``awq + int4:calibrate=mse``,
``smoothquant`` alone ``smoothquant + w8a8``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from regard.compression.distillation.reading import OF_ATTENTION
from regard.compression.pruning.steps import (
    AxFormer,
    GateLearning,
    Magnitude,
    Masking,
    SparseGpt,
    Structured,
    Wanda,
    check_damping,
)
from regard.compression.steps import Distil, Export, FewerTokens, check_program, check_rate
from regard.compression.weights.limits import CALIBRATORS
from regard.contract import (
    Unsupported,
    at_least,
    check_options,
    closest,
    one_of,
    read_options,
    split_list,
    written_options,
)
from regard.layers.quantized import Format
from regard.measurement.data_files import read_data

ACCEPTED = "NAME, NAME:option=value,option=value, STEP + STEP, or a .yaml or .json file"
HEADS = ("int8", "keep")


@dataclass(frozen=True)
class Scaling:
    """A step that moves difficulty between inputs and weights; see :mod:`regard.compression.weights.scaling`."""

    stage: ClassVar = "scale"
    needs: ClassVar = ("range",)


@dataclass(frozen=True)
class SmoothQuant(Scaling):
    """Move difficulty from inputs that are rounded to the weights.

    Attributes:
        alpha: how much, 0 to 1.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        _share("alpha", self.alpha)


@dataclass(frozen=True)
class Awq(Scaling):
    """Round weights that meet large inputs less; how much less is searched for in each layer.

    The paper's code then searches for the ends of the grids, as ``calibrate=mse`` does; so does ``awq`` by default.
    """

    needs: ClassVar = ("second",)


@dataclass(frozen=True)
class Rounding:
    """A step that puts weights on grids.

    Attributes:
        calibrate: how the ends of the grids are chosen: ``minmax``, ``percentile`` (99.9), ``mse`` or ``kl``. Where
            squares of inputs are known, ``mse`` gives more weight to errors that meet large inputs.
        head: treatment of a language model's output layer: ``int8``, one scale per row, together with the
            embedding if it is the same table; or ``keep``. Heads of other models are kept.
    """

    calibrate: str = "minmax"
    head: str = "int8"
    stage: ClassVar = "round"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        one_of("calibrate", self.calibrate, CALIBRATORS)
        one_of("head", self.head, HEADS)
        self.format  # noqa: B018  refuses what does not go together

    @property
    def format(self) -> Format:
        """The format of the weights."""
        raise NotImplementedError


@dataclass(frozen=True)
class Int8(Rounding):
    """Weights in 8 bits, one scale per row."""

    @property
    def format(self) -> Format:
        return Format(8)


@dataclass(frozen=True)
class Int4(Rounding):
    """Weights in 4 bits, in groups.

    Attributes:
        bits: 4, 3 or 2; fewer than 4 take the space of 4.
        group: 32, 64 or 128 columns with one scale.
        symmetric: whether there are no offsets.
    """

    bits: int = 4
    group: int = 32
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits == 8:
            raise Unsupported("int4 of 8 bits", supported="bits=4, 3 or 2", nearest="int8")
        super().__post_init__()

    @property
    def format(self) -> Format:
        return Format(self.bits, self.group, self.symmetric)


@dataclass(frozen=True)
class Gptq(Rounding):
    """Weights in 8 to 2 bits by GPTQ; see :mod:`regard.compression.weights.gptq`.

    Attributes:
        bits, group, symmetric: as in ``int4``; with 8 bits the group has no meaning.
        order: ``activations`` or ``columns``.
        damping: damping of the second moments, above 0.
    """

    calibrate: str = "mse"
    bits: int = 4
    group: int | None = None
    symmetric: bool = True
    order: str = "activations"
    damping: float = 0.05
    needs: ClassVar = ("second",)

    def __post_init__(self) -> None:
        one_of("order", self.order, ("activations", "columns"))
        check_damping(self.damping)
        if self.group is None and self.bits in (4, 3, 2):
            object.__setattr__(self, "group", 32)
        super().__post_init__()

    @property
    def format(self) -> Format:
        return Format(self.bits, self.group, self.symmetric)


@dataclass(frozen=True)
class Lsq(Rounding):
    """Weights in 8 to 2 bits, trained with the steps of their grids; see :mod:`regard.compression.weights.learned`.

    It trains on the data with the model's own loss, so use items that the model is not tested on.

    Attributes:
        bits, group: as in ``int4``; with 8 bits the group has no meaning.
        steps: training steps, a batch each; 1 or more.
        learning_rate: the initial rate, above 0.
    """

    bits: int = 4
    group: int | None = None
    steps: int = 200
    learning_rate: float = 1e-4
    needs: ClassVar = ("training",)

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        check_rate(self.learning_rate)
        if self.calibrate != "minmax":
            raise Unsupported(f"lsq:calibrate={self.calibrate}, whose grids are learned", supported="no calibrate")
        if self.group is None and self.bits in (4, 3, 2):
            object.__setattr__(self, "group", 32)
        super().__post_init__()

    @property
    def format(self) -> Format:
        return Format(self.bits, self.group)


@dataclass(frozen=True)
class W8A8(Rounding):
    """Weights and inputs in 8 bits: each token's inputs on a grid of their own, computed at run time."""

    @property
    def format(self) -> Format:
        return Format(8, dynamic=True)


@dataclass(frozen=True)
class LlmInt8(W8A8):
    """``w8a8``, but input columns with outliers stay in floating point (LLM.int8, arXiv 2208.07339).

    The paper finds these columns in each call; here they are fixed by the calibration data.

    Attributes:
        threshold: the size from which a number makes its column an outlier; 6 in the paper.
    """

    threshold: float = 6.0
    needs: ClassVar = ("range",)

    def __post_init__(self) -> None:
        at_least("threshold", self.threshold, 0.0)
        super().__post_init__()


STEPS: dict[str, type[Any]] = {
    "distil": Distil,
    "structured": Structured,
    "axformer": AxFormer,
    "gates": GateLearning,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGpt,
    "smoothquant": SmoothQuant,
    "awq": Awq,
    "int8": Int8,
    "int4": Int4,
    "gptq": Gptq,
    "lsq": Lsq,
    "w8a8": W8A8,
    "llm_int8": LlmInt8,
    "tokens": FewerTokens,
    "export": Export,
}
"""The steps by the names used in recipes."""

STAGES = {
    "structure": "take parts out of the model",
    "mask": "make weights 0",
    "scale": "scale the same layers",
    "round": "round the same weights",
    "tokens": "let tokens go",
    "export": "make a program",
}
"""Stages in their order, with what two steps of one stage would both do; ``distil`` has no fixed place."""

OF_WEIGHTS = ("mask", "scale", "round")
"""Stages that are done together, layer by layer."""
WON_BACK = ("structure", "mask", "round")
"""Stages that ``distil`` may follow."""

USUAL: dict[str, tuple[str, Rounding]] = {
    "smoothquant": ("w8a8", W8A8()),
    "awq": ("int4", Int4(calibrate="mse")),
}
"""The default rounding step after a step that does not round."""

ALL = ("int8", "w8a8", "smoothquant", "llm_int8", "int4", "int4:calibrate=mse", "awq", "gptq", "awq + gptq", "tokens")
"""The recipes that ``all`` stands for, the quickest first: recipes that need no search or training and make something
smaller or faster. Recipes that do not apply to a model are reported as such."""


@dataclass(frozen=True)
class Recipe:
    """Steps by name, in order.

    Attributes:
        steps: (name, step) pairs.
    """

    steps: tuple[tuple[str, Any], ...]

    @property
    def structure(self) -> Structured | AxFormer | GateLearning | None:
        """The step that removes parts of the model."""
        return self._of("structure")

    @property
    def masking(self) -> Masking | None:
        """The step that sets weights to 0."""
        return self._of("mask")

    @property
    def scaling(self) -> Scaling | None:
        """The step that scales."""
        return self._of("scale")

    @property
    def rounding(self) -> Rounding | None:
        """The step that rounds."""
        return self._of("round")

    @property
    def changes_weights(self) -> bool:
        """Whether a step makes weights 0, scales or rounds them, for which a model needs linear layers."""
        return any(step.stage in OF_WEIGHTS for _, step in self.steps)

    @property
    def acts(self) -> list[Recipe]:
        """The steps in groups to do together: consecutive steps on weights as one group, each other step alone."""
        found: list[list[tuple[str, Any]]] = []
        for one in self.steps:
            joined = one[1].stage in OF_WEIGHTS and found and found[-1][-1][1].stage in OF_WEIGHTS
            found[-1].append(one) if joined else found.append([one])
        return [Recipe(tuple(steps)) for steps in found]

    def _of(self, stage: str) -> Any:
        return next((step for _, step in self.steps if step.stage == stage), None)

    @property
    def needs(self) -> frozenset[str]:
        """What the steps need: of layer inputs the ``range``, the sums of ``squares`` or all ``second`` moments; of
        the model the ``loss`` on items, or its response to ``data``; ``training`` on batches, one a step. Empty if the
        recipe needs no data."""
        return frozenset(need for _, step in self.steps for need in step.needs)

    @property
    def name(self) -> str:
        """The recipe as it is written, with the options that are not defaults."""
        return " + ".join(_written(name, step) for name, step in self.steps)

    def as_list(self) -> list[dict[str, dict[str, Any]]]:
        """The steps with all options, for JSON and YAML."""
        return [{name: asdict(step)} for name, step in self.steps]


def _written(name: str, step: Any) -> str:
    own: dict[str, Any] = {}
    for option in (f.name for f in fields(step)):
        value = getattr(step, option)
        if value != getattr(_usual(name, own), option):
            own[option] = value
    return written_options(name, own)


def _usual(name: str, own: Mapping[str, Any]) -> Any:
    """A step with these options and the defaults that go with them, as those of ``axformer`` go with its focus."""
    try:
        return STEPS[name](**own)
    except Unsupported:  # options that need further ones
        return STEPS[name]()


def read_recipe(given: str | Recipe | Sequence[Any]) -> Recipe:
    """Parse a recipe from its notation, from a file, or from a list of steps.

    Raises:
        Unsupported: for unknown steps and options, naming the nearest, and for steps that do not go together.
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, str):
        if given.strip().endswith((".yaml", ".yml", ".json")):
            return read_recipe(_steps_in(Path(given.strip())))
        given = [part.strip() for part in given.split("+")]
    if not isinstance(given, Sequence) or not given:
        raise Unsupported(f"recipe {given!r}", supported=ACCEPTED, nearest="int8")
    return _checked([_step(one) for one in given])


def read_recipes(text: str) -> list[Recipe]:
    """Parse several recipes, separated by commas; ``all`` is :data:`ALL`."""
    if text.strip() == "all":
        return [read_recipe(one) for one in ALL]
    parts: list[str] = []
    for part in split_list(text):
        if parts and re.match(r"\s*\w+\s*=", part):
            parts[-1] += f",{part}"
        elif part.strip():
            parts.append(part)
    recipes = [read_recipe(part) for part in parts]
    if not recipes:
        raise Unsupported(f"recipes {text!r}", supported=f"all, or a list with commas of {ACCEPTED}", nearest="all")
    return list({recipe.name: recipe for recipe in recipes}.values())


def _step(given: Any) -> tuple[str, Any]:
    if isinstance(given, Mapping) and len(given) == 1:
        ((name, options),) = given.items()
        options = {} if options is None else options
    elif isinstance(given, str):
        name, _, text = given.partition(":")
        options = read_options(text, name.strip())
    else:
        raise Unsupported(f"step {given!r} of a recipe", supported="a name, or {name: {option: value}}")
    name = str(name).strip()
    if name not in STEPS:
        raise Unsupported(f"step {name!r} of a recipe", supported=", ".join(STEPS), nearest=closest(name, STEPS))
    if not isinstance(options, Mapping):
        raise Unsupported(f"options {options!r} of {name}", supported="option: value pairs")
    check_options(STEPS[name], options, name)
    return name, STEPS[name](**options)


def _checked(steps: list[tuple[str, Any]]) -> Recipe:
    if not any(step.stage == "round" for _, step in steps):
        steps = [more for one in steps for more in _with_rounding(one)]
    for name, step in steps:
        if isinstance(step, Structured) and not (step.heads or step.neurons or step.layers):
            raise Unsupported(
                f"{name} that takes nothing away",
                supported="heads=, neurons= or layers=, which say how much goes",
                nearest=f"{name}:layers=1",
            )
    _check_order(steps)
    recipe, named = Recipe(tuple(steps)), {step.stage: name for name, step in steps}
    if "export" in named and "tokens" in named:
        check_program(recipe._of("tokens").named)
    rounding = recipe.rounding
    if rounding is None:
        return recipe
    rounds, last = rounding.format.dynamic, named["round"]
    if isinstance(rounding, Lsq) and (recipe.masking is not None or recipe.scaling is not None):
        raise Unsupported(
            f"lsq after {named.get('scale', named.get('mask'))}, whose weights it would train anew",
            supported="lsq alone, or after a step that takes parts out",
            nearest="lsq",
        )
    if "smoothquant" in named.values() and not rounds:
        raise Unsupported(
            f"smoothquant before {last}, which leaves inputs as they are",
            supported="steps that round inputs: w8a8, llm_int8",
            nearest='"smoothquant + w8a8"',
        )
    if "awq" in named.values() and rounds:
        raise Unsupported(
            f"awq before {last}, which rounds inputs", supported="int4, gptq, int8", nearest='"awq + int4"'
        )
    if recipe.masking is not None and not rounding.format.symmetric:
        raise Unsupported(
            f"{last} with offsets after weights were made 0, which would not stay 0",
            supported="symmetric=true, or no step that makes weights 0",
            nearest="symmetric=true",
        )
    return recipe


def _with_rounding(one: tuple[str, Any]) -> list[tuple[str, Any]]:
    """The step, followed by its default rounding step if it has one."""
    usual = USUAL.get(one[0])
    return [one] if usual is None else [one, usual]


def _check_order(steps: list[tuple[str, Any]]) -> None:
    order = list(STAGES)
    for (first, one), (second, other) in itertools.pairwise(step for step in steps if step[1].stage in STAGES):
        if one.stage == other.stage:
            raise Unsupported(
                f"{first} and {second} in one recipe, which both {STAGES[one.stage]}", supported="one of them"
            )
        if order.index(one.stage) > order.index(other.stage):
            before = "the step that rounds" if one.stage == "round" else first
            raise Unsupported(
                f"{second} after {first}",
                supported=f"{second} before {before}",
                nearest=f'"{_written(second, other)} + {_written(first, one)}"',
            )
    for (before, one), (name, step) in itertools.pairwise(steps):
        if not isinstance(step, Distil):
            continue
        if one.stage not in WON_BACK:
            raise Unsupported(
                f"{name} after {before}",
                supported="distil first, where it makes a student of fewer layers, or directly after a step that takes parts out, "
                "makes weights 0 or rounds, whose losses it wins back",
                nearest="distil once" if before == name else f'"{name} + {before}"',
            )
        if step.kind in OF_ATTENTION and one.stage == "structure" and _takes_heads(one):
            raise Unsupported(
                f"kind={step.kind} of {name} after {before}, which takes heads out that the teacher still has",
                supported="kind=response, features or patient",
                nearest=f'"{before} + {name}:kind=features"',
            )
        if step.layers is not None:
            raise Unsupported(
                f"layers={step.layers} of {name} after {before}",
                supported="layers where distil comes first",
                nearest=f'"structured:layers=... + {name}"',
            )
        if one.stage == "round" and one.format.dynamic:
            raise Unsupported(
                f"{name} after {before}, which rounds inputs, so that no gradients pass",
                supported="int8, int4, gptq or lsq before it, or distil before the step that rounds",
                nearest="int8",
            )


def _takes_heads(step: Structured | AxFormer | GateLearning) -> bool:
    """Return whether a step may take heads out of layers that stay."""
    return not isinstance(step, Structured) or bool(step.heads)


def _steps_in(path: Path) -> Any:
    if not path.is_file():
        raise Unsupported(f"the recipe {path}, which does not exist", supported=ACCEPTED, nearest="int8")
    found = read_data(path, f"the recipe {path}")
    if isinstance(found, Mapping) and set(found) == {"steps"}:
        found = found["steps"]
    if not isinstance(found, list):
        raise Unsupported(f"the recipe {path} with other contents", supported="a list of steps")
    return found


def _share(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise Unsupported(f"{name}={value!r}", supported=f"0 <= {name} <= 1", nearest=f"{name}=0.5")
