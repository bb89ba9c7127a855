"""The task protocol: what a task, the trainer and the workbench agree on.

A task provides batches and scores; it knows nothing about models. Training batches are a pure function of (step, seed,
batch size), so a run resumed at step s sees the same batches as an uninterrupted run. Evaluation items are always the
same, so the scores of two mechanisms are paired item by item.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import Pattern, Unsupported, one_of
from regard.core.precision import wide

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Kind = TypeVar("Kind", bound="Task")

IGNORED = -100
"""The target at a position that has no loss and no score."""


@dataclass(frozen=True)
class Batch:
    """A batch of items of a task.

    Attributes:
        inputs: tokens, or float32 features. With a memory: what the decoder reads, beginning with a start token, or
            what is known about each point to predict.
        targets: one token per position (:data:`IGNORED` where there is none), one class per item, numbers for each
            position (nan where there is none), or the classes of each position's pixels (:data:`IGNORED` where there is
            none).
        valid: key padding, True where a token exists; None when all tokens are valid.
        grid: size of the image whose tokens are laid out row by row.
        memory: what a cross pattern attends to: source tokens, or float32 features of the past.
        memory_valid: True where a memory token exists; None when all are valid.
        class_shares: share of each class in each item, adding up to 1, for the loss of mixed items; `targets` still
            holds classes. None when every item has a single class.
    """

    inputs: Int[Tensor, "b n"] | Float[Tensor, "b n f"]
    targets: Int[Tensor, "b n"] | Int[Tensor, " b"] | Float[Tensor, "b n t"] | Int[Tensor, "b n p"]
    valid: Bool[Tensor, "b n"] | None = None
    grid: tuple[int, ...] | None = None
    memory: Int[Tensor, "b m"] | Float[Tensor, "b m g"] | None = None
    memory_valid: Bool[Tensor, "b m"] | None = None
    class_shares: Float[Tensor, "b c"] | None = None

    @property
    def size(self) -> int:
        """Number of items."""
        return self.inputs.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self._each(lambda x: x.to(device))

    def items(self, begin: int, end: int) -> Batch:
        """The items from number `begin` up to, but not including, `end`."""
        return self if (begin, end) == (0, self.size) else self._each(lambda x: x[begin:end])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        changed: dict[str, Any] = {name: change(x) for name, x in tensors.items()}
        return replace(self, **changed)


@dataclass(frozen=True)
class Baseline:
    """A simple untrained rule that a model should beat.

    Attributes:
        name: name of the rule, in words.
        items: (n, 2) sum and weight of each held-out item, as from :meth:`Task.score`, in the order of
            :meth:`Task.evaluation_batches`.
    """

    name: str
    items: Float[np.ndarray, "n 2"]

    @property
    def score(self) -> float:
        """The score over all held-out items."""
        total, weight = self.items.sum(0)
        return float(total / weight)

    def after(self, items: int) -> Baseline:
        """The rule on the held-out items after the first `items`, which were used to choose something."""
        return Baseline(self.name, self.items[items:])

    @classmethod
    def of(cls, name: str, task: Task, predict: Callable[[Batch], Tensor]) -> Baseline:
        """Score a rule; `predict` returns for a batch what a model of `task` would return."""
        scores = [torch.stack(task.score(predict(batch), batch), -1) for batch in task.evaluation_batches(256)]
        return cls(name, torch.cat(scores).double().numpy())

    @classmethod
    def majority_class(cls, training: Int[np.ndarray, " n"], held_out: Int[np.ndarray, " m"]) -> Baseline:
        """The rule that always answers the commonest training class, scored by accuracy on the held-out classes."""
        return cls.of_answers("majority class", held_out == np.bincount(training).argmax())

    @classmethod
    def of_answers(cls, name: str, right: Bool[np.ndarray, " n"]) -> Baseline:
        """A rule scored by accuracy, from whether it is right for each held-out item."""
        return cls(name, np.stack([right, np.ones_like(right)], -1).astype(np.float64))


@dataclass(frozen=True)
class Scored:
    """A trained model that a task is made to score.

    Attributes:
        reader: the model's reader of images or volumes, with the classes that it was trained on; None for a model that
            reads none.
        fitted: what its task had derived from its training data; see :class:`Task`. Empty in records of earlier versions.
    """

    reader: Any = None
    fitted: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Data on which a model is trained and evaluated.

    Derive from it (members with a value below may be left out), or write any class with these members. A complete
    task::

        class Parity(Task):
            name, pattern, objective = "parity", Pattern.NONCAUSAL_SELF, "classification"
            length, vocab_size, num_classes, chance, solved = 16, 2, 2, 0.5, 0.95

            def describe(self):
                return "is the number of ones odd?"

            def training_batch(self, step, seed, batch_size):
                bits = counter_generator(seed, step).integers(0, 2, (batch_size, self.length))
                return Batch(torch.from_numpy(bits), torch.from_numpy(bits.sum(1) % 2))

            def evaluation_batches(self, batch_size):
                yield self.training_batch(0, 2**32, batch_size)

    Attributes:
        name: name of the task, as shown.
        pattern: the attention pattern that its model needs.
        objective: ``next-token`` (a prediction at each position), ``masked-token`` (a token at each masked position),
            ``replaced-token`` (whether each token replaces another), ``classification`` (one class per item),
            ``regression`` (numbers at each position), ``segmentation`` (a class for each of a token's `num_targets`
            pixels), or one added by :func:`register_objective`.
        length: tokens per item, padding included.
        vocab_size: number of tokens; None when the inputs are floats.
        features: width of float inputs; None when the inputs are tokens.
        num_classes: number of classes in classification and segmentation.
        num_targets: numbers per position in regression, pixels per token in segmentation.
        memory_length: tokens of the memory, padding included, in a cross pattern; None in a self pattern.
        memory_vocab_size, memory_features: `vocab_size` and `features` of the memory.
        target_features: columns of a float memory that hold the past of the targets, in the order of the targets; None
            for the first `num_targets` columns, empty if none do.
        memory_ordered: whether a float memory is a series; if not, its order means nothing, nor does that of the inputs.
        generates: number of tokens to generate for each held-out item, to be scored by :meth:`score_generated` instead
            of :meth:`score`; None when logits are scored.
        stop_tokens: tokens that end a generated sequence.
        grid: size of an image's token grid.
        metric: what :meth:`score` measures.
        higher_is_better: whether a higher value of that metric is better.
        solved: score from which the task counts as solved; None when it is open-ended.
        chance: score of a model that ignores its input.
        baseline: a simple rule that a model should beat, and its score on each held-out item.
        repeats: whether training items come again unchanged in every epoch, so that what a teacher says about them can be
            kept.
        cut_from_stream: whether items are windows of longer data, of which a smaller `length` gives more.
        shared: number of held-out items that are also among the training data; these are not trained on.
        scored: the trained model that the task is made to score: its training items may all be held out too. None for a
            task to train on.
        fitted: JSON-compatible facts derived from the training data, such as scales and the length of the longest item,
            which the task takes from :attr:`Scored.fitted` when it scores a trained model on other data.
        runner: the :class:`regard.training.runner.Runner` that trains and scores the task's models; None for gradient
            steps on its batches.
        registered: name under which :func:`regard.tasks.create_task` made it; None for other tasks.
        origin: JSON-compatible options with which :func:`regard.tasks.create_task` makes it again; None for other
            tasks.
        named: values of `data` that are names of data sets, not paths.
    """

    name: str
    pattern: Pattern
    objective: str
    length: int
    vocab_size: int | None = None
    features: int | None = None
    num_classes: int | None = None
    num_targets: int | None = None
    memory_length: int | None = None
    memory_vocab_size: int | None = None
    memory_features: int | None = None
    target_features: tuple[int, ...] | None = None
    memory_ordered: bool = True
    generates: int | None = None
    stop_tokens: tuple[int, ...] = ()
    grid: tuple[int, ...] | None = None
    metric: str = "accuracy"
    higher_is_better: bool = True
    solved: float | None = None
    chance: float | None = None
    baseline: Baseline | None = None
    repeats: bool = False
    cut_from_stream: bool = False
    shared: int = 0
    scored: Scored | None = None
    fitted: Mapping[str, Any] = {}
    runner: Any = None
    registered: str | None = None
    origin: Mapping[str, Any] | None = None
    named: tuple[str, ...] = ()

    def describe(self) -> str:
        """Sizes, splits and a sample, shown before training. This is plain text, to be printed without markup."""
        ...

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        """The batch for a step, on the CPU: a pure function of the arguments."""
        ...

    def evaluation_batches(self, batch_size: int) -> Iterable[Batch]:
        """The held-out items, always the same and in the same order; the last batch may be smaller."""
        ...

    def score(self, logits: Float[Tensor, "b *n c"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Sum and weight for each item, in float64: the score of many items is total sum / total weight."""
        return accuracy(logits, batch)

    def answer(self, run: Callable[[Batch], Tensor], batch: Batch) -> Float[Tensor, "b *n c"]:
        """A model's output for a held-out batch; `run` calls the model. This may take several calls if held-out items
        are larger than training items; the targets of batches passed to `run` have no meaning."""
        return run(batch)

    def figures(
        self, output: Float[Tensor, "b *n c"], batch: Batch
    ) -> Mapping[str, tuple[Float[Tensor, " b"], Float[Tensor, " b"]]]:
        """Further figures to report next to the score, by name, each in the form of :meth:`score`."""
        return {}

    def score_generated(
        self, tokens: Int[Tensor, "b n"], batch: Batch
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Like :meth:`score`, for tasks with `generates`: scores generated tokens, up to the first of `stop_tokens`."""
        raise Unsupported(f"generated answers to {self.name}", supported="tasks with `generates`, which define this")

    def loss(self, output: Float[Tensor, "b *n c"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Sum and weight of the training loss for each item: that of the objective, in nats if it is an entropy."""
        return OBJECTIVES[self.objective].loss(output, batch)


@dataclass(frozen=True)
class Objective:
    """The kind of output of a task's models, and the loss that training minimises.

    Attributes:
        name: name that tasks and models use.
        targets: shape of an item's targets, given the task.
        loss: from an output and a batch, the sum and weight of each item's loss.
        needs: the task member that it requires, and a description of it; None if it requires none.
    """

    name: str
    targets: Callable[[Task], tuple[int, ...]]
    loss: Callable[[Tensor, Batch], tuple[Tensor, Tensor]]
    needs: tuple[str, str] | None = None


OBJECTIVES: dict[str, Objective] = {}


def register_objective(objective: Objective) -> None:
    """Register a plugin's objective in this process. Models that support it declare so (:mod:`regard.models.registry`).

    Raises:
        Unsupported: if another objective has the same name.
    """
    if OBJECTIVES.setdefault(objective.name, objective) != objective:
        raise Unsupported(
            f"another objective named {objective.name}", supported="a name that none has: " + ", ".join(OBJECTIVES)
        )


def with_options_of_base(task: type[Kind]) -> type[Kind]:
    """Class decorator for tasks that pass ``**options`` to their base class: makes their signature list all options."""
    own, inherited = (inspect.signature(each).parameters.values() for each in (task, task.__mro__[1]))
    named = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
    task.__signature__ = inspect.Signature([*inherited, *named])  # type: ignore[attr-defined]
    return task


def check_task(task: Any) -> Task:
    """Check a user's task by its members and its first batch; raises Unsupported if something is wrong."""
    told = f"the task {getattr(task, 'name', type(task).__name__)!r}"
    required = ["name", "pattern", "objective", "length", "vocab_size", "features", "num_classes", "grid", "metric"]
    required += ["higher_is_better", "solved", "chance", "num_targets", "memory_length", "memory_vocab_size"]
    required += ["memory_features", "target_features", "memory_ordered", "generates", "stop_tokens", "loss"]
    required += ["describe", "training_batch", "evaluation_batches", "score"]
    missing = [name for name in required if not hasattr(task, name)]
    if missing:
        raise Unsupported(
            f"{told} without {', '.join(missing)}",
            supported="a class with the members of regard.tasks.Task",
            nearest="derive from regard.tasks.Task, which gives most of them a value",
        )
    pattern = Pattern.parse(task.pattern)
    one_of("objective", task.objective, OBJECTIVES)
    if (task.vocab_size is None) == (task.features is None):
        raise Unsupported(
            f"{told} with vocab_size={task.vocab_size} and features={task.features}",
            supported="vocab_size for tokens, or features for floats, and None for the other",
        )
    if pattern.cross == (task.memory_length is None):
        raise Unsupported(
            f"{told} of pattern {pattern} with memory_length={task.memory_length}",
            supported="memory_length in the cross patterns, and None in the self patterns",
        )
    if pattern.cross and (task.memory_vocab_size is None) == (task.memory_features is None):
        raise Unsupported(
            f"{told} with memory_vocab_size={task.memory_vocab_size} and memory_features={task.memory_features}",
            supported="memory_vocab_size for tokens, or memory_features for floats, and None for the other",
        )
    baseline = getattr(task, "baseline", None)
    if not (baseline is None or isinstance(baseline, Baseline)):
        raise Unsupported(
            f"{told} with baseline={baseline!r}", supported="a regard.tasks.Baseline, which has a score for each item"
        )
    objective = OBJECTIVES[task.objective]
    if objective.needs is not None and not getattr(task, objective.needs[0], None):
        name, what = objective.needs
        raise Unsupported(f"{told} with {name}={getattr(task, name, None)}", supported=what)
    runner = getattr(task, "runner", None)
    if runner is not None and not (hasattr(runner, "train") and hasattr(runner, "evaluate")):
        raise Unsupported(
            f"{told} with a runner of type {type(runner).__name__}", supported="a regard.training.runner.Runner"
        )
    batch = task.training_batch(0, 0, 2)
    expected = {
        "inputs": (2, task.length) if task.features is None else (2, task.length, task.features),
        "targets": (2, *objective.targets(task)),
    }
    if pattern.cross:
        width = () if task.memory_features is None else (task.memory_features,)
        expected["memory"] = (2, task.memory_length, *width)
    found = {name: None if (x := getattr(batch, name)) is None else tuple(x.shape) for name in expected}
    if found != expected:
        raise Unsupported(
            f"{told} whose batch of 2 has " + ", ".join(f"{name} of shape {shape}" for name, shape in found.items()),
            supported=", ".join(f"{name} {shape}" for name, shape in expected.items())
            + ", from its lengths, features and objective",
        )
    return task


def counter_generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """A random generator that depends only on (seed, step, stream), the same in every process.

    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed by seed and step; `stream`
    separates different uses of the same pair.
    """
    check_integer("seed", seed, 0, (1 << 64) - 1)
    check_integer("step", step, 0, (1 << 64) - 1)
    key = np.array([seed, step], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


TRAINING, EVALUATION, SPLIT, AUGMENTATION = range(4)
"""Streams of :func:`counter_generator`."""


def mean_loss(task: Task, output: Float[Tensor, "b *n c"], batch: Batch) -> Float[Tensor, ""]:
    """The training loss, averaged over all targets of the batch that count; 0 without targets."""
    sums, weights = task.loss(output, batch)
    return sums.sum() / weights.sum().clamp(min=1)


def cross_entropy_by_item(
    logits: Float[Tensor, "b *n c"], batch: Batch
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Sum of cross entropies (nats) and number of targets for each item, in at least float32."""
    targets = _targets(logits, batch)
    precise = wide(logits)
    if batch.class_shares is not None:
        nats = F.cross_entropy(precise, batch.class_shares.to(precise.dtype), reduction="none")
        return nats, torch.ones_like(nats)
    nats = F.cross_entropy(precise.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
    nats = nats.view(batch.size, -1)
    return nats.sum(1), (targets != IGNORED).view(batch.size, -1).sum(1).to(nats.dtype)


def squared_error_by_item(
    output: Float[Tensor, "b n t"], batch: Batch
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Sum of squared errors and number of targets for each item, in at least float32; nan targets do not count."""
    error, counted = _errors(output, batch)
    return error.square().flatten(1).sum(1), counted.flatten(1).sum(1).to(error.dtype)


register_objective(Objective("next-token", lambda task: (task.length,), cross_entropy_by_item))
register_objective(Objective("masked-token", lambda task: (task.length,), cross_entropy_by_item))
register_objective(
    Objective(
        "classification", lambda task: (), cross_entropy_by_item, ("num_classes", "the number of classes, 2 or more")
    )
)
register_objective(
    Objective(
        "regression",
        lambda task: (task.length, task.num_targets or 0),
        squared_error_by_item,
        ("num_targets", "how many numbers to predict a token"),
    )
)


def absolute_error(output: Float[Tensor, "b n t"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Sum of absolute errors and number of targets for each item, in float64; nan targets do not count."""
    error, counted = _errors(output.double(), batch)
    return error.abs().flatten(1).sum(1), counted.flatten(1).sum(1).double()


def _errors(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Differences from the targets (0 where there is no target), and where there are targets."""
    if output.shape != batch.targets.shape:
        raise Unsupported(
            f"outputs of shape {tuple(output.shape)} for targets of shape {tuple(batch.targets.shape)}",
            supported="one number for each target",
        )
    precise = wide(output)
    counted = ~batch.targets.isnan()
    return torch.where(counted, precise - batch.targets.to(precise.dtype), 0), counted


def bits_per_byte(
    logits: Float[Tensor, "b n c"], batch: Batch, token_bytes: Int[Tensor, " c"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Bits spent on the target tokens, and their number of bytes, for each item, in float64.

    Their quotient compares models across tokenizers, unlike a loss per token: bits = nats / ln 2.

    Args:
        token_bytes: number of bytes that each token stands for.
    """
    targets = _targets(logits, batch)
    nats, _ = cross_entropy_by_item(logits.double(), batch)
    counted = targets != IGNORED
    lengths = token_bytes.to(targets.device)[torch.where(counted, targets, 0)]
    return nats / math.log(2), torch.where(counted, lengths, 0).sum(1).double()


def accuracy(logits: Float[Tensor, "b *n c"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Number of correct answers and number of targets for each item, in float64."""
    targets = _targets(logits, batch)
    counted = (targets != IGNORED).view(batch.size, -1)
    right = (logits.argmax(-1) == targets).view(batch.size, -1) & counted
    return right.sum(1).double(), counted.sum(1).double()


def _targets(logits: Tensor, batch: Batch) -> Tensor:
    if logits.shape[:-1] != batch.targets.shape:
        raise Unsupported(
            f"logits of shape {tuple(logits.shape)} for targets of shape {tuple(batch.targets.shape)}",
            supported=f"logits of shape {(*batch.targets.shape, 'classes')}",
        )
    return batch.targets


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """Return an integer option if it is within its range; raises Unsupported otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unsupported(f"{name}={value!r}", supported=f"an integer from {low} to {high}")
    if not low <= value <= high:
        nearest = f"{name}={min(max(value, low), high)}"
        raise Unsupported(f"{name}={value}", supported=f"an integer from {low} to {high}", nearest=nearest)
    return value


SIDES = {2: "size=64, or size=[64,96]", 3: "size=32, or size=[16,64,64]"}
"""Examples of the option `size` for each number of axes."""


def check_sides(size: Any, axes: int, low: int, high: int) -> tuple[int, ...]:
    """Return the sides that the option `size` gives: one number for all axes, or a list with one for each.

    Raises Unsupported for another number of sides, or one out of range.
    """
    each = tuple(size) if isinstance(size, list | tuple) else (size,) * axes
    if len(each) != axes:
        words = {2: "two (height and width)", 3: "three"}
        raise Unsupported(f"size={size}", supported=f"one number, or {words[axes]}", nearest=SIDES[axes])
    return tuple(check_integer("size", side, low, high) for side in each)


def check_fraction(name: str, value: Any, low: float, high: float) -> float:
    """Return a fraction if it is within its range; raises Unsupported otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Unsupported(f"{name}={value!r}", supported=f"a number from {low} to {high}")
    return float(value)


def in_batches(count: int, batch_size: int) -> Iterator[slice]:
    """Slices of at most `batch_size` that cover `count` items in order."""
    check_integer("batch_size", batch_size, 1, 1 << 20)
    for start in range(0, count, batch_size):
        yield slice(start, min(start + batch_size, count))
