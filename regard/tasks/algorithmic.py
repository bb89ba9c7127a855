"""Algorithms on numbers, scored inside and outside the training range (Back de Luca et al., arXiv 2410.01686)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from regard.contract import Pattern, Unsupported, one_of
from regard.measurement.units import counted
from regard.tasks.protocol import (
    EVALUATION,
    SPLIT,
    TRAINING,
    Baseline,
    Batch,
    Task,
    check_fraction,
    check_integer,
    counter_generator,
    in_batches,
    squared_error_by_item,
)
from regard.tasks.sampling import in_epochs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    Numbers = Float[np.ndarray, "b n"]

TRAINED_BOUND = 2.0
"""Training numbers are between -2 and 2."""
MAX_LENGTH = 1 << 9


def prefix_median(x: Numbers) -> Numbers:
    """The median of each number and those before it; for an even count, the mean of the middle two."""
    return np.stack([np.median(x[:, : i + 1], 1) for i in range(x.shape[1])], 1)


def prefix_maximum_subarray(x: Numbers) -> Numbers:
    """The largest sum of a non-empty run of neighbours up to each number."""
    sums = x.cumsum(1)
    before = np.pad(sums, ((0, 0), (1, 0)))[:, :-1]
    return np.maximum.accumulate(sums - np.minimum.accumulate(before, 1), 1)


FUNCTIONS: dict[str, Callable[[Numbers], Numbers]] = {
    "minimum": lambda x: np.minimum.accumulate(x, 1),
    "median": prefix_median,
    "sort": lambda x: np.sort(x, 1),
    "sum": lambda x: x.cumsum(1),
    "maximum_subarray": prefix_maximum_subarray,
}
"""Functions to compute for each row; all but ``sort`` give a value for each number and those before it."""


def targets_of(function: str, numbers: Numbers, counts: Int[np.ndarray, " b"]) -> Numbers:
    """Apply one of `FUNCTIONS` to the first `counts` numbers of each row, with nan for the rest."""
    missing = np.arange(numbers.shape[1]) >= counts[:, None]
    found = FUNCTIONS[function](np.where(missing, np.inf if function == "sort" else 0.0, numbers))
    return np.where(missing, np.nan, found)


def draw_numbers(rng: np.random.Generator, count: int, numbers: int, bound: float) -> Numbers:
    """Draw rows of numbers, uniform between two bounds that are uniform in [-bound, bound].

    If `bound` exceeds the training bound, pairs of bounds that are both within the training range are drawn again; a
    row is then inside the training range only by chance.
    """
    ends = np.empty((count, 2))
    left = np.arange(count)
    while len(left):
        ends[left] = rng.uniform(-bound, bound, (len(left), 2))
        left = left[(np.abs(ends[left]) <= TRAINED_BOUND).all(1)] if bound > TRAINED_BOUND else left[:0]
    low, high = ends.min(1, keepdims=True), ends.max(1, keepdims=True)
    return low + (high - low) * rng.random((count, numbers))


@dataclass(frozen=True)
class BoundedBatch(Batch):
    """A batch whose rows have different ranges.

    Attributes:
        bounds: the numbers of a row are between minus its bound and its bound.
    """

    bounds: Float[Tensor, " b"] | None = None


class AlgorithmicTask(Task):
    """Compute a function of numbers, also for numbers larger than in training (Back de Luca et al., arXiv 2410.01686).

    Each number is a token; `extra` tokens before the numbers hold 0 and have no target. The numbers of an item are
    uniform between two bounds, which are uniform in [-2, 2] in training and in every second held-out item. In the other
    held-out items the bounds are up to `outside` times as large, and not both within [-2, 2]. The functions:

    - ``minimum``, ``sum``, ``median``, ``maximum_subarray`` (the largest sum of neighbours): for each number and those
      before it;
    - ``sort``: all numbers in ascending order.

    Training minimises the squared error. The score is the squared error in units of the squared bound, so that a model
    that scales with its input has the same score in each range; the errors inside and outside the training range are
    reported as well, in the numbers' own units. The baseline is the number itself.

    Args:
        length: tokens per item, 2 + `extra` to 512.
        function: name of the function to compute.
        extra: tokens before the numbers, as room for computation, 0 to 16.
        variable: whether items have between one number and as many as fit, instead of always as many as fit.
        outside: factor by which the range of every second held-out item exceeds the training range, 1.1 to 1000.
        samples: number of training items; 0 for new ones at each step.
        evaluation_items: number of held-out items, 1 to 65536.
        seed: seed of the training items and the held-out items.
    """

    name = "algorithmic"
    pattern = Pattern.NONCAUSAL_SELF
    objective = "regression"
    features = num_targets = 1
    metric = "scaled squared error"
    higher_is_better = False

    def __init__(
        self,
        *,
        length: int = 9,
        function: str = "minimum",
        extra: int = 1,
        variable: bool = False,
        outside: float = 10.0,
        samples: int = 30_000,
        evaluation_items: int = 512,
        seed: int = 0,
    ) -> None:
        one_of("function", function, FUNCTIONS)
        self.function = function
        self.extra = check_integer("extra", extra, 0, 16)
        self.length = check_integer("length", length, 2 + extra, MAX_LENGTH)
        self.numbers = length - extra
        if not isinstance(variable, bool):
            raise Unsupported(f"variable={variable!r}", supported="true or false")
        self.variable = variable
        self.outside = check_fraction("outside", outside, 1.1, 1000)
        self.samples = check_integer("samples", samples, 0, 1 << 20)
        self.evaluation_items = check_integer("evaluation_items", evaluation_items, 1, 1 << 16)
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)

    def draw(
        self, rng: np.random.Generator, count: int, bound: float = TRAINED_BOUND
    ) -> tuple[Numbers, Int[np.ndarray, " b"]]:
        """Draw `count` rows of numbers, and how many numbers of each row are used."""
        counts = rng.integers(1, self.numbers + 1, count) if self.variable else np.full(count, self.numbers)
        return draw_numbers(rng, count, self.numbers, bound), counts

    @cached_property
    def _training(self) -> tuple[Numbers, Int[np.ndarray, " b"]]:
        return self.draw(counter_generator(self.seed, 0, SPLIT), self.samples)

    @cached_property
    def _held_out(self) -> BoundedBatch:
        rng = counter_generator(self.seed, 0, EVALUATION)
        far = np.arange(self.evaluation_items) % 2 == 1
        bounds = np.where(far, self.outside * TRAINED_BOUND, TRAINED_BOUND)
        numbers, counts = np.empty((len(far), self.numbers)), np.empty(len(far), dtype=np.int64)
        for rows, bound in ((~far, TRAINED_BOUND), (far, self.outside * TRAINED_BOUND)):
            numbers[rows], counts[rows] = self.draw(rng, int(rows.sum()), bound)
        return self.batch(numbers, counts, bounds)

    def batch(
        self, numbers: Numbers, counts: Int[np.ndarray, " b"], bounds: Float[np.ndarray, " b"] | None = None
    ) -> BoundedBatch:
        """The batch for rows of numbers, of which the first `counts` are used."""
        before = ((0, 0), (self.extra, 0))
        here = np.arange(self.numbers) < counts[:, None]
        inputs = np.pad(np.where(here, numbers, 0), before)
        targets = np.pad(targets_of(self.function, numbers, counts), before, constant_values=np.nan)
        valid = torch.from_numpy(np.pad(here, before, constant_values=True)) if self.variable else None
        return BoundedBatch(
            torch.from_numpy(inputs).float()[..., None],
            torch.from_numpy(targets).float()[..., None],
            valid,
            bounds=torch.from_numpy(np.full(len(numbers), TRAINED_BOUND) if bounds is None else bounds),
        )

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        check_integer("batch_size", batch_size, 1, 1 << 20)
        if not self.samples:
            return self.batch(*self.draw(counter_generator(seed, step, TRAINING), batch_size))
        chosen = in_epochs(np.arange(self.samples), step, seed, batch_size)
        numbers, counts = self._training
        return self.batch(numbers[chosen], counts[chosen])

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in in_batches(self.evaluation_items, batch_size):
            yield self._held_out.items(rows.start, rows.stop)

    def score(self, logits: Float[Tensor, "b n 1"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Squared errors in units of the squared bound."""
        errors, counted = squared_error_by_item(logits.double(), batch)
        return errors / _bounds(batch).square(), counted

    def figures(
        self, output: Float[Tensor, "b n 1"], batch: Batch
    ) -> Mapping[str, tuple[Float[Tensor, " b"], Float[Tensor, " b"]]]:
        """Squared errors of the items inside and outside the training range."""
        errors, counted = squared_error_by_item(output.double(), batch)
        far = _bounds(batch) > TRAINED_BOUND
        found = {
            "squared error in the range of training": (errors[~far], counted[~far]),
            f"squared error {self.outside:g} times as far out": (errors[far], counted[far]),
        }
        return {name: items for name, items in found.items() if len(items[0])}

    @cached_property
    def chance(self) -> float:  # type: ignore[override]
        """The score of always answering 0."""
        return Baseline.of("always 0", self, lambda batch: torch.zeros_like(batch.targets)).score

    @cached_property
    def baseline(self) -> Baseline:  # type: ignore[override]
        """The rule that answers with each number itself."""
        return Baseline.of("the number itself", self, lambda batch: batch.inputs)

    def describe(self) -> str:
        first = self._held_out.items(0, 1)
        written = ~first.targets[0, :, 0].isnan()
        x, y = (" ".join(f"{v:.2f}" for v in one[0, written, 0].tolist()[:8]) for one in (first.inputs, first.targets))
        more = " ..." if written.sum() > 8 else ""
        training = f"{self.samples:,} items" if self.samples else "drawn afresh at each step"
        of = f"1 to {self.numbers} numbers" if self.variable else f"{self.numbers} numbers"
        return "\n".join(
            [
                f"algorithmic: {self.function.replace('_', ' ')} of {of} after {counted(self.extra, 'empty token')}",
                f"training: {training}, numbers within {TRAINED_BOUND:g}; held out: {self.evaluation_items} items, every "
                f"second with numbers within {self.outside * TRAINED_BOUND:g} (seed {self.seed})",
                f"scored in {self.metric} (1 = the square of an item's bound), lower is better; always 0: "
                f"{self.chance:.3g}; {self.baseline.name}: {self.baseline.score:.3g}",
                f"sample: {x}{more} -> {y}{more}",
            ]
        )


def _bounds(batch: Batch) -> Float[Tensor, " b"]:
    if not isinstance(batch, BoundedBatch) or batch.bounds is None:
        raise Unsupported("a batch without bounds", supported="batches of the task algorithmic")
    return batch.bounds
