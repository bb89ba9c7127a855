"""Softmax regression in context (Li et al., arXiv 2304.13276): do an attention layer and a gradient step do nearly the same?

The paper (abstract): a self-attention layer changes the data of a softmax regression, a step of gradient descent its
weight; both move the regression's target by a bounded amount, and models that learn by either are much alike. No code
was published.

Here: the regression with its exact derivatives (:mod:`regression`), Newton and gradient descent (:mod:`solvers`), both shifts of
the target with two bounds on each (:mod:`shifts`): the paper's, which is too large to be violated, and a tight one.
Then layers of mechanisms trained on in-context tasks are compared with one step of gradient descent at its best rate
(:mod:`learners`). The tasks' queries differ from the context's keys, unless the setting says so: a layer could copy the
target of a key that it is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from regard.contract import Paper
from regard.reproductions.framework.judging import Check, Seed, largest, measured, number, numbers, smallest
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.studies.framework.protocol import Chosen, Study
from regard.studies.softmax_regression.cells import VARIANTS, run_cell
from regard.studies.softmax_regression.learners import KEYS, WIDTH, refuses
from regard.studies.softmax_regression.shown import LEARNER, sections

MECHANISMS = (
    "softmax",
    "sigmoid",
    "linear",
    "linear:feature_map=identity,normalize=false",
    "gated_linear",
    "delta_rule",
)
RADII = (1.0, 4.0)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"steps": 250, "batch_size": 64, "items": 256, "draws": 1000, "learning_rate": 3e-2, "descents": [5]},
    "small": {
        "steps": 2000,
        "batch_size": 256,
        "items": 1024,
        "draws": 1000,
        "learning_rate": 1e-2,
        "descents": [2, 5, 20],
    },
}

SECONDS = {"tiny": 1.0, "small": 11.0}
"""Seconds for a learner; delta_rule takes twice as long as the mean, linear attention half."""


def make(chosen: Chosen) -> Reproduction:
    """Cells for derivatives, bounds of both shifts and solvers, and for a learner of each mechanism."""
    sizes = PRESETS[chosen.preset]
    training = {
        "cell": "learner",
        "n": KEYS,
        "d": WIDTH,
        **{name: size for name, size in sizes.items() if name != "draws"},
    }
    settings: dict[str, Setting] = {
        "derivatives": {"cell": "derivatives", "n": 12, "d": 5, "draws": 8},
        **{
            f"bounds {radius:g}": {"cell": "bounds", "n": 8, "d": 4, "draws": sizes["draws"], "radius": radius}
            for radius in RADII
        },
        "extreme": {"cell": "extreme", "n": 8, "d": 4, "distances": [0.01, 0.1, 0.3, 1.0, 3.0, 10.0]},
        "solvers": {"cell": "solvers", "n": 12, "d": 5, "draws": 32, "steps": 30, "weight": 0.5},
        "construction": {"cell": "construction", "n": KEYS, "d": WIDTH, "items": 64, "rate": 30.0},
        **{
            f"learner {name}": training | {"mechanism": name, "own_queries": True}
            for name in dict.fromkeys(("softmax", *chosen.mechanisms))
        },
        "learner softmax, of the context": training | {"mechanism": "softmax", "own_queries": False},
    }
    return Reproduction(
        name="softmax-regression",
        mechanisms=("softmax",),
        source=Paper(
            "The Closeness of In-Context Learning and Weight Shifting for Softmax Regression", "2304.13276", 2023, 42
        ),
        claim=(
            "A self-attention layer and a step of gradient descent move the target of a softmax regression by bounded amounts, "
            "and what is learned by either is much alike (abstract)."
        ),
        instead=(
            f"Both shifts in {sizes['draws']} random draws beside the paper's bound, with the draws' own norms for R (it "
            "is stated for R of 4 and more, where it is larger), and a tight one; one layer of each "
            f"mechanism, trained for {sizes['steps']} steps on tasks of {KEYS} keys of width {WIDTH}, beside one step of gradient descent "
            "at its best rate, on queries of their own. Much alike means: a loss at most a tenth above the step's, sensitivities "
            "with a cosine above 0.8, answers that differ less than half as much as before training."
        ),
        settings=settings,
        run_cell=run_cell,
        checks=(
            *(
                Check(f"draws beyond the {bound} bound, norms up to {radius:g}", _beyond(bound, radius), below=0.5)
                for bound in ("loose", "tight")
                for radius in RADII
            ),
            Check(
                "the tight bound is reached within 5 % at its extreme",
                lambda seed: smallest(number(seed, "extreme", name) for name in ("weight", "data")),
                above=0.95,
            ),
            Check("softmax: at most a tenth above the loss of one step", _ratio("loss", "one step"), below=1.1),
            Check("softmax: below the answer 1/n by a tenth", _ratio("loss", "uniform"), below=0.9),
            Check("softmax: cosine of the sensitivities", measured("learner softmax", "cosine"), above=0.8),
            Check("softmax: answers half as far as untrained", _ratio("difference", "untrained difference"), below=0.5),
            Check("softmax: no look finds answers farther than the look before, beyond 2 %", _rise, below=0.02),
        ),
        needs=(
            Check("derivatives are those of automatic differentiation", _largest_error, below=1e-12),
            Check("one step is better than the answer 1/n", _ratio("one step", "uniform"), below=0.9),
            Check("the contexts determine the answers: loss of their minimum", _ratio("newton", "uniform"), below=0.05),
            Check("linear attention with written weights is one step", measured("construction", "error"), below=1e-6),
        ),
        left_out=(
            "Newton steps by sketches of the Hessian: they pay where there are far more keys than are tried here",
        ),
        smoke={"steps": 3, "batch_size": 4, "items": 8, "draws": 4, "descents": [2]},
        seeds=3,
        seconds=SECONDS[chosen.preset],
        more_seconds={name: 0.3 for name in settings if not name.startswith(LEARNER)},
    )


def _beyond(bound: str, radius: float) -> Callable[[Seed], float]:
    return lambda seed: sum(
        number(seed, f"bounds {radius:g}", f"{shift}: beyond {bound}") for shift in ("weight", "data")
    )


def _ratio(first: str, second: str) -> Callable[[Seed], float]:
    return lambda seed: number(seed, "learner softmax", first) / number(seed, "learner softmax", second)


def _rise(seed: Seed) -> float:
    """The largest rise of the difference between two moments, as a share of the first difference."""
    found = numbers(seed, "learner softmax", "differences")
    return largest(two - one for one, two in itertools.pairwise(found)) / found[0]


def _largest_error(seed: Seed) -> float:
    return largest(number(seed, "derivatives", name) for name in (*VARIANTS, "identity"))


STUDY = Study(
    name="softmax-regression",
    question="Do an attention layer that reads examples and a step of gradient descent on them do nearly the same?",
    make=make,
    sections=sections,
    presets=tuple(PRESETS),
    mechanisms=MECHANISMS,
    refuses=refuses,
)
