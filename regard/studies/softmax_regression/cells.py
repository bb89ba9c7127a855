"""Measurements of the study's cells."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, hessian, vmap

from regard.reproductions.framework.protocol import Setting
from regard.studies.softmax_regression.learners import (
    Answer,
    Learner,
    Likeness,
    Tasks,
    constructed,
    descent,
    loss_of,
    regression,
    tuned_rate,
)
from regard.studies.softmax_regression.regression import Regression
from regard.studies.softmax_regression.shifts import (
    extreme,
    log10_loose_factor,
    shift_of_data,
    shift_of_weight,
    tight_bound_of_data,
    tight_bound_of_weight,
)
from regard.studies.softmax_regression.solvers import descend, newton

VARIANTS: dict[str, dict[str, Any]] = {
    "exp": {},
    "exp, temperature 2": {"temperature": 2.0},
    "exp, regularised": {"weight": 0.7},
    "exp, not normalised": {"normalised": False},
    "exp, cross-entropy": {"loss": "cross_entropy"},
    "exp, queries at once": {"queries": True},
    "cosh": {"link": "cosh"},
    "cosh, cross-entropy": {"link": "cosh", "loss": "cross_entropy"},
    "cosh, not normalised": {"link": "cosh", "normalised": False},
    "sinh, not normalised": {"link": "sinh", "normalised": False},
}
LARGEST_CURVATURE = 4.0
"""Upper bound on the spectral norm of B for probability vectors f and b."""
LOOKS = 12
"""Number of moments in training at which a learner is compared."""


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measurements of a setting, by its kind of cell."""
    generator = torch.Generator().manual_seed(seed)
    return CELLS[setting["cell"]](setting, generator)


def derivatives(setting: Setting, generator: torch.Generator) -> dict[str, Any]:
    """The largest error of gradient, Hessian and Hessian product against automatic differentiation, by variant,
    relative to the largest entry; and the largest error in the identities of both shifts."""
    n, d, draws = setting["n"], setting["d"], setting["draws"]
    found: dict[str, Any] = {}
    for name, options in VARIANTS.items():
        problem, x = problem_of(draws, n, d, generator, **options)

        def value(a: Tensor, b: Tensor, x: Tensor, options: dict[str, Any] = options) -> Tensor:
            return Regression(a, b, **options).value(x)

        v = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        expected, blocks = (vmap(of(value, 2))(problem.a, problem.b, x) for of in (grad, hessian))
        errors = [
            _error(problem.gradient(x), expected),
            _error(problem.hessian(x), blocks),
            _error(problem.hessian_product(x, v), (blocks @ v[..., None])[..., 0]),
        ]
        found[name] = max(errors)
    before, x0 = problem_of(draws, n, d, generator)
    moved, x1 = problem_of(draws, n, d, generator)
    after = Regression(moved.a, before.b)
    by_weight, by_data = shift_of_weight(before, x0, x1), shift_of_data(before, after, x0)
    pairs = [
        (before.predict(x1) - before.b, before.predict(x0) - by_weight),
        (after.predict(x0) - before.b, before.predict(x0) - by_data),
    ]
    found["identity"] = max(float((one.norm(dim=-1) - other.norm(dim=-1)).abs().max()) for one, other in pairs)
    return found


def problem_of(
    draws: int, n: int, d: int, generator: torch.Generator, *, queries: bool = False, **options: Any
) -> tuple[Regression, Tensor]:
    """Random regressions (draws, n, d) on probabilities, and weights; with `queries`, three queries at once."""
    shape = (draws, 3) if queries else (draws,)
    a, b = (torch.randn(*shape, *more, generator=generator, dtype=torch.float64) for more in ((n, d), (n,)))
    x = torch.randn(draws, d, generator=generator, dtype=torch.float64)
    return Regression(a, b.softmax(-1), queries=queries, **options), x


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def bounds(setting: Setting, generator: torch.Generator) -> dict[str, Any]:
    """How far random shifts move the target, compared with both bounds.

    For each shift: quantiles of the ratio to the tight bound, and of log10 of the ratio to the loose bound. Keys and
    weights have norms up to the radius, and shifts have lengths from a hundredth of the radius to the radius.
    """
    n, d, draws, radius = (setting[name] for name in ("n", "d", "draws", "radius"))

    def normal(*shape: int) -> Tensor:
        return torch.randn(draws, *shape, generator=generator, dtype=torch.float64)

    def upto(low: float) -> Tensor:
        """Log-uniform lengths from `low` times the radius to the radius."""
        return radius * low ** torch.rand(draws, generator=generator, dtype=torch.float64)

    def keys(lengths: Tensor) -> Tensor:
        a = normal(n, d)
        return a * (lengths / torch.linalg.matrix_norm(a, 2))[:, None, None]

    def weights(lengths: Tensor) -> Tensor:
        return torch.nn.functional.normalize(normal(d), dim=-1) * lengths[:, None]

    a, x = keys(upto(0.25)), weights(upto(0.25))
    dx, da = weights(upto(0.01)), keys(upto(0.01))
    problem = Regression(a, normal(n).softmax(-1))
    found: dict[str, Any] = {}
    for name, moved, change, tight, largest in (
        (
            "weight",
            shift_of_weight(problem, x, x + dx),
            dx.norm(dim=-1),
            tight_bound_of_weight(a, x, x + dx),
            (a, x, x + dx),
        ),
        (
            "data",
            shift_of_data(problem, Regression(a + da, problem.b), x),
            torch.linalg.matrix_norm(da, 2),
            tight_bound_of_data(a, a + da, x),
            (a, a + da, x),
        ),
    ):
        distance = (moved - problem.b).norm(dim=-1)
        ratio = distance / tight
        norms = [torch.linalg.matrix_norm(one, 2) if one.ndim == 3 else one.norm(dim=-1) for one in largest]
        loose = distance.log10() - log10_loose_factor(n, torch.stack(norms).amax(0)) - change.log10()
        found |= {
            f"{name}: largest": float(ratio.max()),
            f"{name}: beyond tight": float((ratio > 1).sum()),
            f"{name}: beyond loose": float((loose > 0).sum()),
            f"{name}: within 5 %": float((ratio >= 0.95).double().mean()),
            f"{name}: above half": float((ratio >= 0.5).double().mean()),
            f"{name}: ratios": _thinned(ratio),
            f"{name}: loose log10": float(loose.max()),
            f"{name}: loose log10s": _thinned(loose),
        }
    return found


def _thinned(values: Tensor, count: int = 51) -> list[float]:
    """Evenly spaced quantiles, from minimum to maximum."""
    return torch.quantile(values, torch.linspace(0, 1, count, dtype=values.dtype)).tolist()


def at_extreme(setting: Setting, generator: torch.Generator) -> dict[str, Any]:
    """Ratios to the tight bounds on problems constructed to reach them, by the size of the shift."""
    n, d = setting["n"], setting["d"]
    weight, data = [], []
    for distance in setting["distances"]:
        a, x0, x1, a1 = extreme(n, d, distance, generator=generator)
        problem = Regression(a, torch.full((n,), 1 / n, dtype=a.dtype))
        moved = shift_of_weight(problem, x0, x1) - problem.b
        weight.append(float(moved.norm() / tight_bound_of_weight(a, x0, x1)))
        moved = shift_of_data(problem, Regression(a1, problem.b), x0) - problem.b
        data.append(float(moved.norm() / tight_bound_of_data(a, a1, x0)))
    return {"weight": weight[0], "data": data[0], "weights": weight, "datas": data}


def solvers(setting: Setting, generator: torch.Generator) -> dict[str, Any]:
    """Newton's method and gradient descent on regularised problems: the excess loss over the minimum, step by step.

    The `order` of Newton's method is estimated from its last steps above rounding: log of a gradient norm over log of
    the one before.
    """
    n, d, draws = setting["n"], setting["d"], setting["draws"]
    problem, _ = problem_of(draws, n, d, generator, weight=setting["weight"])
    start = torch.zeros(draws, d, dtype=torch.float64)
    fast = newton(problem, start, setting["steps"])
    norm = torch.linalg.matrix_norm(problem.a, 2)
    rate = 1 / ((LARGEST_CURVATURE + setting["weight"] ** 2) * norm.square())
    slow = descend(problem, start, setting["steps"], rate)
    least = torch.minimum(fast.losses[-1], slow.losses.amin(0))
    orders = []
    for row in fast.gradients.T:
        steps = [(float(one), float(two)) for one, two in itertools.pairwise(row) if 1e-13 < two < one < 1e-1]
        if steps:
            one, two = steps[-1]
            orders.append(math.log(two) / math.log(one))
    lowest = torch.linalg.eigvalsh(problem.hessian(fast.x))[..., 0].min()
    plain, x = problem_of(draws, n, d, generator)
    return {
        "order": sum(orders) / len(orders) if orders else math.nan,
        "newton gradient": float(fast.gradients[-1].max()),
        "largest rise": float((slow.losses[1:] - slow.losses[:-1]).max()),
        "newton": (fast.losses - least).mean(1).tolist(),
        "descent": (slow.losses - least).mean(1).tolist(),
        "regularised: lowest eigenvalue": float(lowest),
        "plain: indefinite": float((torch.linalg.eigvalsh(plain.hessian(x))[..., 0] < 0).double().mean()),
    }


@dataclass(frozen=True, eq=False)
class Beside:
    """Baselines for the layers of all mechanisms on the tasks of a seed.

    Attributes:
        test: the test tasks.
        rate: rate of one step of gradient descent, tuned on separate validation tasks.
        losses: test loss of each baseline.
        state: state of the random generator after these draws.
    """

    test: Tasks
    rate: float
    losses: dict[str, float]
    state: Tensor


@functools.lru_cache(maxsize=2)  # with own queries and without, shared by consecutive mechanisms
def beside(seed: int, items: int, n: int, d: int, own_queries: bool, descents: tuple[int, ...]) -> Beside:
    """Baselines: one step of gradient descent at its best rate and at rate 1, more steps (each number of steps at its
    own best rate), the minimum of the contexts' cross-entropy (which is convex), and the answer 1/n."""
    generator = torch.Generator().manual_seed(seed)
    validation, test = (Tasks.draw(items, n, d, generator, own_queries=own_queries) for _ in range(2))
    rate = tuned_rate(validation)
    answers: dict[str, Answer] = {
        "one step": descent(rate),
        "one step, rate untuned": descent(1.0),
        **{f"descent {k}": descent(tuned_rate(validation, k), k) for k in descents},
        "newton": _solved,
        "uniform": lambda tasks: torch.full_like(tasks.targets, 1 / n),
    }
    with torch.no_grad():
        losses = {name: float(loss_of(answer, test)) for name, answer in answers.items()}
    return Beside(test, rate, losses, generator.get_state())


def learner(setting: Setting, generator: torch.Generator) -> dict[str, Any]:
    """Train a layer to learn in context, and compare it with one step of gradient descent during its training."""
    n, d, options = setting["n"], setting["d"], {"own_queries": setting["own_queries"]}
    others = beside(generator.initial_seed(), setting["items"], n, d, descents=tuple(setting["descents"]), **options)
    generator.set_state(others.state)
    step_of_descent, test = descent(others.rate), others.test
    model = Learner(setting["mechanism"], d + 1)
    optimizer = torch.optim.Adam(model.parameters(), setting["learning_rate"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting["steps"])
    moments = sorted({round(setting["steps"] ** (i / LOOKS)) for i in range(LOOKS + 1)} | {0, setting["steps"]})
    curves: dict[str, list[float]] = {"losses": [], "differences": [], "cosines": [], "slopes": []}
    for step in range(setting["steps"] + 1):
        if step in moments:
            like = Likeness.of(model.eval(), step_of_descent, test)
            with torch.no_grad():
                curves["losses"].append(float(loss_of(model, test)))
            curves["differences"].append(like.difference)
            curves["cosines"].append(like.cosine)
            curves["slopes"].append(like.slope)
            model.train()
        if step == setting["steps"]:
            break
        loss = loss_of(model, Tasks.draw(setting["batch_size"], n, d, generator, **options))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {
        "loss": curves["losses"][-1],
        "untrained": curves["losses"][0],
        "rate": others.rate,
        **others.losses,
        "cosine": curves["cosines"][-1],
        "untrained cosine": curves["cosines"][0],
        "difference": curves["differences"][-1],
        "untrained difference": curves["differences"][0],
        "moments": [float(step) for step in moments],
        **curves,
    }


def _solved(tasks: Tasks) -> Tensor:
    """The answers at the minimum of the contexts' cross-entropy."""
    own = regression(tasks)
    convex = Regression(own.a.double(), own.b.double(), loss="cross_entropy")
    x = newton(convex, torch.zeros_like(convex.a[:, 0]), 30).x.to(tasks.a.dtype)
    return (tasks.queries @ x[..., None])[..., 0].softmax(-1)


def construction(setting: Setting, generator: torch.Generator) -> dict[str, Any]:
    """The error of linear attention with constructed weights against a step of gradient descent, in float64."""
    n, d, rate = setting["n"], setting["d"], setting["rate"]
    tasks = Tasks.draw(setting["items"], n, d, generator, dtype=torch.float64)
    with torch.no_grad():
        written: Answer = constructed(d, rate / n**2)
        return {"error": float((written(tasks) - descent(rate)(tasks)).abs().max())}


CELLS = {
    "derivatives": derivatives,
    "bounds": bounds,
    "extreme": at_extreme,
    "solvers": solvers,
    "learner": learner,
    "construction": construction,
}
