r"""Learners of a softmax regression from examples in the context: an attention layer, and gradient descent.

A task has n keys with their targets, and separate queries whose targets are to be predicted (the protocol of arXiv
2208.01066 and 2212.07677, for the rows of a softmax):

    a_i ~ N(0, 1) / sqrt(d),  x* ~ N(0, 1),   b = softmax(A x*),   to predict: softmax(A' x*) of the queries A'
    tokens: (a_i, n b_i - 1) of the context, (a'_j, 0) of the queries

The layer reads all tokens at once; the last coordinates of the queries' outputs are scores, and their softmax is its
answer. One step of gradient descent from 0 answers softmax(A' x_1) with x_1 = -eta g(0) = eta / n sum_i (b_i - 1/n)
a_i, which is what linear attention computes exactly: :func:`constructed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.catalogue import get_mechanism
from regard.contract import Kind, Pattern, Unsupported
from regard.create import create_layer
from regard.models.variants import known_name
from regard.studies.framework.protocol import lacks, refused
from regard.studies.softmax_regression.regression import Regression
from regard.studies.softmax_regression.solvers import descended

if TYPE_CHECKING:
    from jaxtyping import Float

Answer = Callable[["Tasks"], Tensor]
"""Function from tasks to the predicted targets of their queries, (B, m)."""
KEYS, WIDTH = 10, 5
"""Number of keys (and of queries) in the study's tasks, and their width."""
ENTER = (Kind.ATTENTION, Kind.MIXER, Kind.WRAPPER)


@dataclass(frozen=True)
class Tasks:
    """A batch of tasks.

    Attributes:
        a, b: keys of the context (B, n, d) and their targets (B, n).
        queries, targets: queries (B, m, d) and their targets (B, m).
    """

    a: Float[Tensor, "b n d"]
    b: Float[Tensor, "b n"]
    queries: Float[Tensor, "b m d"]
    targets: Float[Tensor, "b m"]

    @classmethod
    def draw(
        cls,
        count: int,
        n: int,
        d: int,
        generator: torch.Generator,
        *,
        own_queries: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Tasks:
        """Draw new tasks; without `own_queries` the queries are the keys, whose targets are in the context."""
        a, queries = (torch.randn(count, n, d, generator=generator, dtype=dtype) / d**0.5 for _ in range(2))
        queries = queries if own_queries else a
        x = torch.randn(count, d, 1, generator=generator, dtype=dtype)
        b, targets = ((keys @ x)[..., 0].softmax(-1) for keys in (a, queries))
        return cls(a, b, queries, targets)

    def tokens(self) -> Float[Tensor, "b t c"]:
        """Tokens of context and queries, of width d + 1."""
        n = self.a.shape[1]
        context = torch.cat([self.a, (n * self.b - 1)[..., None]], -1)
        asked = torch.cat([self.queries, torch.zeros_like(self.queries[..., :1])], -1)
        return torch.cat([context, asked], 1)

    def asking(self, queries: Tensor) -> Tasks:
        """The same tasks with other queries."""
        return Tasks(self.a, self.b, queries, self.targets)


class Learner(nn.Module):
    """One layer of a mechanism with a residual connection, as the module describes it.

    Args:
        mechanism: as `regard compare` takes it, with or without options.
        dim: width of the tokens.
    """

    def __init__(self, mechanism: str, dim: int) -> None:
        super().__init__()
        self.layer = create_layer(known_name(mechanism), dim, 1, pattern=Pattern.NONCAUSAL_SELF)

    def forward(self, tasks: Tasks) -> Float[Tensor, "b m"]:
        x = tasks.tokens()
        return (x + self.layer(x).output)[:, tasks.a.shape[1] :, -1].softmax(-1)


def refuses(mechanism: str) -> str | None:
    """Why a mechanism cannot be a learner's layer, or None where it can."""
    try:
        card = get_mechanism(known_name(mechanism))
        if card.kind not in ENTER:
            return f"it is a {card.kind.value}, and gives no output for each token"
        reason = lacks(card, Pattern.NONCAUSAL_SELF)
        if reason is not None:
            return reason
        with torch.random.fork_rng():
            tasks = Tasks.draw(2, KEYS, WIDTH, torch.Generator().manual_seed(0))
            learner = Learner(mechanism, WIDTH + 1)
            sensitivity(learner, tasks)
    except Unsupported as error:
        return refused(error)
    return None if list(learner.parameters()) else "it has no parameters, and so cannot learn"


def regression(tasks: Tasks) -> Regression:
    """The regressions in the tasks' contexts."""
    return Regression(tasks.a, tasks.b)


def descent(rate: float, steps: int = 1) -> Answer:
    """Gradient descent from 0, with answers that are differentiable with respect to the queries."""

    def answer(tasks: Tasks) -> Tensor:
        start = torch.zeros_like(tasks.a[:, 0])
        x = descended(regression(tasks), start, steps, rate)
        return (tasks.queries @ x[..., None])[..., 0].softmax(-1)

    return answer


def constructed(d: int, factor: float, dtype: torch.dtype = torch.float64) -> Learner:
    """Linear attention with constructed weights: one step of gradient descent from 0 (arXiv 2212.07677, proposition 1).

    q and k read the keys, v reads the last coordinate y, to which the output adds `factor` sum_i y_i <a_i, a'_j>;
    queries add nothing, since their last coordinate is 0. With y = n b - 1 and a factor of rate / n^2 these are the
    scores after a step of softmax regression; with targets y and rate / n the answers of a step of linear regression on
    |A x - y|^2 / (2 n).
    """
    learner = Learner("linear:feature_map=identity,normalize=false", d + 1).to(dtype)
    keys, last = torch.eye(d + 1, dtype=dtype), torch.zeros(d + 1, d + 1, dtype=dtype)
    keys[-1, -1], last[-1, -1] = 0, 1
    with torch.no_grad():
        for name, weight in {"query": keys, "key": keys, "value": last, "output": factor * last}.items():
            learner.get_parameter(f"layer.{name}.weight").copy_(weight)
    return learner


def loss_of(answer: Answer, tasks: Tasks) -> Tensor:
    """Mean of |answer - targets|^2 / 2."""
    return (answer(tasks) - tasks.targets).square().sum(-1).mean() / 2


@torch.no_grad()
def tuned_rate(tasks: Tasks, steps: int = 1) -> float:
    """The rate of gradient descent with the least loss on these tasks, by a search over nested logarithmic grids."""
    low, high, best = -1.0, 5.0, 0.0
    for _ in range(6):
        grid = torch.linspace(low, high, 13).tolist()
        losses = [float(loss_of(descent(10**power, steps), tasks)) for power in grid]
        best = grid[min(range(len(grid)), key=losses.__getitem__)]
        width = (high - low) / 12
        low, high = best - width, best + width
    return 10**best


def sensitivity(answer: Answer, tasks: Tasks) -> Float[Tensor, "b d"]:
    """Gradient of the answer for each task's first query with respect to that query."""
    queries = tasks.queries.detach().clone().requires_grad_()
    own = answer(tasks.asking(queries))[:, 0].sum()
    return torch.autograd.grad(own, queries)[0][:, 0]


@dataclass(frozen=True)
class Likeness:
    """Similarity of two learners: means over tasks.

    Attributes:
        difference: |y - y'| of the answers.
        cosine: cosine between their sensitivities.
        slope: norm of the difference between their sensitivities.
    """

    difference: float
    cosine: float
    slope: float

    @classmethod
    def of(cls, first: Answer, second: Answer, tasks: Tasks) -> Likeness:
        """Compare two learners on the same tasks."""
        with torch.no_grad():
            difference = (first(tasks) - second(tasks)).norm(dim=-1).mean()
        one, other = sensitivity(first, tasks), sensitivity(second, tasks)
        cosine = torch.cosine_similarity(one, other, dim=-1).mean()
        return cls(float(difference), float(cosine), float((one - other).norm(dim=-1).mean()))
