"""Learn Boolean functions from examples in the context (Bhattamishra et al., arXiv 2310.03016)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import Pattern, Unsupported
from regard.core.precision import wide
from regard.tasks.in_context_functions import learners
from regard.tasks.in_context_functions.functions import (
    CLASSES,
    Contexts,
    Functions,
    draw_contexts,
    draw_functions,
    draw_neighbours,
    function_class,
)
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
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

MAX_LENGTH = 1 << 14
MAX_DIMENSIONS = 1 << 12
MOST_TAKEN, TRIED = 0.9, 1000
"""Largest share of the functions that a pool may hold, by how often they are drawn; number drawn to find it."""


class InContextFunctionsTask(Task):
    """Learn Boolean functions in context, each from its own examples (Bhattamishra et al., arXiv 2310.03016).

    For each item a function is drawn, and examples of it: the tokens x_1, y_1, x_2, y_2, ... with inputs of -1 and +1,
    and labels in the first coordinate of an otherwise zero token. A model's output at x_i, before it reads y_i, is its
    prediction of y_i: the sign counts, and training minimises the cross entropy. Functions are new in each batch, so
    only a model that learns from the context can predict them.

    The function classes: ``conjunction``, ``disjunction``, ``monotone_conjunction``, ``sparse_disjunction`` (of 4),
    ``majority``, ``int_halfspace``, ``sparse_threshold``, ``dnf`` and ``cnf`` (of 3), ``parity``, ``sparse_parity`` (of
    2), ``nearest_neighbours`` (a label is that of the most similar earlier input), and ``teach_conjunction``,
    ``teach_biconjunction`` and ``teach_dnf`` (no clause inside another), whose contexts begin with examples that identify
    the function.

    Args:
        length: tokens per item, two per example: an even number, 4 to 16384.
        function: name of the function class.
        dimensions: bits per input, 1 to 4096.
        literals: share of the bits that a clause reads, above 0. None for the share of the paper (28 bits), or 0.6 with
            fewer than 12 bits (0.4 for each of three clauses), where the share of the paper would often leave no
            literals.
        taught: share of the contexts that begin with a teaching sequence; None for that of the class.
        start: the first example with a target, for nearest neighbours; None for half of the examples.
        noise: share of the labels that are flipped in training, 0 to 0.5. Held-out labels are correct.
        pool: number of functions from which training draws; 0 for new ones at each step. Held-out functions are drawn
            until they are not in the pool.
        ones: probability that a bit is +1.
        evaluation_items: number of held-out contexts, 1 to 65536.
        seed: seed of the held-out contexts and of the pool.
    """

    name = "in_context_functions"
    pattern = Pattern.CAUSAL_SELF
    objective = "regression"
    num_targets = 1
    metric = "accuracy"
    higher_is_better = True

    def __init__(
        self,
        *,
        length: int = 48,
        function: str = "conjunction",
        dimensions: int = 8,
        literals: float | None = None,
        taught: float | None = None,
        start: int | None = None,
        noise: float = 0.0,
        pool: int = 0,
        ones: float = 0.5,
        evaluation_items: int = 512,
        seed: int = 0,
    ) -> None:
        self.kind = function_class(function)
        self.length = check_integer("length", length, 4, MAX_LENGTH)
        if length % 2:
            raise Unsupported(
                f"length={length} of in_context_functions",
                supported="two tokens an example, so an even number",
                nearest=f"length={length + 1}",
            )
        self.points = length // 2
        self.dimensions = check_integer("dimensions", dimensions, 1, MAX_DIMENSIONS)
        self.features = dimensions
        self.seed = check_integer("seed", seed, 0, (1 << 63) - 1)
        self.evaluation_items = check_integer("evaluation_items", evaluation_items, 1, 1 << 16)
        self.noise = check_fraction("noise", noise, 0, 0.5)
        self.pool = check_integer("pool", pool, 0, 1 << 20)
        self.ones = check_fraction("ones", ones, 0, 1)
        self.literals = self._literals(literals)
        self.taught = self._taught(taught)
        self.start = self._start(start)
        if pool and self.kind.rule == "nearest":
            raise Unsupported(f"pool={pool} of nearest neighbours", supported="classes of functions", nearest="pool=0")
        # refuses what cannot be drawn
        draw_functions(self.kind, 1, dimensions, np.random.default_rng(0), self.literals)
        if pool:
            self._check_pool()

    def _literals(self, given: float | None) -> float | None:
        if given is not None and not self.kind.of_literals:
            raise Unsupported(f"literals={given} of {self.kind.name}", supported="classes whose literals are a share")
        if given is None:
            small = self.dimensions < 12 and self.kind.rule in ("all", "any")
            return self.kind.literals * (2 if small else 1) if self.kind.of_literals else None
        if check_fraction("literals", given, 0, 1) == 0:
            raise Unsupported("literals=0, which makes all functions the same", supported="a share above 0")
        return given

    def _taught(self, given: float | None) -> float:
        if given is None:
            return float(self.kind.teaches)
        check_fraction("taught", given, 0, 1)
        if given and not self.kind.teachable:
            teachable = ", ".join(name for name, kind in CLASSES.items() if kind.teachable)
            raise Unsupported(f"teaching sequences of {self.kind.name}", supported=teachable, nearest="taught=0")
        return given

    def _start(self, given: int | None) -> int:
        if self.kind.rule != "nearest":
            if given is not None:
                raise Unsupported(f"start={given} of {self.kind.name}", supported="start of nearest_neighbours")
            return 0
        return self.points // 2 if given is None else check_integer("start", given, 1, self.points - 1)

    def draw(self, rng: np.random.Generator, count: int, functions: Functions | None = None) -> Contexts:
        """Draw `count` contexts.

        Args:
            functions: functions to draw from; None for new ones.
        """
        if self.kind.rule == "nearest":
            return draw_neighbours(count, self.points, self.dimensions, self.start, rng, ones=self.ones)
        if functions is None:
            chosen = draw_functions(self.kind, count, self.dimensions, rng, self.literals)
        else:
            chosen = functions.take(rng.integers(len(functions.weights), size=count))
        return draw_contexts(chosen, self.points, rng, taught=self.taught, ones=self.ones)

    @cached_property
    def pooled(self) -> Functions | None:
        """The functions from which training draws; None for new ones at each step."""
        return self._drawn(0, self.pool) if self.pool else None

    def _drawn(self, number: int, count: int) -> Functions:
        """Functions drawn with the seed of the task, 0 for the pool."""
        rng = counter_generator(self.seed, number, SPLIT)
        return draw_functions(self.kind, count, self.dimensions, rng, self.literals)

    def _check_pool(self) -> None:
        """Refuse a pool that leaves hardly any functions, so that the held-out ones would be few or of a rare kind."""
        drawn = self._drawn(1, TRIED).identities()

        def taken(pool: int) -> float:
            known = set(self._drawn(0, pool).identities())
            return sum(one in known for one in drawn) / TRIED

        if (share := taken(self.pool)) > MOST_TAKEN:
            fewer = self.pool // 2
            while taken(fewer) > MOST_TAKEN:
                fewer //= 2
            raise Unsupported(
                f"pool={self.pool} of {self.kind.name} on {self.dimensions} bits, which holds {share:.0%} of the functions "
                f"as they are drawn",
                supported=f"a pool that holds at most {MOST_TAKEN:.0%} of them, so fewer functions or more dimensions",
                nearest=f"pool={fewer}",
            )

    @cached_property
    def held_out(self) -> Contexts:
        """The held-out contexts, each of its own function."""
        rng = counter_generator(self.seed, 0, EVALUATION)
        if self.pooled is None:
            return self.draw(rng, self.evaluation_items)
        known = set(self.pooled.identities())
        found = self.pooled.take(np.arange(0))
        while (missing := self.evaluation_items - len(found.weights)) > 0:
            drawn = draw_functions(self.kind, missing, self.dimensions, rng, self.literals)
            found = found.joined(drawn.take(np.flatnonzero([one not in known for one in drawn.identities()])))
        return draw_contexts(found, self.points, rng, taught=self.taught, ones=self.ones)

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        check_integer("batch_size", batch_size, 1, 1 << 20)
        rng = counter_generator(seed, step, TRAINING)
        contexts = self.draw(rng, batch_size, self.pooled)
        flipped = rng.random(contexts.y.shape) < self.noise
        return as_batch(contexts.x, np.where(flipped, -contexts.y, contexts.y), self.start)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in in_batches(self.evaluation_items, batch_size):
            yield as_batch(self.held_out.x[rows], self.held_out.y[rows], self.start)

    def loss(self, output: Float[Tensor, "b n 1"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Cross entropy of the labels, in nats; the output is the log-odds of +1."""
        counted = ~batch.targets.isnan()
        nats = F.softplus(-wide(output) * torch.where(counted, batch.targets, 0))
        return torch.where(counted, nats, 0).flatten(1).sum(1), counted.flatten(1).sum(1).to(nats.dtype)

    def score(self, logits: Float[Tensor, "b n 1"], batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        right, counted = right_signs(logits, batch)
        return right.sum(1).double(), counted.sum(1).double()

    def figures(
        self, output: Float[Tensor, "b n 1"], batch: Batch
    ) -> Mapping[str, tuple[Float[Tensor, " b"], Float[Tensor, " b"]]]:
        right, _ = right_signs(output, batch)
        return {"accuracy at the last example": (right[:, -2].double(), torch.ones(batch.size, dtype=torch.float64))}

    @cached_property
    def chance(self) -> float:  # type: ignore[override]
        """The share of the commoner label."""
        ups = float((self.held_out.y[:, self.start :] > 0).mean())
        return max(ups, 1 - ups)

    @cached_property
    def baseline(self) -> Baseline:  # type: ignore[override]
        """The rule that answers with the label of the nearest earlier input."""
        return Baseline.of("nearest neighbour", self, lambda batch: predicted(learners.neighbours(1), batch))

    def describe(self) -> str:
        x, y, taught = self.held_out.x[0], self.held_out.y[0], self.held_out.taught[0]
        spelled = [
            f"{''.join('1' if bit > 0 else '0' for bit in x[i])}>{'1' if y[i] > 0 else '0'}" for i in range(6)[: len(x)]
        ]
        new = f"{self.pool} functions" if self.pool else "new functions at each step"
        others = "functions outside the pool" if self.pool else "functions of their own"
        details = [f"{self.literals:.2g} of the bits in a clause"] if self.literals is not None else []
        details += [f"{self.taught:.0%} of the contexts taught"] if self.taught else []
        details += [f"{self.noise:.0%} of the training labels flipped"] if self.noise else []
        details += [f"targets from example {self.start + 1} on"] if self.start else []
        return "\n".join(
            [
                f"in_context_functions: {self.kind.name} of {self.dimensions} bits, {self.points} examples a context",
                "; ".join([*details, f"always the commoner label {self.chance:.3f}"])
                + f", nearest neighbour {self.baseline.score:.3f}",
                f"training: {new}; held out: {self.evaluation_items} contexts of {others} (seed {self.seed})",
                f"sample: {' '.join(spelled)}{' ...' if len(x) > 6 else ''}"
                + (f" (the first {taught} teach)" if taught else ""),
            ]
        )


def as_batch(x: np.ndarray, y: np.ndarray, start: int = 0) -> Batch:
    """Interleave examples (b, m, n) and labels (b, m) as tokens (b, 2 m, n); the labels are the inputs' targets."""
    count, points, dimensions = x.shape
    tokens = np.zeros((count, 2 * points, dimensions), dtype=np.float32)
    tokens[:, ::2], tokens[:, 1::2, 0] = x, y
    targets = np.full((count, 2 * points, 1), np.nan, dtype=np.float32)
    targets[:, 2 * start :: 2, 0] = y[:, start:]
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))


def examples(batch: Batch) -> tuple[Float[Tensor, "b m n"], Float[Tensor, "b m"]]:
    """The inputs and labels of a batch."""
    return batch.inputs[:, ::2], batch.inputs[:, 1::2, 0]


def predicted(learner: learners.Learner, batch: Batch) -> Float[Tensor, "b n 1"]:
    """Run a learner on a batch; returns its predictions in the form of a model's output."""
    found = learner(*examples(batch))
    return torch.stack([found, torch.zeros_like(found)], -1).flatten(1)[..., None]


def right_signs(output: Float[Tensor, "b n 1"], batch: Batch) -> tuple[Bool[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Two masks: where the sign is that of the target, and where there is a target."""
    counted = ~batch.targets.isnan()
    return ((output.sign() == batch.targets) & counted)[..., 0], counted[..., 0]
