"""What a comparison trains on: the words that tasks share with the trainer and the workbench.

A task gives batches and scores; it knows nothing of models. Training batches are a pure function of (step, seed, batch
size), so a run resumed at step s sees the batches that the uninterrupted run would have seen, and evaluation items are
the same each time, so the scores of two mechanisms are paired item by item.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import Pattern, Unsupported, one_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

IGNORED = -100
"""The target of a position that has no loss and no score."""


@dataclass(frozen=True)
class Batch:
    """Some items of a task.

    Attributes:
        inputs: tokens, or float32 features.
        targets: a token for each position (:data:`IGNORED` where there is none), or a class for each item.
        valid: key padding, True where a token exists; None when all tokens are valid.
        grid: sizes of the image whose tokens are laid out row by row.
    """

    inputs: Int[Tensor, "b n"] | Float[Tensor, "b n f"]
    targets: Int[Tensor, "b n"] | Int[Tensor, " b"]
    valid: Bool[Tensor, "b n"] | None = None
    grid: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Number of items."""
        return self.inputs.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        valid = None if self.valid is None else self.valid.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), valid, self.grid)


class Task(Protocol):
    """What a model is trained on and measured by.

    Derive from it (members with a value below may be left out), or write any class with these members. A whole task::

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
        name: of the task, as shown.
        pattern: the attention pattern that its model needs.
        objective: ``next-token`` (a prediction at each position) or ``classification`` (one for each item).
        length: tokens of an item, padding included.
        vocab_size: number of tokens; None when the inputs are floats.
        features: width of float inputs; None when the inputs are tokens.
        num_classes: in classification.
        grid: sizes of an image's token grid.
        metric: what :meth:`score` measures.
        higher_is_better: of that metric.
        solved: the score from which the task counts as solved; None when it is open-ended.
        chance: the score of a model that ignores the input.
    """

    name: str
    pattern: Pattern
    objective: Literal["next-token", "classification"]
    length: int
    vocab_size: int | None = None
    features: int | None = None
    num_classes: int | None = None
    grid: tuple[int, ...] | None = None
    metric: str = "accuracy"
    higher_is_better: bool = True
    solved: float | None = None
    chance: float | None = None

    def describe(self) -> str:
        """Sizes, splits and a sample, shown before training. Plain text: print it without markup."""
        ...

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        """The batch of a step: a pure function of its arguments, on the CPU."""
        ...

    def evaluation_batches(self, batch_size: int) -> Iterable[Batch]:
        """The same held-out items every time, in the same order; the last batch may be smaller."""
        ...

    def score(self, logits: Float[Tensor, "b *n c"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Sum and weight of each item, in float64: the score of many items is total sum / total weight."""
        return accuracy(logits, batch)


OBJECTIVES = ("next-token", "classification")


def check_task(task: Any) -> Task:
    """A user's task after a look at its members and its first batch; raises Unsupported with what is wrong."""
    told = f"the task {getattr(task, 'name', type(task).__name__)!r}"
    required = ["name", "pattern", "objective", "length", "vocab_size", "features", "num_classes", "grid", "metric"]
    required += ["higher_is_better", "solved", "chance"]
    required += ["describe", "training_batch", "evaluation_batches", "score"]
    missing = [name for name in required if not hasattr(task, name)]
    if missing:
        raise Unsupported(
            f"{told} without {', '.join(missing)}",
            supported="a class with the members of regard.tasks.Task",
            nearest="derive from regard.tasks.Task, which gives most of them a value",
        )
    Pattern.parse(task.pattern)
    one_of("objective", task.objective, OBJECTIVES)
    if (task.vocab_size is None) == (task.features is None):
        raise Unsupported(
            f"{told} with vocab_size={task.vocab_size} and features={task.features}",
            supported="vocab_size for tokens, or features for floats, and None for the other",
        )
    if task.objective == "classification" and not task.num_classes:
        raise Unsupported(f"{told} with num_classes={task.num_classes}", supported="the number of classes, 2 or more")
    batch = task.training_batch(0, 0, 2)
    inputs = (2, task.length) if task.features is None else (2, task.length, task.features)
    targets = (2, task.length) if task.objective == "next-token" else (2,)
    found = (tuple(batch.inputs.shape), tuple(batch.targets.shape))
    if found != (inputs, targets):
        raise Unsupported(
            f"{told} whose batch of 2 has inputs of shape {found[0]} and targets of shape {found[1]}",
            supported=f"inputs {inputs} and targets {targets}, from its length, features and objective",
        )
    return task


def counter_generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """Random numbers that depend on (seed, step, stream) alone, equal in every process.

    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) keyed by seed and step; `stream`
    separates uses of the same pair.
    """
    check_integer("seed", seed, 0, (1 << 64) - 1)
    check_integer("step", step, 0, (1 << 64) - 1)
    key = np.array([seed, step], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


TRAINING, EVALUATION, SPLIT = range(3)
"""Streams of :func:`counter_generator`."""


def cross_entropy(logits: Float[Tensor, "b *n c"], batch: Batch) -> Float[Tensor, ""]:
    """Mean cross entropy over the targets that count, in nats: the training loss of every task. 0 without targets."""
    sums, counts = cross_entropy_by_item(logits, batch)
    return sums.sum() / counts.sum().clamp(min=1)


def cross_entropy_by_item(
    logits: Float[Tensor, "b *n c"], batch: Batch
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Sum of the cross entropies (nats) and number of targets of each item, in at least float32."""
    targets = _targets(logits, batch)
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(precise.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
    nats = nats.view(batch.size, -1)
    return nats.sum(1), (targets != IGNORED).view(batch.size, -1).sum(1).to(nats.dtype)


def bits_per_byte(
    logits: Float[Tensor, "b n c"], batch: Batch, token_bytes: Int[Tensor, " c"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Bits spent and bytes of the target tokens, for each item, in float64.

    Their quotient compares models across tokenizers, which a loss for each token does not: bits = nats / ln 2.

    Args:
        token_bytes: number of bytes that each token stands for.
    """
    targets = _targets(logits, batch)
    nats, _ = cross_entropy_by_item(logits.double(), batch)
    counted = targets != IGNORED
    lengths = token_bytes.to(targets.device)[torch.where(counted, targets, 0)]
    return nats / math.log(2), torch.where(counted, lengths, 0).sum(1).double()


def accuracy(logits: Float[Tensor, "b *n c"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Number of right answers and of targets, for each item, in float64."""
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
    """An integer option within its range; raises Unsupported."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unsupported(f"{name}={value!r}", supported=f"an integer from {low} to {high}")
    if not low <= value <= high:
        nearest = f"{name}={min(max(value, low), high)}"
        raise Unsupported(f"{name}={value}", supported=f"an integer from {low} to {high}", nearest=nearest)
    return value


def check_fraction(name: str, value: Any, low: float, high: float) -> float:
    """A fraction within its range; raises Unsupported."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Unsupported(f"{name}={value!r}", supported=f"a number from {low} to {high}")
    return float(value)


def in_batches(count: int, batch_size: int) -> Iterator[slice]:
    """Slices of at most `batch_size` that cover `count` items in order."""
    check_integer("batch_size", batch_size, 1, 1 << 20)
    for start in range(0, count, batch_size):
        yield slice(start, min(start + batch_size, count))
