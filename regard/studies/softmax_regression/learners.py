r"""Those that learn a softmax regression from its examples in a context: an attention layer, and gradient descent.

A task has n keys with their targets, and queries of its own, whose row of targets is asked for (protocol of arXiv 2208.01066 and
2212.07677, for the rows of a softmax):

    a_i ~ N(0, 1) / sqrt(d),  x* ~ N(0, 1),   b = softmax(A x*),   asked for: softmax(A' x*) of the queries A'
    tokens: (a_i, n b_i - 1) of the context, (a'_j, 0) of the queries

The layer reads all tokens at once; the last coordinate of the queries' outputs are scores, and their softmax is its answer. One
step of gradient descent from 0 answers softmax(A' x_1) with x_1 = -eta g(0) = eta / n sum_i (b_i - 1/n) a_i, which is what linear
attention computes exactly: :func:`constructed`.
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
from regard.studies.softmax_regression.regression import Regression
from regard.studies.softmax_regression.solvers import descended

if TYPE_CHECKING:
    from jaxtyping import Float

Answer = Callable[["Tasks"], Tensor]
"""From tasks to rows of the queries, (B, m)."""
KEYS, WIDTH = 10, 5
"""Of the study's tasks: keys of a context, as many queries, and how wide they are."""
ENTER = (Kind.ATTENTION, Kind.MIXER, Kind.WRAPPER)


@dataclass(frozen=True)
class Tasks:
    """A batch of tasks.

    Attributes:
        a, b: keys of the context (B, n, d) and their targets (B, n).
        queries, targets: (B, m, d) and (B, m).
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
        """New tasks; without queries of their own they are asked for the context's keys, whose targets are there to be seen."""
        a, queries = (torch.randn(count, n, d, generator=generator, dtype=dtype) / d**0.5 for _ in range(2))
        queries = queries if own_queries else a
        x = torch.randn(count, d, 1, generator=generator, dtype=dtype)
        b, targets = ((keys @ x)[..., 0].softmax(-1) for keys in (a, queries))
        return cls(a, b, queries, targets)

    def tokens(self) -> Float[Tensor, "b t c"]:
        """Context and queries, of width d + 1."""
        n = self.a.shape[1]
        context = torch.cat([self.a, (n * self.b - 1)[..., None]], -1)
        asked = torch.cat([self.queries, torch.zeros_like(self.queries[..., :1])], -1)
        return torch.cat([context, asked], 1)

    def asking(self, queries: Tensor) -> Tasks:
        """The same with other queries."""
        return Tasks(self.a, self.b, queries, self.targets)


class Learner(nn.Module):
    """One layer of a mechanism with a residual connection; see the module.

    Args:
        mechanism: as `regard compare` writes it, with options or without.
        dim: of its tokens.
    """

    def __init__(self, mechanism: str, dim: int) -> None:
        super().__init__()
        self.layer = create_layer(known_name(mechanism), dim, 1, pattern=Pattern.NONCAUSAL_SELF)

    def forward(self, tasks: Tasks) -> Float[Tensor, "b m"]:
        x = tasks.tokens()
        return (x + self.layer(x).output)[:, tasks.a.shape[1] :, -1].softmax(-1)


def refuses(mechanism: str) -> str | None:
    """Why a mechanism cannot be such a layer, or None where it can."""
    try:
        kind = get_mechanism(known_name(mechanism)).kind
        if kind not in ENTER:
            return f"a layer from tokens to tokens, and no {kind}"
        with torch.random.fork_rng():
            tasks = Tasks.draw(2, KEYS, WIDTH, torch.Generator().manual_seed(0))
            learner = Learner(mechanism, WIDTH + 1)
            sensitivity(learner, tasks)
    except Unsupported as error:
        return str(error)
    return None if list(learner.parameters()) else "a layer with parameters, which can learn"


def regression(tasks: Tasks) -> Regression:
    """The regressions in the tasks' contexts."""
    return Regression(tasks.a, tasks.b)


def descent(rate: float, steps: int = 1) -> Answer:
    """Gradient descent from 0, whose answers can be differentiated by the queries."""

    def answer(tasks: Tasks) -> Tensor:
        start = torch.zeros_like(tasks.a[:, 0])
        x = descended(regression(tasks), start, steps, rate)
        return (tasks.queries @ x[..., None])[..., 0].softmax(-1)

    return answer


def constructed(d: int, factor: float, dtype: torch.dtype = torch.float64) -> Learner:
    """Linear attention whose weights are written down: one step of gradient descent from 0 (arXiv 2212.07677, proposition 1).

    q and k read the keys, v the last coordinate y, and the output writes `factor` sum_i y_i <a_i, a'_j> there; queries add
    nothing, since their last coordinate is 0. With y = n b - 1 and a factor of rate / n^2 these are the scores of a step of
    softmax regression, with targets y and rate / n the answers of a step of linear regression on |A x - y|^2 / (2 n).
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
    """The rate of gradient descent with the least loss on these tasks: a search of nested grids of powers."""
    low, high, best = -1.0, 5.0, 0.0
    for _ in range(6):
        grid = torch.linspace(low, high, 13).tolist()
        losses = [float(loss_of(descent(10**power, steps), tasks)) for power in grid]
        best = grid[min(range(len(grid)), key=losses.__getitem__)]
        width = (high - low) / 12
        low, high = best - width, best + width
    return 10**best


def sensitivity(answer: Answer, tasks: Tasks) -> Float[Tensor, "b d"]:
    """The derivative of each first query's answer by its own key."""
    queries = tasks.queries.detach().clone().requires_grad_()
    own = answer(tasks.asking(queries))[:, 0].sum()
    return torch.autograd.grad(own, queries)[0][:, 0]


@dataclass(frozen=True)
class Likeness:
    """How like two learners are on tasks: means over them.

    Attributes:
        difference: |y - y'| of the answers.
        cosine: of their sensitivities.
        slope: norm of the difference of their sensitivities.
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
